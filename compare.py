r"""Compares samplers: FID, distance to the converged solution, speed, evaluations spent.

    python compare.py --dataset_name=digits --solvers=euler,heun,dpmpp,ipndm --nfe=3,5,10 --num=5000
    python compare.py --dataset_name=digits --solvers=dpmpp,dpmpp:max_order=2:afs=data \
        --predictor_path=exps/00003-x
    python compare.py --dataset_name=digits \
        --solvers=ipndm,ipndm:schedule=runs/gits-ipndm-{nfe}.json --nfe=4,5,6
    python compare.py --dataset_name=digits --solvers=ipndm,dpmpp,unipc --nfe=5,6 --baseline=ipndm
    torchrun --standalone --nproc_per_node=8 compare.py ... --num_images=50000

All methods use the same network, seeds and range of noise levels. A solver uses the settings
recommended for the network, else those of its paper (solvers/recommended.py). --schedule_type,
--schedule_rho and --afs change them for all solvers, solver:option=value for one. Results are
cached in the output folder: adding a method computes only that method, and an interrupted run
resumes where it stopped. Under torchrun write --num as --num_images, since torchrun has an option
--num of its own.

Writes results.csv, results.json, results.md and index.html, which shows everything on one page.
"""

if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("compare")

import shlex

import click

from tools.compare_options import CompareOptions
from tools.compare_run import compute, prepare
from tools.report import write_report
from torch_utils import distributed
from torch_utils.cli import Command, offline_flag
from torch_utils.locks import only_command
from torch_utils.options import flags, given_flags, read_flags
from torch_utils.session import session

GROUPS = {
    "What to compare": "dataset_name solvers nfe predictor_path num | presets model_path baseline seed groups guidance_type"
    " guidance_rate prompt negative_prompt tokenizer_path",
    "For all solvers": "| schedule_type schedule_rho sigma_min sigma_max sigmas afs",
    "Scores": "ref | detector trust num_reference reference_steps",
    "Output": "outdir",
    "Speed": "batch device | amp compile channels_last dtype tf32 bench offline",
}


@click.command(cls=Command, groups=GROUPS)
@flags(CompareOptions)
@offline_flag
@click.pass_context
def main(ctx, **values):
    """Compares solvers and trained predictors on one network, with the same seeds."""
    given = given_flags(ctx)
    options = read_flags(CompareOptions, values, given)
    command = " ".join(
        ["python compare.py", *(f"--{name}={shlex.quote(_text(values[name]))}" for name in sorted(given))]
    )
    with session(options.compute.device) as device:
        comparison, jobs = prepare(options, device)
        folder = comparison.folder
        refusal = f"another compare.py is writing to {folder}: wait until it ends, or choose another --outdir"
        with only_command(folder / ".lock", refusal):
            done = compute(comparison, jobs)
            if distributed.rank() == 0:
                print(write_report(comparison, jobs, command))
                print(f"{done} of {len(jobs)} rows computed, the rest from the cache -> {folder}", flush=True)
            distributed.barrier()


def _text(value) -> str:
    return ",".join(f"{sigma:.12g}" for sigma in value) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()

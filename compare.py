"""Compares samplers: FID, distance to the converged solution and speed, at the network evaluations really spent.

    python compare.py --dataset_name=digits --solvers=euler,heun,dpmpp,ipndm --nfe=3,5,10 --num=5000
    python compare.py --dataset_name=digits --solvers=dpmpp,dpmpp:max_order=2:afs=data --predictor_path=exps/00003-x
    python compare.py --dataset_name=digits --solvers=ipndm,ipndm:schedule=runs/gits-ipndm-{nfe}.json --nfe=4,5,6
    python compare.py --dataset_name=digits --solvers=ipndm,dpmpp,unipc --nfe=5,6 --baseline=ipndm
    torchrun --standalone --nproc_per_node=8 compare.py ... --num_images=50000

All methods have the same network, seeds and range of noise. A solver comes with the settings that are
recommended for the network, or those of its paper (solvers/recommended.py), which --schedule_type, --schedule_rho and --afs change for all and
solver:option=value for one. Results are kept in the output folder: a further method costs its own work only, and a
killed run goes on where it stopped. Under torchrun write --num as --num_images: torchrun itself takes --num for one of
its own options.

Writes results.csv, results.json, results.md and index.html, one page with everything.
"""

import shlex

import click

from sampling.flags import flags_of, given_flags, read_flags
from tools.compare_options import CompareOptions
from tools.compare_run import compute, prepare
from tools.report import write_report
from torch_utils import distributed
from torch_utils.cli import Command, offline_flag
from torch_utils.locks import only_command
from torch_utils.session import session


@click.command(cls=Command)
@flags_of(CompareOptions)
@offline_flag
@click.pass_context
def main(ctx, **flags):
    """Compares solvers and trained predictors on one network, the same seeds and the same noise range."""
    given = given_flags(ctx)
    options = read_flags(CompareOptions, flags, given)
    command = " ".join(
        ["python compare.py", *(f"--{name}={shlex.quote(_text(flags[name]))}" for name in sorted(given))]
    )
    with session(options.compute.device) as device:
        comparison, jobs = prepare(options, device)
        folder = comparison.folder
        refusal = f"another compare.py works in {folder}: wait for its end, or choose another --outdir"
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

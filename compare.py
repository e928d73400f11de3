"""Compares samplers: FID, distance to the converged solution and speed, at the network evaluations really spent.

    python compare.py --dataset_name=digits --solvers=euler,heun,dpmpp,ipndm --nfe=3,5,10 --num=5000
    python compare.py --dataset_name=digits --solvers=dpmpp,dpmpp:max_order=2:afs=data --predictor_path=exps/00003-x
    python compare.py --dataset_name=digits --solvers=ipndm,ipndm:schedule=runs/gits-ipndm-{nfe}.json --nfe=4,5,6
    python compare.py --dataset_name=digits --solvers=ipndm,dpmpp,unipc --nfe=5,6 --baseline=ipndm
    torchrun --standalone --nproc_per_node=8 compare.py ... --num_images=50000

All methods have the same network, seeds and range of noise. A solver comes with its customary schedule and options
(tools/compare_run.py lists them), which --schedule_type, --schedule_rho and --afs change for all and
solver:option=value for one. Results are kept in the output folder: a further method costs its own work only, and a
killed run goes on where it stopped. Under torchrun write --num as --num_images: torchrun itself takes --num for one of
its own options.

Writes results.csv, results.json, results.md and index.html, one page with everything.
"""

import shlex

import click
from click.core import ParameterSource

from models.compile import AUTOCAST
from sampling.flags import POSITIVE, compile_flag, parse_afs, parse_sigmas, text_flags
from solvers import SCHEDULES
from tools.compare_run import compute, prepare
from tools.report import write_report
from torch_utils import distributed
from torch_utils.cli import PATH, Command, Number, PathText, offline_flag
from torch_utils.locks import only_command
from torch_utils.session import session


def parse_optional_afs(ctx, param, value):
    return None if value is None else parse_afs(ctx, param, value)


@click.command(cls=Command)
@click.option("--dataset_name", metavar="NAME", help="Network: digits, cifar10, ...")
@click.option("--model_path", type=PATH, metavar="FILE", help="The network's file (default: embedded or downloaded)")
@click.option(
    "--solvers",
    metavar="S,S:OPTION=VALUE,...",
    default="all",
    show_default=True,
    help="Solvers without a predictor, with options of their own if need be: dpmpp:max_order=2:schedule_type=logsnr."
    " schedule=FILE: with the noise levels of a schedule file, at its number of evaluations; {nfe} in the name stands for"
    " each of --nfe. all: all that can run here; none: none",
)
@click.option(
    "--nfe",
    default="3,4,5,6,8,10",
    show_default=True,
    metavar="N,N,...",
    help="Network evaluations per image; the nearest possible below where a solver cannot spend just that",
)
@click.option(
    "--predictor_path",
    type=PathText(several=True),
    metavar="N|DIR|FILE,...",
    help="Trained predictors, each at its own NFE",
)
@click.option(
    "--num", "--num_images", type=click.IntRange(min=2), default=5000, show_default=True, help="Images per method"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="First seed; then upwards")
@click.option(
    "--groups",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Groups of seeds: for the confidence intervals, and the unit in which work is stored and shared",
)
@click.option(
    "--baseline",
    metavar="METHOD",
    help="One of the compared methods, by its name in the table; the paired difference of every method to it is"
    " added to all results",
)
@click.option(
    "--num_reference",
    type=click.IntRange(min=0),
    help="Seeds whose distance to the reference solution is taken (default: 256, or all if fewer; 0: none)",
)
@click.option(
    "--reference_steps",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Steps of the reference solution (Heun, 2 evaluations each)",
)
@click.option("--schedule_type", type=click.Choice(list(SCHEDULES)), help="For all solvers (default: customary)")
@click.option("--schedule_rho", type=POSITIVE, help="Its exponent")
@click.option("--sigma_min", type=POSITIVE, help="Last noise level (default: the network's)")
@click.option("--sigma_max", type=POSITIVE, help="First noise level (default: the network's)")
@click.option("--sigmas", metavar="S,S,...", callback=parse_sigmas, help="Explicit noise levels for all solvers")
@click.option("--afs", metavar="True|False|data", callback=parse_optional_afs, help="Free first step, for all solvers")
@click.option("--guidance_type", metavar="NAME", help="Guidance, where the network takes one")
@click.option("--guidance_rate", type=Number(), help="Its strength")
@text_flags("the number of a caption being its seed")
@click.option(
    "--ref", type=PATH, metavar="NPZ|URL|NAME", help="FID reference statistics (default: those of the network)"
)
@click.option("--detector", type=PATH, metavar="NAME|PATH", help="Default: the reference's, else inception")
@click.option("--trust", type=bool, default=False, show_default=True, help="Run a TorchScript detector not known here")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images per network call")
@click.option("--outdir", type=PATH, metavar="DIR", help="Default: runs/compare-<dataset_name>")
@click.option("--amp", type=click.Choice(list(AUTOCAST)), default="none", show_default=True, help="Mixed precision")
@compile_flag
@click.option("--channels_last", type=bool, help="Memory layout (default: True on the CPU in float32)")
@click.option("--device", help="cpu, cuda or mps (default: the best there is)")
@offline_flag
@click.pass_context
def main(ctx, **options):
    """Compares solvers and trained predictors on one network, the same seeds and the same noise range."""
    given = {name for name in options if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    command = " ".join(
        ["python compare.py", *(f"--{name}={shlex.quote(_text(options[name]))}" for name in sorted(given))]
    )
    with session(options["device"]) as device:
        comparison, jobs = prepare(options, given, device)
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

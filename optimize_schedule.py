"""A time schedule for one's own network and solver: where the few evaluations should be.

    python optimize_schedule.py --method=gits --dataset_name=digits --num_steps=6 --solver=ipndm --dest=schedule.json
    python optimize_schedule.py --dataset_name=ms_coco --solver=dpmpp --prompt=captions.csv --dest=schedule.json
    python optimize_schedule.py --method=dmn --dataset_name=digits --num_steps=9 --solver=dpmpp --dest=schedule.json
    python optimize_schedule.py --method=evolution --dataset_name=digits --num_steps=6 --solver=euler --dest=schedule.json
    torchrun --standalone --nproc_per_node=8 optimize_schedule.py --method=gits ... --batch=64

The result is a small JSON file (solvers/schedule_file.py says what is in it). A run that was interrupted goes on when the
same command is given again.
"""

import platform
from pathlib import Path

import click
import torch
from click.core import ParameterSource

from evaluation.fid import choose_detector, find_reference, warn_about_count
from evaluation.frechet import FeatureStatistics, frechet_distance
from models import create_model, zoo
from models.compile import AUTOCAST, prepare_network
from sampling.flags import parse_afs, solver_flags, solver_option_names, text_flags
from sampling.settings import check_text, read_text
from solvers import make_solver
from solvers.schedule_file import Schedule, save_schedule
from solvers.search.problem import Problem
from torch_utils import distributed
from torch_utils.cli import PATH, SEED, Command, Number, offline_flag
from torch_utils.distributed import together
from torch_utils.errors import UserError
from torch_utils.files import check_destination
from torch_utils.images import to_uint8
from torch_utils.locks import only_command
from torch_utils.memory import explained_oom
from torch_utils.options import POSITIVE, click_type
from torch_utils.seeds import SeededGenerators
from torch_utils.session import session
from torch_utils.version import code_version
from training.schedule_search import METHODS, optimize


def method_flags(command):
    """Decorator: a click option for every option of the methods that is not one of the solvers' as well."""
    names = dict.fromkeys(name for method in METHODS.values() for name in method.options)
    for name in reversed([name for name in names if name not in solver_option_names()]):
        users = {key: method.options[name] for key, method in METHODS.items() if name in method.options}
        kind = next(iter(users.values())).kind
        if any(option.kind != kind for option in users.values()):
            raise TypeError(f"the methods {', '.join(users)} disagree about the type of their option '{name}'")
        text = "; ".join(f"{key}: {option.help} (default: {option.default})" for key, option in users.items())
        command = click.option(f"--{name}", type=click_type(kind), help=text)(command)
    return command


def split_options(options: dict, given: set[str]) -> tuple[dict, dict]:
    """(options of the solver, options of the method) among the flags that the user wrote; UserError for idle ones."""
    solver, method = make_solver(options["solver"]).options, METHODS[options["method"]].options
    known = {*solver_option_names(), *(name for entry in METHODS.values() for name in entry.options)}
    for name in sorted(known & given):
        if name not in solver and name not in method:
            raise UserError(
                f"--{name} has no effect with --method={options['method']} --solver={options['solver']}; leave it out"
            )
    return (
        {name: options[name] for name in solver if name in given},
        {name: options[name] for name in method if name in given},
    )


def open_network(options: dict, device: torch.device):
    net = create_model(
        options["dataset_name"], options["model_path"], options["guidance_type"], options["guidance_rate"], device
    )
    prepare_network(net, options["amp"])
    if options["class_idx"] is not None:
        net.make_cond(SeededGenerators([0]), options["class_idx"])  # what the network cannot do is said here
    return net


def fid_judge(dataset_name: str, device: torch.device):
    """``make_judge`` of a Problem: FID as fid.py computes it, of images that are never written."""

    def make_judge(ref: str, detector: str, count: int):
        if ref == "auto" and dataset_name in ("custom", "diffusers"):
            raise UserError(
                f"--dataset_name={dataset_name} has no reference statistics: give --ref (fid.py ref makes them)"
            )
        reference = find_reference(dataset_name if ref == "auto" else ref)
        network = choose_detector(None if detector == "auto" else detector, reference, device)
        warn_about_count(count, network)

        def judge(batches) -> float:
            statistics = FeatureStatistics(network.feature_dim, device)
            with together():
                for images in batches:
                    statistics.append(network(torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)))
            statistics.all_reduce()
            if statistics.count < 2:  # all others were not finite
                return float("nan")
            mu, sigma = statistics.moments()
            return distributed.broadcast_object(frechet_distance(mu, sigma, reference.mu, reference.sigma))

        return judge

    return make_judge


def describe(schedule: Schedule, dest: Path) -> str:
    levels = ", ".join(f"{sigma:.4g}" for sigma in schedule.sigmas)
    return (
        f"{schedule.method} found {len(schedule.sigmas)} noise levels for {schedule.solver}: {levels}\n"
        f"{schedule.evaluations} network evaluations, {schedule.seconds:.1f} s -> {dest}"
    )


def run(options: dict, given: set[str], device: torch.device) -> None:
    """Everything between the flags and the file; every process of a torchrun calls it."""
    solver_options, method_options = split_options(options, given)
    dest = Path(options["dest"])
    distributed.barrier()  # nobody looks for the file while a faster process may be writing it
    check_destination(dest, "--dest")
    if dest.exists() and not options["overwrite"]:
        raise UserError(f"{dest} exists: choose another --dest, or --overwrite=True to replace it")
    options["prompt"] = zoo.resolve_prompts(options["prompt"])
    text = read_text(options["prompt"], options["dataset_name"], [])
    net = open_network(options, device)
    check_text(net, options["dataset_name"], options, text)
    problem = Problem(
        net=net,
        options=solver_options,
        labels=options["class_idx"],
        prompts=[text] if isinstance(text, str) else text and list(text.values()),
        negative_prompt=options["negative_prompt"],
        device=device,
        state_path=dest.with_name(f".{dest.name}.state"),
        make_judge=fid_judge(options["dataset_name"], device),
        **{name: options[name] for name in ("solver", "num_steps", "sigma_min", "sigma_max", "afs", "seed", "batch")},
    )
    versions = {"code": code_version(), "python": platform.python_version(), "torch": torch.__version__}
    refusal = f"another command works on {dest}: wait for its end, or choose another --dest"
    lock = only_command(dest.with_name(f".{dest.name}.lock"), refusal)
    with lock, explained_oom(device, f"lower --batch (now {options['batch']})"):
        schedule = optimize(problem, options["method"], method_options, versions)
    error = None
    if distributed.rank() == 0:
        try:
            save_schedule(dest, schedule)
            print(describe(schedule, dest), flush=True)
        except UserError as exc:  # raised by agree(), on every rank
            error = exc
    distributed.agree(error)
    problem.drop_state()


@click.command(cls=Command)
@click.option("--method", type=click.Choice(list(METHODS)), default="gits", show_default=True, help="How it is found")
@click.option("--dataset_name", metavar="NAME", required=True, help="Network: digits, cifar10, ...")
@click.option("--model_path", type=PATH, metavar="FILE", help="The network's file (default: embedded or downloaded)")
@click.option("--guidance_type", metavar="NAME", help="Guidance, where the network takes one")
@click.option("--guidance_rate", type=Number(), help="Its strength")
@click.option("--solver", metavar="NAME", default="ipndm", show_default=True, help="Solver the schedule is for")
@click.option("--num_steps", type=click.IntRange(min=2), default=6, show_default=True, help="Intervals + 1")
@click.option("--sigma_min", type=POSITIVE, help="Last noise level (default: the network's)")
@click.option("--sigma_max", type=POSITIVE, help="First noise level (default: the network's)")
@click.option(
    "--afs",
    default="False",
    show_default=True,
    metavar="True|False|data",
    callback=parse_afs,
    help="For a free first step",
)
@method_flags
@solver_flags
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the samples that are used")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Samples per network call")
@click.option("--class", "class_idx", type=click.IntRange(min=0), help="Class of all samples (default: drawn)")
@text_flags("of which every sample draws one")
@click.option("--dest", type=PATH, metavar="FILE", required=True, help="The schedule file (.json)")
@click.option("--overwrite", type=bool, default=False, show_default=True, help="Replace it if it exists")
@click.option("--amp", type=click.Choice(list(AUTOCAST)), default="none", show_default=True, help="Mixed precision")
@click.option("--device", help="cpu, cuda or mps (default: the best there is)")
@offline_flag
@click.pass_context
def main(ctx, **options):
    """Optimises the time schedule of a solver for a network and writes it to a file."""
    given = {name for name in options if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    with session(options["device"]) as device:
        run(options, given, device)


if __name__ == "__main__":
    main()

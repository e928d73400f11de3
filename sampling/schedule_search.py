"""One run of optimize_schedule.py: its options, the FID of a schedule, and the search."""

import platform
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

from evaluation.fid import choose_detector, find_reference, warn_about_count
from evaluation.frechet import FeatureStatistics, frechet_distance
from sampling.flags import solver_flags, solver_option_names
from sampling.settings import ComputeOptions, NetworkSettings, Settings, open_network
from sampling.text import PROMPT_HELP, TextOptions
from solvers import make_solver
from solvers.recommended import num_steps_for
from solvers.schedule_file import Schedule, save_schedule
from solvers.search.problem import Problem
from torch_utils import distributed
from torch_utils.cli import PATH, SEED
from torch_utils.distributed import together
from torch_utils.errors import UserError
from torch_utils.files import check_destination
from torch_utils.images import to_uint8
from torch_utils.locks import only_command
from torch_utils.memory import explained_oom
from torch_utils.options import REQUIRED, click_type, derived, flag, like, names_of_written, part
from torch_utils.version import code_version
from training.schedule_search import METHODS, optimize


def method_option_names() -> list[str]:
    """Names of the options of all methods."""
    return list(dict.fromkeys(name for method in METHODS.values() for name in method.options))


def search_flags(command):
    """Decorator: a flag for every option of the methods and of the solvers."""
    command = solver_flags(command)
    for name in reversed([name for name in method_option_names() if name not in solver_option_names()]):
        users = {key: method.options[name] for key, method in METHODS.items() if name in method.options}
        kind = next(iter(users.values())).kind
        if any(option.kind != kind for option in users.values()):
            raise TypeError(f"the methods {', '.join(users)} disagree about the type of their option '{name}'")
        text = "; ".join(f"{key}: {option.help} (default: {option.default})" for key, option in users.items())
        command = click.option(f"--{name}", type=click_type(kind), help=text)(command)
    return command


def _written_options(values: dict, given: set[str]) -> dict:
    names = dict.fromkeys([*solver_option_names(), *method_option_names()])
    return {name: values[name] for name in names if name in given}


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Options of one run of optimize_schedule.py.

    ``options`` holds those of solver and method that the user wrote.
    """

    method: str = flag("Search method", "gits", click.Choice(list(METHODS)))
    network: NetworkSettings = part(dataset_name={"required": True})
    solver: str = like(Settings, "solver", default="ipndm", help="Solver the schedule is for")
    nfe: int | None = like(Settings, "nfe", help="Network evaluations per image, instead of --num_steps")
    num_steps: int = like(Settings, "num_steps")
    sigma_min: float | None = like(Settings, "sigma_min")
    sigma_max: float | None = like(Settings, "sigma_max")
    afs: bool | str = like(Settings, "afs", help="Optimise for the analytical first step")
    options: dict = derived(_written_options, flags=search_flags)
    seed: int = flag("Random seed of the samples", 0, SEED)
    batch: int = flag("Samples per network call", 64, click.IntRange(min=1))
    class_idx: int | None = flag("Class of all samples (default: drawn)", kind=click.IntRange(min=0), called="class")
    text: TextOptions = part(prompt={"help": PROMPT_HELP.format("from which every sample draws one")})
    dest: str = flag("File to write (.json)", REQUIRED, PATH, metavar="FILE")
    overwrite: bool = flag("Replace the file if it exists", False)
    compute: ComputeOptions = part(compile=None, channels_last=None)
    written: frozenset[str] = names_of_written()

    def solver_options(self) -> dict:
        """The solver's options that the user wrote. UserError for options that nothing uses."""
        solver = make_solver(self.solver).options
        for name in sorted(self.options):
            if name not in solver and name not in METHODS[self.method].options:
                raise UserError(
                    f"--{name} has no effect with --method={self.method} --solver={self.solver}; leave it out"
                )
        return {name: self.options[name] for name in solver if name in self.options}

    def method_options(self) -> dict:
        return {name: self.options[name] for name in METHODS[self.method].options if name in self.options}


def fid_functions(dataset_name: str, device: torch.device):
    """``make_fid_fn`` of a Problem: the FID of fid.py, of images that are never written."""

    def make_fid_fn(ref: str, detector: str, count: int):
        if ref == "auto" and dataset_name in ("custom", "diffusers"):
            raise UserError(
                f"--dataset_name={dataset_name} has no reference statistics: give --ref (fid.py ref makes them)"
            )
        reference = find_reference(dataset_name if ref == "auto" else ref)
        network = choose_detector(None if detector == "auto" else detector, reference, device)
        warn_about_count(count, network)

        def fid_fn(batches) -> float:
            statistics = FeatureStatistics(network.feature_dim, device)
            with together():
                for images in batches:
                    statistics.append(network(torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)))
            statistics.all_reduce()
            if statistics.count < 2:  # the other images were not finite
                return float("nan")
            mu, sigma = statistics.moments()
            return distributed.broadcast_object(frechet_distance(mu, sigma, reference.mu, reference.sigma))

        return fid_fn

    return make_fid_fn


def describe(schedule: Schedule, dest: Path) -> str:
    levels = ", ".join(f"{sigma:.4g}" for sigma in schedule.sigmas)
    return (
        f"{schedule.method} found {len(schedule.sigmas)} noise levels for {schedule.solver}: {levels}\n"
        f"{schedule.evaluations} network evaluations, {schedule.seconds:.1f} s -> {dest}"
    )


def run(options: ScheduleOptions, device: torch.device) -> None:
    """Searches for a schedule and writes it. Every process of a torchrun calls it."""
    solver_options, method_options = options.solver_options(), options.method_options()
    if options.nfe is not None and "num_steps" in options.written:
        raise UserError(f"--nfe={options.nfe} chooses the number of steps: leave out --nfe or --num_steps")
    dest, dataset_name = Path(options.dest), options.network.dataset_name
    distributed.barrier()  # no process checks for the file while a faster one may be writing it
    check_destination(dest, "--dest")
    if dest.exists() and not options.overwrite:
        raise UserError(f"{dest} exists: choose another --dest, or --overwrite=True to replace it")
    text = options.text.resolve()
    prompts = text.read(options.network, [], options.compute.model_path)
    net = open_network(options.network, options.compute, device, options.class_idx)
    text.prepare(net, dataset_name, prompts)
    if options.nfe is not None:
        settings = {"solver": options.solver, "afs": options.afs, **solver_options}
        options = replace(options, num_steps=num_steps_for(net, options.nfe, settings))
    problem = Problem(
        net=net,
        options=solver_options,
        labels=options.class_idx,
        prompts=[prompts] if isinstance(prompts, str) else prompts and list(prompts.values()),
        negative_prompt=text.negative_prompt,
        device=device,
        state_path=dest.with_name(f".{dest.name}.state"),
        make_fid_fn=fid_functions(dataset_name, device),
        **{
            name: getattr(options, name)
            for name in ("solver", "num_steps", "sigma_min", "sigma_max", "afs", "seed", "batch")
        },
    )
    versions = {"code": code_version(), "python": platform.python_version(), "torch": torch.__version__}
    refusal = f"another command is writing {dest}: wait until it ends, or choose another --dest"
    lock = only_command(dest.with_name(f".{dest.name}.lock"), refusal)
    with lock, explained_oom(device, f"lower --batch (now {options.batch})"):
        schedule = optimize(problem, options.method, method_options, versions)
    with together():
        if distributed.rank() == 0:
            save_schedule(dest, schedule)
            print(describe(schedule, dest), flush=True)
    problem.drop_state()

"""One run of optimize_schedule.py: its options, the judge of searches by FID, and all between flags and file."""

import platform
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

from evaluation.fid import choose_detector, find_reference, warn_about_count
from evaluation.frechet import FeatureStatistics, frechet_distance
from sampling.flags import (
    REQUIRED,
    derived,
    flag,
    like,
    names_of_written,
    part,
    solver_flags,
    solver_option_names,
)
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
from torch_utils.options import click_type
from torch_utils.version import code_version
from training.schedule_search import METHODS, optimize


def method_option_names() -> list[str]:
    """The options of all methods, each once."""
    return list(dict.fromkeys(name for method in METHODS.values() for name in method.options))


def search_flags(command):
    """Decorator: a flag for every option of the methods, and for every other one of the solvers."""
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
    """One run of optimize_schedule.py. ``options`` are the written ones of solver and method."""

    method: str = flag("How it is found", "gits", click.Choice(list(METHODS)))
    network: NetworkSettings = part(dataset_name={"required": True})
    solver: str = like(Settings, "solver", default="ipndm", help="Solver the schedule is for")
    nfe: int | None = like(Settings, "nfe", help="Network evaluations per image, instead of --num_steps")
    num_steps: int = like(Settings, "num_steps")
    sigma_min: float | None = like(Settings, "sigma_min")
    sigma_max: float | None = like(Settings, "sigma_max")
    afs: bool | str = like(Settings, "afs", help="For a free first step")
    options: dict = derived(_written_options, flags=search_flags)
    seed: int = flag("Of the samples that are used", 0, SEED)
    batch: int = flag("Samples per network call", 64, click.IntRange(min=1))
    class_idx: int | None = flag(
        "Class of all samples (default: drawn)", kind=click.IntRange(min=0), names=("--class",)
    )
    text: TextOptions = part(prompt={"help": PROMPT_HELP.format("of which every sample draws one")})
    dest: str = flag("The schedule file (.json)", REQUIRED, PATH, metavar="FILE")
    overwrite: bool = flag("Replace it if it exists", False)
    compute: ComputeOptions = part(compile=None, channels_last=None)
    written: frozenset[str] = names_of_written()

    def solver_options(self) -> dict:
        """The written options of the solver; UserError for those of neither solver nor method."""
        solver = make_solver(self.solver).options
        for name in sorted(self.options):
            if name not in solver and name not in METHODS[self.method].options:
                raise UserError(
                    f"--{name} has no effect with --method={self.method} --solver={self.solver}; leave it out"
                )
        return {name: self.options[name] for name in solver if name in self.options}

    def method_options(self) -> dict:
        return {name: self.options[name] for name in METHODS[self.method].options if name in self.options}


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


def run(options: ScheduleOptions, device: torch.device) -> None:
    """Everything between the flags and the file; every process of a torchrun calls it."""
    solver_options, method_options = options.solver_options(), options.method_options()
    if options.nfe is not None and "num_steps" in options.written:
        raise UserError(f"--nfe={options.nfe} chooses the number of steps: leave out --nfe or --num_steps")
    dest, dataset_name = Path(options.dest), options.network.dataset_name
    distributed.barrier()  # nobody looks for the file while a faster process may be writing it
    check_destination(dest, "--dest")
    if dest.exists() and not options.overwrite:
        raise UserError(f"{dest} exists: choose another --dest, or --overwrite=True to replace it")
    text = options.text.resolve()
    prompts = text.read(dataset_name, [])
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
        make_judge=fid_judge(dataset_name, device),
        **{
            name: getattr(options, name)
            for name in ("solver", "num_steps", "sigma_min", "sigma_max", "afs", "seed", "batch")
        },
    )
    versions = {"code": code_version(), "python": platform.python_version(), "torch": torch.__version__}
    refusal = f"another command works on {dest}: wait for its end, or choose another --dest"
    lock = only_command(dest.with_name(f".{dest.name}.lock"), refusal)
    with lock, explained_oom(device, f"lower --batch (now {options.batch})"):
        schedule = optimize(problem, options.method, method_options, versions)
    error = None
    if distributed.rank() == 0:
        try:
            save_schedule(dest, schedule)
            print(describe(schedule, dest), flush=True)
        except UserError as exc:  # raised by agree(), on every rank
            error = exc
    distributed.agree(error)
    problem.drop_state()

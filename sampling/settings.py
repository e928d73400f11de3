"""What is sampled and how: settings from flags or a predictor, the network, and their record."""

import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import click
import torch

from models import create_model, zoo
from models.compile import AUTOCAST, COMPILE_MODES, DTYPES, choose_backends, prepare_network
from models.denoiser import member
from models.edm import class_indices
from sampling.flags import solver_flags, solver_option_names
from solvers import SOLVERS, make_solver, resolve_sigmas
from solvers.recommended import DEFAULT_NFE, recommend
from solvers.sampler import afs_direction, check_few_step, check_predictor, check_trained
from solvers.schedules import SCHEDULE_NAMES, SCHEDULES
from solvers.span_table import SpanSolver
from torch_utils import distributed
from torch_utils.cli import PATH, Known, Number
from torch_utils.errors import UserError
from torch_utils.files import read_json, sha256_of
from torch_utils.functions import names_function
from torch_utils.options import ALWAYS, CHANGED, POSITIVE, AFSType, SigmaList, derived, flag, like, recorded
from torch_utils.seeds import SeededGenerators
from training.checkpoint import find_predictor, load_predictor
from training.run_folder import OPTIONS_FILE


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Which network is sampled. None: the network's own value."""

    dataset_name: str | None = flag("Network: digits, cifar10, ...", kind=zoo.NAMES, record=ALWAYS)
    guidance_type: str | None = flag("Kind of guidance (default: the network's)", metavar="NAME", record=ALWAYS)
    guidance_rate: float | None = flag(
        "Strength of the guidance (default: 7.5 for cfg, 1 for cg)", kind=Number(), record=ALWAYS
    )


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """The file of the network, its device and precision."""

    model_path: str | None = flag(
        "File of the network, https address or hf:owner/name (default: embedded or downloaded); diffusers: a folder or"
        " hub id; custom: also MODULE:FUNCTION of your own code, which is run",
        kind=PATH,
        metavar="FILE",
    )
    amp: str = flag("Mixed precision of the network", "none", click.Choice(list(AUTOCAST)), record=ALWAYS)
    dtype: str = flag(
        "Precision of the weights of a diffusers pipeline; auto: bf16 or fp16 on a GPU",
        "fp32",
        click.Choice(DTYPES),
        record=CHANGED,
    )
    tf32: bool = flag("TensorFloat-32 on NVIDIA GPUs: faster, rounded to 10 bits", False, record=CHANGED)
    bench: bool = flag("cuDNN benchmarking: faster, images may differ in the last bits", False, record=CHANGED)
    compile: str = flag(
        "torch.compile of the network (--compile is --compile=default), which takes minutes. reduce-overhead records"
        " CUDA graphs, for small batches on NVIDIA GPUs",
        "none",
        click.Choice(COMPILE_MODES),
        is_flag=False,
        flag_value="default",
        record=CHANGED,
    )
    channels_last: bool | None = flag("Memory format of the network (default: True on the CPU in float32)")
    device: str | None = flag("cpu, cuda or mps (default: the fastest available)")


def _written_solver_options(values: dict, given: set[str]) -> dict:
    return {name: values[name] for name in solver_option_names() if name in given and name != "original_code"}


@dataclass(frozen=True, kw_only=True)
class Settings(NetworkSettings):
    """What is sampled and how.

    None stands for the network's own value. ``options`` holds only the solver options that were
    given; the others have the solver's defaults.
    """

    dataset_name: str | None = like(
        NetworkSettings, "dataset_name", help="Network, without a predictor: digits, cifar10, ..."
    )
    solver: str | None = flag(
        "Plain solver: " + ", ".join(name for name, solver in SOLVERS.items() if not solver.needs_predictor),
        kind=Known(SOLVERS, "unknown solver '{}'"),
        record=ALWAYS,
    )
    nfe: int | None = flag(
        "Network evaluations per image; the network's recommended settings fill in what no other flag sets"
        f" (default: {DEFAULT_NFE}, {2 * DEFAULT_NFE} with guidance, unless another flag sets the noise levels)",
        kind=click.IntRange(min=1),
    )
    num_steps: int | None = flag(
        "Number of noise levels, intervals + 1, instead of --nfe", 6, click.IntRange(min=2), record=ALWAYS
    )
    schedule_type: str = flag("Time schedule", "polynomial", click.Choice(list(SCHEDULES)), record=ALWAYS)
    schedule_rho: float = flag("Exponent of the schedule", 7, POSITIVE, record=ALWAYS)
    sigma_min: float | None = flag("Last noise level (default: the network's)", kind=POSITIVE, record=ALWAYS)
    sigma_max: float | None = flag("First noise level (default: the network's)", kind=POSITIVE, record=ALWAYS)
    sigmas: list[float] | None = flag(  # replaces the five settings above
        "Explicit noise levels instead of a schedule", kind=SigmaList(), metavar="S,S,...", record=ALWAYS
    )
    # Noise levels to condition the network on, if not sigmas; from a schedule file or a span
    # solver.
    sigmas_cond: list[float] | None = derived(
        lambda values, given: values.get("sigmas_cond"), default=None, record=ALWAYS
    )
    afs: bool | str = flag(
        "Analytical first step, without an evaluation; data: from the data's mean and spread",
        False,
        AFSType(),
        metavar="True|False|data",
        record=ALWAYS,
    )
    options: dict = derived(_written_solver_options, flags=solver_flags, default_factory=dict)  # of the solver
    denoise_to_zero: bool = flag(
        "Return the denoised image at the last noise level, with one more evaluation", False, record=ALWAYS
    )
    original_code: bool = derived(  # of solver and schedule
        lambda values, given: bool(values["original_code"]), default=False, record=ALWAYS
    )

    def make_solver(self):
        """The solver with its options. Raises UserError if they do not go together."""
        return make_solver(self.solver, self.options, {"original_code": self.original_code})

    def arguments(self) -> dict:
        """Keyword arguments of ``solvers.sample``."""
        others = {"options", "nfe", *(entry.name for entry in fields(NetworkSettings))}
        if self.sigmas is not None:
            others |= set(SCHEDULE_NAMES)
        return {name: value for name, value in vars(self).items() if name not in others} | self.options

    def warnings(self) -> list[str]:
        """One line for every setting without effect."""
        whole = self.sigmas is not None
        bent = not whole and self.schedule_type == "discrete" and self.schedule_rho != 1
        if self.original_code and "original_code" not in SOLVERS[self.solver].options and not bent:
            return [
                f"original_code has no effect on '{self.solver}' with {'this' if whole else self.schedule_type} schedule"
            ]
        return []

    def resolve(self, net) -> torch.Tensor:
        """The noise levels, float64 on the CPU."""
        names = (*SCHEDULE_NAMES, "sigmas", "original_code")
        return resolve_sigmas(net, **{name: getattr(self, name) for name in names})

    def for_network(self, net, written: frozenset[str] = frozenset(), tuned: bool = True) -> tuple["Settings", str]:
        """(recommended settings for ``nfe`` evaluations on this network, their origin).

        net: the denoiser.
        written: names of the flags that the user wrote; they win.
        tuned: as of ``recommend``.
        """
        given = {name: getattr(self, name) for name in RECOMMENDABLE if name in written} | self.options
        if self.original_code and (self.solver is None or "original_code" in SOLVERS[self.solver].options):
            given["original_code"] = True
        found = recommend(net, self.nfe, self.solver, given, tuned)
        values = dict(found.settings)
        values.pop("original_code", None)
        names = ("solver", "num_steps", "sigmas", *RECOMMENDABLE)
        own = {name: values.pop(name) for name in names if name in values}
        return replace(self, **own, options=values, nfe=None), found.source

    def flags(self) -> str:
        """The settings of a plain solver as flags of sample.py, without defaults."""
        shown = {name: getattr(self, name) for name in ("solver", "num_steps", *RECOMMENDABLE)}
        if self.schedule_type == "logsnr":
            del shown["schedule_rho"]
        shown = {name: value for name, value in shown.items() if value is not False} | self.options
        return " ".join(
            f"--{name}={value:g}" if isinstance(value, float) else f"--{name}={value}" for name, value in shown.items()
        )

    def evaluations(self, net, predictor=None) -> int:
        """Network evaluations per image with these settings."""
        if predictor is not None:
            calls = predictor.evaluations()
        else:
            calls = self.make_solver().evaluations(len(self.resolve(net)) - 1, self.afs)
        return (calls + bool(self.denoise_to_zero)) * member(net, "evals_per_call")


RECOMMENDABLE = ("schedule_type", "schedule_rho", "afs", "denoise_to_zero")  # besides solver, steps and options


def plain_settings(asked: Settings, written: frozenset[str]) -> Settings:
    """Settings without a predictor.

    asked: what the flags say.
    written: names of the flags that the user wrote.

    Where the result has ``nfe``, the rest is left to ``Settings.for_network``.
    """
    if asked.dataset_name is None:
        raise UserError(
            "nothing to sample: give --dataset_name or --predictor_path"
            " ('sample.py --list' shows some; custom is a network of your own)"
        )
    said = [name for name in ("sigmas", *SCHEDULE_NAMES) if name in written]
    if asked.nfe is not None and {"num_steps", "sigmas"} & set(said):
        raise UserError(f"--nfe={asked.nfe} chooses the number of steps: leave out --nfe or --{said[0]}")
    if asked.nfe is None and not said:
        asked = replace(asked, nfe=DEFAULT_NFE)
    if asked.solver is None:
        if asked.nfe is None:
            raise UserError(f"--{said[0]} needs --solver; --nfe={DEFAULT_NFE} instead chooses everything")
        return asked
    if make_solver(asked.solver, asked.options).needs_predictor:
        raise UserError(
            f"--solver={asked.solver} needs a trained predictor: give --predictor_path (train.py makes one)"
        )
    if asked.sigmas is None:
        return asked
    extra = [name for name in SCHEDULE_NAMES if name in written]
    if extra:
        raise UserError(f"--sigmas sets the whole schedule: leave out --{extra[0]}")
    return replace(asked, num_steps=len(asked.sigmas))


def _predictor_settings(config: dict, asked: Settings, written: frozenset[str]) -> Settings:
    """Settings of an AMED predictor: those of its training, replaced by flags that the user wrote.

    Flags that contradict the training are refused: those about the network here, the others by
    ``check_network``, as in ``solvers.sample``.
    """
    network = [entry.name for entry in fields(NetworkSettings)]
    for name in network:
        if name in written and config[name] not in (None, getattr(asked, name)):
            raise UserError(
                f"--{name}={getattr(asked, name)}: the predictor was trained with {name}={config[name]};"
                " leave the flag out"
            )
    values = {"solver": config["sampler_stu"], **{name: config[name] for name in (*SCHEDULE_NAMES, "sigmas", "afs")}}
    if written & set(SCHEDULE_NAMES):
        values["sigmas"] = None  # the written flags replace them
    values |= {name: getattr(asked, name) for name in values if name in written}
    if values["sigmas"] is not None:
        values["num_steps"] = len(values["sigmas"])
    # Old or hand-made predictors may lack these.
    values |= {name: getattr(asked, name) if config[name] is None else config[name] for name in network}
    if values["dataset_name"] is None:
        raise UserError("this predictor does not say which network it belongs to: give --dataset_name")
    if asked.options.get("r") is not None:
        raise UserError("--r is learned by the predictor; leave it out")
    if values["solver"] not in SOLVERS:
        raise UserError(f"the predictor was trained for an unknown solver '{values['solver']}'")
    taken = SOLVERS[values["solver"]].options
    options = {name: config[name] for name in taken if config.get(name) is not None}
    for name, value in (asked.options | {"original_code": asked.original_code}).items():
        if name in taken:
            options[name] = value
        elif value not in (None, False, config.get(name)):
            raise UserError(f"--{name} has no effect with the predictor's solver; leave it out")
    options.pop("original_code", None)
    original = asked.original_code if "original_code" in written else bool(config.get("original_code"))
    return replace(asked, **values, options=options, sigmas_cond=None, original_code=original)


def _span_settings(student: SpanSolver, asked: Settings, written: frozenset[str]) -> Settings:
    """Settings of a span solver. UserError if a flag that the user wrote contradicts them."""
    network = {entry.name: student.config[entry.name] for entry in fields(NetworkSettings)}
    network = {name: getattr(asked, name) if value is None else value for name, value in network.items()}
    if network["dataset_name"] is None:
        raise UserError("this span solver does not say which network it belongs to: give --dataset_name")
    brought = {**network, "solver": student.solver, "afs": student.afs}
    brought |= {name: student.config[name] for name in ("num_steps", "sigma_min", "sigma_max")}
    wishes = vars(asked) | asked.options
    for name in ("schedule_type", "schedule_rho", "sigmas", *solver_option_names(), *brought):
        if name in written and wishes[name] != brought.get(name):
            raise UserError(f"--{name}: the span solver has its own solver, schedule and first step; leave it out")
    brought |= {name: getattr(student, name)().tolist() for name in ("sigmas", "sigmas_cond")}
    return replace(asked, **brought)


@contextmanager
def _as_flag():
    """Turns "name=value: ..." of an error into "--name=value: ..."."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--{error}") from None


def settings_of(predictor, asked: Settings, written: frozenset[str] = frozenset()) -> Settings:
    """Settings that a predictor of any kind was trained for.

    asked: what the flags say; used if the predictor leaves something open.
    written: names of the flags that the user wrote. They replace the settings of the training, or
        are refused.
    """
    if isinstance(predictor, SpanSolver):
        return _span_settings(predictor, asked, written)
    settings = _predictor_settings(predictor.config, asked, written)
    used = {"solver": settings.solver, "afs": settings.afs} | settings.options
    if predictor.config["sigmas"] is None and settings.sigmas is None:  # else check_network compares noise levels
        names = ("num_steps", "schedule_type", "schedule_rho")[: 2 if settings.schedule_type == "logsnr" else 3]
        used |= {name: getattr(settings, name) for name in names}
    with _as_flag():
        check_trained(predictor, used)
    return settings


def open_predictor(predictor_path: str | None, asked: Settings, written: frozenset[str]):
    """(settings, predictor or None, the predictor's file or None)."""
    if predictor_path is None:
        return plain_settings(asked, written), None, None
    path = find_predictor(predictor_path)
    predictor = load_predictor(path)
    return settings_of(predictor, asked, written), predictor, path


def remembered_network(predictor_file: Path | None, settings: Settings, compute: ComputeOptions) -> ComputeOptions:
    """The options, with the network's file of the predictor's run if none is given.

    The folder may come from somebody else, so its files are only read: own code and downloads have
    to be given on the command line.

    Raises UserError if the predictor needs a file that does not exist.
    """
    if predictor_file is None or compute.model_path is not None:
        return compute
    record = predictor_file.with_name(OPTIONS_FILE)
    known = read_json(record).get("model_path") if record.is_file() else None
    if isinstance(known, str) and (Path(known).is_file() or Path(known).is_dir()):
        return replace(compute, model_path=known)
    if zoo.find_card(settings.dataset_name) is not None:
        return compute
    if not isinstance(known, str):
        raise UserError(f"the network of {predictor_file} is one of your own: give --model_path as well")
    if names_function(known):
        raise UserError(f"the network of {predictor_file} is code of your own: repeat --model_path={known} to run it")
    raise UserError(f"the network of {predictor_file} was {known[:200]}, which is not here: give --model_path as well")


def check_class(dataset_name: str, model_path: str | None, class_idx: int | None) -> None:
    """Raises UserError for a class that the network lacks, where its name alone tells this."""
    if class_idx is None:
        return
    if zoo.takes_prompts(dataset_name, model_path):
        raise UserError("this network takes prompts, not classes")
    card = zoo.find_card(dataset_name)
    if card is None or model_path is not None:
        return
    if card.label_dim == 0:
        raise UserError(f"--class={class_idx}: {dataset_name} is unconditional: it takes no class")
    class_indices(class_idx, 1, card.label_dim)


def open_network(network: NetworkSettings, compute: ComputeOptions, device: torch.device, class_idx: int | None = None):
    """The network, with precision and memory format. UserError if it lacks the class."""
    check_class(network.dataset_name, compute.model_path, class_idx)
    choose_backends(compute.tf32, compute.bench)
    net = create_model(
        network.dataset_name,
        compute.model_path,
        network.guidance_type,
        network.guidance_rate,
        device,
        compute.dtype,
    )
    prepare_network(net, compute.amp, compute.channels_last, compute.compile)
    # Errors have to come before anything is written.
    if class_idx is not None:
        net.make_cond(SeededGenerators([0]), class_idx)
    return net


def check_network(net, settings: Settings, predictor, device: torch.device) -> None:
    """Raises UserError if the network cannot run the settings.

    Warns if the predictor was trained on other weights.
    """
    if settings.afs:
        zero = torch.zeros(1, net.img_channels, net.img_resolution, net.img_resolution, device=device)
        kind = predictor.first_direction if isinstance(predictor, SpanSolver) else settings.afs
        afs_direction(net, zero, torch.ones((), device=device), kind)
    if settings.num_steps is not None or settings.sigmas is not None:  # compare.py checks the network before it knows
        solver, sigmas = settings.make_solver(), settings.resolve(net)
        check_few_step(net, solver, sigmas, settings.afs, predictor, settings.denoise_to_zero)
    if isinstance(predictor, SpanSolver):
        predictor.check_network(net)
    elif predictor is not None:
        solver, sigmas = settings.make_solver(), settings.resolve(net)
        with _as_flag():
            check_predictor(predictor, net, solver, sigmas, vars(settings))
    if predictor is not None:
        spent = settings.evaluations(net, predictor)
        if settings.nfe not in (None, spent):
            raise UserError(f"--nfe={settings.nfe}: this predictor spends {spent} evaluations; leave the flag out")
        resolution = predictor.config["img_resolution"]
        if resolution not in (None, net.img_resolution):
            raise UserError(f"the predictor is for images of {resolution} pixels, the network for {net.img_resolution}")
        trained_on = predictor.provenance.get("network_hash")
        if trained_on not in (None, net.weights_hash) and distributed.rank() == 0:
            print(f"Warning: the predictor was trained on other weights than {net.source_path}", file=sys.stderr)


def recorded_settings(settings: Settings, net, predictor_file: Path | None, *parts) -> dict:
    """What the images depend on, with the solver's defaults and the noise levels written out.

    parts: option dataclasses that the images depend on as well.
    """
    solver, sigmas = settings.make_solver(), settings.resolve(net)
    found = recorded(settings) | {"fingerprint": None if predictor_file else solver.setup(net, sigmas).fingerprint}
    for name in settings.options | solver.options:
        value = getattr(solver, name)
        found[name] = str(value) if value in (math.inf, -math.inf) else value  # JSON lacks infinity
    found["original_code"] = getattr(solver, "original_code", None) or None
    found["guidance_rate"] = member(net, "guidance_rate")  # None: without guidance
    return found | {
        **recorded(*parts),
        "sigmas": sigmas.tolist(),
        "network_sha256": net.weights_hash,
        "predictor_sha256": sha256_of(predictor_file) if predictor_file is not None else None,
    }

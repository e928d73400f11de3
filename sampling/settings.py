"""What is sampled and how: settings from flags or a predictor, the network and texts that go with them, their record."""

import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from models import create_model, use_tokenizer, zoo
from models.compile import prepare_network
from sampling.flags import solver_option_names
from sampling.folder import format_seeds
from sampling.generate import _text_of
from solvers import SOLVERS, make_solver, resolve_sigmas
from solvers.sampler import afs_direction, check_predictor
from solvers.schedules import SCHEDULE_NAMES
from solvers.span_table import SpanSolver
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.files import sha256_of
from torch_utils.prompts import FILES, read_prompts
from torch_utils.seeds import SeededGenerators
from training.checkpoint import find_predictor, load_predictor

_GUIDANCE_OPTIONS = ("guidance_type", "guidance_rate")
TEXT_OPTIONS = ("prompt", "negative_prompt", "tokenizer_path")


@dataclass(frozen=True)
class Settings:
    """What is sampled and how; None stands for the network's own value, an option not named for the solver's."""

    dataset_name: str
    solver: str
    num_steps: int | None = 6
    schedule_type: str = "polynomial"
    schedule_rho: float = 7
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigmas: list[float] | None = None  # replaces the five settings above
    sigmas_net: list[float] | None = None  # what the network is told in their place
    afs: bool | str = False
    options: dict = field(default_factory=dict)  # of the solver
    original_code: bool = False  # of solver and schedule
    denoise_to_zero: bool = False
    guidance_type: str | None = None
    guidance_rate: float | None = None

    def make_solver(self):
        """The solver with its options; UserError where they do not go together."""
        return make_solver(self.solver, self.options, {"original_code": self.original_code})

    def arguments(self) -> dict:
        """Keyword arguments of ``solvers.sample``."""
        names = ("solver", *SCHEDULE_NAMES, "sigmas", "sigmas_net", "afs", "denoise_to_zero", "original_code")
        return {name: getattr(self, name) for name in names} | self.options

    def warnings(self) -> list[str]:
        """One line for every setting that changes nothing."""
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

    def evaluations(self, net, predictor=None) -> int:
        """Network evaluations per image that these settings should take."""
        if predictor is not None:
            calls = predictor.evaluations()
        else:
            calls = self.make_solver().evaluations(len(self.resolve(net)) - 1, self.afs)
        return (calls + bool(self.denoise_to_zero)) * getattr(net, "evals_per_call", 1)


def settings_from_flags(options: dict, given: set[str]) -> Settings:
    """Settings of a plain solver. options: all flags by name; given: those that the user wrote."""
    solver = options["solver"]
    if options["dataset_name"] is None or solver is None:
        raise UserError("say what to sample: --predictor_path, or --dataset_name together with --solver")
    explicit = {name: options[name] for name in solver_option_names() if name in given and name != "original_code"}
    if make_solver(solver, explicit).needs_predictor:
        raise UserError(f"--solver={solver} needs a trained predictor: give --predictor_path (train.py makes one)")
    if options["sigmas"] is not None:
        extra = [name for name in SCHEDULE_NAMES if name in given]
        if extra:
            raise UserError(f"--sigmas is the whole schedule: leave out --{extra[0]}")
    names = ("dataset_name", "solver", *SCHEDULE_NAMES, "sigmas", "afs", "denoise_to_zero", *_GUIDANCE_OPTIONS)
    values = {name: options[name] for name in names}
    if options["sigmas"] is not None:
        values["num_steps"] = len(options["sigmas"])
    values["sigmas_net"] = options.get("sigmas_net")  # only a schedule file has them
    return Settings(**values, options=explicit, original_code=bool(options["original_code"]))


def settings_from_predictor(config: dict, options: dict, given: set[str]) -> Settings:
    """Settings that a predictor was trained for, with the flags that the user wrote in their place.

    Flags that contradict the training are refused by ``check_network``, as ``solvers.sample`` does;
    those about the network here.
    """
    network = ("dataset_name", *_GUIDANCE_OPTIONS)
    for name in network:
        if name in given and config[name] not in (None, options[name]):
            raise UserError(
                f"--{name}={options[name]}: the predictor was trained with {name}={config[name]}; leave the flag out"
            )
    values = {"solver": config["sampler_stu"], **{name: config[name] for name in (*SCHEDULE_NAMES, "sigmas", "afs")}}
    if given & set(SCHEDULE_NAMES):
        values["sigmas"] = None  # the other way to say where the noise levels are
    values |= {name: options[name] for name in values if name in given}
    if values["sigmas"] is not None:
        values["num_steps"] = len(values["sigmas"])
    # What an old or hand-made predictor may leave open.
    values |= {name: options[name] if config[name] is None else config[name] for name in network}
    if values["dataset_name"] is None:
        raise UserError("this predictor does not say which network it belongs to: give --dataset_name")
    if options["r"] is not None:
        raise UserError("--r is what the predictor learned; leave it out")
    if values["solver"] not in SOLVERS:
        raise UserError(f"the predictor was trained for an unknown solver '{values['solver']}'")
    taken = SOLVERS[values["solver"]].options
    rule_options = {name: config[name] for name in taken if config.get(name) is not None}
    for name in solver_option_names():
        if name in given and name in taken:
            rule_options[name] = options[name]
        elif name in given and options[name] not in (None, False, config.get(name)):
            raise UserError(f"--{name} has no effect with the predictor's solver; leave it out")
    rule_options.pop("original_code", None)
    as_published = (options if "original_code" in given else config).get("original_code")
    more = {"original_code": bool(as_published), "denoise_to_zero": options["denoise_to_zero"]}
    return Settings(**values, options=rule_options, **more)


def settings_from_student(student: SpanSolver, options: dict, given: set[str]) -> Settings:
    """Settings of a span student; UserError where a flag that the user wrote contradicts them."""
    config = student.config
    own = {name: config[name] for name in ("dataset_name", *_GUIDANCE_OPTIONS)}
    own = {name: options[name] if value is None else value for name, value in own.items()}
    if own["dataset_name"] is None:
        raise UserError("this student does not say which network it belongs to: give --dataset_name")
    brought = {**own, "solver": student.solver, "afs": student.afs}
    brought |= {name: config[name] for name in ("num_steps", "sigma_min", "sigma_max")}
    for name in ("schedule_type", "schedule_rho", "sigmas", *solver_option_names(), *brought):
        if name in given and options[name] != brought.get(name):
            raise UserError(f"--{name}: the span student brings its own solver, schedule and first step; leave it out")
    lists = {name: getattr(student, name)().tolist() for name in ("sigmas", "sigmas_net")}
    return Settings(**brought, **lists, denoise_to_zero=options["denoise_to_zero"])


def settings_of(predictor, options: dict, given: set[str]) -> Settings:
    """Settings that a predictor of any kind was trained for."""
    if isinstance(predictor, SpanSolver):
        return settings_from_student(predictor, options, given)
    return settings_from_predictor(predictor.config, options, given)


def open_predictor(options: dict, given: set[str]):
    """(settings, predictor or None, the predictor's file or None)."""
    if options["predictor_path"] is None:
        return settings_from_flags(options, given), None, None
    path = find_predictor(options["predictor_path"])
    predictor = load_predictor(path)
    return settings_of(predictor, options, given), predictor, path


def read_text(prompt: str | None, dataset_name: str, seeds: list[int]) -> str | dict[int, str] | None:
    """What --prompt says: a text for all images, or the captions of a .txt or .csv file by their seeds."""
    card = zoo.find_card(dataset_name)
    if prompt is None and card is not None and card.takes_prompts:  # said before gigabytes are read
        raise _text_is_missing(dataset_name)
    if prompt is None or not _is_file_of_prompts(prompt):
        return prompt
    captions = read_prompts(prompt)
    without = [seed for seed in seeds if seed not in captions]
    if without:
        raise UserError(
            f"{prompt} has no caption for seeds {format_seeds(without)[:60]}; it has them for --seeds="
            f"{format_seeds(captions)[:60]}"
        )
    return captions


def _text_is_missing(dataset_name: str) -> UserError:
    return UserError(f"{dataset_name} needs a text: give --prompt=TEXT, or --prompt=FILE with captions (.txt or .csv)")


def _is_file_of_prompts(prompt: str) -> bool:
    return Path(prompt).suffix.lower() in FILES


def check_text(net, dataset_name: str, options: dict, prompts) -> None:
    """UserError where prompts are missing, are of no use, or cannot be encoded."""
    if not getattr(net, "takes_prompts", False):
        for given in TEXT_OPTIONS:
            if options[given] is not None:
                raise UserError(f"--{given}: {dataset_name} is no text-to-image network; leave it out")
        return
    if prompts is None:
        raise _text_is_missing(dataset_name)
    if options["negative_prompt"] is not None and net.evals_per_call == 1:
        raise UserError("--negative_prompt has no effect without classifier-free guidance; leave it out")
    if options["tokenizer_path"] is not None:
        use_tokenizer(net, options["tokenizer_path"])
    seed = next(iter(prompts)) if isinstance(prompts, dict) else 0
    net.make_cond(SeededGenerators([seed]), **_text_of([seed], prompts, options["negative_prompt"]))


def recorded_text(options: dict) -> dict:
    """The texts that were given, of a file its name and checksum."""
    texts = {name: options[name] for name in ("prompt", "negative_prompt") if options.get(name) is not None}
    if "prompt" in texts and _is_file_of_prompts(texts["prompt"]):
        path = Path(texts["prompt"])
        texts["prompt"] = {"file": path.name, "sha256": sha256_of(path)}
    return texts


def open_network(settings: Settings, options: dict, predictor, device: torch.device):
    """The network, with precision and memory layout as asked; warns where the predictor was trained on another one."""
    net = create_model(
        settings.dataset_name, options["model_path"], settings.guidance_type, settings.guidance_rate, device
    )
    prepare_network(net, options["amp"], options["channels_last"], options["compile"])
    # What the network cannot do is said before anything is written.
    if options["class_idx"] is not None:
        net.make_cond(SeededGenerators([0]), options["class_idx"])
    check_network(net, settings, predictor, device)
    return net


def check_network(net, settings: Settings, predictor, device: torch.device) -> None:
    """UserError where the network cannot do what the settings ask; warns where the predictor belongs to other weights."""
    if settings.afs:
        zero = torch.zeros(1, net.img_channels, net.img_resolution, net.img_resolution, device=device)
        kind = predictor.first_direction if isinstance(predictor, SpanSolver) else settings.afs
        afs_direction(net, zero, torch.ones((), device=device), kind)
    if isinstance(predictor, SpanSolver):
        predictor.check_network(net)
    elif predictor is not None:
        solver, sigmas = settings.make_solver(), settings.resolve(net)
        try:
            check_predictor(predictor, net, solver, sigmas, vars(settings))
        except UserError as error:
            raise UserError(f"--{error}") from None
    if predictor is not None:
        resolution = predictor.config["img_resolution"]
        if resolution not in (None, net.img_resolution):
            raise UserError(f"the predictor is for images of {resolution} pixels, the network for {net.img_resolution}")
        trained_on = predictor.provenance.get("network_hash")
        if trained_on not in (None, net.weights_hash) and distributed.rank() == 0:
            print(f"Warning: the predictor was trained on other weights than {net.source_path}", file=sys.stderr)


def recorded_settings(settings: Settings, options: dict, net, predictor_file: Path | None) -> dict:
    """What the images depend on, with the defaults of the solver and the noise levels spelled out."""
    solver, sigmas = settings.make_solver(), settings.resolve(net)
    recorded = asdict(settings) | {"fingerprint": solver.bind(net, sigmas).fingerprint}
    for name in recorded.pop("options") | solver.options:
        value = getattr(solver, name)
        recorded[name] = str(value) if value in (math.inf, -math.inf) else value  # JSON has no infinity
    recorded["original_code"] = getattr(solver, "original_code", None) or None
    recorded["guidance_rate"] = getattr(net, "guidance_rate", None)  # None: the network takes no guidance
    return recorded | {
        **recorded_text(options),
        "sigmas": sigmas.tolist(),
        "class": options["class_idx"],
        "amp": options["amp"],
        **({"compile": options["compile"]} if options["compile"] != "none" else {}),
        "network_sha256": net.weights_hash,
        "predictor_sha256": sha256_of(predictor_file) if predictor_file is not None else None,
    }

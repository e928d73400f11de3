"""The methods of a comparison: same network, seeds and range of noise levels.

A *method* is a solver with its recommended or published settings (``solvers.recommended``) or with
the noise levels of schedule files, or a trained predictor. A *job* is a method at one number of
evaluations. Seeds are split into interleaved groups (seed first + i is in group i mod groups).
Results are cached per (job, group), so an interrupted comparison resumes where it stopped, and
ranks share the work. A finished job is one small file; its images are never written.

compare.py is the command line. tools/report.py writes the table and the page.
"""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import click
import torch

from sampling.settings import NetworkSettings, Settings, settings_of
from solvers import SOLVERS, check_sigmas
from solvers.recommended import POLYNOMIAL, PUBLISHED, choose_intervals
from tools.compare_options import CompareOptions
from torch_utils import distributed
from torch_utils.cli import PATH
from torch_utils.errors import UserError
from torch_utils.options import click_type, flag_kind, flags_of
from training.checkpoint import find_predictor, load_predictor

# Settings that all methods share or that follow from the number of evaluations.
SHARED = {entry.name for entry in fields(NetworkSettings)}
SHARED |= {"solver", "nfe", "num_steps", "sigma_min", "sigma_max", "sigmas"}
SCHEDULE_SETTINGS = {  # settings that a method may have besides the options of its solver, and their types
    **{name: flag_kind(Settings, name) for name in flags_of(Settings) if name not in SHARED},
    "schedule_rho": click.FLOAT,
    "original_code": click.BOOL,  # of the solver and of the schedule
}

SCHEDULE_FILE, NFE_MARK = "schedule", "{nfe}"  # one more setting of a method: a file or a pattern of files


@dataclass(frozen=True)
class Method:
    """A method to compare.

    label: its name in the table.
    settings: without a predictor, all but the number of steps.
    predictor, predictor_file: the trained predictor and its file. Default None.
    named: the user named it, instead of ``all`` solvers. Default True.
    schedule: file with its noise levels, read when the jobs are made; {nfe} in its name stands for
        the number of evaluations. Default None.
    """

    label: str
    settings: Settings
    predictor: torch.nn.Module | None = None
    predictor_file: Path | None = None
    named: bool = True
    schedule: str | None = None
    asked: Settings | None = None
    written: frozenset[str] = frozenset()


def _parse_value(method: str, name: str, text: str, kind):
    try:
        return kind.convert(text, None, None)
    except click.BadParameter as error:
        raise UserError(f"--solvers={method}: {name}={text}: {error.message}") from None


def parse_method(text: str, common: dict, everywhere: dict) -> Method:
    """The method of a text like "dpmpp:max_order=2:afs=data".

    text: solver:option=value:...; its options win over ``everywhere``, which wins over ``PRESETS``.
    common: settings that all methods share (dataset_name, sigma_min, guidance, ...).
    everywhere: settings that flags give to all methods.

    Raises UserError on unknown solvers and options, wrong values and impossible combinations.
    """
    solver, *parts = text.strip().split(":")
    if solver not in SOLVERS:
        raise UserError(f"--solvers: unknown solver '{solver}'; choose from {', '.join(SOLVERS)}")
    method = SOLVERS[solver]
    if method.needs_predictor:
        raise UserError(f"--solvers: '{solver}' needs a trained predictor: leave it out, and give --predictor_path")
    own = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or name in own:
            raise UserError(f"--solvers={text}: write each option once, as solver:option=value:option=value")
        if name == SCHEDULE_FILE:
            own[name] = PATH.convert(value, None, None)
        elif name in SCHEDULE_SETTINGS:
            own[name] = _parse_value(text, name, value, SCHEDULE_SETTINGS[name])
        elif name in method.options:
            own[name] = _parse_value(text, name, value, click.types.convert_type(click_type(method.options[name].kind)))
        else:
            known = ", ".join(dict.fromkeys([*method.options, *SCHEDULE_SETTINGS, SCHEDULE_FILE]))
            raise UserError(f"--solvers={text}: {solver} has no option '{name}'; choose from {known}")
    file = own.pop(SCHEDULE_FILE, None)
    asked = {}
    for layer in (everywhere, own):
        if layer.get("schedule_type", asked.get("schedule_type")) != asked.get("schedule_type"):
            asked.pop("schedule_rho", None)  # an exponent belongs to its schedule
        asked |= layer
    values = {**PUBLISHED.get(solver, (POLYNOMIAL, ""))[0]}
    if asked.get("schedule_type", values["schedule_type"]) != values["schedule_type"]:
        values.pop("schedule_rho", None)
    values |= asked
    given = common.get("sigmas") is not None
    whole = "--sigmas" if given else SCHEDULE_FILE
    if (given or file is not None) and {"schedule_type", "schedule_rho"} & own.keys():
        raise UserError(f"--solvers={text}: {whole} sets the whole schedule: leave out schedule_type and schedule_rho")
    if given and file is not None:
        raise UserError(f"--solvers={text}: --sigmas sets the schedule of all methods; leave out one of the two")

    def settings_of_values(values: dict) -> Settings:
        schedule = {name: value for name, value in values.items() if name in SCHEDULE_SETTINGS}
        options = {name: value for name, value in values.items() if name not in SCHEDULE_SETTINGS}
        return Settings(solver=solver, **common, **schedule, options=options)

    method = Method(
        text.strip(),
        settings_of_values(values),
        schedule=file,
        asked=settings_of_values(asked),
        written=frozenset(asked),
    )
    try:
        method.settings.make_solver()  # raises UserError if the options do not go together
    except UserError as error:
        raise UserError(f"--solvers={text}: {error}") from None
    return method


def _guidance(network: NetworkSettings) -> tuple[str, float]:
    """Kind and strength; ("none", 0) without guidance, where "uncond" means the plain network."""
    kind, rate = network.guidance_type, network.guidance_rate
    return ("none", 0.0) if kind in (None, "none", "uncond") else (kind, float(rate or 0))


def predictor_method(path: str, network: NetworkSettings) -> Method:
    """The method of a trained predictor, with the settings that it was trained for."""
    file = find_predictor(path)
    predictor = load_predictor(file)
    settings = settings_of(predictor, Settings(**vars(network)))
    if settings.dataset_name != network.dataset_name:
        raise UserError(f"{file}: trained for dataset_name '{settings.dataset_name}', not '{network.dataset_name}'")
    brought = _guidance(settings)
    if brought != _guidance(network):
        raise UserError(
            f"{file}: trained with guidance_type {brought[0]}, rate {brought[1]:g}, but all methods share one network:"
            f" give --guidance_type={brought[0]} --guidance_rate={brought[1]:g}, or leave the predictor out"
        )
    return Method(_label(predictor, settings.solver), settings, predictor, file)


def _label(predictor, solver: str) -> str:
    if solver == "span":
        preset = predictor.config["preset"]
        return f"span({preset})" if preset else "span"
    return "AMED-Solver" if solver == "amed" else f"AMED-Plugin({solver})"


def choose_steps(settings: Settings, net, nfe: int) -> tuple[Settings, int]:
    """The settings with the number of steps that costs ``nfe`` evaluations, and their actual cost.

    If no number of steps costs exactly that: the nearest below, or the cheapest there is.
    """
    intervals, spent = choose_intervals(lambda n: replace(settings, num_steps=n + 1).evaluations(net), nfe)
    return replace(settings, num_steps=intervals + 1), spent


def settings_at(method: Method, net, nfe: int, tuned: bool) -> tuple[Settings, int]:
    """(settings of a plain method at ``nfe`` evaluations or the nearest number below, their cost).

    tuned: use the settings recommended for the network, else the published ones.
    """
    for number in range(nfe, 0, -1):
        try:
            settings, _ = replace(method.asked, nfe=number).for_network(net, method.written, tuned)
            return settings, settings.evaluations(net)
        except UserError:  # this solver cannot spend exactly this
            continue
    return choose_steps(method.settings, net, nfe)


def split_list(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def parse_nfe(text: str) -> list[int]:
    """ "3,5,8" -> [3, 5, 8], sorted, each once."""
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"--nfe={text}: must be whole numbers like 3,4,5,6,8,10") from None
    if values[0] < 1:
        raise UserError(f"--nfe={text}: must be 1 or more")
    return values


def make_methods(options: CompareOptions) -> list[Method]:
    """All methods that the flags name, without calling a network. UserError if they are wrong."""
    if options.network.dataset_name is None:
        raise UserError("no network given: add --dataset_name=digits, cifar10, ... (or custom with --model_path)")
    sigmas = options.sigmas
    if sigmas is not None:
        extra = [
            name
            for name in ("nfe", "schedule_type", "schedule_rho", "sigma_min", "sigma_max")
            if name in options.written
        ]
        if extra:
            raise UserError(f"--sigmas sets the whole schedule and the NFE: leave out --{extra[0]}")
        sigmas = check_sigmas(sigmas).tolist()
    common = options.common() | {"sigmas": sigmas, "num_steps": None if sigmas is None else len(sigmas)}
    everywhere = {name: getattr(options, name) for name in ("schedule_type", "schedule_rho", "afs")}
    everywhere = {name: value for name, value in everywhere.items() if value is not None}
    names = split_list(options.solvers)
    everything = names == ["all"]
    if everything:
        names = [name for name, solver in SOLVERS.items() if not solver.needs_predictor]
    elif names == ["none"]:
        names = []
    methods = [parse_method(text, common, everywhere) for text in dict.fromkeys(names)]
    methods = [replace(method, named=not everything) for method in name_schedules(methods)]
    for method in methods:
        for line in method.settings.warnings():
            distributed.print0(f"Warning: {method.label}: {line}", file=sys.stderr)
    for path in dict.fromkeys(split_list(options.predictor_path)):
        methods.append(predictor_method(path, options.network))
    if not methods:
        raise UserError("nothing to compare: give --solvers or --predictor_path")
    return methods


def name_schedules(methods: list[Method]) -> list[Method]:
    """Shortens the names of schedule files in labels, unless two labels would become equal."""

    def short(method: Method) -> str:
        full = f":{SCHEDULE_FILE}={method.schedule}"
        return method.label if method.schedule is None else method.label.replace(full, f":{Path(method.schedule).stem}")

    labels = [short(method) for method in methods]
    return [
        replace(method, label=label) if labels.count(label) == 1 else method
        for method, label in zip(methods, labels, strict=True)
    ]

"""Recommended settings of sampling, by network, solver and number of evaluations.

``recommend`` uses the first of these that exists:

* the evidence for this network, ``models/recommended/<dataset_name>.json``: the best settings
  on validation seeds, with their scores. ``python -m benchmarks.recommend`` writes these files.
* ``PUBLISHED``: the settings in the papers of the solvers.

sample.py and train.py with ``--nfe``, compare.py and the demo use the same settings.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from models.denoiser import member
from solvers.solver import SOLVERS, make_solver
from torch_utils.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent / "models" / "recommended"
DEFAULT_NFE = 5

POLYNOMIAL = {"schedule_type": "polynomial", "schedule_rho": 7.0}
LOGSNR = {"schedule_type": "logsnr"}
KARRAS = "Karras et al. 2022 (arXiv 2206.00364)"
LU = "Lu et al. 2022 (arXiv 2211.01095)"
ZHANG = "Zhang and Chen 2023 (arXiv 2204.13902)"
ZHOU = "Zhou et al. 2024 (arXiv 2312.00094)"
# {solver: (schedule and options, paper)}. Dynamic thresholding is published for guided sampling of
# pixels only; elsewhere it damages values outside [-1, 1].
PUBLISHED: dict[str, tuple[dict, str]] = {
    "euler": (POLYNOMIAL, KARRAS),
    "heun": (POLYNOMIAL, KARRAS),
    "edm": (
        POLYNOMIAL | {"S_churn": 30.0, "S_min": 0.01, "S_max": 1.0, "S_noise": 1.007},
        f"{KARRAS}, Table 5, CIFAR-10 VP",
    ),
    "dpm": (LOGSNR, "Lu et al. 2022 (arXiv 2206.00927)"),
    "dpmpp": (LOGSNR | {"max_order": 3, "thresholding": False}, LU),
    "unipc": (LOGSNR | {"max_order": 3, "thresholding": False}, "Zhao et al. 2023 (arXiv 2302.04867)"),
    # tAB3: a polynomial of degree 3 through 4 points; steps uniform in the square root of time.
    "deis": ({"schedule_type": "time_uniform", "schedule_rho": 2.0, "max_order": 4, "deis_mode": "tab"}, ZHANG),
    "ipndm": (POLYNOMIAL | {"max_order": 4}, ZHOU),
    "ipndm_v": (POLYNOMIAL | {"max_order": 4}, ZHOU),
    "pfdiff": (POLYNOMIAL, KARRAS),
    "evodiff": (LOGSNR, LU),
    "dpm_v3": (LOGSNR, "Zheng et al. 2023 (arXiv 2310.13268)"),
}
DISCRETE = {"schedule_type": "discrete", "schedule_rho": 1.0}  # even steps in the index of the noise table
TIME_UNIFORM = {"schedule_type": "time_uniform", "schedule_rho": 1.0}
# The solvers of a network without evidence. iPNDM has the best published FID of plain solvers with
# five evaluations on CIFAR-10 (13.59; DPM-Solver++ 24.97, UniPC 23.98). With guidance the paper of
# DPM-Solver++ recommends its second order.
UNGUIDED_SOLVER, GUIDED_SOLVER = "ipndm", "dpmpp"


@dataclass(frozen=True)
class Recommendation:
    """Result of ``recommend``.

    settings: keyword arguments of ``solvers.sample``: solver, num_steps, schedule, afs, options.
    source: their source, one line.
    """

    settings: dict
    source: str


@cache
def evidence() -> dict[str, dict]:
    """The files of ``models/recommended``, {name of the network: content}."""
    files = sorted(FOLDER.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def evidence_for(net) -> dict | None:
    """The evidence for this network; None for other weights of the same name."""
    found = evidence().get(member(net, "dataset_name"))
    return found if found is not None and found["network_sha256"] == net.weights_hash else None


def published(net, solver: str) -> tuple[dict, str]:
    """(schedule and options, source): published settings of a solver for this kind of network."""
    settings, source = PUBLISHED.get(solver, (POLYNOMIAL, f"{KARRAS}, as for other solvers"))
    options = SOLVERS[solver].options
    if hasattr(net, "sigma_inv") and member(net, "latent"):
        settings = {**settings, **DISCRETE}
        source = "Rombach et al. 2022 (arXiv 2112.10752): even steps in the network's own time"
    elif hasattr(net, "sigma_inv"):
        settings = {**settings, **TIME_UNIFORM}
        source = f"{LU}, for pixels on a discrete noise table"
    if member(net, "guided") and "thresholding" in options:
        settings = {**settings, "max_order": 2, "thresholding": not member(net, "latent")}
        source = f"{LU}, under guidance"
    return settings, source


# Settings of training in the AMED paper; other solvers use those of the plugin.
TRAINING: dict[str, dict[str, Any]] = {
    "amed": {
        **{"sampler_stu": "amed", "sampler_tea": "heun", "M": 1, "afs": True, "scale_dir": 0.01, "scale_time": 0},
        **{"schedule_type": "time_uniform", "schedule_rho": 1, "batch": 128, "total_kimg": 10},
    },
    "plugin": {
        **{"sampler_stu": "ipndm", "sampler_tea": "ipndm", "M": 2, "max_order": 4, "afs": True, "scale_dir": 0.01},
        **{"scale_time": 0.2, "schedule_type": "polynomial", "schedule_rho": 7, "batch": 128, "total_kimg": 10},
    },
    "span": {"sampler_stu": "span"},
}


def training_recipe(dataset_name: str, student: str = "amed") -> tuple[dict, str]:
    """({flag of train.py: value}, source) for a network and a student solver.

    dataset_name: name of the network.
    student: "amed", "span", or a solver that a predictor is inserted into. Default "amed".
    """
    kind = student if student in ("amed", "span") else "plugin"
    found, source = evidence().get(dataset_name), f"the settings of {ZHOU}"
    recipe = dict(TRAINING[kind])
    if kind == "span":
        source = "the defaults of train.py"
    if found is not None:
        recipe, source = dict(found["train"][kind]), f"models/recommended/{dataset_name}.json"
    if recipe["sampler_stu"] != student:
        recipe.pop("max_order", None)
        own = PUBLISHED.get(student, ({}, ""))[0]
        recipe |= {name: own[name] for name in ("max_order", "thresholding") if name in own}
    return {**recipe, "sampler_stu": student}, source


def choose_intervals(cost: Callable[[int], int], nfe: int) -> tuple[int, int]:
    """(number of intervals, its evaluations): ``nfe`` evaluations if possible, else the next fewer.

    cost: function from a number of intervals to its evaluations; may raise UserError.
    nfe: the wanted number of evaluations.

    Of several numbers of intervals with one cost the largest is returned; if all need more than
    ``nfe``, the cheapest. Raises UserError if none is possible.
    """
    best, refusal = None, UserError(f"nfe={nfe}: the solver needs more evaluations")
    for intervals in range(1, 8 * nfe + 9):  # no solver covers more than a few intervals per evaluation
        try:
            spent = cost(intervals)
        except UserError as error:
            refusal = error
            continue
        if spent <= nfe or best is None:
            best = (intervals, spent) if spent > 0 else best
        if spent > nfe:
            break
    if best is None:
        raise refusal
    return best


def steps_for(nfe: int, cost: Callable[[int], int], what: str, hint: str = "") -> int:
    """The ``num_steps`` with exactly ``nfe`` evaluations.

    nfe, cost: see ``choose_intervals``.
    what: the solver and its settings, for the message.
    hint: other solutions, for the message. Default: none.

    Raises UserError with the nearest possible numbers if there is none.
    """
    if nfe < 1:
        raise UserError(f"nfe={nfe} must be at least 1")
    intervals, spent = choose_intervals(cost, nfe)
    if spent == nfe:
        return intervals + 1
    near = [spent]
    for more in range(nfe + 1, 4 * nfe + 9):
        if choose_intervals(cost, more)[1] == more:
            near.append(more)
            break
    numbers = " or ".join(str(number) for number in dict.fromkeys(near))
    raise UserError(f"nfe={nfe} is impossible for {what}: it can spend {numbers}{hint}")


def num_steps_for(net, nfe: int, settings: Mapping) -> int:
    """The ``num_steps`` with exactly ``nfe`` evaluations of this network.

    net: the denoiser.
    nfe: the wanted number of evaluations.
    settings: keyword arguments of ``sample``: solver, afs, denoise_to_zero, options of the solver.

    Raises UserError with the nearest possible numbers if there is none.
    """
    options = {name: value for name, value in settings.items() if name in SOLVERS[settings["solver"]].options}
    solver, afs = make_solver(settings["solver"], options), settings.get("afs", False)
    extra, each = bool(settings.get("denoise_to_zero")), member(net, "evals_per_call")

    def cost(intervals, afs=afs):
        return (solver.evaluations(intervals, afs) + extra) * each

    what = f"solver={solver.name} with afs={afs}" + (" and guidance" if each > 1 else "")
    hint, other = "", not afs
    if nfe >= 1 and choose_intervals(lambda n: cost(n, other), nfe)[1] == nfe:
        hint = f"; afs={other} makes it possible"
    return steps_for(nfe, cost, what, hint)


def merge(own: Mapping, given: Mapping) -> dict:
    """Return ``own`` with the values of ``given``; an exponent is replaced with its schedule."""
    if {"schedule_type", "schedule_rho"} & given.keys():
        own = {name: value for name, value in own.items() if name not in ("schedule_type", "schedule_rho")}
    return {**own, **given}


def recommend(
    net, nfe: int = DEFAULT_NFE, solver: str | None = None, given: Mapping | None = None, tuned: bool = True
) -> Recommendation:
    """The recommended settings of a network, a solver and a number of evaluations.

    net: the denoiser.
    nfe: network evaluations per image, including guidance. Default 5.
    solver: name in ``SOLVERS``. Default: the best plain one for this network.
    given: settings that are fixed, {name: value}. Default: none.
    tuned: use the evidence for this network if it exists. Default True.

    Raises UserError for an unknown solver, one that needs a predictor, and an impossible number of
    evaluations.
    """
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise UserError(f"nfe={nfe!r} must be a whole number of evaluations, 1 or more")
    given = dict(given or {})
    if member(net, "few_step") is not None:
        return _of_few_step_network(net, nfe, solver, given)
    table, calls = evidence_for(net) if tuned else None, nfe / member(net, "evals_per_call")
    if solver is None and table is not None:
        solver = table["best"][_nearest(table["best"], calls)[0]]
    if solver is None:
        solver = GUIDED_SOLVER if member(net, "guided") else UNGUIDED_SOLVER
    if make_solver(solver, {}).needs_predictor:
        raise UserError(f"solver={solver} needs a trained predictor, which has its own settings")
    rows = table["plain"].get(solver) if table is not None else None
    if not rows:
        own, source = published(net, solver)
        settings = merge({"solver": solver, **own}, given)
        why = f"settings of {source}; not tuned for this network{_changes(own, given)}"
        try:
            settings["num_steps"] = num_steps_for(net, nfe, settings)
        except UserError:
            if "afs" in given:
                raise
            known = member(net, "data_mean") is not None  # a solver of two stages, an odd number
            settings["afs"] = "data" if known else True
            settings["num_steps"] = num_steps_for(net, nfe, settings)
        return Recommendation(settings, why)
    refusal = None
    for number in _nearest(rows, calls):
        row = rows[number]
        settings = merge({"solver": solver, **row["settings"]}, given)
        try:
            settings["num_steps"] = num_steps_for(net, nfe, settings)
        except UserError as error:  # two-stage solvers: odd numbers need AFS, even ones must not have it
            refusal = refusal or error
            continue
        source = f"models/recommended/{net.dataset_name}.json"
        changes = _changes(row["settings"], given)
        if int(number) != calls:
            source += f": those of {number} evaluations, the nearest measured{changes}"
        elif changes:
            source += changes
        else:
            source += f": FID* {row['fid']:.2f}, distance {row['distance']:.3f} on validation seeds"
        return Recommendation(settings, source)
    assert refusal is not None  # there is at least one row
    raise refusal


def default_nfe(net) -> int:
    """Evaluations if none are asked for: five calls, or the most that a few-step network makes."""
    few = member(net, "few_step")
    calls = DEFAULT_NFE if few is None else max(few.evaluations())
    return calls * member(net, "evals_per_call")


def _of_few_step_network(net, nfe: int, solver: str | None, given: Mapping) -> Recommendation:
    """``recommend`` for a network that was fine-tuned for few steps: only its own settings."""
    few, each = net.few_step, member(net, "evals_per_call")
    numbers = {calls * each: num_steps for calls, num_steps in few.evaluations().items()}
    if nfe not in numbers:
        raise UserError(f"nfe={nfe}: this network was fine-tuned for {few.describe()}; choose one of these numbers")
    settings = {"solver": few.solver, "afs": few.afs, **few.schedule(numbers[nfe])}
    settings["num_steps"] = numbers[nfe]
    asked = {"solver": solver or few.solver, **given}
    different = [name for name, value in asked.items() if value != settings.get(name, False)]
    if different:
        raise UserError(f"this network was fine-tuned for {few.describe()}: leave {different[0]} out")
    return Recommendation(settings, "the settings that the network was fine-tuned for")


def recommended(net, nfe: int = DEFAULT_NFE, solver: str | None = None) -> dict:
    """The recommended settings as keyword arguments of ``sample``; see ``recommend``."""
    return recommend(net, nfe, solver).settings


def _changes(own: Mapping, given: Mapping) -> str:
    """The changed settings, as text for the source."""
    names = [name for name, value in given.items() if value != own.get(name, False)]
    return f"; changed: {', '.join(names)}" if names else ""


def _nearest(rows: Mapping, calls: float) -> list[str]:
    """The numbers of evaluations in ``rows``, the nearest first; the larger one first if equal."""
    return sorted(rows, key=lambda number: (abs(int(number) - calls), -int(number)))

"""The schedule file: optimised noise levels, with the solver and network they were optimised for.

A JSON object with these fields, all required:

    format          "amed-schedule-1"
    sigmas          noise levels, decreasing and positive
    sigmas_cond     noise levels to condition the network on at these points; null: sigmas
    solver          name of the solver
    solver_options  options of the solver that were set, {name: value}; of these sampling uses
                    those of the schedule itself (direction_sigma)
    afs             kind of the analytical first step: false, true or "data"
    method          name of the optimisation method
    settings        options of the method, {name: value}
    network         name of the network, or null
    network_hash    SHA-256 of its file, or null
    sigma_min, sigma_max   range of noise levels that the network supports
    evaluations     network evaluations that the optimisation took, per sample
    seconds         time that the optimisation took
    versions        versions of the code and of the libraries

You may write such a file by hand: ``load_schedule`` checks it.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from models.denoiser import member
from solvers.former_names import with_current_names
from solvers.sampler import AFS_KINDS, RANGE_SLACK
from solvers.schedules import check_sigmas
from solvers.solver import SOLVERS
from torch_utils.errors import UserError
from torch_utils.file_kind import explain
from torch_utils.files import read_json, write_json

FORMAT = "amed-schedule-1"
MOST_LEVELS = 1000  # time and memory of some solvers grow with its square


@dataclass
class Schedule:
    """The contents of a schedule file, field by field. Raises UserError for impossible values."""

    sigmas: list[float]
    solver: str
    method: str
    sigma_min: float
    sigma_max: float
    sigmas_cond: list[float] | None = None
    solver_options: dict = field(default_factory=dict)
    afs: bool | str = False
    settings: dict = field(default_factory=dict)
    network: str | None = None
    network_hash: str | None = None
    evaluations: int = 0
    seconds: float = 0.0
    versions: dict = field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.sigmas, list) and len(self.sigmas) > MOST_LEVELS:
            raise UserError(f"sigmas has {len(self.sigmas)} noise levels; at most {MOST_LEVELS} are allowed")
        self.sigmas = check_sigmas(_numbers("sigmas", self.sigmas)).tolist()
        if self.sigmas_cond is not None:
            self.sigmas_cond = _numbers("sigmas_cond", self.sigmas_cond)
            if len(self.sigmas_cond) != len(self.sigmas):
                raise UserError(f"sigmas_cond has {len(self.sigmas_cond)} entries, but sigmas has {len(self.sigmas)}")
            if min(self.sigmas_cond) <= 0:
                raise UserError(f"sigmas_cond must be positive, got {min(self.sigmas_cond)}")
        for name in ("solver", "method"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{name} must be text")
        for name in ("network", "network_hash"):
            if not isinstance(getattr(self, name), str | None):
                raise UserError(f"{name} must be text or null")
        for name in ("solver_options", "settings", "versions"):
            if not isinstance(getattr(self, name), dict):
                raise UserError(f"{name} must be an object")
        if not any(self.afs is kind or (kind == "data" and self.afs == kind) for kind in AFS_KINDS):
            raise UserError(f"afs must be false, true or 'data', got {str(self.afs)[:60]}")
        least, most, *cost = _numbers(
            "sigma_min, sigma_max, evaluations and seconds",
            [self.sigma_min, self.sigma_max, self.evaluations, self.seconds],
        )
        if not 0 <= least < most or min(cost) < 0:
            raise UserError("sigma_min must be below sigma_max, evaluations and seconds must not be negative")

    def own_options(self, solver: str) -> dict:
        """Options of a solver that belong to the schedule, {name: value}: direction_sigma."""
        known = SOLVERS[solver].options if solver in SOLVERS else {}
        return {name: v for name, v in self.solver_options.items() if name in known and known[name].of_schedule}

    def warnings(self, net, solver: str | None = None, afs: bool | str | None = None) -> list[str]:
        """List the differences from what the schedule was optimised for, one line each.

        net: the denoiser.
        solver: name of the solver. Default: None, not compared.
        afs: kind of the analytical first step. Default: None, not compared.
        """
        lines = []
        found = member(net, "weights_hash")
        if None not in (found, self.network_hash) and found != self.network_hash:
            lines.append(f"the schedule was optimised for another network ('{self.network}', another SHA-256)")
        if solver is not None and solver != self.solver:
            lines.append(f"the schedule was optimised for the solver '{self.solver}', not for '{solver}'")
        if afs is not None and afs != self.afs:
            lines.append(f"the schedule was optimised for afs={self.afs}, not for afs={afs}")
        least, most = getattr(net, "sigma_min", self.sigma_min), getattr(net, "sigma_max", self.sigma_max)
        if not all(
            math.isclose(a, b, rel_tol=RANGE_SLACK) for a, b in ((least, self.sigma_min), (most, self.sigma_max))
        ):
            lines.append(
                f"the schedule was optimised for noise levels {self.sigma_min:g}..{self.sigma_max:g},"
                f" but the network's are {least:g}..{most:g}"
            )
        return lines


def _numbers(name: str, values) -> list[float]:
    """Return the values as floats. Raises UserError unless they are a list of finite numbers."""
    if not isinstance(values, list | tuple) or any(
        isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in values
    ):
        raise UserError(f"{name} must be finite numbers, got {str(values)[:100]}")
    return [float(v) for v in values]


def save_schedule(path: str | Path, schedule: Schedule) -> None:
    """Write a schedule file. An error leaves no partial file."""
    write_json(path, {"format": FORMAT, **asdict(schedule)}, allow_nan=False)


def load_schedule(path: str | Path) -> Schedule:
    """Read a schedule file. Raises UserError with its name if it is missing or invalid."""
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"cannot read the schedule {path}: {error.strerror or error}") from None
    except ValueError as error:
        reason = explain(path, error, reads=("json",))
        raise UserError(f"{path} is not a schedule file: not valid JSON ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f'{path} is not a schedule file of this version: it needs "format": "{FORMAT}"')
    content, names = with_current_names(content), [f.name for f in fields(Schedule)]
    for problem, wrong in (
        ("lacks the field", [name for name in names if name not in content]),
        ("has the unknown field", sorted(content.keys() - {*names, "format"})),
    ):
        if wrong:
            raise UserError(f"the schedule {path} {problem} '{wrong[0]}'")
    try:
        return Schedule(**{name: content[name] for name in names})
    except UserError as error:
        raise UserError(f"the schedule {path} cannot be used: {error}") from None

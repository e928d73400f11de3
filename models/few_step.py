"""The settings of sampling of a network that was fine-tuned for a few steps."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch_utils.errors import UserError
from torch_utils.kinds import MOST_STEPS, check_kinds, kinds_of


@dataclass(frozen=True)
class FewStep:
    """The solver and the noise levels that a network was fine-tuned for.

    The ends of the schedule are ``sigma_min`` and ``sigma_max`` of the network.

    num_steps: numbers of time steps that it was trained for.
    solver: name in ``solvers.SOLVERS``. Default euler.
    afs: analytical first step, as in ``solvers.sample``. Default True.
    schedule_type, schedule_rho: of the noise levels. Default polynomial, 7.
    sigmas: explicit noise levels instead of a schedule. Default None.
    step_condition: whether the network gets the number of time steps of the run, as the keyword
        step_condition. Default False.
    """

    num_steps: list[int]
    solver: str = "euler"
    afs: bool | str = True
    schedule_type: str = "polynomial"
    schedule_rho: float = 7
    sigmas: list[float] | None = None
    step_condition: bool = False

    def __post_init__(self):
        check_kinds(vars(self), kinds_of(FewStep))
        numbers = [*self.num_steps, *([len(self.sigmas)] if self.sigmas is not None else [])]
        if not self.num_steps or not all(2 + bool(self.afs) <= number <= MOST_STEPS for number in numbers):
            raise UserError(f"num_steps={self.num_steps}: a few-step network needs at least one evaluation")
        if self.sigmas is not None and self.num_steps != [len(self.sigmas)]:
            raise UserError(f"num_steps={self.num_steps} does not belong to {len(self.sigmas)} sigmas")

    @classmethod
    def from_metadata(cls, values: Mapping) -> "FewStep":
        """The entry ``few_step`` of a file. Raises UserError for anything else."""
        unknown = sorted(set(values) - set(kinds_of(cls)))
        if unknown or "num_steps" not in values:
            raise UserError(f"unknown setting '{unknown[0]}'" if unknown else "num_steps is missing")
        return cls(**values)

    def to_dict(self) -> dict:
        return asdict(self)

    def evaluations(self) -> dict[int, int]:
        """{calls of the network: number of time steps}, the fewest first."""
        return {number - 1 - bool(self.afs): number for number in sorted(self.num_steps)}

    def schedule(self, num_steps: int) -> dict:
        """The noise levels with one of ``num_steps``, as keyword arguments of ``sample``."""
        if self.sigmas is not None:
            return {"sigmas": list(self.sigmas)}
        return {"num_steps": num_steps, "schedule_type": self.schedule_type, "schedule_rho": self.schedule_rho}

    def describe(self) -> str:
        """The evaluations and settings, for messages."""
        calls = " or ".join(map(str, self.evaluations()))
        return f"{calls} evaluations with solver {self.solver}, afs={self.afs} and its own noise levels"

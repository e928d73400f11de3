"""The base class of solvers, their registry, and the classic ones.

A solver turns directions d = (x - D) / sigma, the dx/dsigma of the probability-flow ODE, into
steps. ``Solver.step`` is a generator: it yields each ``Point`` where it needs the network, receives
the direction there, and returns the next state. The loop in solvers/sampler.py calls the network.
It also owns the schedule, AFS, the count of evaluations and the predictor. There are three kinds:

* one-stage solvers implement ``update``, called once per interval, or twice with a predictor;
* two-stage solvers evaluate once inside the interval and implement ``combine``;
* all others implement ``step`` themselves.

A solver does not change while it samples.
"""

import functools
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from models.denoiser import member
from torch_utils.errors import UserError

SOLVERS: dict[str, type["Solver"]] = {}


def register(name: str):
    """Class decorator: registers a solver as ``name``, for ``sample``, the flags and the docs."""

    def add(cls):
        cls.name = name
        SOLVERS[name] = cls
        return cls

    return add


@dataclass(frozen=True)
class State:
    """A point of a trajectory.

    x: state [B,C,H,W].
    history: (output, sigma) of the evaluations that the solver remembers, the newest last. Solvers
        may remember more of each.
    updates: number of updates made so far.
    """

    x: torch.Tensor
    history: tuple = ()
    updates: int = 0

    def detach(self) -> "State":
        history = tuple(tuple(torch.as_tensor(value).detach() for value in entry) for entry in self.history)
        return State(self.x.detach(), history, self.updates)


@dataclass(eq=False)
class Point:
    """A state where a step needs the network. The step yields it and receives the direction there.

    x: state [B,C,H,W].
    sigma: noise level of x, a scalar or [B,1,1,1].
    sigma_cond: noise level to condition the network on. Default: sigma.
    index: i if this is schedule point i; AFS, cached evaluations and the callback apply there.
        Default: None, a point inside a step.
    shift: [1,E], added to the network's embedding of the noise level. Default: None.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    sigma_cond: torch.Tensor = None  # type: ignore[assignment]  # see below
    index: int | None = None
    shift: torch.Tensor | None = None

    def __post_init__(self):
        self.sigma_cond = self.sigma if self.sigma_cond is None else self.sigma_cond.to(self.x.dtype)


@dataclass(frozen=True)
class Option:
    """A setting of a solver: a keyword of ``sample`` and a flag of the command lines.

    kind: bool, int, float, str, or a tuple of words to choose from (True and False count as words).
    default: the value if it is not given.
    help: one line for the flag.
    aliases: further names of the flag, such as --solver_r.
    of_schedule: whether it is set by a schedule file with ``sigmas_cond``. Predictors do not have
        it. Default False.
    """

    kind: type | tuple[str, ...]
    default: object
    help: str
    aliases: tuple[str, ...] = ()
    of_schedule: bool = False

    @property
    def type(self) -> type:
        """Python type of the values."""
        return str if isinstance(self.kind, tuple) else self.kind

    def check(self, name, value):
        """Convert ``value`` to the option's type. Raises UserError if it does not fit."""
        if value is None:
            return self.default
        if isinstance(self.kind, tuple):
            value = str(value) if isinstance(value, bool) else value
            if value not in self.kind:
                raise UserError(f"{name}={value}: choose from {', '.join(self.kind)}")
            return value
        if self.kind in (int, float) and not isinstance(value, bool):
            number = float(value) if isinstance(value, int | float) else None
            if number is not None and (number.is_integer() or (self.kind is float and not math.isnan(number))):
                return self.kind(number)
        elif isinstance(value, self.kind):
            return value
        wanted = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[self.kind]
        raise UserError(f"{name}={value} must be {wanted}")


class Solver:
    """Base class. Options are keyword arguments of the constructor and become attributes."""

    name: str
    summary: str = ""  # one line for the documentation table
    options: dict[str, Option] = {}
    learned_options: tuple[str, ...] = ()  # options that a predictor replaces
    stages: int = 1  # network evaluations per interval without a predictor
    can_teach: bool = True
    can_learn: bool = True  # may a predictor be inserted?
    needs_predictor: bool = False
    own_schedule: bool = False  # its predictor has its own schedule and first step (``SpanSolver``)
    stochastic: bool = False  # draws noise while sampling
    per_sample: bool = True  # can every sample have its own schedule?
    differentiable: bool = True  # do gradients flow to the noise levels?
    fingerprint: str | None = None  # SHA-256 of a file that the images depend on, after ``setup``; not with a predictor
    max_order: int = 1
    highest_order: int = 1  # the option max_order may be 1..highest_order
    direction_sigma: str = "point"  # noise level that directions are divided by, see ``DIRECTION_SIGMA``

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the options

    def __init__(self, **values):
        unknown = sorted(set(values) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise UserError(f"{self.name} has no option '{unknown[0]}'; it takes {known}")
        for name, option in self.options.items():
            setattr(self, name, option.check(name, values.get(name)))
        if not 1 <= self.max_order <= self.highest_order:
            raise UserError(f"max_order={self.max_order}: {self.name} supports 1..{self.highest_order}")

    @property
    def keep(self) -> int:
        """Number of evaluations that an update uses, the current one included."""
        return self.max_order

    @property
    def one_step(self) -> bool:
        """True if a step depends on the current state only: a trajectory can start anywhere."""
        return self.keep == 1

    def check_predictor(self, predictor) -> None:
        """Raises UserError unless the solver works with ``predictor`` (None: without one)."""
        if predictor is None and self.needs_predictor:
            raise UserError(f"the solver '{self.name}' needs a trained predictor")
        if predictor is not None and not self.can_learn:
            raise UserError(f"no predictor can be inserted into the solver '{self.name}'")
        if getattr(predictor, "solver", self.name) != self.name:
            raise UserError(f"this predictor was trained for the solver '{predictor.solver}', not for '{self.name}'")

    def setup(self, net, sigmas, predictor=None) -> "Solver":
        """Return this solver configured for a run (a copy if it stores anything).

        net: the denoiser.
        sigmas: noise levels [N] of the run, decreasing.
        predictor: inserts learned points; default None.

        Raises UserError if these do not go together.
        """
        self.check_predictor(predictor)
        return self

    def check_noise(self, net) -> None:
        """Raises UserError if the noise of the network's process is not Gaussian."""
        if member(net, "D") is not None:
            raise UserError(
                f"{self.name} adds Gaussian noise, but this PFGM++ network was trained with Student-t noise"
                f" (D={member(net, 'D')}): choose a solver without fresh noise"
            )

    def evaluations(self, intervals: int, afs=False, learned: bool = False) -> int:
        """Number of network calls over a schedule.

        intervals: number of intervals of the schedule.
        afs: whether the first step is analytical; default False.
        learned: whether a predictor inserts points; default False.
        """
        return (2 if learned else self.stages) * intervals - bool(afs)

    def stride(self, i: int, intervals: int) -> int:
        """Number of intervals that the step from schedule point i covers."""
        return 1

    def output(self, x, d, sigma):
        """The output to remember of an evaluation; default: the direction d."""
        return d

    def update(self, x, history, sigma_next, index, total, scale=1.0):
        """The state [B,C,H,W] at sigma_next.

        x: state [B,C,H,W] at the current noise level.
        history: (output, sigma) of the last ``keep`` evaluations, the current one last.
        sigma_next: a scalar, or [B,1,1,1] if a predictor places the points.
        index: number of this update, from 0.
        total: number of updates of the trajectory.
        scale: the predictor's scale_dir [B,1,1,1]; multiplies the displacement. Default 1.
        """
        raise NotImplementedError

    def step(self, run, state: State, i: int) -> Generator[Point | list[Point], Any, State]:
        """Generator of one step from schedule point i to the next. Returns the next ``State``.

        ``d = yield point`` gives the direction d [B,C,H,W] at a ``Point``; ``yield [point, ...]``
        gives the directions at several points, from one call of the network.

        run: the ``Sampler``, for noise levels (``sigma``), points (``at``, ``inside``), the
            predictor's outputs (``predict``) and random numbers (``noise``).
        state: the ``State`` at point i.
        i: index of the point, from 0.
        """
        cur, nxt = run.sigma(i, state.x), run.sigma(i + 1, state.x)
        d = yield run.at(state.x, i)
        if run.predictor is None:
            return self.make_update(state, d, cur, nxt, run.updates)
        r, scale_dir, scale_time = run.predict(state.x, i)
        mid = intermediate_level(cur, nxt, r)
        state = self.make_update(state, d, cur, mid, run.updates)
        d_mid = yield run.inside(state.x, mid, i, r, scale_time)
        return self.make_update(state, d_mid, mid, nxt, run.updates, scale_dir)

    def make_update(self, state, d, sigma, sigma_next, total, scale=1.0) -> State:
        """Remember the direction d at sigma and make one ``update`` to sigma_next."""
        history = (*state.history, (self.output(state.x, d, sigma), sigma))[-self.keep :]
        x = self.update(state.x, history, sigma_next, state.updates, total, scale)
        return State(x, history, state.updates + 1)


def add_scaled(x: torch.Tensor, factor, value: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """x + sign factor value; one operation if factor has a value per sample.

    x, value: [B,C,H,W].
    factor: a number, a scalar or [B,1,1,1].
    sign: 1 (default) or -1.
    """
    if isinstance(factor, torch.Tensor) and factor.ndim:
        return torch.addcmul(x, factor, value, value=sign)
    return x + factor * value if sign > 0 else x - factor * value


def weighted_sum(weights, values) -> torch.Tensor:
    """The sum of weights times values [B,C,H,W]; weights are numbers, scalars or [B,1,1,1]."""
    (first, value), *others = zip(weights, values, strict=False)
    return functools.reduce(lambda total, pair: add_scaled(total, *pair), others, first * value)


def intermediate_level(sigma, sigma_next, r: torch.Tensor) -> torch.Tensor:
    """The noise level sigma^(1-r) sigma_next^r; r has a value per sample, [B,1,1,1]."""
    return sigma * (sigma_next / sigma) ** r


def order_option(default: int) -> Option:
    return Option(int, default, "order of the method")


# If a schedule conditions the network on another noise level than that of the point (sigmas_cond),
# a direction is (x - D) / sigma with the level of the point or with that of the network. The latter
# treats the network as a predictor of noise, as Euler and iPNDM in the code of LD3 (Tong et al.
# 2024) do.
DIRECTION_SIGMA = Option(
    ("point", "network"),
    "point",
    "with other noise levels for the network: a direction is (x - D) / the level of the point, or the network's",
    of_schedule=True,
)


@register("euler")
class Euler(Solver):
    """x + (t - s) d; DDIM (Song et al. 2021) in this parametrisation."""

    summary = "Euler / DDIM, order 1"
    options = {"direction_sigma": DIRECTION_SIGMA}

    def update(self, x, history, sigma_next, index, total, scale=1.0):
        d, sigma = history[-1]
        return add_scaled(x, scale * (sigma_next - sigma), d)


@register("ipndm")
class IPNDM(Solver):
    """Adams-Bashforth with the weights of equal steps (Zhang & Chen 2023; Liu et al. 2022)."""

    summary = "improved PNDM: linear multistep, order 1-4"
    options = {"max_order": order_option(4), "direction_sigma": DIRECTION_SIGMA}
    highest_order = 4
    one_step = False
    WEIGHTS = (
        (1.0,),
        (3 / 2, -1 / 2),
        (23 / 12, -16 / 12, 5 / 12),
        (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    )

    def update(self, x, history, sigma_next, index, total, scale=1.0):
        weights = self.WEIGHTS[min(self.max_order, len(history)) - 1]
        d = weighted_sum(weights, (past for past, _ in reversed(history)))
        return add_scaled(x, scale * (sigma_next - history[-1][1]), d)


EXPONENTIAL_OPTIONS = {
    "predict_x0": Option(bool, True, "work with images, not with noise"),
    "lower_order_final": Option(bool, True, "lower order in the last steps"),
    "thresholding": Option(bool, True, "dynamic thresholding under predict_x0"),
}


def dynamic_threshold(denoised: torch.Tensor, quantile: float = 0.995) -> torch.Tensor:
    """Clip each sample [B,...] to its own quantile of |x0| (at least 1) and rescale to [-1, 1].

    Saharia et al. 2022, Section 2.3.
    """
    limit = upper_quantile(denoised.flatten(1).abs(), quantile)
    limit = limit.clamp(min=1).reshape(-1, *[1] * (denoised.ndim - 1))
    return (denoised / limit).clamp(-1, 1)


def upper_quantile(values: torch.Tensor, quantile: float) -> torch.Tensor:
    """torch.quantile(values, quantile, dim=1) to the bit, for values [B,N] and a quantile near 1.

    It sorts only the largest values, which is about twenty times faster. N has no limit.
    """
    rank = values.new_tensor(quantile, device="cpu") * (values.shape[1] - 1)  # rounded as in torch.quantile
    below = int(rank)
    top = values.topk(values.shape[1] - below, dim=1).values
    return torch.lerp(top[:, -1], top[:, max(-2, -top.shape[1])], float(rank - below))


def log_ratio(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    """ln(sigma / sigma_next), the length of a step in lambda."""
    return (sigma / sigma_next).log()


def exponential_multistep(x, history, sigma_next, order, predict_x0, scale=1.0):
    """Multistep DPM-Solver++ update (Lu et al. 2022, Algorithms 2 and 3) for x = x0 + sigma noise.

    x: state [B,C,H,W] at the noise level of the newest entry of history.
    history: (model output, sigma) or (model output, sigma, ``log_ratio`` of sigma and the noise
        level after it), the newest last.
    sigma_next: noise level of the result.
    order: 1 to 3.
    predict_x0: whether the model outputs are denoised images; else they are directions.
    scale: multiplies the terms of the model outputs only; default 1.
    """
    outputs, sigmas = [entry[0] for entry in history], [entry[1] for entry in history]
    after = [*sigmas[1:], sigma_next]
    steps = [
        entry[2] if len(entry) > 2 else log_ratio(entry[1], sigma)
        for entry, sigma in zip(history[-order:], after[-order:], strict=True)
    ]
    h = steps[-1]
    z = -h if predict_x0 else h
    phi1 = torch.expm1(z)
    m0 = outputs[-1]
    terms = phi1 * m0
    if order >= 2:
        r0 = steps[-2] / h
        change = m0 - outputs[-2]
    if order == 2:
        terms = add_scaled(terms, 0.5 * phi1 / r0, change)
    elif order == 3:
        d1_0 = change / r0
        phi2 = phi1 / z - 1
        phi3 = phi2 / z - 0.5
        r1 = steps[-3] / h
        bend = d1_0 - (outputs[-2] - outputs[-3]) / r1
        # The first derivative is d1_0 + r0 / (r0 + r1) bend, the second bend / (r0 + r1).
        terms = add_scaled(terms, phi2, d1_0)
        terms = add_scaled(terms, add_scaled(phi3, phi2, r0) / (r0 + r1), bend)
    if not predict_x0:
        return add_scaled(x, scale * sigma_next, terms, -1)
    unscaled = isinstance(scale, float) and scale == 1
    x = sigma_next / sigmas[-1] * x
    return x - terms if unscaled else add_scaled(x, scale, terms, -1)


@register("dpmpp")
class DPMSolverPP(Solver):
    """DPM-Solver++ multistep (Lu et al. 2022), in data (predict_x0) or noise prediction.

    lower_order_final: the last updates have lower orders, down to 1.
    thresholding: dynamic thresholding of every denoised image under predict_x0, the published
        default of pixel models.
    """

    summary = "DPM-Solver++ multistep, order 1-3"
    options = {"max_order": order_option(3), **EXPONENTIAL_OPTIONS}
    highest_order = 3
    one_step = False

    def output(self, x, d, sigma):
        if not self.predict_x0:
            return d
        denoised = add_scaled(x, sigma, d, -1)
        return dynamic_threshold(denoised) if self.thresholding else denoised

    def make_update(self, state, d, sigma, sigma_next, total, scale=1.0):
        """As in the base class. The length of the step is remembered for the next ones."""
        entry = (self.output(state.x, d, sigma), sigma, log_ratio(sigma, sigma_next))
        history = (*state.history, entry)[-self.keep :]
        x = self.update(state.x, history, sigma_next, state.updates, total, scale)
        return State(x, history, state.updates + 1)

    def update(self, x, history, sigma_next, index, total, scale=1.0):
        return exponential_multistep(x, history, sigma_next, self.order(index, total), self.predict_x0, scale)

    def order(self, index, total):
        """The order of update number ``index`` (from 0) of ``total``."""
        if self.lower_order_final and index + 1 >= self.max_order:
            return min(self.max_order, total - index)
        return min(self.max_order, index + 1)


class TwoStageSolver(Solver):
    """One evaluation inside the interval at sigma_mid = t^r s^(1-r), reached by an Euler step."""

    stages = 2
    r: float = 0.5

    def __init__(self, **values):
        super().__init__(**values)
        if not 0 < self.r <= 1:
            raise UserError(f"r={self.r}: the intermediate point of {self.name} needs 0 < r <= 1")

    def step(self, run, state, i):
        x, cur, nxt = state.x, run.sigma(i, state.x), run.sigma(i + 1, state.x)
        d = yield run.at(x, i)
        r, scale_dir, scale_time = (self.r, 1.0, None) if run.predictor is None else run.predict(x, i)
        mid = nxt**r * cur ** (1 - r) if run.predictor is None else intermediate_level(cur, nxt, r)
        d_mid = yield run.inside(add_scaled(x, mid - cur, d), mid, i, r, scale_time)
        return State(add_scaled(x, scale_dir * (nxt - cur), self.combine(d, d_mid, r)), (), state.updates + 1)

    def combine(self, d, d_mid, r):
        """The direction of the whole step.

        d, d_mid: directions [B,C,H,W] at the start of the interval and at the intermediate point.
        r: place of the intermediate point, a number or [B,1,1,1].
        """
        raise NotImplementedError


@register("dpm")
class DPMSolver2(TwoStageSolver):
    """DPM-Solver-2 (Lu et al. 2022, Algorithm 1) for any r in (0, 1]."""

    summary = "DPM-Solver-2 singlestep, order 2; 2 evaluations per step"
    # torchrun takes --r for one of its own options
    options = {"r": Option(float, 0.5, "place of the intermediate point, 0 < r <= 1", ("--solver_r",))}
    learned_options: tuple[str, ...] = ("r",)

    def combine(self, d, d_mid, r):
        return d_mid / (2 * r) + (1 - 1 / (2 * r)) * d


@register("heun")
class Heun(DPMSolver2):
    """Heun's method (Karras et al. 2022, Algorithm 1), which is DPM-Solver-2 with r = 1.

    The step follows the average of the directions at both ends of the interval.
    """

    summary = "Heun, order 2; 2 evaluations per step, also on the last one"
    options = {}
    learned_options = ()
    can_learn = False
    r = 1.0


@register("amed")
class AMED(TwoStageSolver):
    """AMED-Solver (Zhou et al. 2024, eq. 8): the step follows the direction at a learned point."""

    summary = "AMED-Solver: learned intermediate point; needs a predictor"
    can_teach = False
    needs_predictor = True

    def combine(self, d, d_mid, r):
        return d_mid


def make_solver(solver: str, explicit: dict | None = None, common: dict | None = None) -> Solver:
    """Make the solver registered as ``solver``.

    solver: name in ``SOLVERS``.
    explicit: options {name: value}; one that the solver does not have is a UserError.
    common: options {name: value}; those that the solver does not have are ignored.
    """
    if solver not in SOLVERS:
        raise UserError(f"unknown solver '{solver}'; choose from {', '.join(SOLVERS)}")
    cls = SOLVERS[solver]
    chosen = {k: v for k, v in (common or {}).items() if k in cls.options}
    return cls(**{**chosen, **(explicit or {})})


def solver_options(solvers=None) -> dict[str, dict[str, Option]]:
    """The options of these solver classes (default: all), {option: {solver: Option}}."""
    found: dict[str, dict[str, Option]] = {}
    for solver in SOLVERS.values() if solvers is None else solvers:
        for name, option in solver.options.items():
            found.setdefault(name, {})[solver.name] = option
    for name, users in found.items():
        if len({option.kind for option in users.values()}) > 1:
            raise TypeError(f"the solvers {', '.join(users)} disagree about the type of their option '{name}'")
    return found


def teachers(per_step: bool = False) -> list[str]:
    """Names of the solvers that can teach: they need no predictor and draw no noise.

    per_step: only those whose direction at every time step is that of the ODE (``can_teach``).
    """
    return [
        name
        for name, solver in SOLVERS.items()
        if not solver.needs_predictor and not solver.stochastic and (solver.can_teach or not per_step)
    ]


def check_teacher(solver: str, per_step: bool = True) -> None:
    """Raises UserError if this solver is not one of ``teachers(per_step)``."""
    if solver not in teachers(per_step):
        raise UserError(f"the solver '{solver}' cannot be the teacher; choose from {', '.join(teachers(per_step))}")

"""Step rules: how a solver turns directions into a step.

A rule is a small object without state. It sees the state x, the history of what it asked to remember (newest last, the
current point included) and the noise levels; the loop in ``solvers/loop.py`` owns everything else. Two kinds exist:

* one-stage rules implement ``update``; the loop calls it once per interval, twice when a predictor inserts a point;
* two-stage rules evaluate once inside the interval and implement ``combine`` for the two directions.

d = (x - D) / sigma is the direction dx/dsigma of the probability-flow ODE throughout.
"""

import torch

from torch_utils.errors import UserError

SOLVERS: dict[str, type["Rule"]] = {}


def register(name: str):
    """Class decorator: makes a rule known under ``name`` to the command lines, to ``sample`` and to the documentation."""

    def add(cls):
        cls.name = name
        SOLVERS[name] = cls
        return cls

    return add


class Rule:
    """Base class. Options are keyword arguments of the constructor; each rule takes those it understands."""

    name: str
    summary: str = ""  # one line for the documentation table
    options: tuple[str, ...] = ()  # names of the options the rule understands
    stages: int = 1  # network evaluations per interval without a predictor
    can_teach: bool = True
    can_learn: bool = True  # may a predictor be inserted?
    needs_predictor: bool = False
    max_order: int = 1  # default; the largest order of a multistep rule is ``highest_order``
    highest_order: int = 1

    def __init__(self, max_order=None):
        if max_order is not None:
            if int(max_order) != max_order or not 1 <= max_order <= self.highest_order:
                raise UserError(f"max_order={max_order}: {self.name} supports 1..{self.highest_order}")
            self.max_order = int(max_order)

    @property
    def keep(self) -> int:
        """How many points of the history the rule looks at, the current one included."""
        return self.max_order

    @property
    def one_step(self) -> bool:
        """True when a step depends on the current point only, so that a trajectory may be restarted anywhere."""
        return self.keep == 1

    def output(self, x, d, sigma):
        """What the rule remembers of an evaluation: by default the direction."""
        return d

    def update(self, x, history, sigma_next, index, total, scale=1.0):
        """One step to sigma_next.

        x [B,C,H,W]; history: list of (output, sigma), the current point last; index, total: which update of the
        trajectory this is (from 0) and how many there are; scale: the predictor's scale_dir, [B,1,1,1] or 1.
        """
        raise NotImplementedError


@register("euler")
class Euler(Rule):
    """x + (t - s) d; DDIM (Song et al. 2021) in this parametrisation."""

    summary = "Euler / DDIM, order 1"

    def update(self, x, history, sigma_next, index, total, scale=1.0):
        d, sigma = history[-1]
        return x + scale * (sigma_next - sigma) * d


@register("ipndm")
class IPNDM(Rule):
    """Adams-Bashforth with the weights of equal steps, whatever the grid (Zhang & Chen 2023; Liu et al. 2022)."""

    summary = "improved PNDM: linear multistep, order 1-4"
    options = ("max_order",)
    max_order = 4
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
        d = sum(w * past for w, (past, _) in zip(weights, reversed(history), strict=False))
        return x + scale * (sigma_next - history[-1][1]) * d


def dynamic_threshold(denoised: torch.Tensor, quantile: float = 0.995) -> torch.Tensor:
    """Clips each sample to its own quantile of |x0| (at least 1) and rescales it to [-1, 1] (Saharia et al. 2022, 2.3)."""
    flat = denoised.flatten(1).abs()
    limit = torch.quantile(flat, quantile, dim=1).clamp(min=1).reshape(-1, *[1] * (denoised.ndim - 1))
    return torch.minimum(torch.maximum(denoised, -limit), limit) / limit


def exponential_multistep(x, history, sigma_next, order, predict_x0, scale=1.0):
    """Multistep DPM-Solver++ update of Lu et al. 2022 (Algorithms 2 and 3) for x = x0 + sigma * noise, lambda = -ln sigma.

    history: (model output, sigma), newest last; the outputs are denoised images if predict_x0, else directions. scale
    multiplies the model-output terms only.
    """
    outputs, sigmas = [h[0] for h in history], [h[1] for h in history]
    h = (sigmas[-1] / sigma_next).log()
    phi1 = torch.expm1(-h) if predict_x0 else torch.expm1(h)
    phi2 = phi1 / h + 1 if predict_x0 else phi1 / h - 1
    phi3 = phi2 / h - 0.5
    m0 = outputs[-1]
    if order >= 2:
        r0 = (sigmas[-2] / sigmas[-1]).log() / h
        d1 = d1_0 = (m0 - outputs[-2]) / r0
    if order >= 3:
        r1 = (sigmas[-3] / sigmas[-2]).log() / h
        d1_1 = (outputs[-2] - outputs[-3]) / r1
        d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
        d2 = (d1_0 - d1_1) / (r0 + r1)
    if predict_x0:
        terms = phi1 * m0
        if order == 2:
            terms = terms + 0.5 * phi1 * d1
        elif order == 3:
            terms = terms - phi2 * d1 + phi3 * d2
        return sigma_next / sigmas[-1] * x - scale * terms
    terms = phi1 * m0
    if order == 2:
        terms = terms + 0.5 * phi1 * d1
    elif order == 3:
        terms = terms + phi2 * d1 + phi3 * d2
    return x - scale * sigma_next * terms


@register("dpmpp")
class DPMSolverPP(Rule):
    """DPM-Solver++ multistep (Lu et al. 2022), in data (predict_x0) or noise prediction.

    lower_order_final: the last updates fall back to orders that need no step beyond the end. thresholding: dynamic
    thresholding of every denoised image, the published default of pixel models under predict_x0.
    """

    summary = "DPM-Solver++ multistep, order 1-3"
    options = ("max_order", "predict_x0", "lower_order_final", "thresholding")
    max_order = 3
    highest_order = 3
    one_step = False

    def __init__(self, max_order=None, predict_x0=True, lower_order_final=True, thresholding=True):
        super().__init__(max_order)
        self.predict_x0 = predict_x0
        self.lower_order_final = lower_order_final
        self.thresholding = thresholding

    def output(self, x, d, sigma):
        if not self.predict_x0:
            return d
        denoised = x - sigma * d
        return dynamic_threshold(denoised) if self.thresholding else denoised

    def update(self, x, history, sigma_next, index, total, scale=1.0):
        order = min(self.max_order, index + 1)
        if self.lower_order_final and index + 1 >= self.max_order:
            order = min(self.max_order, total - index)
        return exponential_multistep(x, history, sigma_next, order, self.predict_x0, scale)


class TwoStageRule(Rule):
    """One evaluation inside the interval at sigma_mid = t^r s^(1-r), reached by an Euler step."""

    stages = 2

    def __init__(self, max_order=None, r=None):
        super().__init__(max_order)
        if r is not None:
            if not 0 < r <= 1:
                raise UserError(f"r={r}: the intermediate point of {self.name} needs 0 < r <= 1")
            self.r = float(r)

    def combine(self, d, d_mid, r):
        """The direction of the whole step from the one at the start and the one inside."""
        raise NotImplementedError


@register("dpm")
class DPMSolver2(TwoStageRule):
    """DPM-Solver-2 (Lu et al. 2022, Algorithm 1) for any r in (0, 1]."""

    summary = "DPM-Solver-2 singlestep, order 2; 2 evaluations per step"
    options = ("r",)
    r = 0.5

    def combine(self, d, d_mid, r):
        return d_mid / (2 * r) + (1 - 1 / (2 * r)) * d


@register("heun")
class Heun(DPMSolver2):
    """Heun's method (Karras et al. 2022, Algorithm 1): the two-stage rule whose second point is the end of the step."""

    summary = "Heun, order 2; 2 evaluations per step, also on the last one"
    options = ()
    can_learn = False
    r = 1.0


@register("amed")
class AMED(TwoStageRule):
    """AMED-Solver (Zhou et al. 2024, eq. 8): the whole step along the direction at a learned intermediate point."""

    summary = "AMED-Solver: learned intermediate point; needs a predictor"
    options = ()
    can_teach = False
    needs_predictor = True

    def combine(self, d, d_mid, r):
        return d_mid


def make_rule(solver: str, explicit: dict | None = None, common: dict | None = None) -> Rule:
    """The rule named ``solver``. ``explicit`` options must be understood by it, ``common`` ones are used where they are."""
    if solver not in SOLVERS:
        raise UserError(f"unknown solver '{solver}'; choose from {', '.join(SOLVERS)}")
    cls = SOLVERS[solver]
    unknown = sorted(set(explicit or {}) - set(cls.options))
    if unknown:
        known = ", ".join(cls.options) or "none"
        raise UserError(f"{solver} has no option '{unknown[0]}' (its options: {known})")
    chosen = {k: v for k, v in (common or {}).items() if k in cls.options and v is not None}
    return cls(**chosen, **(explicit or {}))

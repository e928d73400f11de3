"""The span solver: explicit linear samplers as one learned table, with its own schedule and first step.

    student = SpanStudent.preset("full", num_steps=5, sigma_min=0.002, sigma_max=80.0)   # 4 network calls with a first step
    student.measure_gaussian(net)                       # only for first_step="gaussian"
    x = student.run(net, latents)                       # [B,C,H,W], differentiable; latents: unit-variance noise
    x = sample(net, latents, solver="span", predictor=student)      # the same without gradients; all options of the loop
    for name, parameter in student.groups().items(): ...            # what is learned, by kind, for learning rates
    save_predictor(student, path); load_predictor(path)             # training/checkpoint.py

Between the noise levels s_0 > ... > s_N (num_steps = N + 1 time stamps) a trajectory is

    g_i     = (x_i - D(x_i, a_i s_i)) / s_i                             slope at a point; g_0 is analytic with a first step
    x_{i+1} = (1 + delta_i) x_i + scale_i (s_{i+1} - s_i) sum_j c_ij g_j           over all slopes there are, sum_j c_ij = 1

and, where more than one call is made per interval, further slopes at m_ik = s_{i+1}^r s_i^(1-r), 0 < r = r_ik < 1:

    e_ik    = x_i + (m_ik - s_i) sum_j c_ikj g_j          g_ik = (e_ik - D(e_ik, a_ik m_ik)) / m_ik.

Any explicit linear sampler evaluates in the span of x_0 and its slopes, so it is such a table (docs of ``PRESETS``). As rows
sum to one, s_i is the noise level that x_i really has, whatever is learned, up to delta and scale. The learned scalars are
corrections: c = c_theory(labels) + Delta, where c_theory is a classical solver on the *current* labels, with gradient.

Two layouts of an interval: "ab" and the other multistep bases call x_i and the e_ik in one batch (they see the slopes of
earlier intervals); "midpoint" calls x_i first and then its K points e_ik in one batch, and steps along those.
"""

import copy

import torch

from solvers.solver import Rule, State, register
from solvers.span_heads import slope_features
from solvers.span_table import SpanStudent
from torch_utils.errors import UserError


@register("span")
class Span(Rule):
    """The span solver: a learned table with a schedule and a first step of its own, ``SpanStudent`` in solvers/span.py.

    x_{i+1} = (1 + delta_i) x_i + scale_i (s_{i+1} - s_i) sum_j c_ij g_j over all slopes g_j = (x_j - D(x_j, a_j s_j)) / s_j
    that there are, with sum_j c_ij = 1. Contains LD3, S4S, DyWeight, GS, EPD and AMED's table as restrictions.
    """

    summary = "span solver: learned schedule, times and coefficients; needs its table"
    can_teach = False
    can_learn = False
    needs_predictor = True
    own_schedule = True
    one_step = False

    def adopt(self, predictor):
        if not isinstance(predictor, SpanStudent):
            raise UserError("the solver 'span' needs its own trained student as predictor (SpanStudent)")
        adopted = copy.copy(self)
        adopted.student, adopted.plan = predictor, predictor.plan()
        return adopted

    def advance(self, run, state, i):
        x, sigma, inner = state.x, run.sigma(i, state.x), self.plan.inner[i]
        slopes = [slope for slope, _ in state.history]
        known = len(slopes)
        if self.student.nested or not inner:
            slopes.append(run.direction_at(x, i, self._shift(known, 1)))
            labels = [sigma]
            if inner:
                points, labels_inner, told = self._points(x, sigma, slopes, inner)
                slopes += run.directions(points, labels_inner, told, self._shift(known + 1, len(points)))
                labels += labels_inner
        else:
            points, labels, told = self._points(x, sigma, slopes, inner)
            points, labels, told = [x, *points], [sigma, *labels], [run.told(i).to(x.dtype), *told]
            slopes += run.directions(points, labels, told, self._shift(known, len(points)))
            run.observe(i, sigma, x, slopes[-len(points)])
        c, scale, contrast = self.plan.steps[i]
        length = (scale * (self.plan.sigmas[i + 1] - self.plan.sigmas[i])).to(x.dtype)
        x = (1 + contrast).to(x.dtype) * x + length * self._average(i, x, sigma, slopes, known, c)
        history = (*state.history, *zip(slopes[-len(labels) :], labels, strict=True))
        return State(x, history, state.updates + 1)

    def _shift(self, slope, count):
        """What the time head adds to the noise embedding of the calls for ``count`` slopes from this one on, or None."""
        call, heads = slope - self.student.analytic, self.student.heads
        return heads["time"](call, count) if "time" in heads and call >= 0 else None

    def _average(self, i, x, sigma, slopes, known, c):
        """What step i follows, table and heads together; known: how many slopes there were before it."""
        heads = self.student.heads
        if "sample" in heads:
            features = slope_features(x, sigma, slopes[known], slopes[known - 1] if known else None)
            change = heads["sample"](i, features)
            c = c.to(change) + change
        direction = combine(c, slopes)
        lift = heads["spatial"](i, x, sigma, slopes, slopes[known]) if "spatial" in heads else None
        return direction if lift is None else direction + lift

    @staticmethod
    def _points(x, sigma, slopes, inner):
        """(states, labels, what the network is told) of the inner points that the slopes lead to from x at sigma."""
        labels = [label.to(x.dtype) for label, _, _ in inner]
        points = [x + (label - sigma) * combine(c, slopes) for label, (_, _, c) in zip(labels, inner, strict=True)]
        return points, labels, [told.to(x.dtype) for _, told, _ in inner]


def combine(coefficients: torch.Tensor, slopes: list[torch.Tensor]) -> torch.Tensor:
    """sum_j c_j g_j for slopes [B,...] and c [number of slopes], or [B, number of slopes]."""
    total = 0
    for c, slope in zip(coefficients.unbind(-1), slopes, strict=True):
        c = c.to(slope.dtype)
        total = total + (c.reshape(-1, *[1] * (slope.ndim - 1)) if c.ndim else c) * slope
    return total

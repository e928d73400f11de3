"""The solver "span": steps along a learned table (solvers/span_table.py)."""

import copy

import torch

from solvers.solver import Solver, State, register
from solvers.span_heads import slope_features
from solvers.span_table import PRESETS, SpanSolver
from torch_utils.errors import UserError

__all__ = ["PRESETS", "Span", "SpanSolver", "SpanStudent", "combine"]

SpanStudent = SpanSolver  # the former name


@register("span")
class Span(Solver):
    """The span solver: a learned table with a schedule and a first step of its own, ``SpanSolver`` in solvers/span_table.py.

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
        if not isinstance(predictor, SpanSolver):
            raise UserError("the solver 'span' needs its own trained student as predictor (SpanSolver)")
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
                points, labels_inner, sigma_cond = self._points(x, sigma, slopes, inner)
                slopes += run.directions(points, labels_inner, sigma_cond, self._shift(known + 1, len(points)))
                labels += labels_inner
        else:
            points, labels, sigma_cond = self._points(x, sigma, slopes, inner)
            points, labels, sigma_cond = [x, *points], [sigma, *labels], [run.sigma_cond(i).to(x.dtype), *sigma_cond]
            slopes += run.directions(points, labels, sigma_cond, self._shift(known, len(points)))
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
        return points, labels, [sigma_cond.to(x.dtype) for _, sigma_cond, _ in inner]


def combine(coefficients: torch.Tensor, slopes: list[torch.Tensor]) -> torch.Tensor:
    """sum_j c_j g_j for slopes [B,...] and c [number of slopes], or [B, number of slopes]."""
    total = 0
    for c, slope in zip(coefficients.unbind(-1), slopes, strict=True):
        c = c.to(slope.dtype)
        total = total + (c.reshape(-1, *[1] * (slope.ndim - 1)) if c.ndim else c) * slope
    return total

"""The solver "span": steps with a learned table (solvers/span_table.py)."""

import copy

import torch

from solvers.solver import Point, Solver, State, register
from solvers.span_heads import direction_features
from solvers.span_table import PRESETS, SpanSolver
from torch_utils.errors import UserError

__all__ = ["PRESETS", "Span", "SpanSolver", "SpanStudent", "combine"]

SpanStudent = SpanSolver  # the former name


@register("span")
class Span(Solver):
    """The span solver: a learned table with its own schedule and first step.

    x_{i+1} = (1 + delta_i) x_i + gain_i (s_{i+1} - s_i) sum_j c_ij g_j over all directions so far,
    g_j = (x_j - D(x_j, a_j s_j)) / s_j, with sum_j c_ij = 1; see solvers/span_table.py. LD3, S4S,
    DyWeight, GS, EPD and AMED's table are special cases.
    """

    summary = "span solver: learned schedule, times and coefficients; needs its table"
    can_teach = False
    can_learn = False
    needs_predictor = True
    own_schedule = True
    one_step = False

    def check_predictor(self, predictor):
        if not isinstance(predictor, SpanSolver):
            raise UserError("the solver 'span' needs a trained span solver as predictor (SpanSolver)")

    def setup(self, net, sigmas, predictor=None):
        solver = copy.copy(super().setup(net, sigmas, predictor))
        solver.student, solver.plan = predictor, predictor.plan()
        return solver

    def step(self, run, state, i):
        x, sigma, substeps = state.x, run.sigma(i, state.x), self.plan.substeps[i]
        directions, known, levels = [d for d, _ in state.history], self.student.directions_before(i), [sigma]
        if self.student.nested or not substeps or not directions:
            directions.append((yield run.at(x, i, self._shift(known))))
            # A run that starts inside the schedule has not made the evaluations before it.
            directions = [directions[0]] * (known + 1 - len(directions)) + directions
            points = self._points(x, sigma, directions, substeps, known)
            if points:
                directions += yield points
        else:
            directions = [directions[0]] * (known - len(directions)) + directions
            points = self._points(x, sigma, directions, substeps, known)
            directions += yield [Point(x, sigma, run.sigma_cond(i), i, self._shift(known)), *points]
        levels += [point.sigma for point in points]
        c, step_gain, state_gain = self.plan.steps[i]
        length = (step_gain * (self.plan.sigmas[i + 1] - self.plan.sigmas[i])).to(x.dtype)
        x = (1 + state_gain).to(x.dtype) * x + length * self._average(i, x, sigma, directions, known, c)
        history = (*state.history, *zip(directions[known:], levels, strict=True))
        return State(x, history, state.updates + 1)

    def _points(self, x, sigma, directions, substeps, known) -> list[Point]:
        """The intermediate points of an interval.

        x: state [B,C,H,W] at its start.
        sigma: noise level of x.
        directions: all directions so far.
        substeps: (noise level, sigma_cond, coefficients) of each point.
        known: number of directions before this interval.
        """
        levels = [level.to(x.dtype) for level, _, _ in substeps]
        return [
            Point(x + (level - sigma) * combine(c, directions), level, sigma_cond, shift=self._shift(known + 1 + k))
            for k, (level, (_, sigma_cond, c)) in enumerate(zip(levels, substeps, strict=True))
        ]

    def _shift(self, number):
        """The noise embedding offset [1,E] of the head "time" for direction ``number``, or None."""
        call, heads = number - self.student.analytic, self.student.heads
        return heads["time"](call, 1) if "time" in heads and call >= 0 else None

    def _average(self, i, x, sigma, directions, known, c):
        """The direction [B,C,H,W] of step i, from the table and the heads.

        x: state [B,C,H,W] at noise level sigma.
        directions: all directions so far.
        known: number of directions before this interval.
        c: coefficients of the table, [number of directions].
        """
        heads = self.student.heads
        if "sample" in heads:
            features = direction_features(x, sigma, directions[known], directions[known - 1] if known else None)
            change = heads["sample"](i, features)
            c = c.to(change) + change
        direction = combine(c, directions)
        lift = heads["spatial"](i, x, sigma, directions, directions[known]) if "spatial" in heads else None
        return direction if lift is None else direction + lift


def combine(coefficients: torch.Tensor, directions: list[torch.Tensor]) -> torch.Tensor:
    """The linear combination sum_j c_j g_j.

    coefficients: c, [number of directions] or [B, number of directions].
    directions: g, each [B,...].
    """
    total = 0
    for c, d in zip(coefficients.unbind(-1), directions, strict=True):
        c = c.to(d.dtype)
        total = total + (c.reshape(-1, *[1] * (d.ndim - 1)) if c.ndim else c) * d
    return total

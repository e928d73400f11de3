"""The solver "span": steps with a learned table (solvers/span_table.py)."""

import copy

import torch

from solvers.solver import Point, Solver, State, register
from solvers.span_heads import direction_features
from solvers.span_table import PRESETS, Moves, SpanSolver
from torch_utils.errors import UserError
from torch_utils.transfer import to_device

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

    student: SpanSolver | None = None
    moves: Moves | None = None

    def setup(self, net, sigmas, predictor=None):
        if self.moves is not None:
            return self
        return super().setup(net, sigmas, predictor).with_moves(predictor, predictor.plan().moves())

    def with_moves(self, student: SpanSolver, moves: Moves) -> "Span":
        """This solver with the factors of its steps, for runs of the same student."""
        solver = copy.copy(self)
        solver.student, solver.moves = student, moves
        return solver

    def step(self, run, state, i):
        x, sigma, substeps = state.x, run.sigma(i, state.x), self.moves.substeps[i]
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
        c, length, gain = self.moves.steps[i]
        direction = self._average(i, x, sigma, directions, known, c)
        x = scaled(gain, x) + scaled(length, direction)
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
        """The offset [1,E] of the head "time" or "blocks" for direction ``number``, or None."""
        call, head = number - self.student.analytic, self.student.shift_head
        return None if head is None or call < 0 else head(call, 1)

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
            c = to_device(c.to(change.dtype), change.device) + change
        direction = combine(c, directions)
        lift = heads["spatial"](i, x, sigma, directions, directions[known]) if "spatial" in heads else None
        return direction if lift is None else direction + lift


def scaled(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """factor times x, in the dtype of x. x itself if the factor is 1 and needs no gradient."""
    factor = factor.to(x.dtype)
    return x if _is(factor, 1.0) else factor * x


def combine(coefficients: torch.Tensor, directions: list[torch.Tensor]) -> torch.Tensor:
    """The linear combination sum_j c_j g_j.

    coefficients: c, [number of directions] or [B, number of directions].
    directions: g, each [B,...].

    Directions whose coefficient is exactly zero and needs no gradient cost nothing.
    """
    total = None
    for c, d in zip(coefficients.unbind(-1), directions, strict=True):
        if _is(c, 0.0):
            continue
        part = scaled(c.reshape(-1, *[1] * (d.ndim - 1)) if c.ndim else c, d)
        total = part if total is None else total + part
    return torch.zeros_like(directions[0]) if total is None else total


def _is(number: torch.Tensor, value: float) -> bool:
    """Whether a number of the CPU without gradient has this value.

    Others are not read, as the host could have to wait for them.
    """
    return number.ndim == 0 and number.device.type == "cpu" and not number.requires_grad and float(number) == value

"""A run of a solver in which the caller evaluates the network, as the pipelines of diffusers do."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from solvers.sampler import Sampler
from solvers.solver import Point, State


@dataclass(frozen=True)
class Call:
    """A planned call of the network.

    interval: number of the interval.
    inside: whether the call is inside the interval, not at its start.
    sigma: noise level of the latents before it, a scalar.
    sigma_cond: noise level that the network is conditioned on, and that scales the latents.
    """

    interval: int
    inside: bool
    sigma: torch.Tensor
    sigma_cond: torch.Tensor


class Walk:
    """A run of a solver in which the caller evaluates the network.

    run: the ``Sampler``.
    x: state [B,...] at the start.
    start: the call to start at. Default: None, the start of the schedule.

    ``point`` is the ``Point`` where the network is needed next. At the end of the schedule it is
    None, and ``state`` is the result.
    """

    point: Any
    _sent: list

    def __init__(self, run: Sampler, x, start: Call | None = None):
        self.run, self._lone = run, False
        if start is not None and start.inside:
            # The evaluations before this point were not made: an Euler step to the interval's end.
            self._lone, self.state, self.interval = True, State(x), start.interval
            self.point = Point(x, start.sigma.to(x), start.sigma_cond.to(x))
            return
        self._enter(x, 0 if start is None else start.interval)

    def _enter(self, x, i: int) -> None:
        self.run, first = self.run.tail(i)
        self.point = None
        if first < self.run.intervals:
            self._begin(State(x), first)
            self._proceed()
        else:
            self.state = State(x)

    def _begin(self, state: State, i: int) -> None:
        """Starts the step from schedule point i."""
        self.state, self.interval = state, i
        self._step = self.run.solver.step(self.run, state, i)
        self._sent = []  # what the step has received so far

    def _proceed(self, *answer) -> None:
        """Goes to the next point. answer: direction [B,...] at the current one."""
        self.point = None
        while self.interval < self.run.intervals:
            if answer:
                self._sent.append(answer[0])
            try:
                request: Any = self._step.send(*answer or [None])
            except StopIteration as finished:
                self._begin(finished.value, self.interval + self.run.solver.stride(self.interval, self.run.intervals))
                answer = ()
                continue
            self._listed = isinstance(request, list)
            point = request[0] if self._listed else request  # one only: solvers of parallel points are refused
            d = self.run.known_direction(point)
            if d is None:
                self.point = point
                return
            answer = (d,)

    @property
    def inside(self) -> bool:
        """Whether ``point`` lies inside an interval, not at its start."""
        return self.point.index is None and not self._lone

    def answer(self, denoised: torch.Tensor) -> None:
        """Goes to the next point. denoised: the denoised image [B,...] at the current one."""
        point = self.point
        d = (point.x - denoised) / self.run.divisor(point)
        if self._lone:
            self._lone = False
            self._enter(point.x + (self.run.sigma(self.interval + 1, d) - point.sigma) * d, self.interval + 1)
        else:
            self._proceed([d] if self._listed else d)

    def change(self, x) -> None:
        """Starts the current step again from another state [B,...]."""
        if self._lone:
            self.point.x = x
            return
        self._begin(State(x, self.state.history, self.state.updates), self.interval)
        self._proceed()

    def __deepcopy__(self, memo):
        """The copy repeats the current step, because a generator cannot be copied."""
        walk = object.__new__(Walk)
        memo[id(self)] = walk
        walk.run = copy.deepcopy(self.run, memo)
        kept = {k: v for k, v in self.__dict__.items() if k not in ("run", "_step", "_sent")}
        walk.__dict__ |= copy.deepcopy(kept, memo)
        if not self._lone and self.point is not None:
            point = walk.point
            sent = copy.deepcopy(self._sent, memo)
            walk._begin(walk.state, walk.interval)
            walk.run.predict = lambda x, i: walk.run.predicted  # the network's bottleneck was read already
            for d in [None, *sent]:
                walk._step.send(d)
            del walk.run.predict
            walk._sent, walk.point = sent, point
        return walk

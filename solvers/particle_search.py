"""Search along the path: a reward chooses among several stochastic steps.

Kim et al. 2025, "Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover
Budget Forcing" (arXiv 2503.19385).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.denoiser import member
from models.inputs import initial_state
from solvers.sampler import Sampler
from solvers.solver import Solver, State, make_solver
from torch_utils.errors import UserError

METHODS = ("rollover", "quota", "resample")


class Rollover:
    """Bookkeeping of rollover budget forcing, as published.

    Every step may use ``quota`` evaluations. If a candidate has a better reward than all before, it
    is taken, and the rest of the quota is added to that of the next step. If the quota is used up,
    the best candidate of the step is taken. The search stays at the last step but one.

    budget: number of all evaluations.
    first: number of evaluations for starting noises.
    steps: number of steps.

    Attributes: step (from 0), quota (of the current step), best (reward), spent (evaluations).
    Raises UserError if a step would have less than one evaluation.
    """

    def __init__(self, budget: int, first: int, steps: int):
        self.budget, self.steps, self.spent = budget, steps, first
        self.share = (budget - first) // steps
        if first < 1 or self.share < 1:
            raise UserError(
                f"budget={budget} is too small for {first} starting noises and {steps} steps:"
                f" it must be at least {max(first, 1) + steps}"
            )
        self.step, self.quota, self.used, self.best = 0, self.share, 1, -math.inf

    @property
    def finished(self) -> bool:
        """Whether the next evaluation would reach the budget."""
        return self.spent + 1 >= self.budget

    def begin(self, reward: float) -> None:
        """Set the reward of the best starting noise."""
        self.best = reward

    def offer(self, reward: float) -> str:
        """Count a candidate of the current step.

        Returns "take" (continue from this candidate), "best" (continue from the best candidate of
        the step) or "again" (try another one).
        """
        self.spent += 1
        better, may_go = reward > self.best, self.step < self.steps - 2
        self.best = max(self.best, reward)
        decision = "again"
        if better and may_go:
            decision, self.quota = "take", self.quota - self.used + self.share
        elif may_go and self.used % self.quota == 0:
            decision, self.quota = "best", self.share
        if decision != "again":
            self.step, self.used = self.step + 1, 0
        self.used += 1
        return decision


@dataclass(frozen=True)
class Candidate:
    """An evaluated state.

    state: the state.
    direction: direction d = (x - D) / sigma at the state, [1,C,H,W].
    reward: reward of the denoised image.
    index: schedule point of the state.
    """

    state: State
    direction: torch.Tensor
    reward: float
    index: int


@dataclass(frozen=True)
class Found:
    """Result of a search.

    x: the image [1,C,H,W].
    reward: reward of this image.
    nfe: number of all network evaluations.
    index: schedule point where the deterministic solver started.
    """

    x: torch.Tensor
    reward: float
    nfe: int
    index: int


class PathSearch:
    """One image by search along the path of the reverse SDE.

    Every candidate is one stochastic step and one evaluation; its denoised image gets a reward. At
    the end a deterministic solver completes the path with the best reward; the budget includes its
    evaluations. The published code returns a denoised image of the last step instead, which may be
    worse than the best one.

    net: the denoiser.
    reward: function from denoised images [1,C,H,W] to a number; larger is better.
    noise: returns standard normal noise [1,C,H,W] for each stochastic step.
    sigmas: noise levels [N] of the steps, decreasing.
    cond: keyword arguments of net. Default: none.
    finish: deterministic solver that completes the path. Default: Euler's method.
    """

    def __init__(self, net, reward: Callable, noise: Callable, sigmas, cond=None, finish: Solver | None = None):
        self.net, self.reward, self.sigmas = net, reward, torch.as_tensor(sigmas, dtype=torch.float64)
        self.cond, self.finish = cond, finish or make_solver("euler")
        self._run = Sampler(net, make_solver("sde", {"max_order": 1}), self.sigmas, cond=cond, noise=noise)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def evaluate(self, state: State, index: int) -> Candidate:
        """One evaluation of the network and of the reward."""
        run = self._run
        direction = run.evaluate(run.at(state.x, index))
        denoised = state.x - run.sigma(index, state.x) * direction
        return Candidate(state, direction, float(self.reward(denoised)), index)

    def start(self, latents: torch.Tensor) -> Candidate:
        """The evaluated state of unit-variance noise [1,C,H,W]."""
        return self.evaluate(State(initial_state(self.net, latents, self._run.sigma(0, latents), self.cond)), 0)

    def propose(self, candidate: Candidate) -> Candidate:
        """One stochastic step from a candidate, and its evaluation."""
        self._run.cached_evals = {candidate.index: (candidate.direction, None)}
        try:
            state = self._run.advance(candidate.state, candidate.index)
        finally:
            self._run.cached_evals = {}
        return self.evaluate(state, candidate.index + 1)

    def complete(self, candidate: Candidate) -> Found:
        """The image at the end of a candidate's path, by the deterministic solver."""
        rest = self.sigmas[candidate.index :]
        x, extra = candidate.state.x, 0
        if len(rest) > 1:
            cached = {0: (candidate.direction, None)}
            run = Sampler(self.net, self.finish, rest, cond=self.cond, cached_evals=cached)
            state, i = State(x), 0
            while i < run.intervals:
                state = run.advance(state, i)
                i += run.solver.stride(i, run.intervals)
            x, extra = state.x, run.nfe
        return Found(x, float(self.reward(x)), self._run.nfe + extra, candidate.index)

    def to_finish(self, index: int) -> int:
        """Number of calls that ``complete`` needs from an evaluated schedule point."""
        intervals = self.steps - index
        return self.finish.evaluations(intervals) - 1 if intervals else 0

    @property
    def per_call(self) -> int:
        """Network evaluations per call; candidates are counted in calls."""
        return member(self.net, "evals_per_call")


def search_path(
    search: PathSearch,
    latents: list[torch.Tensor],
    budget: int,
    method: str = "rollover",
    temperature: float = 0.1,
    uniform: Callable[[], float] | None = None,
) -> Found:
    """Search for an image with at most ``budget`` evaluations.

    search: the network, reward and schedule.
    latents: starting noises of unit variance, each [1,C,H,W].
    budget: number of all evaluations.
    method: rule of the search. Default rollover.
        "rollover": see ``Rollover``.
        "quota": every step tries the same number of candidates and takes the best (SVDD, Li et al.
        2024).
        "resample": the starting noises are particles, resampled before each step in proportion to
        exp(reward / temperature) (sequential Monte Carlo).
    temperature: for "resample". Default 0.1.
    uniform: for "resample": returns a random number in [0, 1). Default: torch's generator.

    Raises UserError for an impossible budget.
    """
    if method not in METHODS:
        raise UserError(f"search={method!r}: choose from {', '.join(METHODS)}")
    budget = budget // search.per_call - search.to_finish(0)
    started = [search.start(noise) for noise in latents]
    if method == "resample":
        return search.complete(_resample(search, started, budget, temperature, uniform))
    best = current = max(started, key=_reward)
    book = Rollover(budget, len(latents), search.steps)
    book.begin(best.reward)
    tried: list[Candidate] = []
    while not book.finished and current.index < search.steps:
        candidate = search.propose(current)
        tried.append(candidate)
        best = max(best, candidate, key=_reward)
        decision = book.offer(candidate.reward)
        if method == "quota":
            decision = "best" if len(tried) == book.share else "again"
        if decision != "again":
            current = candidate if decision == "take" else max(tried, key=_reward)
            tried = []
    return search.complete(best)


def _reward(candidate: Candidate) -> float:
    return candidate.reward


def _resample(search: PathSearch, particles: list[Candidate], budget: int, temperature: float, uniform) -> Candidate:
    """The best candidate of all steps, with particles resampled before each step."""
    if len(particles) * (search.steps + 1) > budget or temperature <= 0:
        raise UserError(
            f"resample: {len(particles)} particles over {search.steps} steps need a larger budget,"
            f" {len(particles) * (search.steps + 1) + search.to_finish(0)}, and temperature > 0"
        )
    best = max(particles, key=_reward)
    for _ in range(search.steps):
        rewards = torch.tensor([one.reward for one in particles], dtype=torch.float64)
        shares = ((rewards - rewards.max()) / temperature).exp().cumsum(0)
        offset = float(torch.rand(())) if uniform is None else uniform()
        points = (torch.arange(len(particles), dtype=torch.float64) + offset) / len(particles) * shares[-1]
        chosen = torch.searchsorted(shares, points).clamp(max=len(particles) - 1).tolist()
        particles = [search.propose(particles[row]) for row in chosen]
        best = max([best, *particles], key=_reward)
    return best

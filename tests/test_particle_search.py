"""Search along the path: the published bookkeeping, and the search itself on closed forms."""

import pytest
import torch
from systems_golden import Function, cases

from solvers import sample
from solvers.particle_search import PathSearch, Rollover, search_path
from torch_utils.errors import UserError

SINGLE = [case for case in cases("flow/rollover") if case["batch"] == 1]


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: f"{case['max_nfe']}-{case['max_steps']}")
def test_bookkeeping_is_as_published(case):
    book = Rollover(budget=case["max_nfe"], first=case["init_n_particles"], steps=case["max_steps"])
    book.begin(max(case["script"][0]))
    for entry, rewards in zip(case["log"], case["script"][1:], strict=False):
        assert not book.finished
        book.offer(rewards[0])
        assert (book.spent, book.step) == (entry["nfe"], entry["step"][0])
        assert (book.quota, book.used) == (entry["budget"][0], entry["used"][0])
        assert book.best == pytest.approx(entry["best"][0], abs=1e-5)
    assert book.finished


def test_a_step_without_evaluations_is_refused():
    with pytest.raises(UserError, match="it must be at least 15"):
        Rollover(budget=14, first=5, steps=10)


class Counting(Function):
    """Data N(0, 0.5^2); counts evaluations."""

    def __init__(self):
        super().__init__(lambda x, sigma: x * 0.25 / (0.25 + sigma**2))
        self.calls = 0

    def forward(self, x, sigma, **cond):
        self.calls += len(x)
        return super().forward(x, sigma, **cond)


SIGMAS = [20.0, 8.0, 3.0, 1.2, 0.5, 0.2, 0.05]


def problem(seed=0):
    """(search, generator): images with a large mean are better."""
    generator, net = torch.Generator().manual_seed(seed), Counting()

    def noise():
        return torch.randn(1, 1, 4, 4, generator=generator, dtype=torch.float64)

    return PathSearch(net, lambda image: image.mean(), noise, SIGMAS), noise, net


@pytest.mark.parametrize("method", ["rollover", "quota", "resample"])
def test_a_search_keeps_its_budget_and_beats_plain_samples(method):
    found, plain = [], []
    for seed in range(12):
        search, noise, net = problem(seed)
        result = search_path(search, [noise() for _ in range(5)], budget=48, method=method, uniform=lambda: 0.3)
        assert result.nfe == net.calls <= 48
        assert result.x.isfinite().all()
        assert result.reward == pytest.approx(float(result.x.mean()))
        found.append(result.reward)
        plain.append(float(sample(net, noise(), solver="euler", sigmas=SIGMAS).mean()))
    # The mean of 16 pixels has a standard deviation of 0.125 in plain samples.
    assert sum(found) / 12 > sum(plain) / 12 + 0.15


def test_a_path_that_is_finished_at_once_is_the_deterministic_sample():
    search, noise, net = problem()
    start = noise()
    found = search.complete(search.start(start))
    torch.testing.assert_close(found.x, sample(net, start, solver="euler", sigmas=SIGMAS), rtol=0, atol=1e-12)
    assert found.nfe == len(SIGMAS) - 1


def test_what_is_impossible_is_said():
    search, noise, _ = problem()
    with pytest.raises(UserError, match="choose from rollover, quota, resample"):
        search_path(search, [noise()], 40, "beam")
    with pytest.raises(UserError, match="resample: 5 particles over 6 steps need a larger budget, 40"):
        search_path(search, [noise() for _ in range(5)], 30, "resample")

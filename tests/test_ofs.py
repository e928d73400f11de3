"""OFS: its bound against quadrature and Euler's error, its schedules against all others."""

import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from toy import ToyNet

from models.denoiser import Denoiser
from solvers import sample
from solvers.search.ofs import bound_costs, ofs_cost
from solvers.search.problem import Problem
from torch_utils.errors import UserError
from training.schedule_search import optimize

SMALL = {"num_steps_tea": 13, "num_warmup": 3}


class GaussianNet(Denoiser):
    """The exact denoiser of N(mean, std^2); the two halves of the image have their own std."""

    img_channels, img_resolution = 1, 2

    def __init__(self, mean=0.3, stds=(0.2, 1.5)):
        super().__init__()
        self.mean = mean
        self.variance = torch.tensor(stds, dtype=torch.float64).square().repeat_interleave(2).reshape(1, 1, 2, 2)
        self.data_mean, self.data_std = torch.full((1, 2, 2), mean), float(self.variance.mean().sqrt())

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma, dtype=x.dtype)
        return self.mean + self.variance / (self.variance + sigma**2) * (x - self.mean)

    def at(self, x, s, t):
        """Where the exact flow takes x from s to t."""
        return self.mean + (x - self.mean) * ((self.variance + t**2) / (self.variance + s**2)).sqrt()


def problem(**changes):
    return Problem(**({"net": GaussianNet(), "solver": "euler", "num_steps": 5, "batch": 2} | changes))


def exact_denoised(net, x, sigmas):
    """D along the exact trajectory that starts in x at sigmas[0]."""
    return torch.stack([net(net.at(x, sigmas[0], s), s) for s in sigmas])


@pytest.mark.parametrize("spread", [0.0, 1.5, 40.0])
def test_costs_are_the_integrals(spread):
    net = GaussianNet()
    sigmas = torch.logspace(np.log10(80), np.log10(0.002), 161, dtype=torch.float64)
    x = 80 * torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cost = bound_costs(exact_denoised(net, x, sigmas), sigmas, spread)
    assert cost.dtype == torch.float64 and not cost.tril().any()
    for i, j in ((0, 1), (0, 80), (40, 100), (70, 160), (150, 160)):
        start, end, last = (float(sigmas[k]) for k in (i, j, 160))
        held = net(net.at(x, 80.0, start), start)

        def gap(u, held=held):
            difference = net(net.at(x, 80.0, 1 / u), 1 / u) - held
            return float(difference.square().mean(dim=(1, 2, 3)).sqrt().mean())

        integral = quad(gap, 1 / start, 1 / end, epsrel=1e-9, limit=400)[0]
        weight = end * np.sqrt((spread**2 + last**2) / (spread**2 + end**2))
        assert float(cost[i, j]) == pytest.approx(weight * integral, rel=4e-3)


def test_bound_bounds_euler_and_the_open_loop_does_not():
    """For Gaussian data the bound holds for every schedule, if no direction exceeds the spread.

    With errors that are not fed back it does not.
    """
    net, rng = GaussianNet(), np.random.default_rng(0)
    sigmas = torch.logspace(np.log10(80), np.log10(0.002), 101, dtype=torch.float64)
    latents = torch.randn(16, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoised = exact_denoised(net, 80 * latents, sigmas)
    target = net.at(80 * latents, 80.0, 0.002)
    costs = {spread: bound_costs(denoised, sigmas, spread) for spread in (0.0, 1.5, 10.0)}
    broken, ratios = 0, []
    for _ in range(40):
        chain = [0, *sorted(rng.choice(np.arange(1, 100), rng.integers(1, 9), replace=False).tolist()), 100]
        x = sample(net, latents, solver="euler", sigmas=sigmas[chain])
        error = float((x - target).flatten(1).square().mean(dim=1).sqrt().mean())
        bounds = {spread: float(cost[chain[:-1], chain[1:]].sum()) for spread, cost in costs.items()}
        assert error <= bounds[1.5] <= bounds[10.0]
        ratios.append(bounds[1.5] / error)
        broken += bounds[0.0] < error
    assert broken > 30 and np.median(ratios) < 1.5  # it is also close


def test_every_denoiser_that_does_not_expand_is_bounded():
    """D = tanh of x times a slope of at most 1: nothing Gaussian about it."""

    class Tanh(GaussianNet):
        def forward(self, x, sigma):
            return torch.tanh(x / (1 + torch.as_tensor(sigma, dtype=x.dtype)))

    net = Tanh()
    sigmas = torch.logspace(np.log10(80), np.log10(0.002), 401, dtype=torch.float64)
    latents = torch.randn(8, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = sample(net, latents, solver="heun", sigmas=sigmas, return_trajectory=True)
    cost = bound_costs(torch.stack([net(x, s) for x, s in zip(states, sigmas, strict=True)]), sigmas, 1e6)
    for chain in ([0, 200, 400], [0, 100, 250, 400], [0, 50, 180, 230, 300, 400]):
        x = sample(net, latents, solver="euler", sigmas=sigmas[chain])
        error = float((x - states[-1]).flatten(1).square().mean(dim=1).sqrt().mean())
        assert 0 < error < float(cost[chain[:-1], chain[1:]].sum())


@pytest.mark.parametrize("trajectories", ["teacher", "noised"])
@pytest.mark.parametrize("afs", [False, True, "data"])
def test_schedule_is_the_cheapest_of_all(trajectories, afs):
    task = problem(afs=afs)
    found = optimize(task, "ofs", {**SMALL, "trajectories": trajectories})
    teacher = task.teacher("ipndm", 13, "logsnr", 7.0)
    parts = [len(s) * ofs_cost(task, s, trajectories, 10.0, teacher) for s in task.batches(3)]
    cost = sum(parts) / 3
    chains = [(0, *inner, 12) for inner in itertools.combinations(range(1, 12), 3)]
    best = min(chains, key=lambda chain: float(cost[list(chain[:-1]), list(chain[1:])].sum()))
    grid = np.geomspace(80, 0.002, 13)
    np.testing.assert_allclose(found.sigmas, grid[list(best)], rtol=1e-9)
    assert found.sigmas[0] == pytest.approx(80) and found.sigmas[-1] == pytest.approx(0.002)
    assert all(a > b for a, b in itertools.pairwise(found.sigmas))
    # 12 intervals and the last point; the teacher alone, and 13 points beside its trajectory.
    assert found.evaluations == 3 * (13 if trajectories == "teacher" else 12 + 13)


def test_afs_is_charged_for_what_it_takes_the_image_for():
    """The published form is wrong about this data's mean, the other about its halves' spread."""
    teacher = problem().teacher("ipndm", 13, "logsnr", 7.0)
    net = GaussianNet(mean=0.9)
    none, published, fitted = (
        ofs_cost(problem(afs=afs, net=net), [5, 6], "teacher", 10.0, teacher) for afs in (False, True, "data")
    )
    assert torch.equal(none[1:], published[1:]) and torch.equal(none[1:], fitted[1:])
    assert published[0, 6] > 1.2 * none[0, 6] and fitted[0, 6] < 0.6 * published[0, 6]


def test_noised_trajectories_do_not_repeat_the_teachers_noise():
    """Teacher images with fresh noise: for exact Gaussian data the same law, other samples."""
    task = problem()
    seeds = list(range(400))
    fine = task.teacher("ipndm", 81, "logsnr", 7.0)
    ends = sample(task.net, task.noise(seeds)[0], **fine)
    assert abs(float((ends * task.fresh_noise(seeds)()).mean())) < 0.05
    assert torch.equal(task.fresh_noise(seeds)(), task.fresh_noise(seeds)())
    assert not torch.equal(task.fresh_noise([3])(), task.noise([3])[0].float())
    costs = [ofs_cost(task, seeds, kind, 10.0, fine) for kind in ("teacher", "noised")]
    assert not torch.equal(*costs)
    # Far from the data, where a straight line and the flow are close, so are the costs.
    torch.testing.assert_close(costs[1][0, 10:30], costs[0][0, 10:30], rtol=0.15, atol=0)


def test_seeds_and_batches():
    first, again, parts, other = (
        optimize(problem(net=ToyNet(), seed=seed, batch=batch), "ofs", {**SMALL, "num_steps_tea": 41}).sigmas
        for seed, batch in ((0, 3), (0, 3), (0, 2), (1, 3))
    )
    assert first == again == parts and other != first


def test_resume(tmp_path, monkeypatch):
    """A run that dies in its second batch goes on there, with the same result and the same bill."""
    from solvers.search import ofs

    whole = optimize(problem(net=ToyNet()), "ofs", {**SMALL, "num_warmup": 5})
    real, calls = ofs.ofs_cost, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(ofs, "ofs_cost", dying)
    with pytest.raises(KeyboardInterrupt):
        optimize(problem(net=ToyNet(), state_path=tmp_path / "s"), "ofs", {**SMALL, "num_warmup": 5})
    done = optimize(problem(net=ToyNet(), state_path=tmp_path / "s"), "ofs", {**SMALL, "num_warmup": 5})
    assert len(calls) == 4 and (done.sigmas, done.evaluations) == (whole.sigmas, whole.evaluations)


@pytest.mark.parametrize(
    "options, changes, message",
    [
        ({"num_steps_tea": 4}, {}, "num_steps=5: OFS chooses 2 to 4"),
        ({"num_warmup": 0}, {}, "num_warmup >= 1"),
        ({"spread": -1.0}, {}, "spread=-1.0"),
        ({"spread": float("nan")}, {}, "spread=nan"),
        ({"solver_tea": "edm"}, {}, "'edm' cannot be the teacher"),
        ({"trajectories": "x"}, {}, "choose from teacher, noised"),
        ({}, {"net": GaussianNet(mean=float("nan"))}, "cost matrix of OFS is not finite"),
    ],
)
def test_mistakes(options, changes, message):
    with pytest.raises(UserError, match=message):
        optimize(problem(**changes), "ofs", {**SMALL, **options})


def test_a_wider_spread_moves_points_to_high_noise():
    """With errors forgotten on the way, the end of the sampling is all that counts."""
    found = [
        optimize(problem(), "ofs", {**SMALL, "num_steps_tea": 81, "spread": spread}).sigmas
        for spread in (0.0, 0.3, 10.0)
    ]
    assert all(a[k] < b[k] for a, b in itertools.pairwise(found) for k in (1, 2, 3))

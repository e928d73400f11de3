"""The solver ``sde``: against the published MR sampler, closed forms, and its own noise."""

import math

import pytest
import torch
from systems_golden import Function, arrays, assert_relative, cases

from solvers import SOLVERS, sample
from torch_utils.errors import UserError

RUNS = [c for c in cases("mrs/sampler") if c["solver_type"] == "sde" and (c["order"] == 1 or c["nfe"] >= 10)]


def mr_problem(case, data):
    """A recorded run: (denoiser of the residual, start, noise levels, residual -> state).

    z = (x_t - mu) / alpha = (x_0 - mu) + sigma noise with sigma = sigma_bar / alpha; the network of
    the runs is a formula.
    """
    i, key, strength = case["case"], f"s{case['seed']}_{case['max_sigma']}", case["max_sigma"] / 255
    mu, alphas, bars, times = (data[k] for k in (f"mu__{key}", f"alphas__{i}", f"sigmas__{i}", f"timesteps__{i}"))
    sigmas = bars / alphas

    def network(x, t):
        wave = 0.2 * torch.sin(3 * x + 0.05 * t) - 0.1 * mu * math.cos(0.03 * t)
        return 1.3 * torch.tanh(2.0 * (x - mu) + 0.3 * mu) + wave

    def denoised(z, sigma):
        k = int((sigmas - sigma).abs().argmin())
        a, bar, x = float(alphas[k]), float(bars[k]), mu + float(alphas[k]) * z
        output = network(x, float(times[k]))
        if case["fit_target"] == "noise":
            return z - float(sigmas[k]) * output
        if case["fit_target"] == "data":
            return output - mu
        if case["parameterization"] == "data":
            return a * x - bar / strength * output + (1 - a) * mu - mu
        return z - float(sigmas[k]) * ((output * a + (x - mu) * bar / strength) / strength)

    start = (data[f"start__{key}"] - mu) / alphas[0]
    return Function(denoised), start, sigmas, lambda z: mu + alphas[-1] * z


@pytest.mark.parametrize("case", RUNS, ids=lambda c: f"{c['case']}-order{c['order']}-{c['parameterization']}")
def test_equals_the_published_stochastic_sampler(case):
    data = arrays("mrs/sampler")
    net, start, sigmas, back = mr_problem(case, data)
    draws = iter(data[f"noise__s{case['seed']}_n{case['nfe']}"])
    options = {"max_order": case["order"], "predict_x0": case["parameterization"] == "data"}
    z = sample(
        net,
        start / sigmas[0],
        sigmas=sigmas,
        solver="sde",
        noise=lambda: next(draws),
        lower_order_final=False,
        **options,
    )
    assert_relative(back(z), data[f"last__{case['case']}"], 1e-9)


def seeded_noise(shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [2, 3, 7])
def test_a_point_of_data_keeps_exactly_the_noise_of_the_last_level(order, steps):
    """With D constant the reverse SDE is solved exactly: x - D ~ N(0, sigma_last^2)."""
    shape = (4000, 1, 4, 4)
    point = torch.full((1, 1, 4, 4), 0.3, dtype=torch.float64)
    x = sample(
        Function(lambda x, sigma: point.expand_as(x)),
        seeded_noise(shape, 0)(),
        solver="sde",
        max_order=order,
        num_steps=steps,
        sigma_min=0.5,
        sigma_max=10.0,
        noise=seeded_noise(shape),
    )
    assert (x - point).mean().abs() < 0.01
    assert abs(float((x - point).std()) / 0.5 - 1) < 0.01


STD = 0.7


def gaussian(x, sigma):
    return x * STD**2 / (STD**2 + sigma**2)


def spread(steps, **options) -> float:
    """Standard deviation at the end over the exact one, for data N(0, STD^2)."""
    shape = (20000, 1, 2, 2)
    x = sample(
        Function(gaussian),
        seeded_noise(shape, 0)() * math.sqrt(1 + (STD / 20.0) ** 2),
        solver="sde",
        num_steps=steps,
        sigma_min=0.05,
        sigma_max=20.0,
        schedule_type="logsnr",
        noise=seeded_noise(shape),
        **options,
    )
    return float(x.std()) / math.sqrt(STD**2 + 0.05**2)


@pytest.mark.parametrize("options", [{"max_order": 1}, {}, {"midpoint": True}, {"predict_x0": False}], ids=str)
def test_variance_of_gaussian_data_is_right_with_many_steps(options):
    few, many = abs(spread(9, **options) - 1), abs(spread(101, **options) - 1)
    assert many < 0.03
    assert many < few


def test_second_order_is_better_than_first():
    assert abs(spread(17) - 1) < 0.5 * abs(spread(17, max_order=1) - 1)


def test_noise_is_drawn_once_per_interval_and_none_at_zero_is_the_mean():
    shape, draws = (2, 1, 8, 8), []

    def noise():
        draws.append(1)
        return torch.zeros(shape, dtype=torch.float64)

    latents = seeded_noise(shape)()
    settings = {"solver": "sde", "sigmas": [10.0, 3.0, 1.0, 0.2]}
    sample(Function(gaussian), latents, noise=noise, **settings)
    assert len(draws) == 3


def test_roles_and_options():
    solver = SOLVERS["sde"]
    assert solver.stochastic and not solver.can_learn and not solver.can_teach
    with pytest.raises(UserError, match="midpoint=True needs"):
        solver(midpoint=True, predict_x0=False)

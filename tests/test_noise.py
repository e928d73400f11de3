"""Noise processes: one interface, time <-> noise level is a bijection, correct derivative."""

import pytest
import torch

from models.noise import (
    CosineNoise,
    DiscreteTime,
    LinearNoise,
    NoiseProcess,
    RectifiedFlow,
    VariancePreserving,
    VPTime,
)

ALPHAS = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
PROCESSES = {
    "VPTime": VPTime(0.002, 80.0),
    "LinearNoise": LinearNoise(),
    "CosineNoise": CosineNoise(),
    "DiscreteTime": DiscreteTime(ALPHAS),
    "VariancePreserving": VariancePreserving(ALPHAS, "v_prediction"),
    "RectifiedFlow": RectifiedFlow(1000, shift=3.0),
}
WITH_NETWORK = [name for name in PROCESSES if name != "VPTime"]


def levels(process: NoiseProcess) -> torch.Tensor:
    ends = torch.tensor([process.sigma_min, process.sigma_max], dtype=torch.float64).log()
    return torch.linspace(*ends.tolist(), 101, dtype=torch.float64).exp()


@pytest.mark.parametrize("name", PROCESSES)
def test_every_process_maps_its_range_one_to_one_to_times(name):
    process = PROCESSES[name]
    sigma = levels(process)
    t = process.sigma_inv(sigma)
    assert isinstance(process, NoiseProcess) and t.dtype == torch.float64
    assert (t.diff() > 0).all() and t[0] >= 0 and t[-1] <= 1 + 1e-6
    torch.testing.assert_close(process.sigma(t), sigma, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", WITH_NETWORK)
def test_timesteps_are_those_of_a_training_with_a_thousand_steps(name):
    steps = PROCESSES[name].timestep(levels(PROCESSES[name]))
    assert (steps.diff() > 0).all() and -0.01 < steps[0] < 3 and steps[-1] < 1000  # a shifted flow begins at 3
    assert steps[-1] > 980  # the cosine process stops at sigma 80


@pytest.mark.parametrize("name", ["VariancePreserving", "RectifiedFlow"])
def test_timesteps_lead_back_to_the_noise_level(name):
    sigma = levels(PROCESSES[name])
    back = PROCESSES[name].sigma_of_timestep(PROCESSES[name].timestep(sigma))
    torch.testing.assert_close(back, sigma, rtol=1e-7, atol=0)


def test_the_derivative_is_that_of_automatic_differentiation():
    process = PROCESSES["VPTime"]
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64, requires_grad=True)
    process.sigma(t).sum().backward()
    torch.testing.assert_close(process.dsigma_dt(t.detach()), t.grad, rtol=1e-9, atol=0)

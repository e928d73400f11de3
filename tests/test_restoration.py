"""Mean-reverting diffusion (IR-SDE, Refusion): networks, noise process, sampling."""

import gzip
import json

import pytest
import torch
from systems_golden import GOLDEN, arrays, assert_relative, cases

from models import build_denoiser, zoo
from models.mr import RELEASED_CONFIGS, MRDenoiser
from models.noise import MeanReverting
from solvers import sample
from solvers.sampler import afs_direction
from torch_utils.errors import UserError

PROCESS = {"max_sigma": 50, "T": 100, "schedule": "cosine", "eps": 0.005}


def tiny(name: str) -> tuple:
    """(denoiser, arrays, settings) of a recorded network."""
    data, case = arrays(f"mrs/net_{name}"), cases(f"mrs/net_{name}")
    weights = {key.removeprefix("weights/"): v for key, v in data.items() if key.startswith("weights/")}
    return build_denoiser("mr", {"network": case["cls"], **case["kwargs"], **PROCESS}, weights), data, case


@pytest.mark.parametrize("name", ["ir_unet", "nafnet"])
def test_networks_equal_the_published_ones(name):
    net, data, case = tiny(name)
    for t in case["times"]:
        ours = net.model(data["xt"], data["cond"], torch.full((2,), float(t)))
        assert_relative(ours, data[f"out__{t}"], 3e-6)
    vector = net.model(data["xt"], data["cond"], torch.tensor(case["vec"], dtype=torch.float32))
    assert_relative(vector, data["out__vec"], 3e-6)


@pytest.mark.parametrize("name", ["ir_unet", "nafnet"])
def test_denoiser_is_the_network_in_our_coordinates(name):
    net, data, case = tiny(name)
    alphas = arrays("mrs/schedule")
    (i,) = (c["case"] for c in cases("mrs/schedule") if all(c[k] == v for k, v in PROCESS.items()))
    x_t, mu = data["xt"].double(), data["cond"].double()
    for t in case["times"]:
        alpha, sigma_bar = alphas[f"alpha_ir__{i}"][t], alphas[f"sigma_bar_ir__{i}"][t]
        x, sigma = mu + (x_t - mu) / alpha, float(sigma_bar / alpha)
        clean = x - sigma * data[f"out__{t}"]
        ours = net(2 * x - 1, 2 * sigma, mu=2 * mu - 1)
        assert_relative(ours, 2 * clean - 1, 1e-4)


@pytest.mark.parametrize(
    ("manifest", "preset"),
    [
        ("ir_unet_nf64_depth4", "ir_sde_sisr"),
        ("ir_unet_nf32_depth5", "ir_sde_deshadow"),
        ("nafnet_w64", "refusion"),
    ],
)
def test_published_weights_fit_strictly(manifest, preset):
    keys = json.loads(gzip.decompress((GOLDEN / f"mrs/manifest_{manifest}.json.gz").read_bytes()))
    with torch.device("meta"):
        net = MRDenoiser(**RELEASED_CONFIGS[preset])
    assert {name: list(value.shape) for name, value in net.model.state_dict().items()} == keys


@pytest.mark.parametrize("case", cases("mrs/schedule"), ids=lambda c: f"{c['schedule']}-{c['max_sigma']}-{c['eps']}")
def test_noise_process_equals_both_published_tables(case):
    data, i = arrays("mrs/schedule"), case["case"]
    for original, name in ((False, "ir"), (True, "mr")):
        settings = {**{k: case[k] for k in ("T", "schedule", "eps")}, "original_code": original}
        alphas = data[f"alpha_{name}__{i}"]
        assert_relative(MeanReverting.alphas(**settings), alphas, 1e-9)
        process = MeanReverting(case["max_sigma"], **settings)
        steps = torch.arange(1, case["T"] + 1, dtype=torch.float64)
        expected = 2 * data[f"sigma_bar_{name}__{i}"] / alphas
        torch.testing.assert_close(process.sigma(steps / case["T"]), expected[1:], rtol=1e-9, atol=0)
        torch.testing.assert_close(process.timestep(expected[1:]), steps, rtol=0, atol=1e-6)
        torch.testing.assert_close(process.alpha(expected[1:]), alphas[1:], rtol=1e-9, atol=0)


def test_the_range_in_images_from_minus_one_to_one():
    """For max_sigma 50 and eps 0.005: 0.00736 .. 78.43, twice the published numbers for [0, 1]."""
    process = MeanReverting(**PROCESS)
    assert process.sigma_min == pytest.approx(2 * 0.00368, rel=2e-3)
    assert process.sigma_max == pytest.approx(2 * 39.2152, rel=1e-5)


def test_sampling_starts_around_the_degraded_image():
    net, data, _ = tiny("ir_unet")
    mu = 2 * data["cond"] - 1
    latents = torch.randn(mu.shape, generator=torch.Generator().manual_seed(0))
    cond = net.make_cond(images=mu)
    states = sample(net, latents, solver="euler", num_steps=4, cond=cond, return_trajectory=True)
    torch.testing.assert_close(states[0], mu + net.sigma_max * latents)
    whole = sample(net, latents, solver="dpmpp", num_steps=4, cond=cond, thresholding=False, schedule_type="discrete")
    part = {"mu": mu[1:]}
    alone = sample(
        net, latents[1:], solver="dpmpp", num_steps=4, cond=part, thresholding=False, schedule_type="discrete"
    )
    torch.testing.assert_close(alone, whole[1:], rtol=1e-4, atol=1e-4)


def test_the_free_first_step_is_around_the_degraded_image():
    net, data, _ = tiny("nafnet")
    mu, sigma = 2 * data["cond"] - 1, torch.tensor(50.0)
    x = mu + sigma
    torch.testing.assert_close(afs_direction(net, x, sigma, True, {"mu": mu}), (x - mu) / (1 + 50.0**2) ** 0.5)


def test_what_is_wrong_is_said():
    net, data, case = tiny("nafnet")
    with pytest.raises(UserError, match="give --images"):
        net.make_cond()
    with pytest.raises(UserError, match="it takes no class"):
        net.make_cond(labels=1, images=data["cond"])
    with pytest.raises(UserError, match=r"expected \[B,3,H,W\]"):
        net.make_cond(images=data["cond"][:, :1])
    with pytest.raises(UserError, match="unknown restoration network 'UNet'"):
        build_denoiser("mr", {"network": "UNet"}, {})
    with pytest.raises(UserError, match="schedule 'sine'"):
        build_denoiser("mr", {"network": case["cls"], **case["kwargs"], "schedule": "sine"}, {})
    with pytest.raises(UserError, match=r"ir_sde_sisr has no direct address: .*image-restoration-sde"):
        zoo.resolve("ir_sde_sisr")

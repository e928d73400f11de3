"""Latent diffusion against the reference implementation and the official parameter list."""

import types

import pytest
import torch
from latent_nets import TOLERANCE, manifest, meta_weights, relative_error, same_settings, tiny_case

from models import build_denoiser
from models.building import build_empty
from models.denoiser import read_bottleneck
from models.ldm import VQ_F4_LDM, LDMDenoiser, load_ldm
from models.noise import DiscreteTime
from solvers import sample
from torch_utils.errors import UserError


def build(guidance_type="uncond", **changes):
    facts, weights, io = tiny_case("ldm_uncond_vq")
    return build_denoiser("ldm", {**facts["init_kwargs"], **changes}, weights, guidance_type), facts, io


def test_outputs_of_the_reference():
    net, facts, io = build()
    plain, _, _ = build(use_ema=False)
    checked = {}
    with torch.no_grad(), read_bottleneck(net) as reader:
        for i, sigma in enumerate(io["sigmas"]):
            x = io[f"x__{i}"]
            checked[f"D__{i}"] = net(x, sigma)
            checked[f"bottleneck_mean__{i}"] = reader.read(len(x))
            checked[f"D_plain_weights__{i}"] = plain(x, sigma)
            checked[f"F__{i}"] = net.unet(x / (1 + sigma**2).sqrt(), io[f"net_t__{i}"])
        checked["D__vec"] = net(io["x__vec"], io["sigma__vec"].reshape(-1, 1, 1, 1))
        checked["decode_image"] = net.decode(io["decode_z"])
        features = []
        handle = net.bottleneck.register_forward_hook(lambda module, inputs, output: features.append(output))
        for i in (2, 4):
            net(io[f"x__{i}"], io["sigmas"][i])
            checked[f"bottleneck__{i}"] = features.pop()
        handle.remove()
        assert torch.equal(net(io["x__vec"], io["sigma__vec"]), checked["D__vec"])
    named = [key for key in io if key.startswith(("D_", "F_", "bottleneck_"))] + ["decode_image"]
    assert sorted(checked) == sorted(named)  # nothing that the reference recorded is left out
    errors = {key: relative_error(checked[key], io[key]) for key in named}
    assert max(errors.values()) < TOLERANCE, errors
    assert relative_error(io["D_plain_weights__2"], io["D__2"]) > 1e-3  # the two sets of weights can be told apart
    assert (net.img_channels, net.img_resolution, net.label_dim, net.evals_per_call) == (3, 16, 0, 1)
    assert not net.training and not any(p.requires_grad for p in net.parameters()) and net.make_cond() == {}


@pytest.mark.parametrize("case, family", [("ldm_uncond_vq", "ldm"), ("sd_cfg_kl", "sd")])
def test_time_of_the_reference(case, family):
    facts, weights, io = tiny_case(case)
    net = build_denoiser(family, facts["init_kwargs"], weights)
    assert net.sigma_min == pytest.approx(facts["sigma_min"], rel=1e-6)
    assert net.sigma_max == pytest.approx(facts["sigma_max"], rel=1e-6)
    for dtype in (torch.float32, torch.float64):
        sigma, t = net.sigma(io["sched_t"].to(dtype)), net.sigma_inv(io["sched_sigma"].to(dtype))
        assert sigma.dtype == t.dtype == dtype
        torch.testing.assert_close(sigma.float(), io["sched_sigma_of_t"], rtol=2e-5, atol=0)
        torch.testing.assert_close(t.float(), io["sched_t_of_sigma"], rtol=1e-5, atol=1e-9)


def test_time_maps_are_inverse_and_hit_the_table():
    time = DiscreteTime.of_scaled_linear_betas(0.0015, 0.0195, 1000)
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(time.sigma(t), ((1 - alphas) / alphas).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(time.timestep(time.sigma(t)), torch.arange(1000.0).double(), rtol=0, atol=1e-4)
    t = torch.linspace(0.0004, 1.3, 777, dtype=torch.float64).reshape(7, 111)  # any shape, beyond the table as well
    torch.testing.assert_close(time.sigma_inv(time.sigma(t)), t, rtol=1e-9, atol=0)
    assert (time.sigma(t).flatten().diff() > 0).all()
    for whole in (1, torch.tensor(1)):  # no tables of integers
        assert time.sigma(whole) == time.sigma(torch.tensor(1.0))
        assert time.sigma_inv(whole) == time.sigma_inv(torch.tensor(1.0))
    assert time.sigma(1).item() == pytest.approx(83.8225, rel=1e-5)


@pytest.mark.parametrize("alphas", [[], [0.9], [0.9, 0.9], [0.5, 0.9], [0.5, 0.0], [0.5, -0.1], [1.5, 0.5]])
def test_noise_tables_have_to_fall(alphas):
    with pytest.raises(UserError, match="the noise table is unusable"):
        DiscreteTime(torch.tensor(alphas))


def test_full_size_parameter_list():
    facts = manifest("lsun_bedrooms_ldm")
    net = build_empty(LDMDenoiser, facts["init_kwargs"], "an LDM")
    official = meta_weights(facts)
    ema_map = facts["ema"]["map"]
    for name, average in ema_map.items():
        assert official[name].shape == official[average].shape
    selected = net.select_weights(official)
    assert {name: id(value) for name, value in selected.items() if name.startswith("model.")} == {
        name: id(official[average]) for name, average in ema_map.items()
    }
    net.load_state_dict(selected, strict=True, assign=True)
    own = [name for name in official if name.startswith(("model.", "first_stage_model."))]
    assert list(net.state_dict()) == own
    for name, known in (("sigma_min", 0.0387590), ("sigma_max", 83.8225)):
        assert getattr(net, name) == pytest.approx(known, rel=2e-6)
        assert getattr(net, name) == pytest.approx(facts["schedule"][name], rel=1e-6)


def test_published_settings_are_those_of_the_manifest():
    official = manifest("lsun_bedrooms_ldm")["init_kwargs"]
    assert same_settings(VQ_F4_LDM, official)


def test_latents_to_images_and_back_use_the_scale_factor():
    net, _, io = build()
    scaled, _, _ = build(scale_factor=0.5)
    assert torch.allclose(scaled.decode(0.5 * io["decode_z"]), net.decode(io["decode_z"]), atol=1e-6)
    images = io["decode_image"]
    assert torch.allclose(scaled.encode(images), 0.5 * net.encode(images))
    many = io["decode_z"].repeat(6, 1, 1, 1)  # more than are decoded at a time
    assert torch.allclose(net.decode(many)[-2:], net.decode(io["decode_z"]), atol=1e-5)


def test_official_file_to_samples(tmp_path):
    """A PyTorch-Lightning checkpoint with a foreign object, through the loader and a solver."""
    facts, weights, io = tiny_case("ldm_uncond_vq")
    path = tmp_path / "model.ckpt"
    extra = {"first_stage_model.loss.logvar": torch.zeros(())}
    torch.save({"state_dict": {**weights, **extra}, "callbacks": {types.SimpleNamespace: torch.device("cpu")}}, path)
    net = load_ldm(path, config=facts["init_kwargs"], guidance_type="uncond", guidance_rate=1)
    assert relative_error(net(io["x__2"], io["sigmas"][2]), io["D__2"]) < TOLERANCE
    latents = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x, info = sample(net, latents, solver="euler", num_steps=3, schedule_type="discrete", return_info=True)
    assert info.nfe == 2 and x.isfinite().all() and net.decode(x).shape == (2, 3, 64, 64)

    pruned = {name: value for name, value in weights.items() if not name.startswith("model_ema.")}
    torch.save(pruned, path)
    net = load_ldm(path, config=facts["init_kwargs"])
    assert relative_error(net(io["x__2"], io["sigmas"][2]), io["D_plain_weights__2"]) < TOLERANCE


def test_half_precision_options():
    net, _, io = build()
    expected = io["D__2"]
    net.autocast = torch.bfloat16
    with torch.no_grad():
        assert 1e-5 < relative_error(net(io["x__2"], io["sigmas"][2]), expected) < 3e-2
        net.autocast = None
        net.convert_torso(torch.bfloat16)
        assert 1e-5 < relative_error(net(io["x__2"], io["sigmas"][2]), expected) < 3e-2


def test_the_factor_measured_in_training_is_the_one_used():
    facts, weights, io = tiny_case("ldm_uncond_vq")
    config = {**facts["init_kwargs"], "scale_by_std": True}
    net = build_denoiser("ldm", config, {**weights, "scale_factor": torch.tensor(0.25)})
    plain = build_denoiser("ldm", facts["init_kwargs"], weights)
    z = torch.randn(2, net.img_channels, net.img_resolution, net.img_resolution, generator=torch.manual_seed(0))
    torch.testing.assert_close(net.decode(z), plain.decode(z * plain.scale_factor / 0.25), rtol=1e-5, atol=1e-5)


def test_mistakes_end_in_one_line(tmp_path):
    facts, weights, _ = tiny_case("ldm_uncond_vq")
    config = facts["init_kwargs"]

    def refused(message, config=config, weights=weights, **guidance):
        with pytest.raises(UserError, match=message) as caught:
            build_denoiser("ldm", config, weights, **guidance)
        assert "\n" not in str(caught.value)

    refused("does not take guidance_type 'cfg'; use none or uncond", guidance_type="cfg")
    refused("guidance_rate 4 has no effect", guidance_type="uncond", guidance_rate=4)
    refused("cond_stage_config must be", config={**config, "cond_stage_config": {"target": "x"}})
    refused("parameterization 'v'", config={**config, "parameterization": "v"})
    refused("beta_schedule 'cosine'", config={**config, "beta_schedule": "cosine"})
    refused("conditioning_key 'concat'", config={**config, "conditioning_key": "concat"})
    refused("unknown argument 'scale_by_sdt'", config={**config, "scale_by_sdt": True})
    for value in (0, float("nan"), -1):
        refused("scale_factor .* positive", config={**config, "scale_factor": value})
        refused("scale_factor .* positive", weights={**weights, "scale_factor": torch.tensor(value)})
    refused("scale_by_std needs a tensor scale_factor", config={**config, "scale_by_std": True})
    refused("noise table is unusable", config={**config, "timesteps": 1})
    refused("3 latent channels, the model 4", config={**config, "channels": 4})
    refused("unet_config", config={key: value for key, value in config.items() if key != "unet_config"})
    no_ema = {name: value for name, value in weights.items() if not name.startswith("model_ema.")}
    refused("lacks moving averages .* use_ema=False", weights=no_ema)
    name = "first_stage_model.quantize.embedding.weight"
    refused(name, weights={key: value for key, value in weights.items() if key != name})
    refused(rf"{name} \[63, 3\]", weights={**weights, name: weights[name][1:]})
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": weights}, path)
    with pytest.raises(UserError, match="model.ckpt: the weights do not fit"):  # the full-size settings
        load_ldm(path)
    with pytest.raises(UserError, match="no settings for dataset_name 'church'"):
        load_ldm(path, "church")
    torch.save({"state_dict": {**weights, "cond_stage_model.x": torch.ones(1)}}, path)
    with pytest.raises(UserError, match="is not a latent diffusion model: it looks like a Stable Diffusion"):
        load_ldm(path, config=config)

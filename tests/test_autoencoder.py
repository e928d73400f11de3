"""First stages against the reference's outputs and the parameter lists of published files."""

import copy

import pytest
import torch
from latent_nets import TOLERANCE, manifest, meta_weights, relative_error, tiny_case

from models.autoencoder import Codebook, Downsample, build_first_stage
from torch_utils.errors import UserError


def tiny_first_stage(case):
    """(network with the reference's weights, inputs and outputs, scale factor)."""
    facts, weights, io = tiny_case(case)
    net = build_first_stage(facts["init_kwargs"]["first_stage_config"]).eval().requires_grad_(False)
    prefix = "first_stage_model."
    state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    assert list(net.state_dict()) == list(state)
    net.load_state_dict(state, strict=True)
    return net, io, facts["scale_factor"]


def test_vq_decoder_equals_reference():
    net, io, scale = tiny_first_stage("ldm_uncond_vq")
    z = io["decode_z"] / scale
    assert torch.equal(net.quantize.indices(z), io["decode_indices"])
    assert relative_error(net.quantize(z), io["decode_quant"]) < 1e-6
    assert relative_error(net.decode(z), io["decode_image"]) < TOLERANCE
    assert relative_error(net.decode(z, quantise=False), io["decode_image_without_quantiser"]) < TOLERANCE
    assert relative_error(io["decode_image_without_quantiser"], io["decode_image"]) > 1e-3  # the two can be told apart
    assert torch.allclose(net.decode(net.quantize(z)), net.decode(z), atol=1e-5)  # quantising twice changes nothing


def test_kl_decoder_equals_reference():
    net, io, scale = tiny_first_stage("sd_cfg_kl")
    assert relative_error(net.decode(io["decode_z"] / scale), io["decode_image"]) < TOLERANCE


@pytest.mark.parametrize("name", ["vq_f4_first_stage", "v1-5-pruned-emaonly", "lsun_bedrooms_ldm"])
def test_full_size_parameter_lists(name):
    """Names, order of names and shapes of every tensor of the official files."""
    facts = manifest(name)
    prefix, config = "first_stage_model.", facts["init_kwargs"].get("first_stage_config")
    if config is None:  # the stand-alone file
        prefix, config = "", {"target": "VQModelInterface", "params": facts["init_kwargs"]}
    with torch.device("meta"):
        net = build_first_stage(config)
    weights = meta_weights(facts)
    weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    assert list(net.state_dict()) == list(weights)
    net.load_state_dict(weights, strict=True, assign=True)
    assert net.downsample_factor == {"vq": 4, "ls": 4, "v1": 8}[name[:2]]


def test_nearest_code_by_brute_force():
    torch.manual_seed(0)
    book = Codebook(50, 3)
    z = torch.randn(2, 3, 70, 40)  # more positions than are looked up at once
    distances = (z.movedim(1, -1).unsqueeze(-2).double() - book.embedding.weight.double()).square().sum(-1)
    assert torch.equal(book.indices(z), distances.argmin(-1))


def test_quantiser_passes_gradients_through():
    book, z = Codebook(5, 3), torch.randn(1, 3, 2, 2, requires_grad=True)
    weights = torch.randn(1, 3, 2, 2)
    (gradient,) = torch.autograd.grad((book(z) * weights).sum(), z)
    assert torch.equal(gradient, weights)


def test_downsampling_pads_right_and_bottom():
    layer = Downsample(1)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.bias.zero_()
        layer.conv.weight[0, 0, 0, 0] = 1  # picks the first pixel of every window
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    assert torch.equal(layer(x), x[:, :, ::2, ::2])


@pytest.mark.parametrize("case", ["ldm_uncond_vq", "sd_cfg_kl"])
def test_encoder_shapes_and_sampling(case):
    net, io, _ = tiny_first_stage(case)
    torch.manual_seed(0)
    images = torch.randn_like(io["decode_image"]).clamp(-1, 1)
    latents = net.encode(images)
    assert latents.shape == io["decode_z"].shape and latents.shape[1] == net.latent_channels
    assert latents.shape[-1] * net.downsample_factor == images.shape[-1]
    if case == "sd_cfg_kl":
        noise = torch.randn_like(latents)
        mean, std = net.posterior(images)
        assert torch.equal(mean, latents) and torch.allclose(net.encode(images, noise), mean + std * noise)


def test_wrong_configurations():
    with pytest.raises(UserError, match="'IdentityFirstStage' is unknown; known: VQModelInterface"):
        build_first_stage({"target": "torch.nn.IdentityFirstStage", "params": {}})
    config = copy.deepcopy(tiny_case("sd_cfg_kl")[0]["init_kwargs"]["first_stage_config"])
    config["params"]["ddconfig"]["double_z"] = False
    with pytest.raises(UserError, match="double_z=False"):
        build_first_stage(config)

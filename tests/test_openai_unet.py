"""The shared U-Net against published parameter lists and reference outputs; its reader."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models import openai_unet
from models.denoiser import read_bottleneck
from models.openai_unet import (
    EncoderUNetModel,
    UNetModel,
    classifier_arguments,
    guess_family,
    timestep_embedding,
    unet_arguments,
)
from torch_utils.errors import UserError

NETS = Path(__file__).parent / "golden" / "nets"
TOLERANCE = 3e-5  # relative to the largest magnitude; float32 results of another convolution backend differ by 5e-6
LATENT = ("lsun_bedrooms_ldm", "v1-5-pruned-emaonly")
SMALL = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 16,
}


def manifest(name: str) -> dict:
    with gzip.open(NETS / "manifests" / f"{name}.json.gz") as file:
        return json.load(file)


def meta_weights(name: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors of an official file under ``prefix``, which is cut off; they take no memory."""
    tensors = {key: shape for key, shape, _ in manifest(name)["tensors"] if key.startswith(prefix)}
    return {key.removeprefix(prefix): torch.empty(shape, device="meta") for key, shape in tensors.items()}


def tiny_case(name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(facts, weights, inputs and outputs) of a miniature."""
    folder = NETS / "tiny" / name
    arrays = []
    for file in ("weights.npz", "io.npz"):
        with np.load(folder / file, allow_pickle=False) as stored:
            arrays.append({key: torch.from_numpy(stored[key]) for key in stored.files})
    return json.loads((folder / "config.json").read_text()), *arrays


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float32
    return ((found - expected).abs().max() / expected.abs().max()).item()


def half_names(net: torch.nn.Module) -> list[str]:
    return [name for name, value in net.state_dict().items() if value.dtype == torch.float16]


def published_net(name: str) -> tuple[torch.nn.Module, str]:
    """The network of an official file on the meta device, and what its names begin with there."""
    kwargs = manifest(name)["init_kwargs"]
    with torch.device("meta"):
        if name in LATENT:
            return UNetModel(**kwargs["unet_config"]["params"]), "model.diffusion_model."
        if "classifier_width" in kwargs:
            return EncoderUNetModel(**classifier_arguments(kwargs)), ""
        return UNetModel(**unet_arguments(kwargs), qkv_dims=2 if name == "edm_bedroom256_ema" else 1), ""


@pytest.mark.parametrize("name", ["edm_bedroom256_ema", "256x256_diffusion", "256x256_classifier", *LATENT])
def test_full_size_parameter_lists(name):
    """Names, their order, shapes, and which of them the published code turns into float16."""
    facts = manifest(name)
    net, prefix = published_net(name)
    expected = meta_weights(name, prefix)
    found = net.state_dict()
    assert list(found) == list(expected)
    assert {key: value.shape for key, value in found.items()} == {key: v.shape for key, v in expected.items()}
    net.load_state_dict(expected, strict=True)
    if "half_after_convert_to_fp16" in facts:
        assert half_names(net) == facts["half_after_convert_to_fp16"]["keys"]
    if "bottleneck_module" in facts:
        assert facts["bottleneck_module"] == f"{prefix}middle_block"


@pytest.mark.parametrize("name", ["edm_bedroom256_ema", "256x256_diffusion", "256x256_classifier"])
def test_published_settings(name):
    kwargs, derived = manifest(name)["init_kwargs"], manifest(name)["derived"]
    arguments = (classifier_arguments if "classifier" in name else unet_arguments)(kwargs)
    assert list(arguments["channel_mult"]) == derived["channel_mult"]
    assert sorted(arguments["attention_resolutions"]) == derived["attention_downsample_factors"]
    assert arguments["out_channels"] == derived["out_channels"]
    assert arguments.get("num_classes") == derived.get("num_classes")
    assert unet_arguments(SMALL) == SMALL
    for change, message in (({"image_size": 100}, "image_size 100"), ({"attention_resolutions": "all"}, "='all'")):
        with pytest.raises(UserError, match=message):
            unet_arguments({**kwargs, "num_channels": 64, **change})


def latent_unet(case: str):
    facts, weights, io = tiny_case(case)
    prefix = "model.diffusion_model."
    names = [name for name in weights if name.startswith(prefix)]
    source = facts.get("ema_map") or {name: name for name in names}  # the reference sampled with the averaged weights
    net = UNetModel(**facts["init_kwargs"]["unet_config"]["params"])
    net.load_state_dict({name.removeprefix(prefix): weights[source[name]] for name in names}, strict=True)
    return net.eval().requires_grad_(False), io


@pytest.mark.parametrize("case, output", [("ldm_uncond_vq", "F__"), ("sd_cfg_kl", "F_stacked__")])
def test_latent_networks_equal_the_reference(case, output):
    """Outputs and bottleneck features, as latent diffusion and Stable Diffusion use them."""
    net, io = latent_unet(case)
    features = []
    net.middle_block.register_forward_hook(lambda module, inputs, feature: features.append(feature))
    context = torch.cat([io["context_uncond"], io["context"]]) if "context" in io else None
    errors = {}
    for i, sigma in enumerate(io["sigmas"]):
        x = io[f"x__{i}"] / (1 + sigma**2).sqrt()
        time = io[f"net_t__{i}"]
        found = net(x.repeat(len(time) // len(x), 1, 1, 1), time, context)
        errors[f"{output}{i}"] = relative_error(found, io[f"{output}{i}"])
        name = f"bottleneck{'_stacked' if context is not None else ''}__{i}"
        if name in io:
            errors[name] = relative_error(features[-1], io[name])
    assert len(errors) == len(io["sigmas"]) + 2
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_half_precision_torso(dtype, tolerance):
    net, io = latent_unet("sd_cfg_kl")
    arguments = io["x__2"], io["net_t__2"][:1], io["context"]
    exact = net(*arguments)
    net.convert_torso(dtype)
    assert net.middle_block[0].in_layers[2].weight.dtype == dtype
    assert net.middle_block[1].transformer_blocks[0].attn2.to_k.weight.dtype == dtype
    assert net.middle_block[1].norm.weight.dtype == net.out[2].weight.dtype == torch.float32
    assert 0 < relative_error(net(*arguments), exact) < tolerance
    net.convert_torso(torch.float32)
    assert relative_error(net(*arguments), exact) < tolerance


def test_checkpointing_changes_memory_only():
    net, io = latent_unet("sd_cfg_kl")
    seen = []
    net.middle_block.register_forward_hook(lambda *_: seen.append(1))
    gradients = []
    for use_checkpoint in (False, True):
        for block in (*net.input_blocks, net.middle_block, *net.output_blocks):
            block.use_checkpoint = use_checkpoint
        x = io["x__2"].clone().requires_grad_(True)
        net(x, io["net_t__2"][:1], io["context"]).square().sum().backward()
        gradients.append(x.grad)
    assert len(seen) == 2  # the bottleneck is not read again in the backward pass
    assert relative_error(gradients[1], gradients[0]) < 1e-5


def test_timestep_embedding():
    """Closed form, and one column more for odd widths."""
    times = torch.tensor([0.0, 3.5])
    found = timestep_embedding(times, 7)
    frequencies = 10000.0 ** (-np.arange(3) / 3)
    angles = times.numpy()[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((2, 1))], axis=1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_linear_projections_equal_convolutions():
    """Stable Diffusion 2's transformer is Stable Diffusion 1's with reshaped weights."""
    torch.manual_seed(0)
    conv = openai_unet.SpatialTransformer(32, 2, context_dim=5)
    linear = openai_unet.SpatialTransformer(32, 2, context_dim=5, use_linear=True)
    weights = conv.state_dict()
    linear.load_state_dict({k: v.flatten(1) if k.startswith("proj_") and v.ndim > 1 else v for k, v in weights.items()})
    x, context = torch.randn(2, 32, 4, 3), torch.randn(2, 7, 5)
    torch.testing.assert_close(linear(x, context), conv(x, context), rtol=1e-5, atol=1e-5)


def test_resampling_switches():
    """The four ways to change resolution keep sizes; those without parameters leave them out."""
    counts = {}
    for updown in (False, True):
        for conv in (False, True):
            net = UNetModel(**SMALL, resblock_updown=updown, conv_resample=conv)
            assert net(torch.ones(1, 3, 16, 16), torch.ones(1)).shape == (1, 3, 16, 16)
            counts[updown, conv] = sum(p.numel() for p in net.parameters())
    assert counts[False, False] < counts[False, True] < counts[True, True] == counts[True, False]


@pytest.mark.parametrize(
    "kind, change, message",
    [
        (UNetModel, {"dims": 3}, "dims=2"),
        (UNetModel, {"context_dim": 8}, "given together"),
        (UNetModel, {"use_spatial_transformer": True}, "given together"),
        (UNetModel, {"num_head_channels": 24}, "are not divisible"),
        (UNetModel, {"num_head_channels": -1, "num_heads": -1}, "are not divisible"),
        (EncoderUNetModel, {"pool": "adaptive"}, "pool='adaptive'"),
        (EncoderUNetModel, {"num_head_channels": -1}, "needs num_head_channels"),
    ],
)
def test_refused_arguments(kind, change, message):
    with pytest.raises(UserError, match=message):
        kind(**{**SMALL, **change})


def test_refused_classes():
    x, time = torch.ones(1, 3, 16, 16), torch.ones(1)
    with pytest.raises(UserError, match="takes no class"):
        UNetModel(**SMALL)(x, time, y=torch.tensor([0]))
    with pytest.raises(UserError, match="pass class_labels"):
        UNetModel(**SMALL, num_classes=2)(x, time)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("edm_bedroom256_ema", openai_unet.CONSISTENCY),
        ("256x256_diffusion", openai_unet.ADM),
        ("256x256_classifier", openai_unet.ADM_CLASSIFIER),
        ("lsun_bedrooms_ldm", openai_unet.LATENT_DIFFUSION),
        ("v1-5-pruned-emaonly", openai_unet.STABLE_DIFFUSION),
        ("edm-cifar10-32x32-uncond-vp", openai_unet.EDM),
        ("edm-imagenet-64x64-cond-adm", openai_unet.EDM),
    ],
)
def test_official_files_are_recognised(name, expected):
    assert guess_family(meta_weights(name)) == expected
    assert guess_family({"weight": torch.ones(1)}) is None


def test_bottleneck_reader_takes_half_precision():
    """The predictor's input comes from a float16 torso, too."""
    net = openai_unet.PixelUNetDenoiser(UNetModel(**SMALL, use_fp16=True).requires_grad_(False))
    with read_bottleneck(net) as reader:
        net.model(torch.ones(2, 3, 16, 16), torch.ones(1))
        assert reader.read(2).shape == (2, 8, 8)

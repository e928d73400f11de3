"""Consistency-model U-Nets as denoisers, against the reference implementation's outputs."""

import pytest
import torch
from test_openai_unet import TOLERANCE, half_names, manifest, meta_weights, relative_error, tiny_case

from models import build_denoiser
from models.cm import RELEASED_CONFIGS, CMDenoiser, load_cm
from models.denoiser import read_bottleneck
from models.openai_unet import UNetModel
from solvers import sample
from torch_utils.errors import UserError
from torch_utils.seeds import SeededGenerators

CASES = ("cm_lsun", "cm_classcond")


def cond_of(io: dict) -> dict:
    return {"class_labels": io["class_index"]} if "class_index" in io else {}


@pytest.mark.parametrize("case", CASES)
def test_outputs_of_the_reference(case):
    facts, weights, io = tiny_case(case)
    net = build_denoiser("cm", facts["init_kwargs"], weights)
    assert (net.sigma_min, net.sigma_max, net.sigma_data) == (0.002, 80, facts["sigma_data"])
    assert (net.img_channels, net.img_resolution, net.evals_per_call) == (3, 16, 1)
    outputs, features, found = [], [], {}
    net.model.register_forward_hook(lambda module, inputs, output: outputs.append((inputs[1], output)))
    net.bottleneck.register_forward_hook(lambda module, inputs, output: features.append(output))
    with torch.no_grad(), read_bottleneck(net) as reader:
        for i, sigma in enumerate(io["sigmas"]):
            found[f"D__{i}"] = net(io[f"x__{i}"], sigma, **cond_of(io))
            time, found[f"F__{i}"] = outputs[-1]
            found[f"net_t__{i}"] = time.expand(len(io[f"net_t__{i}"]))
            found[f"bottleneck_mean__{i}"] = reader.read(2)
            if f"bottleneck__{i}" in io:
                found[f"bottleneck__{i}"] = features[-1]
        for shape in ((-1,), (-1, 1, 1, 1)):
            found["D__vec"] = net(io["x__vec"], io["sigma__vec"].reshape(shape), **cond_of(io))
            assert relative_error(found["D__vec"], io["D__vec"]) < TOLERANCE
    inputs = ("sigma", "x__", "class_index", "D_fp16", "F_fp16")
    assert sorted(found) == sorted(name for name in io if not name.startswith(inputs))
    errors = {name: relative_error(value, io[name]) for name, value in found.items()}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("case", CASES)
def test_float16_torso(case):
    facts, weights, io = tiny_case(case)
    net = build_denoiser("cm", {**facts["init_kwargs"], "use_fp16": True}, weights)
    assert half_names(net.model) == facts["half_keys_after_convert"]
    outputs = []
    net.model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    assert relative_error(net(io["x__2"], io["sigmas"][2], **cond_of(io)), io["D_fp16__2"]) < 2e-2
    assert relative_error(outputs[0], io["F_fp16__2"]) < 2e-2
    net.convert_torso(torch.bfloat16)
    assert relative_error(net(io["x__2"], io["sigmas"][2], **cond_of(io)), io["D__2"]) < 5e-2
    net.convert_torso(torch.float32)
    net.autocast = torch.bfloat16
    assert 0 < relative_error(net(io["x__2"], io["sigmas"][2], **cond_of(io)), io["D__2"]) < 5e-2


@pytest.mark.parametrize("case", CASES)
def test_head_order(case):
    """The legacy order loads the same weights and gives the known wrong images."""
    facts, weights, io = tiny_case(case)
    net = build_denoiser("cm", {**facts["init_kwargs"], "use_new_attention_order": False}, weights)
    wrong = build_denoiser("cm", facts["init_kwargs"], weights)
    wrong.model = UNetModel(**facts["init_kwargs"], qkv_dims=2).eval().requires_grad_(False)
    wrong.model.load_state_dict(weights, strict=True)
    arguments = io["x__2"], io["sigmas"][2]
    assert relative_error(net(*arguments, **cond_of(io)), io["D__2"]) < TOLERANCE
    difference = (wrong(*arguments, **cond_of(io)) - io["D__2"]).abs().max().item()
    assert difference == pytest.approx(facts["max_abs_difference_if_head_first_order_is_used"], rel=1e-3)


@pytest.mark.parametrize("dataset_name", RELEASED_CONFIGS)
def test_published_file(dataset_name):
    """The public function builds the full-size network as published, without memory."""
    weights = meta_weights("edm_bedroom256_ema")
    for config in (manifest("edm_bedroom256_ema")["init_kwargs"], RELEASED_CONFIGS[dataset_name]):
        net = build_denoiser("cm", config, weights, "uncond", 1, device="meta")
        assert (net.img_resolution, net.img_channels, net.label_dim) == (256, 3, 0)
        assert half_names(net.model) == manifest("edm_bedroom256_ema")["half_after_convert_to_fp16"]["keys"]


def test_classes():
    facts, weights, io = tiny_case("cm_classcond")
    net = build_denoiser("cm", facts["init_kwargs"], weights)
    labels = net.make_cond(SeededGenerators([3, 4, 5]))["class_labels"]
    assert labels.dtype == torch.int64 and labels.shape == (3,) and labels.min() >= 0 and labels.max() < net.label_dim
    assert net.make_cond(labels=[2, 6])["class_labels"].tolist() == io["class_index"].tolist()
    with pytest.raises(UserError, match="out of range"):
        net.make_cond(labels=10)
    with pytest.raises(UserError, match="class-conditional"):
        net(io["x__2"], 1.0)
    facts, weights, _ = tiny_case("cm_lsun")
    plain = build_denoiser("cm", facts["init_kwargs"], weights)
    assert plain.make_cond(SeededGenerators([1])) == {}


def test_sampling_and_gradients():
    facts, weights, io = tiny_case("cm_lsun")
    net = build_denoiser("cm", facts["init_kwargs"], weights)
    images, info = sample(net, io["x__2"], solver="heun", num_steps=3, return_info=True)
    assert torch.isfinite(images).all() and info.nfe == 4
    x = io["x__2"].clone().requires_grad_(True)
    net(x, torch.tensor(0.7)).sum().backward()
    assert x.grad.abs().min() > 0


def test_files(tmp_path):
    facts, weights, io = tiny_case("cm_lsun")
    path = tmp_path / "tiny.pt"
    torch.save(weights, path)
    net = load_cm(path, config=facts["init_kwargs"])
    assert isinstance(net, CMDenoiser) and not net.training and not any(p.requires_grad for p in net.parameters())
    assert relative_error(net(io["x__2"], io["sigmas"][2]), io["D__2"]) < TOLERANCE
    # Float16 as published belongs to GPUs, unless asked for.
    assert not half_names(load_cm(path, config={**facts["init_kwargs"], "use_fp16": True}))
    assert half_names(load_cm(path, config=facts["init_kwargs"], use_fp16=True))

    with pytest.raises(UserError, match=r"tiny.pt.*of another shape"):
        load_cm(path)  # not the published size
    with pytest.raises(UserError, match="no settings for dataset_name 'cifar10'"):
        load_cm(path, "cifar10")
    torch.save({name: value for name, value in weights.items() if name != "out.2.bias"}, path)
    with pytest.raises(UserError, match=r"1 missing \(out.2.bias\)"):
        load_cm(path, config=facts["init_kwargs"])
    adm = tiny_case("adm_guided")[1]
    for prefix, message in (("model.", "a network of guided-diffusion"), ("classifier.", "a noisy classifier")):
        part = {name.removeprefix(prefix): value for name, value in adm.items() if name.startswith(prefix)}
        torch.save(part, path)
        with pytest.raises(UserError, match=f"is not a U-Net of consistency models: it looks like {message}"):
            load_cm(path, config=facts["init_kwargs"])
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match="its first tensor is 'weight'"):
        load_cm(path)


@pytest.mark.parametrize(
    "case, change, kwargs, message",
    [
        ("cm_lsun", {"channel_mult": [1]}, {}, "do not fit"),
        ("cm_lsun", {"depth": 3}, {}, "not the arguments of a consistency-model U-Net"),
        ("cm_lsun", {"model_channels": "wide"}, {}, "not the arguments of a consistency-model U-Net"),
        ("cm_lsun", {}, {"guidance_type": "cg"}, "does not take guidance_type 'cg'"),
        ("cm_lsun", {}, {"guidance_rate": 3}, "no effect"),
        ("cm_classcond", {}, {"guidance_type": "uncond"}, "does not take guidance_type 'uncond'"),
    ],
)
def test_refused(case, change, kwargs, message):
    facts, weights, _ = tiny_case(case)
    with pytest.raises(UserError, match=message):
        build_denoiser("cm", {**facts["init_kwargs"], **change}, weights, **kwargs)

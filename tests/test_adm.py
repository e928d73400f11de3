"""ADM networks with classifier guidance against the reference implementation's outputs."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from test_openai_unet import TOLERANCE, half_names, manifest, meta_weights, relative_error, tiny_case
from torch.utils.checkpoint import checkpoint

from models import build_denoiser
from models.adm import RELEASED_CONFIGS, ADMDenoiser, load_adm
from models.denoiser import read_bottleneck
from models.noise import CosineNoise, LinearNoise
from solvers import get_schedule, sample
from torch_utils.errors import UserError
from torch_utils.seeds import SeededGenerators
from training.predictor import AMEDPredictor

FACTS, WEIGHTS, IO = tiny_case("adm_guided")
CONFIG = {"model": FACTS["init_kwargs_model"], "classifier": FACTS["init_kwargs_classifier"]}
LABELS = {"class_labels": IO["class_index"]}


def part(prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in WEIGHTS.items() if name.startswith(prefix)}


def guided(rate=None, **changes):
    return build_denoiser("adm", {**CONFIG, **changes}, WEIGHTS, "cg", rate)


def test_outputs_of_the_reference():
    net, strong = guided(FACTS["guidance_rate"]), guided(FACTS["extra_guidance_rates"][0])
    assert (net.sigma_min, net.sigma_max) == (FACTS["sigma_min"], FACTS["sigma_max"])
    assert (net.img_channels, net.img_resolution, net.label_dim, net.evals_per_call) == (3, 16, 10, 1)
    raw, features, found = [], [], {}
    net.model.register_forward_hook(lambda module, inputs, output: raw.append((*inputs, output)))
    net.bottleneck.register_forward_hook(lambda module, inputs, output: features.append(output))
    with torch.no_grad(), read_bottleneck(net) as reader:
        for i, sigma in enumerate(IO["sigmas"]):
            x = IO[f"x__{i}"]
            found[f"D__{i}"] = net(x, sigma, **LABELS)
            x_in, found[f"net_t__{i}"], found[f"F__{i}"] = raw[-1]
            found[f"bottleneck_mean__{i}"] = reader.read(2)
            if f"bottleneck__{i}" in IO:
                found[f"bottleneck__{i}"] = features[-1]
            found[f"D_rate4__{i}"] = strong(x, sigma, **LABELS)
            found[f"logits__{i}"] = net.classifier(x_in, found[f"net_t__{i}"])
            found[f"cond_grad__{i}"] = net.classifier_gradient(x_in, found[f"net_t__{i}"], LABELS["class_labels"])
            net.clip_denoised = False
            unclamped = found[f"D_unclamped__{i}"] = net(x, sigma, **LABELS)
            net.clip_denoised = True
            found[f"clamped_fraction__{i}"] = (unclamped.abs() > 1).float().mean()
        for shape in ((-1,), (-1, 1, 1, 1)):
            found["D__vec"] = net(IO["x__vec"], IO["sigma__vec"].reshape(shape), **LABELS)
            assert (found["D__vec"] - IO["D__vec"]).abs().max() < TOLERANCE * IO["sigma__vec"].max()
    found["sched_sigma_of_t"] = net.sigma(IO["sched_t"])
    found["sched_t_of_sigma"] = net.sigma_inv(IO["sched_sigma"])
    inputs = ("sigma", "x__", "class_index", "D_fp16", "sched_t", "sched_sigma")
    named = [name for name in IO if not name.startswith(inputs)] + ["sched_sigma_of_t", "sched_t_of_sigma"]
    assert sorted(found) == sorted(named)
    for name, value in found.items():
        if name.startswith(("D__", "D_rate4__")):  # the clamp follows a large cancellation
            scale = IO["sigmas"][int(name[-1])].clamp(min=1) if name != "D__vec" else IO["sigma__vec"].max()
            error = ((value - IO[name]).abs().max() / scale).item()
        elif name.startswith("clamped_fraction"):
            error = 0 if abs(value - IO[name]) <= 1 / IO["x__0"].numel() else 1  # one pixel at the edge
        else:
            error = relative_error(value, IO[name])
        assert error < TOLERANCE, (name, error)


def test_guidance_matters():
    """The comparison of the clamped outputs would miss a guidance term that neither side has."""
    assert (IO["D_rate4__2"] - IO["D__2"]).abs().max() > 1e-2


def test_float16_torsos():
    config = {name: {**arguments, "use_fp16": True} for name, arguments in CONFIG.items()}
    net = build_denoiser("adm", config, WEIGHTS, "cg", 1)
    assert half_names(net.model) == FACTS["half_keys_model"]
    assert half_names(net.classifier) == FACTS["half_keys_classifier"]
    sigma = IO["sigmas"][2]
    assert relative_error(net(IO["x__2"], sigma, **LABELS), IO["D_fp16__2"]) < 2e-2
    net.convert_torso(torch.bfloat16)
    assert relative_error(net(IO["x__2"], sigma, **LABELS), IO["D__2"]) < 1e-1
    net.convert_torso(torch.float32)
    assert not half_names(net)
    net.autocast = torch.bfloat16
    assert 0 < relative_error(net(IO["x__2"], sigma, **LABELS), IO["D__2"]) < 1e-1


@pytest.mark.parametrize("guidance", [("cg", 0), ("none", None), (None, None)])
def test_no_guidance_skips_the_classifier(guidance):
    """D = x - sigma F, clamped, whether or not the weights of a classifier are there."""
    sigma, x = IO["sigmas"][2], IO["x__2"]
    expected = (x - sigma * IO["F__2"][:, :3]).clamp(-1, 1)
    without = {name: value for name, value in WEIGHTS.items() if name.startswith("model.")}
    for config, weights in ((CONFIG, WEIGHTS), ({"model": CONFIG["model"]}, without)):
        net = build_denoiser("adm", config, weights, *guidance)
        assert net.classifier is None and net.evals_per_call == 1 and not net.guided and not net.latent
        assert relative_error(net(x, sigma, **LABELS), expected) < TOLERANCE


def test_rate_is_one_unless_given():
    assert guided().guidance_rate == guided(1).guidance_rate == 1
    assert guided().guided and guided(4).guided


def test_unconditional_network_with_classifier():
    """As 256x256_diffusion_uncond.pt is used: the labels reach the classifier only."""
    config = {**CONFIG, "model": {**CONFIG["model"], "num_classes": None}}
    weights = {name: value for name, value in WEIGHTS.items() if name != "model.label_emb.weight"}
    net = build_denoiser("adm", config, weights, "cg", 4)
    plain = build_denoiser("adm", config, weights, "uncond")
    assert (net.label_dim, plain.label_dim) == (10, 0) and plain.make_cond(SeededGenerators([0])) == {}
    sigma, x = IO["sigmas"][2], IO["x__2"]
    net.clip_denoised = plain.clip_denoised = False
    moved = net(x, sigma, **LABELS) - plain(x, sigma)
    assert relative_error(moved, 4 * sigma**2 / (1 + sigma**2).sqrt() * IO["cond_grad__2"]) < 1e-4
    with pytest.raises(UserError, match="needs class_labels"):
        net(x, sigma)
    with pytest.raises(UserError, match="takes no class"):
        plain(x, sigma, **LABELS)


def test_classes():
    net = guided()
    labels = net.make_cond(SeededGenerators([3, 4, 5]))["class_labels"]
    assert labels.dtype == torch.int64 and labels.shape == (3,)
    assert net.make_cond(SeededGenerators([1, 2]), labels=7)["class_labels"].tolist() == [7, 7]
    x, sigma = IO["x__2"], IO["sigmas"][2]
    one = net(x, sigma, class_labels=torch.tensor([7]))
    assert torch.allclose(one, net(x, sigma, class_labels=torch.tensor([7, 7])), atol=1e-5)
    assert (one - net(x, sigma, class_labels=torch.tensor([8]))).abs().max() > 1e-3


def test_linear_noise():
    """Against exact arithmetic, and as inverse functions."""
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    noise = LinearNoise()
    assert torch.allclose(noise.sigma_inv(noise.sigma(t)), t, rtol=1e-9)
    assert noise.sigma(torch.tensor(1.0, dtype=torch.float64)).item() == pytest.approx(math.sqrt(math.expm1(10.05)))


def test_cosine_noise():
    """Against the products of 1 - beta over 1000 steps, beta = 1 - f(u + 1/1000) / f(u)."""
    u = np.arange(1001) / 1000
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    alphas_cumprod = np.cumprod(f[1:] / f[:-1])[:999]  # the last beta is cut off at 0.999 in the table
    table = torch.from_numpy(np.sqrt(1 / alphas_cumprod - 1))
    noise = CosineNoise()
    steps = noise.timestep(table)
    assert torch.allclose(steps, torch.arange(999, dtype=torch.float64), atol=1e-7)
    assert torch.allclose(noise.sigma(torch.from_numpy(u[1:1000])), table, rtol=1e-6)
    low, high = noise.sigma_min, noise.sigma_max
    assert low == pytest.approx(table[0].item()) and high == 80
    assert 0.01 > noise.timestep(torch.tensor(low)).item() > -0.01  # in float32, as in a call
    net = guided(noise_schedule="cosine")
    assert (net.sigma_min, net.sigma_max) == (low, high)
    seen = []
    net.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1].item()))
    net(IO["x__2"], table[500], **LABELS)
    assert seen[0] == pytest.approx(500, abs=1e-2)


def test_sampling():
    """Plain, on the network's own time grid, and with a predictor that reads the bottleneck."""
    net = guided()
    sigmas = get_schedule(5, net.sigma_min, net.sigma_max, "discrete", 1, net=net)
    assert torch.allclose(net.sigma_inv(sigmas).diff(), net.sigma_inv(sigmas).diff().mean().expand(4), rtol=1e-6)
    images, info = sample(
        net, IO["x__2"], solver="euler", sigmas=sigmas, cond=LABELS, return_info=True, denoise_to_zero=True
    )
    assert images.abs().max() <= 1 and info.nfe == 5
    torch.manual_seed(0)
    config = dict(num_steps=3, sampler_stu="amed", sampler_tea="heun", M=1, guidance_type="cg", guidance_rate=1.0)
    predictor = AMEDPredictor(**config)
    images, info = sample(
        net, IO["x__2"], solver="amed", num_steps=3, cond=LABELS, predictor=predictor, return_info=True
    )
    assert torch.isfinite(images).all() and info.nfe == 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("what", "h", "tolerance"), [("state", 4e-3, 3e-3), ("sigma", 1e-3, 2e-2)])
def test_gradients_pass_network_and_guidance(what, h, tolerance, checkpointing):
    """Against finite differences, without guidance and with it (its gradient is much larger)."""
    slopes = []
    along, weights = torch.randn(2, *IO["x__2"].shape, generator=torch.Generator().manual_seed(0))
    for net in (guided(40), build_denoiser("adm", CONFIG, WEIGHTS)):
        net.clip_denoised = False

        def value(shift, net=net):
            x, sigma = IO["x__2"] + shift * along * (what == "state"), 2.0 + shift * (what == "sigma")
            call = partial(checkpoint, net, use_reentrant=False) if checkpointing else net
            return (call(x, sigma, **LABELS) * weights).double().sum()

        leaf = torch.zeros((), requires_grad=True)
        value(leaf).backward()
        with torch.no_grad():
            expected = (value(torch.tensor(h)) - value(torch.tensor(-h))) / (2 * h)
        assert float(leaf.grad) == pytest.approx(float(expected), rel=tolerance)
        slopes.append(float(leaf.grad))
    assert abs(slopes[0]) > 3 * abs(slopes[1])


@pytest.mark.parametrize("with_classifier", [False, True])
def test_published_files(with_classifier):
    """The public function builds the full-size networks as published, without memory."""
    model, classifier = manifest("256x256_diffusion"), manifest("256x256_classifier")
    weights = {f"model.{name}": value for name, value in meta_weights("256x256_diffusion").items()}
    if with_classifier:
        weights |= {f"classifier.{name}": value for name, value in meta_weights("256x256_classifier").items()}
    ours = {"model": model["init_kwargs"], "classifier": classifier["init_kwargs"]}
    for config in (ours, RELEASED_CONFIGS["imagenet256"]):
        net = build_denoiser("adm", config, weights, "cg" if with_classifier else None, device="meta")
        assert (net.img_resolution, net.img_channels, net.label_dim) == (256, 3, 1000)
        assert half_names(net.model) == model["half_after_convert_to_fp16"]["keys"]
        assert (net.sigma_min, net.sigma_max) == (FACTS["sigma_min"], FACTS["sigma_max"])
        if with_classifier:
            assert half_names(net.classifier) == classifier["half_after_convert_to_fp16"]["keys"]


@pytest.mark.parametrize(
    "dataset_name, millions",
    [("imagenet64_adm", 296), ("imagenet128", 422), ("imagenet256", 554), ("imagenet512", 559)],
)
def test_presets(dataset_name, millions):
    """The published sizes. Network and classifier agree on image size and classes."""
    preset = RELEASED_CONFIGS[dataset_name]
    with torch.device("meta"):
        net = ADMDenoiser(**preset, guidance_rate=1.0)
    count = sum(value.numel() for value in net.model.parameters())
    assert round(count / 1e6) == millions
    assert net.label_dim == 1000 and net.model.out_channels == 6
    assert net.img_resolution == net.classifier.image_size == preset["model"]["image_size"]
    assert net.classifier.out[2].positional_embedding.shape[1] == 65  # the classifier ends at 8x8
    if dataset_name == "imagenet64_adm":  # EDM's network of this size lacks the learned sigma and has fixed filters
        edm = manifest("edm-imagenet-64x64-cond-adm")
        filters = sum(math.prod(shape) for name, shape, _ in edm["tensors"] if "resample_filter" in name)
        assert count - 3 * (9 * 192 + 1) == edm["n_values"] - filters


def test_files(tmp_path):
    model, classifier = tmp_path / "model.pt", tmp_path / "classifier.pt"
    torch.save(part("model."), model)
    torch.save(part("classifier."), classifier)
    x, sigma = IO["x__2"], IO["sigmas"][2]
    net = load_adm(model, classifier, config=CONFIG, guidance_type="cg", guidance_rate=4.0)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert relative_error(net(x, sigma, **LABELS), IO["D_rate4__2"]) < TOLERANCE
    assert load_adm(model, config=CONFIG).classifier is None
    half = load_adm(model, classifier, config=CONFIG, guidance_type="cg", use_fp16=True)
    assert half_names(half.model) == FACTS["half_keys_model"]
    # The unconditional variant is recognised.
    torch.save({name: value for name, value in part("model.").items() if name != "label_emb.weight"}, tmp_path / "u.pt")
    assert load_adm(tmp_path / "u.pt", config=CONFIG, guidance_type="uncond").label_dim == 0

    for arguments, message in (
        (dict(path_model=model, guidance_type="cg"), "needs the file of a classifier"),
        (dict(path_model=classifier), "is not a network of guided-diffusion.*looks like a noisy classifier"),
        (dict(path_model=model, path_classifier=model, guidance_type="cg"), "is not a noisy classifier"),
        (dict(path_model=model, config=None), "model.pt.*of another shape"),
        (dict(path_model=model, config=None, dataset_name="lsun"), "no settings for dataset_name 'lsun'"),
        (dict(path_model=model, guidance_type="cfg"), "does not take guidance_type 'cfg'"),
        (dict(path_model=model, config={}), "needs the entry 'model'"),
        (dict(path_model=model, config={**CONFIG, "classifier": [1]}), "needs the entry 'model'"),
        (dict(path_model=model, config={**CONFIG, "noise_schedul": "cosine"}), "unexpected .* 'noise_schedul'"),
        (dict(path_model=model, config={"model": {"num_channels": 32, "image_size": [64]}}), "channel_mult is needed"),
    ):
        with pytest.raises(UserError, match=message):
            load_adm(**{"config": CONFIG, **arguments})
    torch.save(tiny_case("cm_classcond")[1], model)
    with pytest.raises(UserError, match="looks like a U-Net of consistency models"):
        load_adm(model, config=CONFIG)
    model.write_bytes(model.read_bytes()[:-1000])
    with pytest.raises(UserError, match="truncated"):
        load_adm(model, config=CONFIG)


@pytest.mark.parametrize(
    "config, guidance, message",
    [
        (CONFIG["model"], (None, None), "needs the entry 'model'"),
        ({"model": CONFIG["model"]}, ("cg", 1), "needs the arguments and the weights of a classifier"),
        (CONFIG, ("cg", -1.0), "guidance_rate -1 must be"),
        (CONFIG, ("cg", math.inf), "guidance_rate inf must be"),
        (CONFIG, ("uncond", None), "does not take guidance_type 'uncond'"),
        (CONFIG, (None, 3.0), "no effect"),
        ({**CONFIG, "noise_schedule": "square"}, (None, None), "noise_schedule 'square'"),
        ({**CONFIG, "depth": 1}, (None, None), "not the arguments of an ADM network"),
        ({"model": {**CONFIG["model"], "out_channels": 4}}, (None, None), "4 output channels"),
        ({**CONFIG, "classifier": {**CONFIG["classifier"], "out_channels": 9}}, ("cg", 1), "has 9 classes"),
        ({**CONFIG, "classifier": {**CONFIG["classifier"], "model_channels": 64}}, ("cg", 1), "do not fit"),
    ],
)
def test_refused(config, guidance, message):
    with pytest.raises(UserError, match=message):
        build_denoiser("adm", config, WEIGHTS, *guidance)


def test_missing_classifier_weights():
    weights = {name: value for name, value in WEIGHTS.items() if name.startswith("model.")}
    with pytest.raises(UserError, match="missing .classifier.time_embed.0.weight"):
        build_denoiser("adm", CONFIG, weights, "cg", 1)

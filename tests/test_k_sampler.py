"""A learned solver as a sampling function of k-diffusion and ComfyUI, against the own loop."""

import importlib.util
import sys
import types
from unittest.mock import MagicMock

import fake_comfy
import pytest
import torch
from toy import ToyNet

from models import create_model
from models.denoiser import shifted_layers
from solvers import sample
from solvers.k_sampler import learned_sigmas, sample_learned
from solvers.span_table import SpanSolver
from torch_utils.errors import UserError
from training.predictor import AMEDPredictor

SD_RANGE = {"sigma_min": 0.029167, "sigma_max": 14.6146}


def amed(solver="dpmpp", **settings):
    torch.manual_seed(1)
    options = {"num_steps": 4, "scale_dir": 0.2, "scale_time": 0.2, **SD_RANGE}
    predictor = AMEDPredictor(sampler_stu=solver, **options | settings).eval()
    with torch.no_grad():
        predictor.enc_layer0.weight.mul_(8)
    return predictor


def span(preset="full", **settings):
    student = SpanSolver.preset(preset, **{"num_steps": 5, "first_step": "zero", **SD_RANGE, **settings})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in student.groups().values():
            value.add_(0.2 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return student


def noise(batch=2):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def own(net, latents, predictor):
    settings = {"solver": "span"} if isinstance(predictor, SpanSolver) else {}
    if not settings:
        names = ("num_steps", "schedule_type", "schedule_rho", "sigma_min", "sigma_max", "afs")
        settings = {name: predictor.config[name] for name in names} | {"solver": predictor.config["sampler_stu"]}
    return sample(net, latents, predictor=predictor, return_info=True, **settings)


PREDICTORS = {
    "dpmpp": lambda: amed(),
    "amed, AFS": lambda: amed("amed", afs=True),
    "ipndm": lambda: amed("ipndm"),
    "full": span,
    "epd": lambda: span("epd", num_steps=4),
    "gs": lambda: span("gs", first_step="none"),
}


@pytest.mark.parametrize("name", PREDICTORS)
def test_the_result_is_that_of_the_own_loop(name):
    """With the bottleneck of the network inside the model; every call of it is for one batch."""
    predictor, net = PREDICTORS[name](), ToyNet()
    expected, info = own(net, noise(), predictor)
    sizes, seen = [], []

    class Model:  # a wrapper, as k-diffusion's guided denoisers are
        inner_model = net

        def __call__(self, x, sigma, **extra):
            assert sigma.shape == (len(x),) and extra == {"label": 3}
            sizes.append(len(x))
            return net(x, sigma)

    sigmas = learned_sigmas(predictor, Model())
    assert len(sigmas) == len(info.sigmas) and sigmas[-1] == 0
    assert torch.allclose(sigmas[:-1].double(), info.sigmas[:-1].double(), rtol=1e-6)
    for given in (sigmas, None, info.sigmas):
        seen.clear(), sizes.clear()
        x = sample_learned(
            Model(), noise() * info.sigmas[0], given, {"label": 3}, seen.append, disable=True, predictor=predictor
        )
        assert torch.allclose(x, expected, rtol=1e-9, atol=1e-9)
        assert sizes == [2] * info.nfe
        first = 1 if predictor.config.get("afs") or predictor.config.get("first_step") == "zero" else 0
        assert [state["i"] for state in seen] == list(range(first, len(sigmas) - 1))
        for state in seen:
            assert float(state["sigma"]) == float(state["sigma_hat"]) == pytest.approx(float(sigmas[state["i"]]))
            assert torch.allclose(state["denoised"], net(state["x"], state["sigma"]), atol=0.5)


def test_a_part_of_the_schedule():
    """From a level on, the loop on the rest; up to a level, the state there."""
    net, predictor = ToyNet(), amed("ipndm", num_steps=5)
    sigmas = learned_sigmas(predictor, net)
    x = noise() * sigmas[1]
    rest = amed("ipndm", num_steps=5)
    rest.stated = frozenset()
    expected = sample(
        net, noise(), solver="ipndm", sigmas=sigmas[1:-1].tolist() + [SD_RANGE["sigma_min"]], predictor=rest
    )
    found = sample_learned(net, x, sigmas[1:], disable=True, predictor=predictor)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    whole = sample(net, noise(), solver="span", predictor=span(), return_trajectory=True)
    levels = learned_sigmas(span(), net)
    half = sample_learned(net, noise() * levels[0].double(), levels[:3], disable=True, predictor=span())
    assert torch.allclose(half, whole[2], rtol=1e-5, atol=1e-5)
    late = sample_learned(net, whole[2], levels[2:], disable=True, predictor=span())
    assert (late - whole[-1]).abs().mean() < 0.1 * whole[-1].abs().mean()
    assert torch.equal(sample_learned(net, x, sigmas[:1], predictor=predictor), x)
    with pytest.raises(UserError, match="14.61, 5, 0.03 are not the noise levels of this predictor"):
        sample_learned(net, x, [14.61, 5.0, 0.03], predictor=predictor)
    with pytest.raises(UserError, match="neither the predictor nor the model says sigma_min and sigma_max"):
        learned_sigmas(amed(sigma_min=None, sigma_max=None), lambda x, sigma: x)


@pytest.mark.parametrize("head", ["time", "blocks"])
def test_heads_act_inside_the_network(head):
    """On the layers of the embedding, wherever the wrapper keeps them."""
    net = create_model("digits")
    width = sum(layer.out_features for layer in shifted_layers(net, head == "blocks"))
    student = span(heads=[head], embedding_width=width, sigma_min=0.002, sigma_max=80.0)
    with torch.no_grad():
        for value in student.head_parameters():
            value.normal_(generator=torch.Generator().manual_seed(0))
    latents = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = sample(net, latents, solver="span", predictor=student)
    without = sample(net, latents, solver="span", predictor=span(sigma_min=0.002, sigma_max=80.0))
    assert not torch.allclose(expected, without, atol=1e-2)

    class Model:
        inner_model = net

        def __call__(self, x, sigma):
            return net(x, sigma)

    found = sample_learned(Model(), latents * 80, disable=True, predictor=student)
    assert torch.allclose(found, expected, atol=1e-4)
    with pytest.raises(UserError, match="noise.embedding"):
        sample_learned(lambda x, sigma: net(x, sigma), latents * 80, disable=True, predictor=student)


@pytest.fixture(scope="module")
def k_external():
    """k_diffusion.external, without the packages that the rest of k-diffusion needs."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed")
    before = dict(sys.modules)
    package = sys.modules["k_diffusion"] = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    for name in ("torchsde", "torchdiffeq", "torchvision"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = sys.modules[f"{name}.transforms"] = MagicMock()
    try:
        yield importlib.import_module("k_diffusion.external")
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]


def test_k_diffusion(k_external):
    """Its own wrapper of a discrete network, whose table is the range of the schedule."""
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).float()

    class Epsilon(torch.nn.Module):  # exact for N(0, 0.25)
        def forward(self, x, t):
            a = torch.exp(torch.lerp(alphas.log()[t.floor().long()], alphas.log()[t.ceil().long()], t.frac()))
            sigma = ((1 - a) / a).sqrt().reshape(-1, 1, 1, 1)
            return x * (1 + sigma**2).sqrt() * sigma / (0.25 + sigma**2)

    model = k_external.DiscreteEpsDDPMDenoiser(Epsilon(), alphas, quantize=False)
    predictor = amed("dpmpp", sigma_min=None, sigma_max=None)
    sigmas = learned_sigmas(predictor, model)
    x = sample_learned(model, noise().float() * sigmas[0], sigmas, disable=True, predictor=predictor)
    net = ReadableExact(Exact(float(model.sigma_min), float(model.sigma_max), mean=0))
    assert (x - time_only(net, noise(), predictor).float()).abs().max() < 1e-4


def time_only(net, latents, predictor):
    """The own loop with zeros for the bottleneck."""
    names = ("num_steps", "schedule_type", "schedule_rho", "sigma_min", "sigma_max")
    settings = {key: predictor.config[key] for key in names} | {"solver": predictor.config["sampler_stu"]}
    return sample(net, latents, predictor=TimeOnly(predictor), **settings)


# ComfyUI


@pytest.fixture
def comfy():
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "comfy"}
    fake_comfy.install()
    yield sys.modules["comfy.samplers"]
    for name in [name for name in sys.modules if name.split(".")[0] == "comfy"]:
        del sys.modules[name]
    sys.modules.update(before)


class Exact(torch.nn.Module):
    """D for N(mean, 0.5^2); mean 1 is that of the toy model with cfg 1."""

    def __init__(self, low, high, mean=1):
        super().__init__()
        self.sigma_min, self.sigma_max, self.mean = low, high, mean

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        return self.mean + 0.25 / (0.25 + sigma**2) * (x - self.mean)


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("name", ["dpmpp", "full"])
def test_comfyui_gives_the_images_of_the_own_loop(comfy, kind, name):
    """Same noise, same images, up to the whole steps that the network of the eps kind receives."""
    ends = SD_RANGE if kind == "eps" else {"sigma_min": 0.004, "sigma_max": 999.0}
    predictor = amed(**ends) if name == "dpmpp" else span(**ends)
    model = fake_comfy.toy_model(kind)
    model.model.diffusion_model.middle_block = None  # the toy has no bottleneck
    sigmas = learned_sigmas(predictor, model.model)
    sampler = comfy.KSAMPLER(sample_learned, {"predictor": predictor})
    steps = []
    latent = torch.zeros(2, 4, 8, 8)
    found = fake_comfy.run(model, sampler, sigmas, latent, callback=lambda i, d, x, total: steps.append((i, total)))
    assert [total for _, total in steps] == [len(sigmas) - 1] * len(steps) and steps[-1][0] == len(sigmas) - 2
    start = torch.randn(latent.shape, generator=torch.manual_seed(0))
    if kind == "flow":
        assert sigmas[0] == pytest.approx(0.999, abs=1e-6) and max(sigmas) < 1
    net = Exact(ends["sigma_min"], ends["sigma_max"])
    if name == "full":
        expected = sample(net, start.double(), solver="span", predictor=predictor)
    else:
        expected = time_only(ReadableExact(net), start.double(), predictor)
    assert (found - expected.float()).abs().max() < (0.06 if kind == "eps" else 2e-4)


class TimeOnly(torch.nn.Module):
    def __init__(self, predictor):
        super().__init__()
        self.predictor, self.config = predictor, predictor.config

    def forward(self, feature, *times):
        return self.predictor(torch.zeros_like(feature), *times)


class ReadableExact(torch.nn.Module):
    """``Exact`` with a module that stands for the bottleneck."""

    def __init__(self, net):
        super().__init__()
        self.net, self.bottleneck = net, torch.nn.Identity()
        self.sigma_min, self.sigma_max = net.sigma_min, net.sigma_max

    def forward(self, x, sigma):
        self.bottleneck(x)
        return self.net(x, sigma)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_comfyui_inpainting_keeps_the_rest(comfy, kind):
    """To the bit, though a learned last step does not end at D."""
    ends = SD_RANGE if kind == "eps" else {"sigma_min": 0.004, "sigma_max": 999.0}
    predictor = span(**ends)
    model = fake_comfy.toy_model(kind)
    sampler = comfy.KSAMPLER(sample_learned, {"predictor": predictor})
    mask = torch.ones(2, 1, 8, 8)
    mask[..., :4] = 0
    latent = torch.linspace(-2, 2, 2 * 4 * 64).reshape(2, 4, 8, 8)
    for sigmas in (learned_sigmas(predictor, model.model), learned_sigmas(predictor, model.model)[2:]):
        found = fake_comfy.run(model, sampler, sigmas, latent, cfg=2.0, denoise_mask=mask)
        assert torch.equal(found[..., :4], latent[..., :4]) and not torch.allclose(found[..., 4:], latent[..., 4:])
    assert torch.equal(fake_comfy.run(model, sampler, torch.FloatTensor([]), latent), latent)


def test_comfyui_bottleneck(comfy):
    """Under guidance the conditional half is read, also if the halves come in several calls."""
    seen = []

    class Predictor(AMEDPredictor):
        def forward(self, feature, *times):
            seen.append(feature.clone())
            return super().forward(feature, *times)

    class Network(fake_comfy.ToyNetwork):
        split = False

        def __init__(self, sampling):
            super().__init__(sampling)
            self.middle_block = torch.nn.Identity()

        def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **named):
            self.middle_block(context.expand(len(x), 1, 8)[..., None].expand(-1, -1, -1, 8))
            return super().forward(x, timesteps, context, control, transformer_options, **named)

    predictor = Predictor(num_steps=4, sampler_stu="euler", **SD_RANGE)
    model = fake_comfy.toy_model("eps")
    model.model.diffusion_model = Network(model.model.model_sampling)
    sampler = comfy.KSAMPLER(sample_learned, {"predictor": predictor})
    sigmas = learned_sigmas(predictor, model.model)
    fake_comfy.run(model, sampler, sigmas, torch.zeros(2, 4, 8, 8), cfg=3.0)
    assert len(seen) == 3 and all(torch.equal(feature, torch.ones(2, 8, 8)) for feature in seen)
    assert not model.model.diffusion_model._forward_pre_hooks

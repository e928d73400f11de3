"""8-bit networks: the range search, int8 kernels against their simulation, and quality."""

import copy
import pickle

import pytest
import torch
from click.testing import CliRunner
from systems_golden import arrays, assert_relative, cases
from test_execution import tiny_network

import sample as sample_cli
from models import compile as compile_module
from models import create_model
from models import quantize as q
from models.compile import CompiledForward, prepare_network
from models.denoiser import call_shifted
from models.inputs import draw_inputs
from solvers import sample
from torch_utils.errors import UserError
from training.sample_loss import DenoiserFeatures

IPNDM = {"solver": "ipndm", "num_steps": 6}
SYMMETRIC = [case for case in cases("ptq/quantiser") if case["symmetric"]]


@pytest.mark.parametrize("case", SYMMETRIC, ids=lambda case: f"{case['kind']}-{case['bits']}")
def test_ranges_and_results_are_as_published(case):
    data, i = arrays("ptq/quantiser"), case["case"]
    x = data[f"x__{case['kind']}"]
    scale, zero = q.search_range(x, case["bits"], case["channel_wise"])
    assert_relative(scale, data[f"delta__{i}"].reshape(-1), 1e-5)
    assert torch.equal(zero, data[f"zero__{i}"].reshape(-1).to(zero))
    shape = (-1, *[1] * (x.ndim - 1)) if case["channel_wise"] else ()
    rounded = q._round(x, scale.reshape(shape), zero.reshape(shape), 2 ** case["bits"] - 1)
    assert_relative(rounded, data[f"y__{i}"], 1e-5)


@pytest.fixture(scope="module")
def digits():
    """(float network, states of the sampler, noise to test with, calibration)."""
    net, states = create_model("digits"), []
    handle = net.register_forward_pre_hook(lambda module, args: states.append((args[0].clone(), args[1])))
    sample(net, draw_inputs(net, range(1000, 1008))[0], **IPNDM)
    handle.remove()
    return net, states, draw_inputs(net, range(8))[0], q.calibrate(net, states)


def difference(net, quantized, latents) -> float:
    return float((sample(quantized, latents, **IPNDM) - sample(net, latents, **IPNDM)).square().mean().sqrt())


def test_calibrated_on_all_levels_it_is_near_the_float_network(digits):
    net, states, latents, calibration = digits
    quantized = q.apply_ranges(net, calibration)
    error = difference(net, quantized, latents)
    assert error < 0.04
    assert difference(net, q.quantize(net, states[:1]), latents) > 2 * error
    names = {name for name, layer in quantized.named_modules() if isinstance(layer, q.QuantizedLayer)}
    assert len(names) > 20
    assert not any("map_layer" in name or "affine" in name for name in names)
    assert not any(isinstance(layer, q.QuantizedLayer) for layer in net.modules())


@pytest.mark.skipif(not q.int8_kernels(torch.device("cpu")), reason="needs an x86 CPU")
@pytest.mark.parametrize("channels", [8, 19])
@torch.no_grad()
def test_kernels_agree_with_the_simulation(channels):
    generator = torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(channels, 24, 3, stride=2, padding=1)
    x = torch.randn(3, channels, 9, 11, generator=generator)
    scale, zero = q.search_range(x)
    layer = q.QuantizedLayer(conv.weight, conv.bias, q.Levels([1.0]), scale, zero, 2, 1)
    assert_relative(layer(x), layer.simulate(x, float(scale), int(zero)), 1e-5)
    assert_relative(layer(x), conv(x), 0.03)


@pytest.mark.skipif(not q.int8_kernels(torch.device("cpu")), reason="needs an x86 CPU")
@torch.no_grad()
def test_one_graph_for_all_noise_levels():
    """aot_eager traces as inductor does, and compiles nothing."""
    net, _, _ = tiny_network("edm_song_uncond")
    noise = torch.randn(4, net.img_channels, net.img_resolution, net.img_resolution)
    states = [(sigma * noise, torch.tensor(sigma)) for sigma in (80.0, 2.0, 0.05)]
    quantized = q.quantize(net, states)
    compiled = copy.deepcopy(quantized)
    compiled.compiled, graphs = CompiledForward(compiled, backend="aot_eager"), torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for state in states:
        exact = net(*state)
        errors = [(network(*state) - exact).square().mean().sqrt() for network in (quantized, compiled)]
        assert 0 < errors[1] < 1.2 * errors[0] < 0.15 * exact.square().mean().sqrt()  # roundings differ a little
    assert graphs["unique_graphs"] == before + 1


@torch.no_grad()
def test_every_way_to_call_it_chooses_the_level(digits):
    """As sample.py does; with a shift of a learned solver; for the features of a loss; compiled."""
    net, _, latents, calibration = digits
    quantized, seen = q.apply_ranges(net, calibration), []
    levels = next(layer.levels for layer in quantized.modules() if isinstance(layer, q.QuantizedLayer))
    x, shift = latents[:1], torch.zeros(1, net.noise_embedding.out_features)
    compiled = copy.copy(quantized)
    compiled.compiled = CompiledForward(compiled, backend="eager")
    compiled.compiled.graph = compiled.compiled._both
    calls = {
        "call": lambda: quantized(x, torch.tensor(0.01)),
        "by name": lambda: quantized(x, sigma=0.01),
        "shifted": lambda: call_shifted(quantized, shift, x, torch.tensor(0.01)),
        "features": lambda: DenoiserFeatures(quantized, 0.01)(x, {}),
        "compiled": lambda: compiled(x, torch.tensor(0.01)),
        "compiled, shifted": lambda: call_shifted(compiled, shift, x, torch.tensor(0.01)),
    }
    for call in calls.values():
        levels.choose(80.0)
        call()
        seen.append(levels.index)
    assert seen == [len(calibration["sigmas"]) - 1] * len(calls)


@torch.no_grad()
def test_copies_of_a_network_that_has_run(digits):
    net, _, latents, calibration = digits
    quantized, x = q.apply_ranges(net, calibration), latents[:1]
    expected = quantized(x, torch.tensor(0.5))
    for made in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        levels = [next(m.levels for m in n.modules() if isinstance(m, q.QuantizedLayer)) for n in (made, quantized)]
        quantized(x, torch.tensor(80.0))  # changes nothing for the copy
        assert torch.equal(made(x, torch.tensor(0.5)), expected) and levels[0] is not levels[1]


def test_compiling_needs_int8_kernels(digits, monkeypatch):
    net, _, _, calibration = digits
    monkeypatch.setattr(compile_module, "int8_kernels", lambda device: False)
    with pytest.raises(UserError, match="needs the int8 kernels of an x86 CPU"):
        prepare_network(q.apply_ranges(net, calibration), compile_mode="default")
    done = CliRunner().invoke(sample_cli.main, ["--dataset_name=digits", "--quantize=int8", "--compile", "--seeds=0"])
    assert done.exit_code == 2 and "needs the int8 kernels" in done.output and "calibrating" not in done.output


def test_gradients_pass_through_the_rounding(digits):
    """Solvers can be distilled on an 8-bit network."""
    net, _, latents, calibration = digits
    gradients = []
    for network in (net, q.apply_ranges(net, calibration)):
        x = latents[:2].clone().requires_grad_()
        network(x, torch.tensor(1.0)).square().sum().backward()
        gradients.append(x.grad)
    assert_relative(gradients[1], gradients[0], 0.3)


def test_each_noise_level_has_its_ranges(digits):
    net, states, _, calibration = digits
    assert calibration["sigmas"] == pytest.approx([float(sigma) for _, sigma in states])
    first = next(iter(calibration["layers"].values()))
    assert len(first) == len(states) and first[0] != first[-1]
    assert len(q.calibrate(net, states[-2:], per_level=False)["sigmas"]) == 1
    levels = q.Levels([80.0, 1.0, 0.01])
    for sigma, index in ((60.0, 0), (torch.tensor([0.9, 0.5]), 1), (0.02, 2)):
        levels.choose(sigma)
        assert levels.index == index


def test_a_calibration_can_be_kept(digits):
    net, _, latents, calibration = digits
    a, b = (q.apply_ranges(net, calibration) for _ in range(2))
    assert torch.equal(sample(a, latents, **IPNDM), sample(b, latents, **IPNDM))
    with pytest.raises(UserError, match="of another network, which has the layer nowhere"):
        q.apply_ranges(net, {"sigmas": [1.0], "layers": {"nowhere": [[1.0, 0.0]]}})


def test_what_does_not_go_together_is_said(digits):
    net, states, *_ = digits
    with pytest.raises(UserError, match="no states"):
        q.quantize(net, [])
    with pytest.raises(UserError, match="leave out --amp"):
        q.quantize(prepare_network(create_model("digits"), amp="bf16"), states)

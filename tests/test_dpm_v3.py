"""DPM-Solver-v3 and its statistics against exact solutions, other solvers and theory."""

import math
import os
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from toy import ToyNet, common

from models import create_model
from models.edm import EDMDenoiser
from solvers import get_schedule, make_solver, sample
from solvers.dpm_solver_v3 import (
    CORRECTORS,
    Curves,
    Statistics,
    guidance_rate,
    load_statistics,
    make_step,
    node_slopes,
    save_statistics,
    statistics_path,
    step_weights,
)
from solvers.unipc import UniPC
from tools import model_statistics
from tools.model_statistics import Derivative, Moments, estimate_statistics, regress
from torch_utils.errors import UserError
from torch_utils.tensor_file import write_safetensors

torch.set_num_threads(1)


class Base(torch.nn.Module):
    sigma_min, sigma_max, img_channels, img_resolution, label_dim = 0.01, 50.0, 1, 2, 0

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        self.calls.append(float(sigma.detach().max()))
        return self.denoised(x, sigma)


class Gaussian(Base):
    """Data N(mean, variance) per pixel: D is linear in x, and the ODE has a closed solution."""

    mean = torch.tensor([[[0.3, -0.7], [1.1, 0.0]]], dtype=torch.float64)
    variance = torch.tensor([[[0.09, 2.9], [0.01, 0.25]]], dtype=torch.float64)

    def denoised(self, x, sigma):
        return (self.variance * x + sigma**2 * self.mean) / (self.variance + sigma**2)

    def solution(self, x, start, end):
        return self.mean + (x - self.mean) * ((self.variance + end**2) / (self.variance + start**2)).sqrt()


class TwoGaussians(Base):
    """Data (N(-1, std^2) + N(1, std^2)) / 2 in every pixel: nonlinear, each pixel for itself."""

    std = 0.6

    def denoised(self, x, sigma):
        variance = self.std**2 + sigma**2
        return (self.std**2 * x + sigma**2 * torch.tanh(x / variance)) / variance


def latents(batch=4, shape=(1, 2, 2)):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def solve(net, path, sigmas, x=None, **options):
    return sample(net, latents() if x is None else x, solver="dpm_v3", statistics=str(path), sigmas=sigmas, **options)


def quantities(statistics):
    return {name: getattr(statistics, name) for name in ("sigmas", "l", "s", "b")}


# ---- limits in which it is another solver --------------------------------------------------------


class FullyWeighted(UniPC):
    """UniPC that solves for all its weights, also where the published code fixes one."""

    def weights(self, z, places, fixed):
        return super().weights(z, places, fixed=False)


@pytest.mark.parametrize("schedule", ["logsnr", "polynomial"])
@pytest.mark.parametrize("kind", ["data", "noise"])
def test_constant_statistics_of_order_one_are_dpmpp(kind, schedule):
    net, x = ToyNet(), common("latents2")
    expected = sample(
        net, x, solver="dpmpp", max_order=1, predict_x0=kind == "data", thresholding=False, num_steps=7,
        schedule_type=schedule,
    )  # fmt: skip
    found = sample(
        net, x, solver="dpm_v3", statistics=kind, corrector="off", max_order=1, num_steps=7, schedule_type=schedule
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(("order", "corrector"), [(1, "pseudo"), (2, "off"), (3, "off")])
@pytest.mark.parametrize("kind", ["data", "noise"])
def test_constant_statistics_are_unipc_with_all_weights_solved(monkeypatch, kind, order, lower, corrector):
    """The exponential integrator with polynomial interpolation. With a corrector of order 1 it is
    UniPC, without one UniPC's predictor alone."""
    monkeypatch.setitem(sys.modules["solvers.solver"].SOLVERS, "weighted", FullyWeighted)
    x, sigmas = common("latents2"), get_schedule(8, 0.01, 60.0)
    common_options = {"sigmas": sigmas, "max_order": order, "lower_order_final": lower, "return_trajectory": True}
    found = sample(ToyNet(), x, solver="dpm_v3", statistics=kind, corrector=corrector, **common_options)
    options = {"solver": "weighted", "predict_x0": kind == "data", "thresholding": False, **common_options}
    if corrector == "pseudo":
        expected = sample(ToyNet(), x, **options)
    else:  # UniPC does not correct its last point: every row from a schedule that starts from the row before
        expected = predictor_only(x, sigmas, order, lower, kind == "data")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def predictor_only(x, sigmas, order, lower, predict_x0):
    """The exponential integrator through the newest points, written with UniPC's weights."""
    solver, net, n = FullyWeighted(predict_x0=predict_x0, thresholding=False), ToyNet(), len(sigmas) - 1
    x, outputs = x * sigmas[0], []
    rows = [x]
    for i in range(n):
        s, t = float(sigmas[i]), float(sigmas[i + 1])
        denoised = net(x, s)
        outputs.append(denoised if predict_x0 else (x - denoised) / s)
        p = min(order, i + 1, n - i) if lower and i + 1 >= order else min(order, i + 1)
        h = math.log(s / t)
        z = -h if predict_x0 else h
        places = [math.log(s / float(sigmas[i - k])) / h for k in range(1, p)]
        terms = math.expm1(z) * outputs[-1]
        if places:
            terms = terms + sum(
                w * (outputs[-1 - k] - outputs[-1]) for k, w in enumerate(solver.weights(z, places, False), start=1)
            )
        x = t / s * x - terms if predict_x0 else x - t * terms
        rows.append(x)
    return torch.stack(rows)


# ---- the integrals -------------------------------------------------------------------------------


def random_statistics(nodes=6, scale=0.7):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(3, nodes, 1, 1, 2, generator=generator, dtype=torch.float64) * scale
    return Statistics(get_schedule(nodes, 0.05, 5.0, "logsnr"), 0.5 + 0.5 * values[0], values[1], values[2])


def test_integrals_against_a_fine_sum():
    statistics = random_statistics()
    curves, start, end, count = Curves(statistics), -math.log(4.1), -math.log(0.21), 40001
    at = torch.linspace(start, end, count, dtype=torch.float64)
    cells = torch.bucketize(at, curves.nodes[1:-1])
    l, s, b = (  # noqa: E741
        torch.cat(parts) for parts in zip(*(curves.values(at[cells == k], k) for k in range(5)), strict=True)
    )
    assert [curves.cell(float(value)) for value in at[::1000]] == cells[::1000].tolist()
    width = (end - start) / (count - 1)

    def running(values):
        pairs = 0.5 * width * (values[1:] + values[:-1])
        return torch.cat([torch.zeros_like(values[:1]), pairs.cumsum(0)])

    total_l, total_s = running(l), running(s)
    bias = running((-total_s).exp() * b)
    weight, u = (total_l + total_s).exp(), ((at - start) / (end - start)).reshape(-1, 1, 1, 1)
    decay = (-total_l[-1]).exp()
    step = make_step(curves, start, end)
    expected = {
        "l_start": l[0],
        "l_end": l[-1],
        "decay": decay,
        "growth": total_s[-1].exp(),
        "bias": bias[-1],
        "moments": torch.stack([decay * running(weight * u**j)[-1] for j in range(4)]),
        "drift": decay * running(weight * bias)[-1],
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(step, name), value, rtol=1e-7, atol=1e-8, msg=lambda m, name=name: name + m)


def test_curves_pass_through_the_nodes_with_the_slopes_of_the_estimate():
    statistics = random_statistics()
    curves = Curves(statistics)
    slopes = node_slopes(curves.nodes, statistics.l)
    for k in range(5):
        for node in (k, k + 1):
            at = curves.nodes[node : node + 1].clone().requires_grad_(True)
            l, s, b = curves.values(at, k)  # noqa: E741
            for value, name in ((l, "l"), (s, "s"), (b, "b")):
                torch.testing.assert_close(value[0], getattr(statistics, name)[node], rtol=0, atol=1e-13)
            (slope,) = torch.autograd.grad(l[0, 0, 0, 0], at)
            torch.testing.assert_close(slope[0], slopes[node, 0, 0, 0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("places", [[0.0], [0.0, -0.7], [0.0, -0.7, -1.9], [1.0, 0.0, -0.7, -1.9]])
def test_weights_integrate_polynomials(places):
    moments = torch.rand(4, 3, dtype=torch.float64)
    weights = step_weights(moments, places)
    for j in range(len(places)):
        torch.testing.assert_close(sum(w * u**j for w, u in zip(weights, places, strict=True)), moments[j])
    if len(places) == 2:
        assert all(map(torch.equal, step_weights(moments, places, pseudo=True), weights))
    if len(places) == 3:  # pseudo derivatives: exact to first order only
        pseudo = step_weights(moments, places, pseudo=True)
        reached = [sum(w * u**j for w, u in zip(pseudo, places, strict=True)) for j in range(3)]
        torch.testing.assert_close(reached[0], moments[0])
        torch.testing.assert_close(reached[1], moments[1])
        assert not torch.allclose(reached[2], moments[2])


# ---- exact on linear problems --------------------------------------------------------------------


def linear_statistics(kind, sigmas):
    """Statistics of the Gaussian network in closed form.

    own: use its own l, for which f is constant; else another l, for which f is an affine function
        of x that grows along the trajectories.
    """
    net, sigma = Gaussian(), sigmas.reshape(-1, 1, 1, 1)
    share = sigma**2 / (net.variance + sigma**2)
    if kind == "own":
        slope = -2 * share * (1 - share)  # dl / dlambda
        return Statistics(sigmas, share, torch.zeros_like(share), -slope * net.mean)
    if kind == "noise":  # f = N, proportional to sigma^2 / sqrt(variance + sigma^2)
        return Statistics(sigmas, torch.zeros_like(share), share - 2, torch.zeros_like(share))
    return Statistics(sigmas, torch.ones_like(share), share, share * net.mean)  # f = -D


@pytest.mark.parametrize("schedule", [[50.0, 0.01], [50.0, 9.0, 2.0, 0.3, 0.01]])
@pytest.mark.parametrize("kind", ["own", "data", "noise"])
def test_linear_networks_are_solved_exactly(tmp_path, kind, schedule):
    """Exact but for the interpolation, for any steps, order and corrector.

    The error falls at least with the square of the distance of the nodes.
    """
    net, x = Gaussian(), latents()
    exact = net.solution(x * 50.0, 50.0, 0.01)
    for options in ({}, {"max_order": 1}, {"corrector": "off"}, {"pseudo": True, "lower_order_final": False}):
        errors = []
        for nodes in (64, 256):
            path = tmp_path / f"{nodes}.safetensors"
            if not path.exists():
                save_statistics(linear_statistics(kind, get_schedule(nodes, 0.01, 50.0, "logsnr")), path)
            errors.append(float((solve(net, path, schedule, x, **options) - exact).abs().max()))
        assert errors[1] < 1e-3 and errors[1] < errors[0] / 12, (options, errors)
    euler = sample(net, x, solver="euler", sigmas=schedule)
    assert float((euler - exact).abs().max()) > 0.1


def test_estimated_statistics_of_a_linear_network(tmp_path):
    net, x = Gaussian(), latents()
    exact = net.solution(x * 50.0, 50.0, 0.01)
    errors = []
    for nodes in (32, 128):
        found = estimate_statistics(net, nodes=nodes, samples=6, batch=4, dtype=torch.float64)
        expected = linear_statistics("own", found.sigmas)
        torch.testing.assert_close(found.l, expected.l, rtol=0, atol=1e-8)
        assert found.s.abs().max() < 1e-3
        save_statistics(found, tmp_path / "found.safetensors")
        errors.append(float((solve(net, tmp_path / "found.safetensors", [50.0, 0.01], x) - exact).abs().max()))
    assert errors[1] < 0.05 and errors[1] < errors[0] / 8, errors


# ---- estimates -----------------------------------------------------------------------------------


def test_estimates_against_definitions():
    """Each pixel for itself, so that one probe per sample gives the derivative itself."""
    net, nodes, samples = TwoGaussians(), 41, 12
    found = {
        kind: estimate_statistics(net, nodes=nodes, samples=samples, batch=5, derivatives=kind, dtype=torch.float64)
        for kind in ("finite", "forward")
    }
    for a, b in zip(*(quantities(value).values() for value in found.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    assert [found[kind].metadata["derivatives"] for kind in found] == list(found)
    statistics = found["forward"]
    states = trajectories(net, statistics.sigmas, samples)
    lambdas = -statistics.sigmas.log()
    expected_l = []
    for sigma, x in zip(statistics.sigmas, states, strict=True):
        x = x.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(net(x, sigma).sum(), x)
        expected_l.append((1 - slope).mean(0))
    torch.testing.assert_close(statistics.l, torch.stack(expected_l), rtol=0, atol=1e-12)
    f = torch.stack(
        [(1 - l) * x - net(x, s) for l, x, s in zip(statistics.l, states, statistics.sigmas, strict=True)]  # noqa: E741
    )
    change = node_slopes(lambdas, f)[5:-5]  # along the trajectories
    s, b = statistics.s[5:-5], statistics.b[5:-5]
    residual = change - s.unsqueeze(1) * f[5:-5] - b.unsqueeze(1)
    tolerance = 0.03 * float(change.abs().max())
    assert residual.mean(1).abs().max() < tolerance  # b makes the residual zero on average
    assert residual.std() < (change - change.mean(1, keepdim=True)).std()  # and s makes it smaller


def trajectories(net, sigmas, samples):
    """The states that the estimate used, [N,samples,C,H,W]."""
    states = []

    class Recorder(Moments):
        def add(self, values):
            super().add(values)
            if len(values) == 3:
                states.append(values[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_statistics, "Moments", Recorder)
        estimate_statistics(
            net, nodes=len(sigmas), samples=samples, batch=samples, derivatives="forward", dtype=torch.float64
        )
    return torch.stack(states)


def test_regression_of_a_known_line():
    generator = torch.Generator().manual_seed(1)
    x, noise, f = torch.randn(3, 500, 1, 2, 2, generator=generator, dtype=torch.float64)
    l, slope = torch.rand(2, 1, 2, 2, generator=generator, dtype=torch.float64)  # noqa: E741
    s, b = torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64)
    denoised = (1 - l) * x - f
    change = -(1 - l) * (x - denoised) - slope * x - (s * f + b + 0.0 * noise)
    moments = Moments()
    for part in torch.stack([x, denoised, change]).split(170, dim=1):
        moments.add(part)
    found = regress(l, slope, moments.mean, moments.scatter / 500, 1e9, shrink=0.0)
    torch.testing.assert_close(found[0], s, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1], b, rtol=1e-5, atol=1e-5)
    shrunk, _ = regress(l, slope, moments.mean, moments.scatter / 500, 1e9, shrink=1.0)
    assert (shrunk.abs() < 0.7 * s.abs()).all()


def test_moments_do_not_depend_on_the_batches():
    values = torch.randn(3, 7, 1, 2, 2, dtype=torch.float64) * 3 + 50
    together, parts = Moments(), Moments()
    together.add(values)
    for part in values.split((1, 4, 2), dim=1):
        parts.add(part)
    torch.testing.assert_close(parts.mean, values.mean(1))
    torch.testing.assert_close(parts.scatter, together.scatter)
    torch.testing.assert_close(together.scatter[0, 0] / 7, values[0].var(0, correction=0))


def small_network():
    torch.manual_seed(0)
    net = EDMDenoiser(
        img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=8, channel_mult=[1, 2], num_blocks=1,
        attn_resolutions=[4], dropout=0.0,
    )  # fmt: skip
    for value in net.parameters():
        value.data += 0.1 * torch.randn_like(value)
    return net.eval().requires_grad_(False)


def test_finite_differences_of_a_real_network():
    """In float32, with attention, against double backward, at high and low noise."""
    net, x = small_network(), torch.randn(4, 1, 8, 8)
    for level in (40.0, 1.0, 0.01):
        sigma = torch.tensor(level)
        tangent = sigma * torch.randn_like(x).sign()
        found = Derivative(net, "auto", "cpu")(level * x, sigma, tangent, 0 * sigma, {})
        y = (level * x).requires_grad_(True)
        dual = torch.zeros_like(x, requires_grad=True)
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention of CPUs can be differentiated only once
            (first,) = torch.autograd.grad(net(y, sigma), y, dual, create_graph=True)
            (exact,) = torch.autograd.grad(first, dual, tangent)
        assert float((found - exact).norm() / exact.norm()) < 0.02, level


# ---- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"max_order": 1, "corrector": "off"}, 1),
        ({"max_order": 1, "corrector": "same"}, 1),
        ({"max_order": 1, "corrector": "pseudo"}, 2),
        ({"max_order": 2, "corrector": "off"}, 2),
        ({"max_order": 2, "corrector": "same"}, 2),
        ({"max_order": 2, "corrector": "pseudo"}, 2),
        ({"max_order": 3, "corrector": "same"}, 2),
        ({"max_order": 3, "corrector": "off", "pseudo": True}, 2),
    ],
    ids=str,
)
def test_order_with_estimated_statistics(toy, options, order):
    """On the mixture of the golden data. The first step of order one limits the whole to order 2
    where it is not corrected (docs/solvers.md)."""
    path, x, exact = toy
    errors = []
    for n in (24, 48):
        sigmas = get_schedule(n + 1, 0.35, 1.6, "logsnr")
        found = solve(ToyNet(), path, sigmas, x, lower_order_final=False, **options)
        errors.append(float((found - exact).square().mean().sqrt()))
    assert math.log2(errors[0] / errors[1]) > order - 0.3, errors


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(file of estimated statistics, latents, the exact solution from 1.6 to 0.35)."""
    path = tmp_path_factory.mktemp("toy") / "toy.safetensors"
    net = ToyNet()
    net.sigma_min, net.sigma_max = 0.3, 2.0
    save_statistics(estimate_statistics(net, nodes=9, samples=16, batch=16, dtype=torch.float64), path)
    x, sigmas = common("latents2") * 0.3, get_schedule(401, 0.35, 1.6, "logsnr")
    exact = sample(ToyNet(), x, solver="ipndm", sigmas=sigmas)
    rough = sample(ToyNet(), x, solver="heun", sigmas=sigmas[::4])
    torch.testing.assert_close(rough, exact, rtol=0, atol=1e-4)
    return path, x, exact


# ---- evaluations and files -----------------------------------------------------------------------


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("intervals", [1, 2, 7])
def test_one_evaluation_per_interval(intervals, corrector, afs):
    net, sigmas = ToyNet(), get_schedule(intervals + 1, 0.01, 60.0)
    seen = []
    _, info = sample(
        net, common("latents2"), solver="dpm_v3", statistics="data", corrector=corrector, sigmas=sigmas, afs=afs,
        return_info=True, callback=lambda i, sigma, x, denoised: seen.append(i),
    )  # fmt: skip
    assert [float(value) for value in net.calls] == sigmas[int(afs) : -1].tolist()
    assert info.nfe == make_solver("dpm_v3").evaluations(intervals, afs)
    assert seen == list(range(intervals))


@pytest.mark.parametrize(
    ("latent", "guided", "intervals", "corrector", "pseudo"),
    [
        (False, False, 5, "same", True),
        (False, False, 6, "same", False),
        (False, False, 7, "off", False),
        (True, False, 5, "pseudo", False),
        (False, True, 7, "pseudo", False),
    ],
)
def test_auto_depends_on_the_network_and_the_length(latent, guided, intervals, corrector, pseudo):
    net, x = ToyNet(), common("latents2")
    net.latent, net.guided = latent, guided

    def run(**options):
        return sample(net, x, solver="dpm_v3", statistics="data", num_steps=intervals + 1, **options)

    auto = run()
    assert torch.equal(auto, run(corrector=corrector, pseudo=pseudo))
    assert torch.equal(auto, run(corrector=corrector, pseudo=str(pseudo)))
    if intervals < 7 or guided:
        assert not torch.allclose(auto, run(corrector="off"))
    if pseudo:
        assert not torch.allclose(auto, run(pseudo=False))


def test_file_keeps_everything(tmp_path):
    net = TwoGaussians()
    net.weights_hash, net.dataset_name, net.guidance_rate = "ab" * 32, "toy", 2.5
    found = estimate_statistics(net, nodes=5, samples=3, seed=4, dtype=torch.float64)
    path = tmp_path / "folder" / "toy.safetensors"
    save_statistics(found, path)
    kept = load_statistics(path)
    assert all(torch.equal(a, b) for a, b in zip(quantities(found).values(), quantities(kept).values(), strict=True))
    assert kept.metadata == found.metadata
    wanted = {"network_hash": "ab" * 32, "samples": 3, "nodes": 5, "seed": 4, "sigma_min": 0.01, "guidance_rate": 2.5}
    assert {
        name: pytest.approx(kept.metadata[name]) if name == "sigma_min" else kept.metadata[name] for name in wanted
    } == wanted
    assert [entry.name for entry in path.parent.iterdir()] == ["toy.safetensors"]
    assert statistics_path(net) == Path("src/toy/dpm_v3-abababababab-guidance2.5.safetensors")
    again = estimate_statistics(net, nodes=5, samples=3, seed=4, dtype=torch.float64)
    other = estimate_statistics(net, nodes=5, samples=3, seed=5, dtype=torch.float64)
    assert torch.equal(again.s, found.s) and not torch.equal(other.s, found.s)


@pytest.mark.parametrize(
    ("rate", "guided", "expected"),
    [(None, False, None), (0.0, False, None), (1.0, False, None), (1.0, True, 1.0), (0.0, True, 0.0), (3, True, 3.0)],
)
def test_guidance_of_the_statistics(rate, guided, expected):
    """A rate of 0 or 1 means no guidance in one family of networks and guidance in another."""
    net = named(Gaussian())
    net.guidance_rate, net.guided = rate, guided
    assert guidance_rate(net) == expected
    assert ("guidance" in statistics_path(net).name) == (expected is not None)


def named(net, digest="ab" * 32):
    net.weights_hash, net.dataset_name = digest, "toy"
    return net


def message(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.safetensors"
    schedule = [40.0, 1.0]

    def attempt(net, sigmas=schedule, statistics=path):
        before = len(net.calls)
        text = message(lambda: solve(net, statistics, sigmas))
        assert len(net.calls) == before  # found before the network is asked
        return text

    command = "python -m tools.model_statistics --dataset_name=toy"
    assert attempt(named(Gaussian()), statistics="auto").endswith(command)
    assert attempt(named(Gaussian())).endswith(f"{command} --dest={path}")
    assert "give statistics=FILE" in attempt(Gaussian(), statistics="auto")
    path.write_bytes(b"no tensors at all")
    assert "not a readable safetensors file" in attempt(Gaussian())
    write_safetensors(path, {"l": torch.zeros(2)}, {})
    assert "no 'dpm_v3' in its metadata" in attempt(Gaussian())
    write_safetensors(path, {"l": torch.zeros(2)}, {"dpm_v3": "{}"})
    assert "'sigmas' is missing" in attempt(Gaussian())
    good = linear_statistics("own", get_schedule(9, 0.01, 50.0, "logsnr"))
    for change, text in (
        ({"s": good.s[:3]}, "do not match"),
        ({"b": good.b * math.nan}, "not finite"),
        ({"sigmas": good.sigmas.flip(0)}, "decrease"),
    ):
        write_safetensors(path, {**quantities(good), **change}, {"dpm_v3": "{}"})
        assert text in attempt(Gaussian())
    made = {"network_hash": "cd" * 32, "guidance_rate": None}
    save_statistics(Statistics(**quantities(good), metadata=made), path)
    assert "of another network (cdcdcdcdcdcd, not abababababab)" in attempt(named(Gaussian()))
    wide = Gaussian()
    wide.sigma_min = 0.002
    assert "sigma=0.005 is outside the range of the statistics" in attempt(wide, [50.0, 0.005])
    assert "images of 1x2x2, those of the network have 3x16x16" in attempt(ToyNet())
    guided = Gaussian()
    guided.guidance_rate = 7.5
    assert "guidance_rate=None, the network has 7.5" in attempt(guided)
    solve(named(Gaussian(), "cd" * 32), path, schedule)  # the right one
    with pytest.raises(ValueError, match="corrector=maybe: choose from auto, same, pseudo, off"):
        solve(Gaussian(), path, schedule, corrector="maybe")


def test_a_new_file_is_seen(tmp_path):
    """What was read before is kept in memory only as long as the file is the same."""
    path, net, results = tmp_path / "x.safetensors", Gaussian(), []
    for number, kind in enumerate(("own", "data")):
        save_statistics(linear_statistics(kind, get_schedule(9, 0.01, 50.0, "logsnr")), path)
        os.utime(path, ns=(number, number))
        results.append(solve(net, path, [50.0, 0.01]))
    assert not torch.equal(*results)


def test_tool(tmp_path, monkeypatch):
    """Through the command line on the embedded network; then the solver finds the file itself."""
    monkeypatch.chdir(tmp_path)
    options = ["--dataset_name=digits", "--nodes=4", "--samples=2", "--device=cpu"]
    done = CliRunner().invoke(model_statistics.main, options)
    assert done.exit_code == 0, done.output
    net = create_model("digits")
    path = statistics_path(net)
    assert f"{path}: 4 nodes, 2 samples, finite derivatives" in done.output
    statistics = load_statistics(path)
    assert statistics.l.shape == (4, 1, 32, 32)
    assert statistics.metadata["network_hash"] == net.weights_hash
    assert abs(float(statistics.l[0].mean()) - 1) < 0.01  # at high noise: data prediction
    found = sample(net, torch.randn(1, 1, 32, 32), solver="dpm_v3", num_steps=4)
    assert found.dtype == torch.float32 and found.isfinite().all()
    done = CliRunner().invoke(model_statistics.main, ["--help"])
    assert "Costs about five" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--dataset_name=nothing"], "'nothing' is unknown"),
        (["--dataset_name=digits", "--dest=a.pt"], "must end in .safetensors"),
        (["--dataset_name=digits", "--nodes=2"], "--nodes"),
        (["--dataset_name=digits", "--device=toaster"], "not a device"),
    ],
)
def test_mistakes_on_the_command_line(options, text):
    found = CliRunner().invoke(model_statistics.main, options)
    assert found.exit_code == 2 and isinstance(found.exception, SystemExit)
    assert text in found.output


def test_forward_mode_that_is_not_supported_is_explained():
    class Stubborn(TwoGaussians):
        def denoised(self, x, sigma):
            if torch.autograd.forward_ad.unpack_dual(
                x
            ).tangent is not None or torch._C._functorch.is_gradtrackingtensor(x):
                raise NotImplementedError("no forward mode here")
            return super().denoised(x, sigma)

    net = Stubborn()
    found = message(lambda: estimate_statistics(net, nodes=3, samples=2, derivatives="forward"))
    assert "no forward mode here" in found and "use finite" in found
    x, sigma = latents(), torch.tensor(1.0, dtype=torch.float64)
    automatic = Derivative(net, "auto", "cuda")
    fallen_back = automatic(x, sigma, sigma * x.sign(), 0 * sigma, {})
    assert automatic.used == "finite"
    wanted = Derivative(TwoGaussians(), "forward", "cpu")(x, sigma, sigma * x.sign(), 0 * sigma, {})
    torch.testing.assert_close(fallen_back, wanted, rtol=0, atol=1e-7)

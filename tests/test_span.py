"""The span solver against solvers and formulas it contains, closed forms and differences."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from toy import GOLDEN, ToyNet, common

import compare
import sample as cli
from models import create_model
from sampling.generate import generate_images
from sampling.settings import Settings, settings_of
from solvers import Sampler, get_schedule, integrate, make_solver, sample
from solvers.span_heads import SpatialHead, direction_features
from solvers.span_table import GROUPS, PRESETS, SpanSolver
from tools import report as comparison_report
from torch_utils.errors import UserError
from torch_utils.seeds import SeededGenerators
from torch_utils.tensor_file import read_safetensors
from training.checkpoint import load_predictor, save_predictor
from training.predictor import AMEDPredictor

torch.set_num_threads(1)
GRID = [60.0, 21.0, 9.5, 2.0, 0.7, 0.11, 0.01]
EXACT = {"rtol": 0, "atol": 1e-10}


def latents(name="latents2"):
    return common(name)


def shaken(student, size=0.3, seed=0):
    """The same with random numbers for everything that is learned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in student.groups().values():
            value.add_(size * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return student


def set_(student, **values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(student, name).copy_(torch.as_tensor(value, dtype=torch.float64))
    return student


class Embedding(torch.nn.Module):
    """A noise embedding of two numbers, zero but for what is added to it."""

    out_features = 2

    def forward(self, noise):
        return torch.zeros(len(noise), 2, dtype=noise.dtype)


class EmbeddedToy(ToyNet):
    """A toy network with a noise embedding: its numbers are a contrast and a brightness."""

    def __init__(self, dtype=torch.float64):
        super().__init__(dtype)
        self.noise_embedding = Embedding()

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        contrast, brightness = self.noise_embedding(sigma.flatten())[..., None, None].split(1, 1)
        return super().forward(x, sigma) * (1 + contrast) + brightness


class Gauss(torch.nn.Module):
    """Data N(mean, v) in every pixel."""

    img_channels, img_resolution, label_dim, sigma_min, sigma_max = 3, 16, 0, 0.001, 80.0

    def __init__(self, mean=0.0, v=0.5):
        super().__init__()
        self.mean, self.v, self.calls = mean, v, []

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        self.calls.append(sigma.flatten())
        return self.mean + (x - self.mean) * self.v / (self.v + sigma**2)

    def solution(self, x, start, end):
        return self.mean + (x - self.mean) * math.sqrt((self.v + end**2) / (self.v + start**2))


class Zero(torch.nn.Module):
    sigma_min, sigma_max = 0.001, 100.0

    def forward(self, x, sigma):
        return torch.zeros_like(x)


# ---- what it contains ----------------------------------------------------------------------------

THEORIES = [
    ({"base": "euler"}, {"solver": "euler"}),
    *(({"base": "ab", "max_order": k}, {"solver": "ipndm_v", "max_order": k}) for k in (1, 2, 3, 4)),
    *(({"base": "ipndm", "max_order": k}, {"solver": "ipndm", "max_order": k}) for k in (2, 3, 4)),
    *(({"base": "dpmpp", "max_order": k}, {"solver": "dpmpp", "max_order": k, "thresholding": False}) for k in (2, 3)),
    (
        {"base": "dpmpp", "lower_order_final": False},
        {"solver": "dpmpp", "max_order": 3, "thresholding": False, "lower_order_final": False},
    ),
    ({"base": "deis"}, {"solver": "deis", "max_order": 3}),
    *(
        ({"base": "unipc", "max_order": k}, {"solver": "unipc", "max_order": k, "thresholding": False})
        for k in (1, 2, 3)
    ),
]


@pytest.mark.parametrize("first_step", ["none", "zero"])
@pytest.mark.parametrize(("config", "plain"), THEORIES, ids=lambda value: "-".join(map(str, value.values())))
def test_without_corrections_it_is_the_theory(config, plain, first_step):
    student = SpanSolver(**config, first_step=first_step, sigmas=GRID)
    options = {"return_trajectory": True, "return_info": True}
    found, info = sample(ToyNet(), latents(), solver="span", predictor=student, **options)
    expected, other = sample(ToyNet(), latents(), sigmas=GRID, afs=first_step == "zero", **plain, **options)
    assert info.nfe == other.nfe and found.shape[0] == expected.shape[0] == len(GRID)
    if plain["solver"] == "unipc":  # its trajectory has the corrected points, that of the table the predicted ones
        found, expected = found[-1], expected[-1]
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("base", ["ab", "dpmpp"])
def test_ld3_is_its_base_on_labels_with_decoupled_times(base):
    student = shaken(SpanSolver.preset("ld3", base=base, num_steps=6, sigma_max=60.0))
    assert set(student.groups()) == {"knots", "sigma_scale"}
    plain = {"ab": {"solver": "ipndm_v", "max_order": 3}, "dpmpp": {"solver": "dpmpp", "thresholding": False}}[base]
    sigmas, sigma_cond = student.sigmas().detach(), student.sigmas_cond().detach()
    assert not torch.allclose(sigmas[:-1], sigma_cond[:-1], rtol=1e-3)
    expected = sample(ToyNet(), latents(), sigmas=sigmas, sigmas_cond=sigma_cond, **plain)
    torch.testing.assert_close(student.run(ToyNet(), latents()).detach(), expected, **EXACT)


class Table(torch.nn.Module):
    """A predictor with constant outputs per interval, looked up by its first noise level."""

    def __init__(self, sigmas, r, c, a):
        super().__init__()
        self.sigmas, self.numbers = sigmas, (r, c, a)

    def forward(self, feature, cur, nxt):
        i = int((self.sigmas - cur).abs().argmin())
        return tuple(numbers[i].reshape(1, 1, 1, 1) for numbers in self.numbers)


@pytest.mark.parametrize("first_step", ["none", "zero"])
def test_amed_table_is_amed_with_constant_outputs(first_step):
    student = SpanSolver.preset("amed-table", num_steps=5, first_step=first_step)
    generator = torch.Generator().manual_seed(3)
    r, c, a = (torch.rand(4, generator=generator, dtype=torch.float64) for _ in range(3))
    c, a = 1 + 0.08 * (c - 0.5), (0.5 * (a - 0.5)).exp()
    set_(student, substeps=r.logit(), step_gain=((c - 1) / 0.05).atanh(), substep_sigma_scale=(a.log() / 0.3).atanh())
    sigmas = get_schedule(5, 0.002, 80.0, "time_uniform", 1)
    expected, info = sample(
        ToyNet(),
        latents(),
        solver="amed",
        predictor=Table(sigmas, r, c, a),
        sigmas=sigmas,
        afs=first_step == "zero",
        return_trajectory=True,
        return_info=True,
    )
    found = student.run(ToyNet(), latents(), return_trajectory=True).detach()
    torch.testing.assert_close(found, expected, **EXACT)
    assert info.nfe == student.evaluations()


def test_epd_is_its_formulas():
    student = shaken(SpanSolver.preset("epd", num_steps=4))
    net, x = ToyNet(), latents()
    sigmas = get_schedule(4, 0.002, 80.0, "time_uniform", 1)
    r = torch.sigmoid(student.substeps).detach().reshape(3, 2)
    a = (0.05 * torch.tanh(student.substep_sigma_scale)).exp().detach().reshape(3, 2)
    scale = 1 + 0.05 * torch.tanh(student.step_gain.detach())
    x = x * sigmas[0]
    for i, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        d = x / (1 + s**2).sqrt() if i == 0 else (x - net(x, s)) / s
        first = 0.5 + student.coef_offset.detach()[i]
        total = 0
        for k, weight in enumerate((first, 1 - first)):
            m = t ** r[i, k] * s ** (1 - r[i, k])
            point = x + (m - s) * d
            total = total + scale[i] * weight * (point - net(point, a[i, k] * m)) / m
        x = x + (t - s) * total
    torch.testing.assert_close(student.run(ToyNet(), latents()).detach(), x, **EXACT)


def test_dyweight_is_its_formulas_on_the_labels_that_they_imply():
    net, tau = ToyNet(), get_schedule(6, 0.02, 70.0)
    generator = torch.Generator().manual_seed(2)
    theory = make_solver("ipndm", {"max_order": 3}).WEIGHTS
    weights = [torch.tensor(theory[min(n, 2)], dtype=torch.float64) for n in range(5)]
    weights = [w + 0.03 * torch.randn(len(w), generator=generator, dtype=torch.float64) for w in weights]
    a = 1 + 0.1 * torch.randn(5, generator=generator, dtype=torch.float64)
    t, x, slopes, labels = tau[0], latents() * tau[0], [], [tau[0]]
    for n in range(5):  # x += (tau_{n+1} - t_n) sum_j W_nj g_j and the same for the label
        slopes.append(x / (1 + t**2).sqrt() if n == 0 else (x - net(x, a[n] * t)) / t)
        x = x + (tau[n + 1] - t) * sum(w * g for w, g in zip(weights[n], reversed(slopes), strict=False))
        t = t + weights[n].sum() * (tau[n + 1] - t)
        labels.append(t)
    student = SpanSolver.preset("dyweight", sigmas=[float(label) for label in labels])
    corrections = []
    for w, base in zip(weights, (theory[min(n, 2)] for n in range(5)), strict=True):
        corrections += reversed((w / w.sum() - torch.tensor(base, dtype=torch.float64))[1:].tolist())
    set_(student, sigma_scale=a[1:].log(), coef_offset=corrections)
    torch.testing.assert_close(student.run(ToyNet(), latents()).detach(), x, **EXACT)


@pytest.mark.parametrize(("case", "first_step"), [("dyweight.0", "zero"), ("dyweight.1", "none")])
@pytest.mark.parametrize("last_sum", [1.0, 0.97])
def test_dyweight_is_its_authors_sampler(case, first_step, last_sum):
    """Samples of Westlake-AGI-Lab/DyWeight 620534e, also if the last row does not sum to one."""
    z, net = np.load(GOLDEN / "dyweight.npz"), ToyNet()
    net.means, x = torch.from_numpy(z["means"]).double(), torch.from_numpy(z["latents"]).double()
    weights, times = torch.from_numpy(z[f"{case}.W"]), torch.from_numpy(z[f"{case}.t_scale"])
    grid, labels = get_schedule(5, 0.002, 80.0), [80.0]
    for i in range(3):  # sums of rows move the labels along the fixed grid
        labels.append(labels[-1] + float(weights[i].sum()) * (float(grid[i + 1]) - labels[-1]))
    student = SpanSolver.preset("dyweight", sigmas=[*labels, 0.002], first_step=first_step)
    changes = []
    for row in student.rows:
        own = weights[row.interval, : row.count] / weights[row.interval].sum()
        changes.append((own - student.coefficients(row.interval).detach())[row.first : row.first + row.free])
    set_(student, coef_offset=torch.cat(changes), sigma_scale=times.log())
    assert student.groups()["step_gain"].numel() == 1
    set_(
        student, step_gain=[math.atanh((last_sum - 1) / student.config["step_gain_bound"])]
    )  # one number: of the last row
    expected = torch.from_numpy(z[f"{case}.{'final' if last_sum == 1 else 'unpinned'}"])
    torch.testing.assert_close(student.run(net, x).detach(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_scales_of_the_last_intervals_only():
    student = shaken(SpanSolver(learn=["step_gain"], last_step_gains=2, num_steps=6))
    scales = torch.stack([scale for _, scale, _ in student.plan().steps]).detach()
    assert student.scalars() == 2 and bool((scales[:3] == 1).all()) and bool((scales[3:] != 1).all())
    with pytest.raises(UserError, match="last_step_gains=0 must be a whole number above 0"):
        SpanSolver(last_step_gains=0)


def test_gs_and_s4s_are_in_the_span():
    """A step of free weights b on denoised images with a gain on x is a row of a dense table."""
    net, sigmas, x = ToyNet(), torch.tensor(GRID, dtype=torch.float64), latents() * GRID[0]
    generator = torch.Generator().manual_seed(5)
    student = SpanSolver.preset("gs", sigmas=GRID, learn=["coef_offset", "state_gain"])
    images, theory = [], student.plan().steps
    eye, coordinates, rows = torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64), []
    in_span = []  # D_j = x_j - s_j g_j in coordinates on the slopes
    for i, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        b = torch.randn(min(i + 1, 3), generator=generator, dtype=torch.float64) * 0.2
        b[-1] = 1 - b[:-1].sum()
        images.append(net(x, s))
        in_span.append(coordinates - s * eye[i])
        x = t / s * x + (1 - t / s) * sum(w * d for w, d in zip(b, images[-3:], strict=True))
        after = t / s * coordinates + (1 - t / s) * sum(w * d for w, d in zip(b, in_span[-3:], strict=True))
        rows.append(((after - coordinates) / (t - s))[: i + 1])
        coordinates = after
    set_(student, coef_offset=torch.cat([(row - c)[:-1] for row, (c, _, _) in zip(rows, theory, strict=True)]))
    torch.testing.assert_close(student.run(ToyNet(), latents()).detach(), x, rtol=0, atol=1e-9)


# ---- theory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "order"),
    [
        ({"base": "ab", "max_order": 1}, 1),
        ({"base": "ab", "max_order": 2}, 2),
        ({"base": "dpmpp", "max_order": 2, "lower_order_final": False}, 2),
        ({"base": "midpoint"}, 2),
        ({"base": "ab", "parallel": 2, "max_order": 2}, 2),
        ({"base": "ab", "parallel": 3, "max_order": 2}, 2),
    ],
    ids=str,
)
def test_order_of_convergence(config, order):
    net, x, errors = Gauss(v=1.5), latents(), []
    for intervals in (20, 40):
        sigmas = torch.linspace(1.2, 0.4, intervals + 1, dtype=torch.float64).tolist()
        student = SpanSolver(**config, sigmas=sigmas, first_step="none")
        found = sample(net, x, solver="span", predictor=student)
        errors.append(float((found - net.solution(1.2 * x, 1.2, 0.4)).abs().max()))
    assert order - 0.2 < math.log2(errors[0] / errors[1]) < order + 0.4


@pytest.mark.parametrize("first_step", ["none", "gaussian"])
@pytest.mark.parametrize("structure", [{}, {"parallel": 2}, {"base": "midpoint", "parallel": 2}], ids=str)
def test_translation_of_the_data_is_that_of_the_images(structure, first_step):
    """Only delta, and a scale that breaks the labels, can move the mean."""
    student = SpanSolver(**structure, num_steps=5, first_step=first_step, learn=list(GROUPS[:5]))
    shift = torch.linspace(-1, 2, 3 * 16 * 16, dtype=torch.float64).reshape(3, 16, 16)
    net, high = Gauss(0.0), 80.0
    shaken(student)
    if first_step == "gaussian":
        student._set_gaussian(torch.zeros(3, 16, 16), torch.tensor(0.5))
    plain = sample(net, latents(), solver="span", predictor=student)
    if first_step == "gaussian":
        student._set_gaussian(shift, torch.tensor(0.5))
    moved = sample(Gauss(shift), latents() + shift / high, solver="span", predictor=student)
    torch.testing.assert_close(moved, plain + shift, rtol=0, atol=1e-9)
    student = shaken(SpanSolver(**structure, num_steps=5, first_step=first_step, learn=["state_gain"]))
    if first_step == "gaussian":
        student._set_gaussian(shift, torch.tensor(0.5))
    moved = sample(Gauss(shift), latents() + shift / high, solver="span", predictor=student)
    assert float((moved - plain - shift).abs().max()) > 0.01


@pytest.mark.parametrize("name", PRESETS)
def test_labels_are_the_noise_levels(name):
    """With D = 0 every state is x_0 s_i / s_0, whatever is learned but delta and scale."""
    learn = [group for group in GROUPS if group not in ("step_gain", "state_gain")]
    student = shaken(SpanSolver.preset(name, num_steps=5, first_step="none", learn=learn), 0.5)
    states = student.run(Zero(), latents(), return_trajectory=True)
    expected = latents() * student.sigmas().reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(states, expected, **EXACT)
    plan = student.plan()
    rows = [c for c, _, _ in plan.steps] + [c for points in plan.substeps for _, _, c in points]
    torch.testing.assert_close(
        torch.stack([c.sum() for c in rows]), torch.ones(len(rows), dtype=torch.float64), **EXACT
    )


def test_gaussian_data_are_measured():
    mean = torch.linspace(-1, 0.5, 3 * 16 * 16, dtype=torch.float64).reshape(3, 16, 16)
    net, student = Gauss(mean, v=0.3), SpanSolver(first_step="gaussian")
    with pytest.raises(UserError, match="measure_gaussian"):
        student.run(net, latents())
    student.measure_gaussian(net, calls=96)
    assert sum(len(call) for call in net.calls) == 2 and student.config["image_shape"] == [3, 16, 16]
    # the mean of D over 96 samples has a standard error of sqrt(v^2 / sigma^2 / 96)
    assert float((student.mean - mean).abs().max()) < 5 * 0.3 / 80 / math.sqrt(96)
    assert float(student.variance) == pytest.approx(0.3, rel=1e-4)
    x = 80 * latents()
    slope = student.first_direction(x, torch.tensor(80.0, dtype=torch.float64))
    torch.testing.assert_close(slope, (x - net(x, torch.tensor(80.0))) / 80, rtol=0, atol=1e-4)

    class Prompted(Gauss):
        def forward(self, x, sigma, rows):
            assert rows == len(x)
            return super().forward(x, sigma)

    again = SpanSolver(first_step="gaussian")
    prompted = Prompted(mean, v=0.3)
    again.measure_gaussian(prompted, calls=96, batch=17, make_cond=lambda generators: {"rows": len(generators.seeds)})
    torch.testing.assert_close(again.mean, student.mean, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="images of shape"):
        student.run(net, latents()[..., :8])


@pytest.mark.parametrize(("slope", "variance"), [(-0.2, 0.0), (0.25, 80.0**2 / 3), (0.9, 80.0**2)])
def test_a_measured_variance_is_never_negative(slope, variance):
    """D = mu + slope (x - mu) with slope = v / (v + sigma^2), which is limited to 0..1/2."""

    class Linear(Gauss):
        def forward(self, x, sigma):
            return self.mean + slope * (x - self.mean)

    student = SpanSolver(first_step="gaussian")
    student.measure_gaussian(Linear(torch.zeros(3, 16, 16, dtype=torch.float64)), calls=16)
    assert float(student.variance) == pytest.approx(variance, rel=1e-4, abs=1e-9)
    assert student.run(Linear(torch.zeros(3, 16, 16, dtype=torch.float64)), latents()).isfinite().all()


# ---- labels and numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["polynomial", "logsnr", "time_uniform", None])
def test_initial_labels_are_those_asked_for(schedule):
    config = {"sigmas": GRID} if schedule is None else {"num_steps": 7, "schedule_type": schedule, "sigma_max": 60.0}
    student = SpanSolver(**config)
    expected = GRID if schedule is None else get_schedule(7, 0.002, 60.0, schedule)
    torch.testing.assert_close(
        student.sigmas().detach(), torch.as_tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0
    )
    torch.testing.assert_close(student.sigmas_cond(), student.sigmas(), rtol=0, atol=0)
    assert student.config["sigma_max"] == 60.0 and student.config["num_steps"] == 7


@pytest.mark.parametrize("size", [0.1, 3.0, 100.0])
def test_labels_descend_between_fixed_ends_whatever_the_parameters(size):
    for seed in range(20):
        student = shaken(SpanSolver(num_steps=9, parallel=2, learn=["knots", "substeps", "sigma_scale"]), size, seed)
        sigmas, inner = student._levels()
        assert (sigmas[0], sigmas[-1]) == (80.0, 0.002) and bool((sigmas[1:] < sigmas[:-1]).all())
        for i, points in enumerate(inner):
            assert all(sigmas[i + 1] <= label <= sigmas[i] for label in points)
        assert bool((student.sigmas_cond() / sigmas).log().abs().max() <= 0.3 + 1e-12)


def test_numbers_of_scalars_and_evaluations():
    counts = [SpanSolver.preset("full", num_steps=calls + 2).scalars() for calls in (3, 4, 5, 6)]
    assert counts == [15, 22, 30, 39]  # coefficients S (S + 1) / 2, labels, times and gains S each
    assert SpanSolver.preset("full", num_steps=5, first_step="none").evaluations() == 4
    for structure, calls in (({"parallel": 2}, 6), ({"base": "midpoint", "parallel": 2}, 11)):
        assert SpanSolver(**structure, num_steps=5).evaluations() == calls


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("first_step", ["none", "zero"])
@pytest.mark.parametrize("name", PRESETS)
def test_evaluations_are_those_really_made(name, first_step, denoise):
    for parallel in {1, PRESETS[name].get("parallel", 1), 2 if name == "full" else 1}:
        student, net, seen = (
            SpanSolver.preset(name, num_steps=5, first_step=first_step, parallel=parallel),
            ToyNet(),
            [],
        )
        x, info = sample(
            net,
            latents(),
            solver="span",
            predictor=student,
            return_info=True,
            denoise_to_zero=denoise,
            callback=lambda i, sigma, x, denoised, seen=seen: seen.append((i, float(sigma), x, denoised)),
        )
        made = sum(max(1, len(call) // 2) for call in net.calls)
        assert info.nfe == made == student.evaluations() + denoise
        stages = 4 * (1 + student.nested) - student.analytic
        assert len(net.calls) == stages + denoise  # those of a stage in one batch
        sigmas = student.sigmas().detach()
        assert [(i, sigma) for i, sigma, _, _ in seen] == [(i, float(sigmas[i])) for i in range(4)]
        net.evals_per_call = 2
        assert (
            sample(net, latents(), solver="span", predictor=student, return_info=True)[1].nfe
            == 2 * student.evaluations()
        )
        torch.testing.assert_close(seen[2][3], ToyNet()(seen[2][2], sigmas[2]), rtol=0, atol=1e-11)


def test_parallel_calls_have_the_condition_of_their_samples():
    class Classes(Gauss):
        def forward(self, x, sigma, shift, other):
            assert len(shift) == len(x) and len(other) in (1, len(x))
            return super().forward(x - shift, sigma) + shift

    shift = torch.tensor([0.5, -2.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    student = shaken(SpanSolver.preset("epd", num_steps=4))
    cond = {"shift": shift, "other": torch.zeros(1, 3)}
    together = student.run(Classes(), latents(), cond)
    for k in range(2):
        alone = student.run(Classes(), latents()[k : k + 1], {**cond, "shift": shift[k : k + 1]})
        torch.testing.assert_close(together[k : k + 1], alone, **EXACT)


def test_single_and_double_precision():
    student = shaken(SpanSolver.preset("full", num_steps=5, first_step="zero", parallel=2))
    double = student.run(ToyNet(), latents())
    single = student.run(ToyNet(torch.float32), latents().float())
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-4)
    assert all(value.dtype == torch.float64 for value in student.half().state_dict().values())


def test_the_table_is_the_whole_solver():
    """Sampling by hand from nothing but the exported numbers."""
    student = shaken(SpanSolver.preset("full", num_steps=5, first_step="zero", parallel=2))
    table = json.loads(json.dumps(student.table()))
    net, x, slopes = ToyNet(), latents() * table["sigmas"][0], []
    mix = lambda row: sum(c * slope for c, slope in zip(row, slopes, strict=True))  # noqa: E731
    for step, end in zip(table["intervals"], table["sigmas"][1:], strict=True):
        s = step["sigma"]
        points = [
            (x + (p["sigma"] - s) * mix(p["coefficients"]), p["sigma"], p["sigma_cond"]) for p in step["substeps"]
        ]
        if step["sigma_cond"] is None:
            slopes.append(x / math.sqrt(1 + s * s))
        else:
            points.insert(0, (x, s, step["sigma_cond"]))
        slopes += [
            (y - net(y, torch.tensor(sigma_cond, dtype=torch.float64))) / level for y, level, sigma_cond in points
        ]
        x = (1 + step["state_gain"]) * x + step["step_gain"] * (end - s) * mix(step["coefficients"])
    torch.testing.assert_close(student.run(ToyNet(), latents()).detach(), x, **EXACT)


# ---- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"parallel": 2, "learn": list(GROUPS)},
        {"base": "dpmpp", "learn": list(GROUPS), "first_step": "none", "sigma_scale_bound": None},
        {"base": "midpoint", "parallel": 2, "learn": list(GROUPS)},
        {"base": "ipndm", "relative": False, "learn": list(GROUPS)},
    ],
    ids=["parallel", "dpmpp", "midpoint", "free"],
)
def test_gradients_against_finite_differences(config):
    student = shaken(SpanSolver(**config, num_steps=4), 0.2)
    probe = torch.randn(latents().shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(checkpointing=False):
        return (student.run(ToyNet(), latents(), checkpointing=checkpointing) * probe).sum()

    groups = student.groups()
    wanted = set(GROUPS) - (set() if config.get("parallel") else {"substeps", "substep_sigma_scale"})
    assert set(groups) == wanted
    gradients = dict(zip(groups, torch.autograd.grad(value(), list(groups.values())), strict=True))
    again = dict(zip(groups, torch.autograd.grad(value(True), list(groups.values())), strict=True))
    for name, parameter in groups.items():
        torch.testing.assert_close(again[name], gradients[name], rtol=1e-9, atol=1e-9)
        assert float(gradients[name].abs().min()) > 0 or name == "coef_offset"
        way = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        found = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                parameter += step * way
                found.append(float(value()))
        assert (found[0] - found[1]) / 2e-6 == pytest.approx(float(gradients[name] @ way), rel=1e-5, abs=1e-5)
        with torch.no_grad():
            parameter += 1e-6 * way


def test_free_coefficients_do_not_follow_the_labels_and_relative_ones_do():
    free, relative = (SpanSolver(num_steps=6, relative=relative) for relative in (False, True))
    for student in (free, relative):
        before = student.coefficients(3).detach()
        shaken(student, 0.3).corrections.data.zero_()
        assert torch.equal(student.coefficients(3), before) == (student is free)


def test_the_window_limits_the_corrections():
    student = shaken(SpanSolver(num_steps=7, window=2, max_order=1))
    assert student.coef_offset.numel() == 5  # all steps but the first have one
    row = student.coefficients(4).detach()
    assert torch.equal(row[:3], torch.zeros(3, dtype=torch.float64)) and float(row[3:].abs().min()) > 0
    epd = SpanSolver.preset("epd", num_steps=4)  # of each interval one weight of two
    assert epd.coef_offset.numel() == 3


def test_only_what_is_learned_has_gradients():
    student = SpanSolver.preset("ld3", num_steps=5)
    student.run(ToyNet(), latents()).sum().backward()
    assert {name for name, value in student.named_parameters() if value.grad is not None} == {"knots", "sigma_scale"}


# ---- heads ---------------------------------------------------------------------------------------

STRUCTURES = [{}, {"parallel": 2}, {"base": "midpoint", "parallel": 2}, {"first_step": "none", "window": 2}]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("heads", [["sample"], ["spatial"], ["time"], ["sample", "spatial", "time"]], ids="-".join)
def test_new_heads_change_nothing(heads, structure):
    with_heads = SpanSolver(num_steps=5, heads=heads, img_channels=3, embedding_width=2, **structure)
    plain, state = shaken(SpanSolver(num_steps=5, **structure)), torch.get_rng_state()
    with_heads.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(torch.get_rng_state(), state)  # nor the random numbers of others
    for dtype in (torch.float64, torch.float32):
        x = latents().to(dtype)
        assert torch.equal(with_heads.run(EmbeddedToy(dtype), x), plain.run(ToyNet(dtype), x))
    with_heads.run(EmbeddedToy(), latents()).sum().backward()
    news = {
        name: value
        for name, value in with_heads.heads.named_parameters()
        if name.split(".")[1] in ("mix", "write", "vectors")
    }
    assert all(float(value.grad.abs().sum()) > 0 for value in news.values() if value.numel())
    assert with_heads.table()["heads"] == heads


def learned_heads(**config):
    heads = ["sample", "spatial", "time"]
    student = SpanSolver(num_steps=5, heads=heads, img_channels=3, embedding_width=2, **config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in student.head_parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return student


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_learned_heads_depend_on_each_sample_alone(structure, tmp_path):
    student = learned_heads(**structure)
    together, plain = (
        one.run(EmbeddedToy(), latents()).detach() for one in (student, SpanSolver(num_steps=5, **structure))
    )
    assert float((together - plain).abs().max()) > 1e-3
    alone = student.run(EmbeddedToy(), latents()[1:]).detach()
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-5)
    save_predictor(student, tmp_path / "p.safetensors")
    assert torch.equal(load_predictor(tmp_path / "p.safetensors").run(EmbeddedToy(), latents()), together)
    network = EmbeddedToy()
    images = student.run(network, latents(), checkpointing=True)
    torch.testing.assert_close(images.detach(), together, rtol=0, atol=1e-12)
    gradients = []
    for found in (images, student.run(network, latents())):
        student.zero_grad()
        found.square().sum().backward()
        gradients.append(student.heads["time"].vectors.grad.clone())
    assert not network.noise_embedding._forward_hooks and float(gradients[0].abs().min()) > 0
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_the_sample_head_keeps_rows_of_sum_one_and_the_spatial_one_the_first_steps():
    student = learned_heads()
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    for i in range(4):
        change = student.heads["sample"](i, features).detach()
        assert change.shape == (7, i + 1) and float(change.sum(1).abs().max()) < 1e-7
        assert (float(change.abs().max()) > 1e-3) == (i > 0)
    with torch.no_grad():
        for value in (*student.heads["sample"].parameters(), student.heads["time"].vectors):
            value.zero_()
    states = [one.run(EmbeddedToy(), latents(), return_trajectory=True) for one in (student, SpanSolver(num_steps=5))]
    changed = [not torch.equal(a, b) for a, b in zip(*states, strict=True)]
    assert changed == [False, False, False, True, True]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_the_time_head_shifts_the_embedding_of_its_own_call(structure):
    """Against a closed form: shifting call j by (c, b) changes only D_j, to (1 + c) D_j + b."""
    plain = shaken(SpanSolver(num_steps=4, **structure))
    student = SpanSolver(num_steps=4, heads=["time"], embedding_width=2, **structure)
    student.load_state_dict(plain.state_dict(), strict=False)

    class Changed(ToyNet):
        """The toy network, its answer number ``which`` changed."""

        def forward(self, x, sigma):
            found, rows = super().forward(x, sigma), len(latents())
            for part in range(len(x) // rows):
                if self.asked == which:
                    found = torch.cat([*(p if k != part else p * 1.25 - 0.5 for k, p in enumerate(found.split(rows)))])
                self.asked += 1
            return found

    images = []
    for which in range(student.evaluations()):
        with torch.no_grad():
            student.heads["time"].vectors.zero_()[which] = torch.tensor([0.25, -0.5])
        network = Changed()
        network.asked = 0
        images.append(student.run(EmbeddedToy(), latents()).detach())
        torch.testing.assert_close(images[-1], plain.run(network, latents()).detach(), rtol=0, atol=1e-10)
        assert network.asked == student.evaluations()
    unchanged = plain.run(ToyNet(), latents()).detach()
    assert all(float((image - unchanged).abs().max()) > 1e-3 for image in images)
    with pytest.raises(UserError, match="leave the heads 'time' and 'blocks' out"):
        student.run(ToyNet(), latents())


def test_features_of_slopes_by_hand():
    x, g, before = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(k)).double() for k in range(3))
    found = direction_features(x, torch.tensor(2.0), g, before)[1].tolist()
    a, b, c = (v[1].flatten().numpy() for v in (x, g, before))
    image = a - 2 * b
    cosine = [float(u @ v / (u @ u * (v @ v)) ** 0.5) for u, v in ((b, c), (b, a))]
    expected = [0.5 * math.log((b * b).mean()), *cosine, image.mean(), image.std()]
    assert found == pytest.approx(expected, rel=1e-5)
    assert direction_features(x, torch.tensor(2.0), g, None)[:, 1].tolist() == [0, 0]


def test_noise_levels_given_beside_those_of_the_solver_have_to_be_the_same():
    student = shaken(SpanSolver(num_steps=5))
    own = {"sigmas": student.sigmas().detach(), "sigmas_cond": student.sigmas_cond().detach()}
    for name, levels in own.items():
        found = student.brings(**{name: (levels * (1 + 1e-8)).tolist()})  # as a file may have rounded them
        assert torch.equal(found[name], getattr(student, name)())
        for other in (levels * 1.001, levels[:-1]):
            with pytest.raises(UserError, match=f"{name}: the span solver has its own"):
                student.brings(**{name: other.tolist()})


@pytest.mark.parametrize("structure", [{"first_step": "none"}, {"base": "midpoint"}, {"parallel": 2}], ids=str)
def test_a_time_head_learns_alone(structure):
    """Its vectors get gradients at every call, also where nothing before that call is learned."""
    student = SpanSolver(num_steps=4, learn=[], heads=["time"], embedding_width=2, **structure)
    student.run(EmbeddedToy(), latents()).square().sum().backward()
    assert student.heads["time"].vectors.grad.norm(dim=1).min() > 1e-6


def test_features_of_a_sample_without_slope_are_finite():
    x = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    assert direction_features(x, torch.tensor(2.0), torch.zeros_like(x), torch.zeros_like(x)).isfinite().all()


def test_the_spatial_head_sees_the_state_at_unit_size():
    """Besides the slopes it depends on x / sqrt(1 + sigma^2) and D only, at any noise level."""
    generator = torch.Generator().manual_seed(3)
    state, denoised, slope = torch.randn(3, 2, 3, 8, 8, generator=generator, dtype=torch.float64)
    head = SpatialHead(3, {2: 1})
    with torch.no_grad():
        for layer in head.write.values():
            layer.weight.normal_(generator=generator)
        found = []
        for sigma in (0.01, 1.0, 60.0):
            x = state * math.sqrt(1 + sigma**2)
            found.append(head(2, x, torch.tensor(sigma, dtype=torch.float64), [slope], (x - denoised) / sigma))
    assert float(found[0].std()) > 0.01
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


# ---- files and command lines ---------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name, tmp_path):
    student = SpanSolver.preset(name, num_steps=4, dataset_name="digits")
    if name == "full":
        student.measure_gaussian(Gauss(), calls=8)
    path = tmp_path / "predictor-000001.safetensors"
    save_predictor(shaken(student), path, {"seed": 3})
    loaded = load_predictor(path)
    assert isinstance(loaded, SpanSolver) and loaded.provenance == {"seed": 3} and not loaded.training
    assert loaded.config == student.config and loaded.table() == student.table()
    assert torch.equal(loaded.run(ToyNet(), latents()), student.run(ToyNet(), latents()))
    assert read_safetensors(path.read_bytes(), "")[1]["kind"] == "span"
    save_predictor(AMEDPredictor(), path)
    assert "kind" not in read_safetensors(path.read_bytes(), "")[1]


def test_files_that_are_no_students(tmp_path):
    path = tmp_path / "p.safetensors"
    save_predictor(SpanSolver(num_steps=4), path)
    tensors, metadata = read_safetensors(path.read_bytes(), "")
    config = json.loads(metadata["config"])
    for change, message in (
        ({"num_steps": 10**9}, "num_steps"),
        ({"num_steps": None}, "num_steps"),
        ({"image_shape": [10**6, 10**6]}, "image_shape"),
        ({"base": "magic"}, "choose from ab"),
        ({"parallel": 2}, "do not fit"),
        ({"sigma_min": "x"}, "p.safetensors"),
        ({"surprise": 1}, "surprise"),
        ({"learn": None}, "p.safetensors"),
        ({"heads": ["spatial"], "img_channels": 10**9}, "img_channels"),
        ({"heads": ["time"], "embedding_width": 10**9}, "embedding_width"),
        ({"heads": ["sample"]}, "do not fit"),
    ):
        save_file(tensors, path, {**metadata, "config": json.dumps({**config, **change})})
        with pytest.raises(UserError, match=message):
            load_predictor(path)
    save_file(tensors, path, {**metadata, "kind": "other"})
    with pytest.raises(UserError, match="unknown kind of predictor 'other'"):
        load_predictor(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"surprise": 1}, "unknown setting 'surprise' of a span solver"),
        ({"base": "heun"}, "base='heun': choose from ab"),
        ({"first_step": True}, "first_step=True"),
        ({"learn": ["knots", "x"]}, "learn: unknown 'x'"),
        ({"parallel": 0}, "parallel=0"),
        ({"parallel": 2, "base": "dpmpp"}, "needs base='ab'"),
        ({"window": 0}, "window=0"),
        ({"max_order": 5}, "max_order=5"),
        ({"sigma_scale_bound": 0}, "sigma_scale_bound=0"),
        ({"state_gain_bound": None}, "state_gain_bound=None"),
        ({"num_steps": 1}, "at least 2 time steps"),
        ({"sigma_min": 90.0}, "0 < sigma_min < sigma_max"),
        ({"heads": ["tail"]}, "heads: unknown 'tail'"),
        ({"heads": ["spatial"]}, "needs img_channels"),
        ({"heads": ["time"]}, "needs embedding_width"),
        ({"heads": ["blocks"]}, "needs embedding_width"),
        ({"heads": ["time", "blocks"], "embedding_width": 2}, "'blocks' contains 'time'"),
        ({"sigmas": [3.0, 4.0]}, "strictly decreasing"),
        ({"sigmas": [3.0, 3.0 - 1e-9, 1.0]}, "nearly coincide"),
    ],
    ids=str,
)
def test_impossible_settings(config, message):
    with pytest.raises(UserError, match=message) as caught:
        SpanSolver(**config)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="unknown preset 'x' of the span solver"):
        SpanSolver.preset("x")


def test_learned_solvers_and_solvers_that_do_not_belong_together():
    student = SpanSolver(num_steps=4)
    for options, message in (
        ({"solver": "span"}, "'span' needs"),
        ({"solver": "span", "predictor": AMEDPredictor()}, "SpanSolver"),
        ({"solver": "ipndm", "predictor": student}, "trained for the solver 'span', not for 'ipndm'"),
        ({"solver": "heun", "predictor": student}, "no predictor can be inserted"),
        ({"solver": "span", "predictor": student, "num_steps": 5}, "num_steps=5"),
        (
            {"solver": "span", "predictor": student, "sigmas": [80.0, 3.0, 0.2, 0.002]},
            "sigmas: the span solver has its own",
        ),
        ({"solver": "span", "predictor": student, "afs": "data"}, "afs=data"),
        ({"solver": "span", "predictor": SpanSolver(sigma_max=90.0)}, "outside the network's range"),
        (
            {"solver": "span", "predictor": SpanSolver(heads=["spatial"], img_channels=1)},
            "needs 1 channels, this network has 3",
        ),
        (
            {"solver": "span", "predictor": SpanSolver(heads=["time"], embedding_width=2)},
            "leave the heads 'time' and 'blocks' out",
        ),
    ):
        with pytest.raises(UserError, match=message):
            integrate(ToyNet(), latents(), **{"num_steps": 4, **options} if options["solver"] != "span" else options)
    with pytest.raises(UserError, match="needs a noise embedding of 3 numbers, this network's has 2"):
        sample(EmbeddedToy(), latents(), solver="span", predictor=SpanSolver(heads=["time"], embedding_width=3))
    with pytest.raises(UserError, match="no block_layers: use the head 'time'"):
        sample(EmbeddedToy(), latents(), solver="span", predictor=SpanSolver(heads=["blocks"], embedding_width=3))
    with pytest.raises(UserError, match="'amed' needs"):
        Sampler(ToyNet(), make_solver("amed"), get_schedule(4, 0.002, 80.0))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """(the network, a file of an untrained student for it)"""
    net, folder = create_model("digits"), tmp_path_factory.mktemp("student")
    config = {"sigma_min": net.sigma_min, "sigma_max": net.sigma_max, "img_resolution": 32, "dataset_name": "digits"}
    student = SpanSolver.preset("full", num_steps=4, **config)
    student.measure_gaussian(net, calls=16)
    save_predictor(shaken(student, 0.05), folder / "predictor-000001.safetensors", {"network_hash": net.weights_hash})
    return net, folder


def invoke(command, *arguments):
    return CliRunner().invoke(command, ["--device=cpu", *map(str, arguments)])


def test_sample_py(digits, tmp_path):
    net, folder = digits
    out = tmp_path / "out"
    flags = [f"--predictor_path={folder}", "--seeds=0-2", f"--outdir={out}", "--return_inters=True"]
    done = invoke(cli.main, *flags)
    assert done.exit_code == 0, done.output
    assert "NFE=2" in done.output and len(list(out.glob("000000/*.png"))) == 3
    record = json.loads((out / "sampling.json").read_text())
    student = load_predictor(folder / "predictor-000001.safetensors")
    settings = record["settings"]
    assert (settings["solver"], settings["afs"], settings["num_steps"]) == ("span", "gaussian", 4) and record[
        "nfe"
    ] == 2
    assert settings["sigmas"] == student.sigmas().tolist() and settings["sigmas_cond"] == student.sigmas_cond().tolist()
    seeds = [batch.images for batch in generate_images(net, [0, 1, 2], predictor=student, solver="span", device="cpu")]
    again = student.run(net, SeededGenerators([0, 1, 2]).randn((1, 32, 32)))
    torch.testing.assert_close(seeds[0], again.detach(), rtol=0, atol=1e-5)
    for flag, message in (
        ("--num_steps=9", "has its own"),
        ("--afs=True", "has its own"),
        ("--solver=amed", "own"),
    ):
        assert invoke(cli.main, *flags, "--overwrite=True", flag).exit_code == 2
        with pytest.raises(UserError, match=message):
            name, value = flag[2:].split("=")
            settings_of(student, Settings(**{name: value}), frozenset({name}))
    assert settings_of(student, Settings(num_steps=4), frozenset({"num_steps"})).solver == "span"


def test_compare_py(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_report, "plots_html", lambda rows: "")  # drawing takes longer than sampling here
    net, folder = digits
    arguments = ["--dataset_name=digits", "--solvers=none", f"--predictor_path={folder}", f"--outdir={tmp_path}"]
    done = invoke(compare.main, *arguments, "--num=6", "--groups=2", "--num_reference=2", "--reference_steps=3")
    assert done.exit_code == 0, done.output + repr(done.exception)
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["method"], row["nfe"]) == ("span(full)", 2)

"""What every solver must satisfy, against closed-form solutions and theory."""

import functools
import math

import numpy as np
import pytest
import torch
from toy import ToyNet, common

from solvers import SOLVERS, Sampler, State, get_schedule, make_solver, refine, sample
from solvers.solver import DPMSolverPP, dynamic_threshold, upper_quantile
from solvers.span_table import SpanSolver
from torch_utils.errors import UserError
from training.predictor import AMEDPredictor

torch.set_num_threads(1)
HI, LO = 1.2, 0.4  # a range where every method is in its asymptotic regime at a hundred steps
PLAIN = [name for name, solver in SOLVERS.items() if not solver.needs_predictor]
# Options that a solver needs on these networks, or to draw no noise from torch's generator.
NEEDS = {"dpm_v3": {"statistics": "data"}, "sde": {"noise": lambda: torch.zeros((), dtype=torch.float64)}}
LEARNING = [name for name, solver in SOLVERS.items() if solver.can_learn]


class Analytic(torch.nn.Module):
    """A denoiser with the interface that solvers need; counts its calls."""

    sigma_min, sigma_max, img_channels, img_resolution, label_dim = LO, HI, 1, 2, 0

    def __init__(self):
        super().__init__()
        self.bottleneck = torch.nn.Identity()
        self.calls = []

    def forward(self, x, sigma, **cond):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        self.calls.append(sigma.flatten())
        self.bottleneck(x)
        return self.denoised(x, sigma)


class Gaussian(Analytic):
    """Data N(mu, std^2): x(t) = mu + (x0 - mu) sqrt((std^2 + t^2) / (std^2 + t0^2))."""

    def __init__(self, std=1.2):
        super().__init__()
        self.data_mean = torch.tensor([[[0.3, -0.7], [1.1, 0.0]]], dtype=torch.float64)
        self.data_std = std

    def denoised(self, x, sigma):
        mean = self.data_mean.to(x.dtype)
        return (self.data_std**2 * x + sigma**2 * mean) / (self.data_std**2 + sigma**2)

    def solution(self, start, sigmas):
        mean, variance = self.data_mean, self.data_std**2
        shrink = ((variance + sigmas**2) / (variance + sigmas[0] ** 2)).sqrt()
        return mean + (start - mean) * shrink.reshape(-1, 1, 1, 1, 1)


class TwoGaussians(Analytic):
    """Data (N(-1, std^2) + N(1, std^2)) / 2 per pixel, solved by a fine Runge-Kutta method."""

    std = 0.6

    def denoised(self, x, sigma):
        variance = self.std**2 + sigma**2
        return (self.std**2 * x + sigma**2 * torch.tanh(x / variance)) / variance

    def solution(self, start, sigmas):
        states, x, substeps = [start], start, max(2, 400 // len(sigmas))
        for a, b in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            step = math.log(b / a) / substeps
            for k in range(substeps):  # classical Runge-Kutta for dx / d ln sigma = x - D(x)
                at = [torch.tensor(a * math.exp(step * (k + c)), dtype=x.dtype) for c in (0, 0.5, 1)]
                k1 = x - self.denoised(x, at[0])
                k2 = x + 0.5 * step * k1 - self.denoised(x + 0.5 * step * k1, at[1])
                k3 = x + 0.5 * step * k2 - self.denoised(x + 0.5 * step * k2, at[1])
                k4 = x + step * k3 - self.denoised(x + step * k3, at[2])
                x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            states.append(x)
        return torch.stack(states)


class Constant:
    """A predictor that always answers the same."""

    def __init__(self, r, scale_dir=1.0, scale_time=1.0):
        self.answer = (r, scale_dir, scale_time)

    def __repr__(self):  # in names of tests, which have to be the same in every process
        return f"Constant{self.answer}"

    def __call__(self, bottleneck, t_cur, t_next):
        return tuple(bottleneck.new_full((len(bottleneck), 1, 1, 1), value) for value in self.answer)


def noise(batch=2, seed=0, shape=(1, 2, 2), dtype=torch.float64):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def grid(intervals, kind):
    if kind == "uniform":
        return torch.linspace(HI, LO, intervals + 1, dtype=torch.float64)
    return get_schedule(intervals + 1, LO, HI, kind)


@functools.cache
def exact_states(make, intervals, kind):
    """The true trajectory [N,B,C,H,W] of ``noise()`` on a grid."""
    return make().solution(noise() * HI, grid(intervals, kind))


def order_of(errors, intervals):
    return -np.polyfit(np.log(intervals), np.log(errors), 1)[0]


def final_errors(make, counts, kind, solver, **options):
    errors = []
    for count in counts:
        x = sample(make(), noise(), solver=solver, sigmas=grid(count, kind), **options)
        errors.append(float((x - exact_states(make, count, kind)[-1]).norm()))
    return errors


def errors_after_exact_start(make, counts, kind, solver):
    """Errors of a multistep method from exact first points: its own order, not its start's."""
    errors = []
    for count in counts:
        net, sigmas, exact = make(), grid(count, kind), exact_states(make, count, kind)
        run = Sampler(net, solver, sigmas)
        known = solver.keep - 1
        history = tuple(
            (solver.output(exact[k], (exact[k] - net.denoised(exact[k], sigmas[k])) / sigmas[k], sigmas[k]), sigmas[k])
            for k in range(known)
        )
        state = State(exact[known], history, known)
        with torch.no_grad():
            for i in range(known, run.intervals):
                state = run.advance(state, i)
        errors.append(float((state.x - exact[-1]).norm()))
    return errors


NETS = [Gaussian, TwoGaussians]
ONE_STEP = [
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("dpm", {}, 2),
    ("dpm", {"r": 0.5}, 2),
    ("dpm", {"r": 0.3}, 2),
    ("dpm", {"r": 1.0}, 2),
]


@pytest.mark.parametrize("kind", ["logsnr", "polynomial"])
@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize(("solver", "options", "order"), ONE_STEP)
def test_order_of_one_step_methods(solver, options, order, make, kind):
    counts = (40, 80, 160)
    assert order_of(final_errors(make, counts, kind, solver, **options), counts) == pytest.approx(order, abs=0.15)


DPMPP = {"thresholding": False}


class RepairedDPMSolverPP(DPMSolverPP):
    """With the factor 2 that the published order 3 lacks in front of its second difference."""

    def update(self, x, history, sigma_next, index, total, scale=1.0):
        x = super().update(x, history, sigma_next, index, total, scale)
        (m2, s2, *_), (m1, s1, *_), (m0, s0, *_) = history[-3:]
        h, h0, h1 = (s0 / sigma_next).log(), (s1 / s0).log(), (s2 / s1).log()
        second = ((m0 - m1) / h0 - (m1 - m2) / h1) * h**2 / (h0 + h1)  # half of h^2 times the second derivative
        if self.predict_x0:
            return x + (h**2 / 2 - h + 1 - (-h).exp()) / h**2 * second
        return x - sigma_next * (h.exp() - 1 - h - h**2 / 2) / h**2 * second


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_dpmpp(order, predict_x0, make):
    counts = (50, 100, 200)
    options = {**DPMPP, "max_order": order, "predict_x0": predict_x0}
    errors = errors_after_exact_start(make, counts, "polynomial", DPMSolverPP(lower_order_final=False, **options))
    if order < 3:
        assert order_of(errors, counts) == pytest.approx(order, abs=0.15)
        return
    # The published third-order update weighs its second difference by half, which makes it a
    # second-order method.
    assert order_of(errors, counts) < 2.5
    repaired = RepairedDPMSolverPP(lower_order_final=False, **options)
    assert order_of(errors_after_exact_start(make, counts, "polynomial", repaired), counts) == pytest.approx(
        3, abs=0.15
    )


@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("order", [1, 2])
def test_order_of_dpmpp_from_noise(order, predict_x0, lower_order_final):
    """The first-order steps at the start and at the end each cost a second-order error."""
    counts = (50, 100, 200)
    options = {**DPMPP, "max_order": order, "predict_x0": predict_x0, "lower_order_final": lower_order_final}
    errors = final_errors(Gaussian, counts, "logsnr", "dpmpp", **options)
    assert order_of(errors, counts) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_of_ipndm_on_equal_steps(order, make):
    counts = (80, 160, 320)
    errors = errors_after_exact_start(make, counts, "uniform", make_solver("ipndm", {"max_order": order}))
    assert order_of(errors, counts) == pytest.approx(order, abs=0.15)
    errors = final_errors(make, counts, "uniform", "ipndm", max_order=order)
    assert order_of(errors, counts) == pytest.approx(min(order, 2), abs=0.15)  # the first step is Euler's


def test_ipndm_on_unequal_steps():
    """Its weights assume equal steps: order 2 on a smooth grid, whose steps differ by O(h^2)."""
    counts = (80, 160, 320)
    for order in (2, 3, 4):
        errors = errors_after_exact_start(TwoGaussians, counts, "logsnr", make_solver("ipndm", {"max_order": order}))
        assert order_of(errors, counts) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize(
    ("solver", "r", "options", "order"),
    [
        ("amed", 0.5, {}, 2),  # the geometric mean is the midpoint up to second order
        ("amed", 0.3, {}, 1),
        ("amed", 0.8, {}, 1),
        ("dpm", 0.3, {}, 2),
        ("euler", 0.4, {}, 1),
        ("dpmpp", 0.4, {**DPMPP, "max_order": 2}, 2),  # it knows that its two steps are unequal
    ],
)
def test_order_with_a_constant_predictor(solver, r, options, order, make):
    counts = (40, 80, 160)
    errors = final_errors(make, counts, "logsnr", solver, predictor=Constant(r), **options)
    assert order_of(errors, counts) == pytest.approx(order, abs=0.15)


def test_inserted_point_equals_a_finer_schedule():
    """A plugin with r = 1/2 on a geometric schedule equals the solver on halved intervals."""
    sigmas = grid(6, "logsnr")
    for solver in ("euler", "ipndm", "dpmpp"):
        inserted = sample(ToyNet(), common("latents2"), solver=solver, sigmas=sigmas, predictor=Constant(0.5))
        plain = sample(ToyNet(), common("latents2"), solver=solver, sigmas=refine(sigmas, 1))
        torch.testing.assert_close(inserted, plain, rtol=0, atol=1e-11)
    for solver, r in (("dpm", 0.3), ("amed", 0.5)):
        inserted = sample(ToyNet(), common("latents2"), solver=solver, sigmas=sigmas, predictor=Constant(r))
        net, x = ToyNet(), common("latents2") * sigmas[0]
        for a, b in zip(sigmas[:-1], sigmas[1:], strict=True):
            d = (x - net(x, a)) / a
            mid = a ** (1 - r) * b**r
            y = x + (mid - a) * d
            d_mid = (y - net(y, mid)) / mid
            x = x + (b - a) * (d_mid if solver == "amed" else d_mid / (2 * r) + (1 - 1 / (2 * r)) * d)
        torch.testing.assert_close(inserted, x, rtol=0, atol=1e-11)


# ---- evaluations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("afs", [False, True, "data"])
@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_evaluations_are_those_really_made(solver, denoise, afs):
    method = SOLVERS[solver]
    for predictor in [None] * (not method.needs_predictor) + [Constant(0.4)] * method.can_learn:
        expected = method().evaluations(4, afs, predictor is not None)
        net = Gaussian()
        _, info = sample(
            net,
            noise(),
            solver=solver,
            num_steps=5,
            **NEEDS.get(solver, {}),
            afs=afs,
            predictor=predictor,
            denoise_to_zero=denoise,
            return_info=True,
        )
        assert info.nfe == len(net.calls) == expected + denoise
        net.evals_per_call = 2  # classifier-free guidance
        chosen = {"solver": solver, "num_steps": 5, "afs": afs, "predictor": predictor, **NEEDS.get(solver, {})}
        _, doubled = sample(net, noise(), return_info=True, **chosen)
        assert doubled.nfe == 2 * expected


def test_a_predictor_knows_its_evaluations():
    for solver in LEARNING:
        for afs in (False, True):
            config = {"num_steps": 4, "afs": afs, "sampler_stu": solver}
            predictor = AMEDPredictor(**config).double()
            _, info = sample(
                ToyNet(), common("latents2"), solver=solver, num_steps=4, afs=afs, predictor=predictor, return_info=True
            )
            assert info.nfe == predictor.evaluations()


@pytest.mark.parametrize("make", [list, torch.tensor, np.array])
def test_explicit_sigmas_reach_the_network_unchanged(make):
    values = [3.7, 1.0 / 3.0, 0.1234567890123, 0.01]
    net = ToyNet()
    given = make(values) if make is not torch.tensor else torch.tensor(values, dtype=torch.float64)
    _, info = sample(
        net, common("latents2"), solver="ipndm", sigmas=given, num_steps=9, denoise_to_zero=True, return_info=True
    )
    assert [float(c) for c in net.calls] == values
    assert info.sigmas.tolist() == values
    net.calls.clear()
    sample(net, common("latents2"), solver="heun", sigmas=given)
    sigma_cond = [float(c) for c in net.calls]
    assert sigma_cond[::2] == values[:-1]
    assert sigma_cond[1::2] == pytest.approx(values[1:], rel=1e-15)


def test_scale_time_changes_only_what_the_network_is_told():
    sigmas = torch.tensor([1.0, 0.49], dtype=torch.float64)
    net = Gaussian()
    sample(net, noise(1), solver="amed", sigmas=sigmas, predictor=Constant(0.5, scale_time=1.1))
    assert [float(c) for c in net.calls] == pytest.approx([1.0, 0.7 * 1.1], rel=1e-14)


@pytest.mark.parametrize("solver", ["euler", "ipndm", "dpmpp", "unipc", "heun", "edm", "pfdiff"])
def test_decoupled_noise_levels_change_only_what_the_network_is_told(solver):
    """LD3's decoupled times: a network that undoes the change gives the same samples."""
    sigmas = grid(4, "logsnr")
    sigma_cond = sigmas * torch.linspace(0.9, 1.1, 5, dtype=torch.float64)

    class Undoing(Gaussian):
        def forward(self, x, sigma, **cond):
            return super().forward(x, sigmas[(sigma_cond - sigma).abs().argmin()], **cond)

    options = {"solver": solver, "sigmas": sigmas, **(DPMPP if solver in ("dpmpp", "unipc") else {})}
    expected = sample(Gaussian(), noise(), denoise_to_zero=True, **options)
    found = sample(Undoing(), noise(), denoise_to_zero=True, sigmas_cond=sigma_cond, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    changed = sample(Gaussian(), noise(), denoise_to_zero=True, sigmas_cond=sigma_cond, **options)
    assert not torch.allclose(changed, expected)
    same = sample(Gaussian(), noise(), denoise_to_zero=True, sigmas_cond=sigmas.tolist(), **options)
    torch.testing.assert_close(same, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("solver", ["euler", "ipndm"])
def test_every_call_gets_its_own_decoupled_level(solver):
    """The last step to zero included; none of these levels is one of the schedule."""
    net, sigma_cond = ToyNet(), [70.0, 11.0, 2.0, 0.003]
    options = {"sigmas": [80.0, 9.0, 1.0, 0.002], "sigmas_cond": sigma_cond, "denoise_to_zero": True}
    sample(net, common("latents2"), solver=solver, **options)
    assert [float(call) for call in net.calls] == sigma_cond


def test_noise_levels_may_leave_the_range_by_rounding_only():
    """A published table of rounded numbers is fine; half a percent is another noise level."""
    for share, fine in ((1 + 5e-4, True), (1.005, False)):
        for sigmas in ([80.0 * share, 1.0, 0.002], [80.0, 1.0, 0.002 / share]):
            if fine:
                sample(ToyNet(), common("latents2"), solver="euler", sigmas=sigmas)
            else:
                with pytest.raises(ValueError, match="outside the network's range"):
                    sample(ToyNet(), common("latents2"), solver="euler", sigmas=sigmas)


@pytest.mark.parametrize("rho", [0.5, 1, 2, 7])
def test_a_discrete_schedule_runs_from_end_to_end(rho):
    """Uniform in the rho-th root of time, as polynomial is in that of the noise level."""
    net = ToyNet(discrete=True)
    highest, lowest = (float(net.sigma(torch.tensor(t, dtype=torch.float64))) for t in (0.64, 0.01))
    sigmas = get_schedule(6, lowest, highest, "discrete", rho, net)
    assert float(sigmas[0]) == pytest.approx(highest, rel=1e-9) and float(sigmas[-1]) == pytest.approx(lowest, rel=1e-9)
    roots = net.sigma_inv(sigmas) ** (1 / rho)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(5), rtol=1e-9, atol=0)


# ---- the free first step -------------------------------------------------------------------------


@pytest.mark.parametrize("solver", PLAIN)
def test_afs_from_data_statistics_is_exact_for_gaussian_data(solver):
    options = {"solver": solver, "num_steps": 6, **(DPMPP if solver == "dpmpp" else NEEDS.get(solver, {}))}
    paid = sample(Gaussian(), noise(), return_trajectory=True, **options)
    free = sample(Gaussian(), noise(), return_trajectory=True, afs="data", **options)
    torch.testing.assert_close(free, paid, rtol=0, atol=1e-12)


def test_plain_afs_is_the_published_formula():
    """x / sqrt(1 + sigma^2); unit Gaussian data: sqrt(1 + sigma^-2) times the exact length."""
    net = Gaussian(std=1.0)
    net.data_mean = torch.zeros_like(net.data_mean)
    net.sigma_max = 3.0
    x, sigmas = noise() * 3.0, [3.0, 1.0]
    stepped = sample(net, noise(), solver="euler", sigmas=sigmas, afs=True)
    torch.testing.assert_close((stepped - x) / (1.0 - 3.0), x / math.sqrt(10.0), rtol=0, atol=1e-13)
    exact = (x - net.denoised(x, torch.tensor(3.0))) / 3.0
    torch.testing.assert_close(x / math.sqrt(10.0), exact * math.sqrt(1 + 3.0**-2), rtol=0, atol=1e-13)


def test_afs_reaches_the_predictor_as_zeros():
    seen = []

    class Recording(Constant):
        def __call__(self, bottleneck, t_cur, t_next):
            seen.append(bottleneck.clone())
            return super().__call__(bottleneck, t_cur, t_next)

    sample(ToyNet(), common("latents2"), solver="amed", num_steps=3, afs=True, predictor=Recording(0.5))
    assert [tuple(feature.shape) for feature in seen] == [(2, 8, 8)] * 2
    assert not seen[0].any()
    assert seen[1].any()


# ---- what sample returns -------------------------------------------------------------------------


def test_callback_sees_states_and_denoised_images():
    net, seen = Gaussian(), []
    trajectory = sample(
        net,
        noise(),
        solver="heun",
        num_steps=5,
        return_trajectory=True,
        callback=lambda i, sigma, x, denoised: seen.append((i, float(sigma), x, denoised)),
    )
    sigmas = get_schedule(5, LO, HI)
    assert [entry[0] for entry in seen] == [0, 1, 2, 3]
    for i, sigma, x, denoised in seen:
        assert sigma == float(sigmas[i])
        assert torch.equal(x, trajectory[i])
        torch.testing.assert_close(denoised, net.denoised(x, sigmas[i]), rtol=0, atol=1e-14)


# Their last step differs from the others: no corrector, or a formula of its own.
ENDS_DIFFERENTLY = {"unipc", "dpm_v3", "evodiff", "pfdiff"}


@pytest.mark.parametrize("solver", [name for name in PLAIN if name not in ENDS_DIFFERENTLY])
def test_trajectory_rows_are_the_results_of_shorter_schedules(solver):
    options = {"lower_order_final": False, "solver": solver, **NEEDS.get(solver, {})}
    sigmas = grid(5, "logsnr")
    trajectory = sample(ToyNet(), common("latents2"), sigmas=sigmas, return_trajectory=True, **options)
    assert torch.equal(trajectory[0], common("latents2") * sigmas[0])
    for k in range(1, 6):
        assert torch.equal(trajectory[k], sample(ToyNet(), common("latents2"), sigmas=sigmas[: k + 1], **options))
    longer = sample(
        ToyNet(), common("latents2"), sigmas=sigmas, return_trajectory=True, denoise_to_zero=True, **options
    )
    assert torch.equal(longer[:-1], trajectory)
    assert torch.equal(longer[-1], ToyNet()(trajectory[-1], sigmas[-1]))


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_sampling_is_deterministic_and_leaves_its_inputs_alone(solver):
    torch.manual_seed(0)
    predictor = AMEDPredictor(scale_dir=0.01, scale_time=0.2).double() if SOLVERS[solver].can_learn else None
    if SOLVERS[solver].own_schedule:
        predictor = SpanSolver(sigmas=grid(4, "polynomial").tolist())
    before = None if predictor is None else {k: v.clone() for k, v in predictor.state_dict().items()}
    latents, sigmas = common("latents3"), grid(4, "polynomial")
    kept, kept_sigmas, cond = latents.clone(), sigmas.clone(), {}
    random_state = torch.get_rng_state()
    first, second = (
        sample(ToyNet(), latents, solver=solver, sigmas=sigmas, predictor=predictor, cond=cond, **NEEDS.get(solver, {}))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert torch.equal(latents, kept) and torch.equal(sigmas, kept_sigmas) and cond == {}
    assert torch.equal(torch.get_rng_state(), random_state)
    if predictor is not None:
        assert all(torch.equal(value, before[name]) for name, value in predictor.state_dict().items())


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_dtype_of_latents_is_the_dtype_of_results(solver):
    predictor = AMEDPredictor() if SOLVERS[solver].needs_predictor else None
    if SOLVERS[solver].own_schedule:
        predictor = SpanSolver(num_steps=4)
    for dtype in (torch.float32, torch.float64):
        net, latents = ToyNet(dtype), common("latents2", dtype)
        trajectory, info = sample(
            net,
            latents,
            solver=solver,
            num_steps=4,
            predictor=predictor,
            return_trajectory=True,
            return_info=True,
            **NEEDS.get(solver, {}),
        )
        assert trajectory.dtype == dtype
        assert info.sigmas.dtype == torch.float64
        assert all(c.dtype == dtype for c in net.calls)


COMBINATIONS = [(name, False) for name, solver in SOLVERS.items() if not solver.needs_predictor]
COMBINATIONS += [(name, True) for name, solver in SOLVERS.items() if solver.can_learn]


@pytest.mark.parametrize(("solver", "learned"), COMBINATIONS)
def test_samples_of_a_batch_are_independent(solver, learned):
    torch.manual_seed(1)
    predictor = AMEDPredictor(scale_dir=0.05, scale_time=0.2).double() if learned else None
    latents = common("latents4")
    options = {"solver": solver, "num_steps": 4, "predictor": predictor, "afs": True, **NEEDS.get(solver, {})}
    together = sample(ToyNet(), latents, **options)
    for k in range(len(latents)):
        alone = sample(ToyNet(), latents[k : k + 1], **options)
        torch.testing.assert_close(together[k : k + 1], alone, rtol=0, atol=1e-12)


def test_cond_is_passed_on_at_every_call():
    class Conditional(Gaussian):
        seen = ()

        def forward(self, x, sigma, **cond):
            self.seen = (*self.seen, cond)
            return super().forward(x, sigma)

    net = Conditional()
    sample(net, noise(), solver="heun", num_steps=3, cond={"class_labels": 5}, denoise_to_zero=True)
    assert net.seen == ({"class_labels": 5},) * 5


# ---- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 199, 1024, 49152])
def test_the_quantile_of_the_threshold_is_that_of_torch(size, dtype):
    values = torch.randn(4, size, dtype=dtype, generator=torch.Generator().manual_seed(size)).abs()
    for quantile in (0.9, 0.995):
        assert torch.equal(upper_quantile(values, quantile), torch.quantile(values, quantile, dim=1))


def test_dynamic_threshold():
    x = noise(3, shape=(3, 16, 16)) * torch.tensor([0.2, 1.0, 30.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    y = dynamic_threshold(x)
    assert torch.equal(y[0], x[0])  # within [-1, 1] nothing happens
    assert float(y.abs().max()) <= 1
    assert torch.equal(dynamic_threshold(y), y)
    assert torch.equal(y.sign(), x.sign())
    limit = np.quantile(x[2].abs().numpy(), 0.995)
    np.testing.assert_allclose(y[2], x[2].clip(-limit, limit) / limit, rtol=1e-13)


def test_thresholding_belongs_to_data_prediction():
    options = {"solver": "dpmpp", "num_steps": 5}
    latents = common("latents2") * 3  # far from the data, so that clipping matters

    def result(**more):
        return sample(ToyNet(), latents, **options, **more)

    assert not torch.allclose(result(), result(thresholding=False))
    assert torch.equal(result(predict_x0=False), result(predict_x0=False, thresholding=False))


def test_related_rules_agree():
    latents, sigmas = common("latents2"), grid(6, "polynomial")

    def run(solver, **options):
        return sample(ToyNet(), latents, solver=solver, sigmas=sigmas, **options)

    for same in (
        run("ipndm", max_order=1),
        run("dpmpp", max_order=1, thresholding=False),
        run("dpmpp", max_order=1, predict_x0=False),
    ):
        torch.testing.assert_close(same, run("euler"), rtol=0, atol=1e-11)
    torch.testing.assert_close(run("dpm", r=1.0), run("heun"), rtol=0, atol=1e-12)


# ---- mistakes ------------------------------------------------------------------------------------


MISTAKES = [
    ({"solver": "eular"}, "unknown solver 'eular'"),
    ({"schedule_type": "cosine"}, "unknown schedule_type 'cosine'"),
    ({"schedule_type": "discrete"}, "discrete noise table"),
    ({"num_steps": None}, "num_steps"),
    ({"num_steps": 1}, "at least 2"),
    ({"num_steps": 3.5}, "whole number"),
    ({"sigma_min": 5.0, "sigma_max": 1.0}, "sigma_min < sigma_max"),
    ({"sigma_min": 0.0}, "sigma_min"),
    ({"sigma_max": float("inf")}, "sigma_max"),
    ({"schedule_rho": 0}, "schedule_rho"),
    ({"schedule_rho": float("nan")}, "schedule_rho"),
    ({"sigmas": [1.0, 2.0]}, "decreasing"),
    ({"sigmas": [2.0, 2.0]}, "decreasing"),
    ({"sigmas": [2.0, 0.0]}, "positive"),
    ({"sigmas": [2.0, float("nan")]}, "finite"),
    ({"sigmas": [2.0]}, "two noise levels"),
    ({"sigmas": [100.0, 2.0]}, "sigma=100 is outside the network's range, 0.4..1.2"),
    ({"sigmas": [1.0, 0.001]}, "sigma=0.001 is outside the network's range"),
    ({"sigma_max": 81}, "sigma=81 is outside the network's range"),
    ({"sigmas": [[2.0, 1.0]]}, "two noise levels"),
    ({"sigmas": [1.2, 0.5], "sigmas_cond": [1.2]}, "sigmas_cond must be 2 positive numbers"),
    ({"sigmas": [1.2, 0.5], "sigmas_cond": [1.2, 0.0]}, "sigmas_cond must be 2 positive numbers"),
    ({"solver": "ipndm", "max_order": 0}, "supports 1..4"),
    ({"solver": "ipndm", "max_order": 5}, "supports 1..4"),
    ({"solver": "ipndm", "max_order": 2.5}, "whole number"),
    ({"solver": "dpmpp", "thresholding": 1}, "True or False"),
    ({"solver": "dpm", "r": "half"}, "must be a number"),
    ({"solver": "ipndm", "max_order": float("nan")}, "whole number"),
    ({"solver": "ipndm", "max_order": float("inf")}, "whole number"),
    ({"solver": "dpmpp", "max_order": 4}, "supports 1..3"),
    ({"solver": "dpm", "r": 0.0}, "0 < r <= 1"),
    ({"solver": "dpm", "r": 1.5}, "0 < r <= 1"),
    ({"solver": "euler", "r": 0.5}, "has no option 'r'"),
    ({"solver": "heun", "speed": 9}, "has no option 'speed'"),
    ({"solver": "amed"}, "needs a trained predictor"),
    ({"solver": "heun", "predictor": Constant(0.5)}, "no predictor"),
    ({"afs": "yes"}, "afs='yes'"),
    ({"afs": "data"}, "afs='data': this network has no mean"),
]


@pytest.mark.parametrize(("change", "text"), MISTAKES, ids=[str(m[0]) for m in MISTAKES])
def test_mistakes_are_explained(change, text):
    net = Gaussian()
    net.data_mean = None
    with pytest.raises(ValueError) as caught:
        sample(net, noise(), **{"solver": "euler", "num_steps": 4, **change})
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert net.calls == []  # found before the network is asked


def test_a_schedule_that_would_rise_is_refused():
    """time_uniform is not monotone for large sigma_min: an error, not samples of noise."""
    with pytest.raises(ValueError, match="strictly decreasing"):
        get_schedule(6, 0.2, 80, "time_uniform", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": "x"}, "num_steps='x' must be a number"),
        ({"num_steps": "4"}, "num_steps='4' must be a number"),
        ({"num_steps": [4]}, "num_steps=.* must be a number"),
        ({"num_steps": 3.5}, "whole number"),
        ({"num_steps": math.inf}, "whole number"),
        ({"sigmas": ["a", "b"]}, "sigmas must be a list of numbers, got .'a', 'b'"),
        ({"sigmas": "80,1"}, "sigmas must be a list of numbers"),
        ({"sigmas": [80, None]}, "sigmas must be a list of numbers"),
        ({"sigmas_cond": "a"}, "sigmas_cond must be a list of numbers"),
        ({"sigma_min": "a"}, "sigma_min='a' must be a number"),
        ({"sigma_max": [80, 70]}, "sigma_max=.* must be a number"),
        ({"afs": 2}, "afs=2: choose from"),
        ({"latents": [1.0, 2.0]}, "floating-point tensor .*, got list"),
        ({"latents": torch.zeros(1, 3, 16, 16, dtype=torch.int64)}, "floating-point tensor .*, got torch.int64"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(change, message):
    arguments = {"latents": torch.zeros(1, 3, 16, 16), "solver": "euler", "num_steps": 3} | change
    with pytest.raises(UserError, match=message):
        sample(ToyNet(), arguments.pop("latents"), **arguments)


def test_whole_numbers_of_other_kinds_are_numbers():
    expected = get_schedule(5, 0.01, 50)
    for five in (5.0, np.int64(5), torch.tensor(5)):
        assert torch.equal(get_schedule(five, np.float64(0.01), torch.tensor(50)), expected)

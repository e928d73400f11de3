"""UniPC: the published numbers, orders, exactness on polynomials, where it evaluates."""

import copy
import math

import numpy as np
import pytest
import torch
from test_solvers_golden import close, run_case
from test_solvers_properties import NETS, Constant, Gaussian, exact_states, final_errors, grid, noise, order_of
from toy import ToyNet, common, load_golden

from solvers import SOLVERS, Sampler, State, make_solver, sample
from solvers.unipc import phi_functions

ARCHIVE, JSON = load_golden("diff_solvers")
CASES = [case for case in JSON["cases"] if case["solver"] == "unipc"]
VARIANTS = ("bh1", "bh2")


def check_golden(case, dtype, tolerance, **options):
    """Runs a case of diff_solvers and compares all that is stored of its samples."""
    key, suffix = case["id"], "" if dtype == torch.float64 else "_f32"
    if suffix:  # the float32 run is compared from its own schedule on
        options["sigmas"] = torch.from_numpy(ARCHIVE[f"{key}.t_steps_f32"])
    net, trajectory, info = run_case(ARCHIVE, case, dtype, latents=JSON["latents"], **options)
    assert trajectory.dtype == dtype
    assert info.nfe == case["nfe"] + 1 == len(net.calls)  # one more for denoise_to_zero
    probes = trajectory.flatten(2)[:, :, common("probe_idx", torch.int64)]
    for row, expected in zip(probes, ARCHIVE[f"{key}.traj_probe{suffix}"], strict=True):
        close(row, expected, tolerance)
    if not suffix:
        close(info.sigmas, ARCHIVE[f"{key}.t_steps"])
        close([float(c[0]) for c in net.calls[:-1]], ARCHIVE[f"{key}.net_sigmas"])
        close(trajectory[-2], ARCHIVE[f"{key}.final"], tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_golden(case):
    """original_code changes nothing with at least max_order intervals, as in all cases."""
    original = int(case["id"][1:]) % 2 == 0
    check_golden(case, torch.float64, 1e-8, variant=case["variant"], original_code=original)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_golden_float32(case):
    check_golden(case, torch.float32, 2e-3, variant=case["variant"])


# ---- accuracy ------------------------------------------------------------------------------------


def exact_start(net, solver, sigmas, exact, known):
    """The state at point ``known``, with everything up to it exact, its evaluation included."""
    history = tuple(
        (solver.output(exact[k], (exact[k] - net(exact[k], sigmas[k])) / sigmas[k], sigmas[k]), sigmas[k])
        for k in range(known + 1)
    )[-solver.keep :]
    return State(exact[known], history, known)


def errors_after_exact_start(make, counts, solver):
    errors = []
    for count in counts:
        net, sigmas, exact = make(), grid(count, "polynomial"), exact_states(make, count, "polynomial")
        run = Sampler(net, solver, sigmas)
        state = exact_start(net, solver, sigmas, exact, solver.max_order - 1)
        with torch.no_grad():
            for i in range(solver.max_order - 1, run.intervals):
                state = run.advance(state, i)
        errors.append(float((state.x - exact[-1]).norm()))
    return errors


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order(order, variant, predict_x0, make):
    """Predictor of order p, corrector of order p + 1: globally p + 1.

    The evaluation after the correction is saved, and the last interval has no corrector, which
    costs one error of order p + 1.
    """
    counts = (80, 160, 320)
    options = {"max_order": order, "variant": variant, "predict_x0": predict_x0, "thresholding": False}
    solver = make_solver("unipc", {**options, "lower_order_final": False})
    assert order_of(errors_after_exact_start(make, counts, solver), counts) == pytest.approx(order + 1, abs=0.15)


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize(("order", "lower_order_final", "expected"), [(2, False, 3), (3, False, 3), (3, True, 2)])
def test_order_from_noise(order, lower_order_final, expected, predict_x0):
    """The first interval is a corrected Euler step, one error of third order.

    Under lower_order_final the last is an Euler step without a corrector, one of second order.
    """
    counts = (50, 100, 200)
    options = {"max_order": order, "lower_order_final": lower_order_final, "predict_x0": predict_x0}
    errors = final_errors(Gaussian, counts, "logsnr", "unipc", thresholding=False, **options)
    assert order_of(errors, counts) == pytest.approx(expected, abs=0.15)


class Polynomial(torch.nn.Module):
    """Its output (predict_x0) or direction is a polynomial of s = ln sigma, whatever x is."""

    def __init__(self, coefficients, predict_x0):
        super().__init__()
        self.q, self.predict_x0 = np.polynomial.Polynomial(coefficients), predict_x0

    def forward(self, x, sigma):
        value = self.q(math.log(float(sigma)))
        return torch.full_like(x, value) if self.predict_x0 else x - sigma * value

    def solution(self, start, sigmas):
        """dx/ds = x - q(s) or e^s q(s): particular solutions are sums of derivatives of q."""
        derivatives = [self.q.deriv(k) if k else self.q for k in range(self.q.degree() + 1)]
        sign = 1 if self.predict_x0 else -1
        particular = sum(sign**k * d for k, d in enumerate(derivatives))(sigmas.log().numpy())
        particular = torch.from_numpy(particular)
        if self.predict_x0:
            shift = (start - particular[0]) * (sigmas / sigmas[0]).reshape(-1, 1, 1, 1, 1)
        else:
            particular, shift = particular * sigmas, start - particular[0] * sigmas[0]
        return particular.reshape(-1, 1, 1, 1, 1) + shift


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", [2, 3])
def test_exact_on_polynomials(order, variant, predict_x0):
    """Degrees of polynomials in ln sigma that a step integrates exactly.

    Corrector of order p: degree p of the model output. Third-order predictor, alone on the last
    interval: degree 2. The second-order predictor has a fixed weight.
    """
    options = {"max_order": order, "variant": variant, "predict_x0": predict_x0, "thresholding": False}
    solver = make_solver("unipc", {**options, "lower_order_final": False})
    sigmas = torch.tensor([40.0, 22.0, 9.0, 3.0, 0.4, 0.1], dtype=torch.float64)
    for degree in range(order + 1):
        net = Polynomial([0.7, -0.4, 0.3, 0.2][: degree + 1], predict_x0)
        exact = net.solution(noise(), sigmas)
        run = Sampler(net, solver, sigmas)
        state = exact_start(net, solver, sigmas, exact, order - 1)
        for i in range(order - 1, run.intervals):
            state = run.advance(state, i)
            if i + 1 < run.intervals or degree == 0 or (order == 3 and degree < 3):
                torch.testing.assert_close(state.x, exact[i + 1], rtol=0, atol=1e-10)
    assert float((state.x - exact[-1]).abs().max()) > 1e-4  # degree p is beyond the predictor


@pytest.mark.parametrize("z", [-3.0, -1.001, -0.999, -0.3, -0.02, 0.02, 0.3, 0.999, 1.001, 3.0])
def test_phi_functions_do_not_cancel(z):
    """By quadrature: phi_k = int_0^1 e^((1 - s) z) s^(k - 1) / (k - 1)! ds has positive terms."""
    points, weights = np.polynomial.legendre.leggauss(40)
    s, weights = (1 + points) / 2, weights / 2
    expected = [(weights * np.exp((1 - s) * z) * s ** (k - 1)).sum() / math.factorial(k - 1) for k in range(1, 5)]
    assert [float(value) for value in phi_functions(z, 4)] == pytest.approx(expected, rel=5e-14)


def test_phi_functions():
    """Where the series and the recursion meet, and the first values by hand."""
    for z in (-0.999999, -1.000001, 1.000001, -8.0, 6.0):
        e = math.exp(z)
        expected = [(e - 1) / z, (e - 1 - z) / z**2, (e - 1 - z - z**2 / 2) / z**3]
        assert phi_functions(z, 3) == pytest.approx(expected, rel=1e-13)
    assert phi_functions(1e-9, 4) == pytest.approx([1, 1 / 2, 1 / 6, 1 / 24], rel=1e-8)


def test_variants_differ_only_where_a_weight_is_fixed():
    rules = [make_solver("unipc", {"variant": variant}) for variant in VARIANTS]
    free, fixed = ([solver.weights(-0.7, [-0.4, 1.0][: 2 - f], bool(f)) for solver in rules] for f in (0, 1))
    assert free[0] == free[1]
    assert fixed[0] == pytest.approx([-0.7 / 2 / -0.4], rel=1e-14)
    assert fixed[1] == pytest.approx([math.expm1(-0.7) / 2 / -0.4], rel=1e-14)


# ---- evaluations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("afs", [False, True, "data"])
@pytest.mark.parametrize("original_code", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_evaluations(order, original_code, afs):
    """original_code with fewer than max_order intervals: a last corrector, one more evaluation."""
    for intervals in (1, 2, 3, 5):
        net = Gaussian()
        options = {"max_order": order, "original_code": original_code}
        _, info = sample(net, noise(), solver="unipc", num_steps=intervals + 1, afs=afs, return_info=True, **options)
        expected = intervals - bool(afs) + (original_code and intervals < order)
        assert info.nfe == len(net.calls) == expected
        assert make_solver("unipc", options).evaluations(intervals, afs) == expected


def test_the_corrector_of_the_published_code_on_few_intervals():
    """With one interval: a corrected Euler step, which is the exponential trapezium rule of bh2."""
    net, x, (a, b) = Gaussian(), noise() * 1.2, (1.2, 0.8)
    result = sample(net, noise(), solver="unipc", sigmas=[a, b], thresholding=False, original_code=True)
    start = net.denoised(x, torch.tensor(a, dtype=torch.float64))
    predicted = b / a * x + (1 - b / a) * start
    end = net.denoised(predicted, torch.tensor(b, dtype=torch.float64))
    torch.testing.assert_close(result, predicted + (1 - b / a) * 0.5 * (end - start), rtol=0, atol=1e-13)
    plain = sample(net, noise(), solver="unipc", sigmas=[a, b], thresholding=False)
    torch.testing.assert_close(plain, predicted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("original_code", [False, True])
def test_callback_and_trajectory(original_code, afs):
    """A call per point but the last. It sees predicted points; the trajectory is corrected."""
    seen = []

    def callback(*call):
        seen.append(call)

    for intervals in (2, 5):
        seen.clear()
        options = {"solver": "unipc", "num_steps": intervals + 1, "afs": afs, "original_code": original_code}
        trajectory = sample(ToyNet(), common("latents2"), return_trajectory=True, callback=callback, **options)
        assert [call[0] for call in seen] == list(range(intervals))
        assert torch.equal(seen[0][2], trajectory[0])
        for i, sigma, x, denoised in seen[1:]:
            assert x.shape == trajectory[i].shape and not torch.equal(x, trajectory[i])
            torch.testing.assert_close(denoised, ToyNet()(x, sigma), rtol=0, atol=1e-12)
        assert len(trajectory) == intervals + 1
        assert torch.equal(trajectory[-1], sample(ToyNet(), common("latents2"), **options))


def test_last_interval_is_the_predictor_of_a_longer_schedule():
    sigmas, seen = grid(6, "logsnr"), []
    options = {"solver": "unipc", "lower_order_final": False, "return_trajectory": True}
    longer = sample(ToyNet(), common("latents2"), sigmas=sigmas, callback=lambda *c: seen.append(c[2]), **options)
    for k in range(1, 6):
        shorter = sample(ToyNet(), common("latents2"), sigmas=sigmas[: k + 1], **options)
        assert torch.equal(shorter[:-1], longer[:k])
        assert torch.equal(shorter[-1], seen[k])


def test_a_rule_is_not_changed_by_sampling():
    solver = make_solver("unipc")
    before = copy.deepcopy(vars(solver))
    run = Sampler(Gaussian(), solver, grid(4, "logsnr"))
    run.advance(State(noise()), 0)
    assert vars(solver) == before


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"variant": "bh3"}, "variant=bh3: choose from bh1, bh2"),
        ({"max_order": 4}, "max_order=4: unipc supports 1..3"),
        ({"max_order": 0}, "max_order=0: unipc supports 1..3"),
        ({"deis_mode": "tab"}, "unipc has no option 'deis_mode'"),
        ({"predictor": Constant(0.5)}, "no predictor can be inserted"),
    ],
)
def test_mistakes_are_explained(change, text):
    with pytest.raises(ValueError) as caught:
        sample(Gaussian(), noise(), solver="unipc", num_steps=4, **change)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert SOLVERS["unipc"].options["variant"].default == "bh2"

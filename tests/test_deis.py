"""DEIS: the published code's numbers, exact integrals, orders of accuracy, and learned points."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from test_solvers_golden import close
from test_solvers_properties import (
    NETS,
    Constant,
    Gaussian,
    errors_after_exact_start,
    final_errors,
    grid,
    noise,
    order_of,
)
from test_unipc import ARCHIVE, JSON, check_golden
from toy import ToyNet, common

from solvers import Sampler, State, get_schedule, make_solver, refine, sample
from solvers.deis import CURVE

CASES = [case for case in JSON["cases"] if case["solver"] == "deis"]
MODES = ("tab", "rhoab")


def settings(case, original_code):
    return {"deis_mode": case["deis_mode"], "original_code": original_code}


def published_right(case):
    """rhoab, except where coefficients are reused: the published integrals are exact."""
    return case["deis_mode"] == "rhoab" and "stale_coefficients_from_step" not in case


def needs_original(case):
    """coeff_order = 3 with max_order = 4 on five intervals is the one case without original_code.

    The published code gets there only when its two halves are given different orders.
    """
    return not (published_right(case) and case["max_order"] == 4 and case["num_steps"] > 5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['id']}-{c['deis_mode']}")
def test_golden(case):
    check_golden(case, torch.float64, 1e-8, **settings(case, needs_original(case)))
    if published_right(case):
        check_golden(case, torch.float64, 1e-8, **settings(case, False))
    elif case["deis_mode"] == "tab":  # coefficients differ by less than 1e-4, see below
        check_golden(case, torch.float64, 2e-3, **settings(case, False))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['id']}-{c['deis_mode']}")
def test_golden_float32(case):
    check_golden(case, torch.float32, 2e-3, **settings(case, needs_original(case)))


def coefficients(solver, sigmas, i):
    newest = range(i, max(-1, i - solver.max_order), -1)
    return torch.stack(solver.coefficients([sigmas[k] for k in newest], sigmas[i + 1]))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['id']}-{c['deis_mode']}")
def test_golden_coefficients(case):
    sigmas = torch.from_numpy(ARCHIVE[f"{case['id']}.t_steps"])
    expected, expected_f32 = (ARCHIVE[f"{case['id']}.{name}"] for name in ("coeff", "coeff_f32"))
    options = {"max_order": case["max_order"], "deis_mode": case["deis_mode"]}
    published, exact = (make_solver("deis", {**options, "original_code": original}) for original in (True, False))
    assert np.isnan(expected[0]).all()  # an Euler step
    assert published.coefficients([sigmas[0]], sigmas[1]) == [sigmas[1] - sigmas[0]]
    for i in range(1, min(len(sigmas) - 1, case.get("stale_coefficients_from_step", 99))):
        row = expected[i][~np.isnan(expected[i])]
        assert len(row) == min(i + 1, case["max_order"])
        close(coefficients(published, sigmas, i), row, 1e-11)
        np.testing.assert_allclose(coefficients(published, sigmas, i), expected_f32[i][: len(row)], rtol=2e-3)
        np.testing.assert_allclose(coefficients(exact, sigmas, i), row, rtol=1e-4)


def test_default_of_rhoab_goes_on_at_its_full_order():
    """The published code reuses the coefficients of step four; the default computes each step's."""
    case = next(c for c in CASES if "stale_coefficients_from_step" in c and c["num_steps"] == 8)
    options = {k: case[k] for k in ("solver", "num_steps", "max_order", "deis_mode")}
    exact = sample(ToyNet(), common("latents2"), solver="heun", num_steps=120)
    good, published = (
        sample(ToyNet(), common("latents2"), original_code=original, **options) for original in (False, True)
    )
    assert float((good - exact).norm()) < 0.2 * float((published - exact).norm())


# ---- exactness and accuracy ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["polynomial", "time_uniform"])
@pytest.mark.parametrize("steps", [5, 9])
def test_integrals_are_exact(steps, kind, mode):
    """Against adaptive quadrature over sigma, up to an interval that spans two decades."""
    sigmas = get_schedule(steps, 0.002, 80, kind, 7 if kind == "polynomial" else 1)
    solver = make_solver("deis", {"max_order": 4, "deis_mode": mode})
    for i in range(1, steps - 1):
        count = min(4, i + 1)
        nodes = [sigmas[i - k] for k in range(count)]
        variable = [float(CURVE.sigma_inv(s)) if mode == "tab" else float(s) for s in nodes]

        def basis(sigma, j, nodes=variable):
            u = float(CURVE.sigma_inv(torch.tensor(sigma, dtype=torch.float64))) if mode == "tab" else sigma
            return math.prod((u - v) / (nodes[j] - v) for v in nodes[:j] + nodes[j + 1 :])

        a, b = float(sigmas[i]), float(sigmas[i + 1])
        expected = [quad(basis, a, b, args=(j,), epsabs=1e-13, epsrel=1e-12, limit=200)[0] for j in range(count)]
        close(torch.stack(solver.coefficients(nodes, sigmas[i + 1])), expected, 1e-12)


def test_curve():
    """It is that of the time_uniform schedule, and its parts belong together."""
    time = torch.linspace(1e-3, 1, 6, dtype=torch.float64)
    torch.testing.assert_close(
        CURVE.sigma(time).flip(0), get_schedule(6, 0.002, 80, "time_uniform", 1), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(CURVE.sigma_inv(CURVE.sigma(time)), time, rtol=1e-9, atol=0)
    between = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    numeric = (CURVE.sigma(between + 1e-5) - CURVE.sigma(between - 1e-5)) / 2e-5
    torch.testing.assert_close(CURVE.dsigma_dt(between), numeric, rtol=1e-5, atol=0)


class PolynomialDirection(torch.nn.Module):
    """dx/dsigma is a polynomial of sigma."""

    def __init__(self, coefficients):
        super().__init__()
        self.q = np.polynomial.Polynomial(coefficients)

    def forward(self, x, sigma):
        return x - sigma * self.q(float(sigma))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_rhoab_is_exact_on_polynomials(order):
    """Of degree order - 1 in sigma, and not of one more."""
    sigmas = torch.tensor([4.0, 3.7, 2.2, 2.0, 1.1, 0.3], dtype=torch.float64)
    solver = make_solver("deis", {"max_order": order, "deis_mode": "rhoab"})
    for degree in range(order + 1):
        net = PolynomialDirection([0.5, -0.8, 0.4, 0.3, -0.2][: degree + 1])
        integral, start = net.q.integ(), order - 1
        exact = [noise() + integral(float(s)) for s in sigmas]
        run = Sampler(net, solver, sigmas)
        history = tuple((torch.full_like(exact[0], net.q(float(s))), s) for s in sigmas[:start])
        state = State(exact[start], history, start)
        for i in range(start, run.intervals):
            state = run.advance(state, i)
        error = float((state.x - exact[-1]).abs().max())
        assert error < 1e-12 if degree < order else error > 1e-3


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order(order, mode, make):
    """On unequal steps; order 2 at most from noise, for the first step is Euler's."""
    counts = (50, 100, 200)
    solver = make_solver("deis", {"max_order": order, "deis_mode": mode})
    errors = errors_after_exact_start(make, counts, "polynomial", solver)
    assert order_of(errors, counts) == pytest.approx(order, abs=0.15)
    if make is Gaussian and order in (1, 3):
        errors = final_errors(make, counts, "polynomial", "deis", max_order=order, deis_mode=mode)
        assert order_of(errors, counts) == pytest.approx(min(order, 2), abs=0.15)


def test_related_rules_agree():
    latents, sigmas = common("latents2"), torch.linspace(9.0, 1.0, 7, dtype=torch.float64)

    def run(solver, **options):
        return sample(ToyNet(), latents, solver=solver, sigmas=sigmas, **options)

    for mode in MODES:
        torch.testing.assert_close(run("deis", max_order=1, deis_mode=mode), run("euler"), rtol=0, atol=1e-12)
    for order in (2, 3, 4):  # rhoab on equal steps is Adams-Bashforth
        torch.testing.assert_close(
            run("deis", max_order=order, deis_mode="rhoab"), run("ipndm", max_order=order), rtol=0, atol=1e-11
        )


# ---- learned points ------------------------------------------------------------------------------


@pytest.mark.parametrize("original_code", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_inserted_points_equal_a_finer_schedule(mode, original_code):
    """Only tab is compared: the others reuse coefficients of schedules without learned points."""
    sigmas = grid(4, "polynomial")
    options = {"solver": "deis", "deis_mode": mode, "return_trajectory": True}
    for r in (0.5, 0.3):
        mid = sigmas[1:] ** r * sigmas[:-1] ** (1 - r)
        fine = torch.cat([torch.stack([sigmas[:-1], mid], 1).flatten(), sigmas[-1:]])
        if r == 0.5:
            torch.testing.assert_close(fine, refine(sigmas, 1), rtol=1e-14, atol=0)
        inserted = sample(
            ToyNet(), common("latents2"), sigmas=sigmas, predictor=Constant(r), original_code=original_code, **options
        )
        plain = sample(
            ToyNet(), common("latents2"), sigmas=fine, original_code=original_code and mode == "tab", **options
        )
        torch.testing.assert_close(inserted, plain[::2], rtol=0, atol=1e-11)


class PerSample(Constant):
    """Another point and scale for each sample of the batch."""

    def __call__(self, bottleneck, t_cur, t_next):
        return tuple(value.reshape(-1, 1, 1, 1) for value in self.answer)


@pytest.mark.parametrize("mode", MODES)
def test_points_per_sample(mode):
    r, scale, ones = (torch.tensor(v, dtype=torch.float64) for v in ((0.2, 0.5, 0.8), (1.1, 0.9, 1.0), (1.0, 1.0, 1.0)))
    options = {"solver": "deis", "num_steps": 5, "deis_mode": mode}
    together = sample(ToyNet(), common("latents3"), predictor=PerSample(r, scale, ones), **options)
    for k in range(3):
        alone = Constant(float(r[k]), float(scale[k]))
        expected = sample(ToyNet(), common("latents3")[k : k + 1], predictor=alone, **options)
        torch.testing.assert_close(together[k : k + 1], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_scale_dir_multiplies_the_displacement(mode):
    sigmas = torch.tensor([1.2, 0.6], dtype=torch.float64)
    options = {"solver": "deis", "sigmas": sigmas, "deis_mode": mode}
    full, scaled, none = (sample(Gaussian(), noise(), predictor=Constant(0.5, s), **options) for s in (1, 1.05, 0))
    x, (start, end) = noise() * 1.2, sigmas
    middle = x + ((start * end).sqrt() - start) * (x - Gaussian().denoised(x, start)) / start
    torch.testing.assert_close(none, middle, rtol=0, atol=1e-13)
    torch.testing.assert_close(scaled, none + 1.05 * (full - none), rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"deis_mode": "rhoab"}, {"original_code": True}])
def test_gradients_with_respect_to_the_points(options):
    """The coefficients depend on r: automatic and numerical derivatives of two intervals agree."""
    solver = make_solver("deis", options)

    def end(r, scale):
        net = Gaussian()
        run = Sampler(net, solver, grid(2, "logsnr"), predictor=PerSample(r, scale, torch.ones_like(r)))
        state = State(noise() * 1.2)
        with run.reading():
            for i in range(2):
                state = run.advance(state, i)
        return state.x

    r, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.4, 0.7], [1.02, 0.97]))
    assert torch.autograd.gradcheck(end, (r, scale), fast_mode=True)


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"deis_mode": "uni"}, "deis_mode=uni: choose from tab, rhoab"),
        ({"max_order": 5}, "max_order=5: deis supports 1..4"),
        ({"max_order": 0}, "max_order=0: deis supports 1..4"),
        ({"variant": "bh1"}, "deis has no option 'variant'"),
    ],
)
def test_mistakes_are_explained(change, text):
    with pytest.raises(ValueError) as caught:
        sample(Gaussian(), noise(), solver="deis", num_steps=4, **change)
    assert text in str(caught.value) and "\n" not in str(caught.value)

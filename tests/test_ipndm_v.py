"""Variable-step iPNDM: the published numbers, exactness on polynomials, orders, relatives."""

import pytest
import torch
from test_solvers_properties import NETS, Constant, errors_after_exact_start, grid, order_of
from test_unipc import JSON, check_golden
from toy import ToyNet, common

from solvers import Sampler, State, make_solver, refine, sample
from solvers.ipndm_v import adams_bashforth_weights

CASES = [case for case in JSON["cases"] if case["solver"] == "ipndm_v"]
UNEQUAL = torch.tensor([1.0, 0.83, 0.71, 0.4, 0.12], dtype=torch.float64)


def solver(order, **options):
    return make_solver("ipndm_v", {"max_order": order, **options})


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['id']}-{c['max_order']}")
def test_golden(case):
    check_golden(case, torch.float64, 1e-8, original_code=True)
    if case["max_order"] == 2:
        check_golden(case, torch.float64, 1e-8)
    elif case["num_steps"] > 3:
        with pytest.raises(AssertionError):  # the published weights of the higher orders are others
            check_golden(case, torch.float64, 1e-8)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['id']}-{c['max_order']}")
def test_golden_float32(case):
    check_golden(case, torch.float32, 2e-3, original_code=True)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_exact_on_polynomials(order, published):
    """Exact for directions sigma^p, p below the order; the published weights only to order 2."""

    class Power(ToyNet):
        def forward(self, x, sigma):
            return x - sigma * sigma**p

    for p in range(order + 1):
        known = order - 1
        history = tuple((torch.full((1, 1, 1, 1), float(s) ** p, dtype=torch.float64), s) for s in UNEQUAL[:known])
        run = Sampler(Power(), solver(order, original_code=published), UNEQUAL[: order + 1])
        state = run.advance(State(torch.zeros(1, 1, 1, 1, dtype=torch.float64), history, known), known)
        error = abs(float(state.x) - float(UNEQUAL[order] ** (p + 1) - UNEQUAL[known] ** (p + 1)) / (p + 1))
        if p < order and not (published and order >= 3):
            assert error < 1e-14
        elif p == order or p == order - 1:
            assert error > 1e-4


def test_published_weights_of_order_4_do_not_sum_to_one():
    newest_first, target = list(UNEQUAL[:4].flip(0)), UNEQUAL[4]
    assert float(sum(adams_bashforth_weights(newest_first, target))) == pytest.approx(1, abs=1e-13)
    assert abs(float(sum(adams_bashforth_weights(newest_first, target, published=True))) - 1) > 0.01


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order(order, make):
    counts = (80, 160, 320)
    errors = errors_after_exact_start(make, counts, "polynomial", solver(order))
    assert order_of(errors, counts) == pytest.approx(order, abs=0.15)
    published = errors_after_exact_start(make, counts, "polynomial", solver(order, original_code=True))
    assert order_of(published, counts) == pytest.approx(2 if order == 4 else order, abs=0.15)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_relatives(order):
    latents = common("latents2")

    def run(solver, sigmas, **options):
        return sample(ToyNet(), latents, solver=solver, sigmas=sigmas, max_order=order, **options)

    equal, unequal = grid(7, "uniform"), grid(7, "polynomial")
    torch.testing.assert_close(run("ipndm_v", equal), run("ipndm", equal), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        run("ipndm_v", unequal), run("deis", unequal, deis_mode="rhoab"), rtol=0, atol=1e-11
    )  # Adams-Bashforth in sigma under another name
    published = run("ipndm_v", equal, original_code=True)
    assert torch.allclose(published, run("ipndm", equal), rtol=0, atol=1e-12) == (order < 4)


@pytest.mark.parametrize("original_code", [False, True])
def test_learned_points(original_code):
    options = {"solver": "ipndm_v", "original_code": original_code}
    latents, sigmas = common("latents2"), grid(5, "logsnr")

    def run(predictor=None, sigmas=sigmas, **more):
        return sample(ToyNet(), latents, sigmas=sigmas, predictor=predictor, **options, **more)

    torch.testing.assert_close(run(Constant(0.5)), run(sigmas=refine(sigmas, 1)), rtol=0, atol=1e-11)
    # In the only interval: scale_dir multiplies the displacement of the second update.
    start, middle, end = run(sigmas=refine(sigmas[:2], 1), return_trajectory=True)
    scaled = run(Constant(0.5, scale_dir=0.9), sigmas=sigmas[:2])
    torch.testing.assert_close(scaled, middle + 0.9 * (end - middle), rtol=0, atol=1e-12)
    assert not torch.equal(start, middle)


def test_a_learned_point_per_sample():
    class PerSample(Constant):
        def __call__(self, bottleneck, t_cur, t_next):
            r, *scales = super().__call__(bottleneck, t_cur, t_next)
            return torch.tensor(self.points).reshape(-1, 1, 1, 1).to(r), *scales

    def run(points, latents):
        predictor = PerSample(0.5)
        predictor.points = points
        return sample(ToyNet(), latents, solver="ipndm_v", sigmas=grid(4, "polynomial"), predictor=predictor)

    together = run([0.3, 0.7], common("latents2"))
    for k, r in enumerate((0.3, 0.7)):
        alone = run([r], common("latents2")[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], alone, rtol=0, atol=1e-12)


def test_bad_order_is_explained():
    with pytest.raises(ValueError, match=r"^max_order=5: ipndm_v supports 1\.\.4$"):
        solver(5)

"""PFDiff: where it evaluates and how often, its Adams-Bashforth limit, exactness, orders."""

import pytest
import torch
from test_solvers_properties import Constant, Gaussian, final_errors, grid, noise, order_of
from toy import ToyNet, common

from solvers import make_solver, sample

PAIRS = [(k, h) for k in (1, 2, 3) for h in range(1, k + 1)]


def run(net, latents, k=1, h=1, **options):
    return sample(net, latents, solver="pfdiff", pfdiff_k=k, pfdiff_h=h, **options)


def observed(net, latents, **options):
    """(result, [(i, sigma, x, direction)] of the evaluations)."""
    seen = []

    def callback(i, sigma, x, denoised):
        seen.append((i, float(sigma), x, (x - denoised) / sigma))

    return run(net, latents, callback=callback, **options), seen


@pytest.mark.parametrize(("k", "h"), PAIRS)
def test_evaluations(k, h):
    solver = make_solver("pfdiff", {"pfdiff_k": k, "pfdiff_h": h})
    for intervals in range(1, 13):
        expected = next(n for n in range(1, 13) if (k + 1) * n - k >= intervals)
        for afs in (False, True):
            net = Gaussian()
            _, info = run(net, noise(), k, h, sigmas=grid(intervals, "polynomial"), afs=afs, return_info=True)
            assert solver.evaluations(intervals, afs) == expected - afs == len(net.calls) == info.nfe
        _, doubled = run(
            net, noise(), k, h, sigmas=grid(intervals, "polynomial"), denoise_to_zero=True, return_info=True
        )
        assert doubled.nfe == expected + 1


@pytest.mark.parametrize(
    ("k", "h", "intervals", "points"),
    [
        (1, 1, 5, [0, 2, 4]),
        (1, 1, 6, [0, 2, 4, 5]),  # one interval is left: Euler's step
        (2, 1, 7, [0, 2, 5]),
        (2, 2, 7, [0, 3, 6]),
        (2, 2, 6, [0, 3, 5]),  # fewer than k + 1 intervals are left: one point ahead
        (2, 2, 5, [0, 3, 4]),
        (3, 1, 9, [0, 2, 6]),
        (3, 3, 7, [0, 4, 6]),
        (3, 2, 8, [0, 3, 6]),
        (3, 3, 1, [0]),
        (3, 3, 2, [0, 1]),
    ],
)
def test_where_it_evaluates(k, h, intervals, points):
    net, sigmas = Gaussian(), grid(intervals, "polynomial")
    _, seen = observed(net, noise(), k=k, h=h, sigmas=sigmas)
    assert [i for i, *_ in seen] == points
    assert [sigma for _, sigma, *_ in seen] == [float(sigmas[i]) for i in points] == [float(c[0]) for c in net.calls]


@pytest.mark.parametrize(("k", "h"), PAIRS)
def test_exact_where_the_slope_is_constant(k, h):
    slope = noise(1, seed=3)

    class Straight(Gaussian):
        def denoised(self, x, sigma):
            return x - sigma * slope

    for intervals in range(1, 13):
        sigmas = grid(intervals, "polynomial")
        x = run(Straight(), noise(), k, h, sigmas=sigmas)
        torch.testing.assert_close(x, noise() * sigmas[0] + (sigmas[-1] - sigmas[0]) * slope, rtol=0, atol=1e-13)


def test_equal_steps_are_adams_bashforth_on_the_evaluated_points():
    sigmas = torch.linspace(20, 0.5, 12, dtype=torch.float64)  # 11 intervals: evaluated at 0, 2, ..., 10
    _, seen = observed(ToyNet(), common("latents2"), sigmas=sigmas)
    coarse = sample(
        ToyNet(), common("latents2"), solver="ipndm", max_order=2, sigmas=sigmas[::2], return_trajectory=True
    )
    torch.testing.assert_close(torch.stack([x for _, _, x, _ in seen]), coarse, rtol=0, atol=1e-11)


def test_unequal_steps_are_a_two_slope_method_on_the_evaluated_points():
    """e_{m+2} = e_m + (s_{m+2} - s_m) (c g_m + (1 - c) g_{m-2}).

    c = (s_{m+2} - s_{m-1}) / (s_{m+2} - s_m).
    """
    s = grid(11, "polynomial")
    x, seen = observed(ToyNet(), common("latents2"), sigmas=s)
    for before, (m, _, e, g), (_, _, following, _) in zip(seen, seen[1:], seen[2:], strict=False):
        c = (s[m + 2] - s[m - 1]) / (s[m + 2] - s[m])
        expected = e + (s[m + 2] - s[m]) * (c * g + (1 - c) * before[3])
        torch.testing.assert_close(following, expected, rtol=0, atol=1e-12)
    # The result: the last jump, from the grid point before the last evaluated one.
    (_, _, _, g_before), (m, _, e, g) = seen[-2:]
    torch.testing.assert_close(x, e - (s[m] - s[m - 1]) * g_before + (s[m + 1] - s[m - 1]) * g, rtol=0, atol=1e-12)


def test_a_single_interval_left_is_an_euler_step():
    sigmas, net = grid(6, "polynomial"), ToyNet()
    trajectory = run(net, common("latents2"), sigmas=sigmas, return_trajectory=True)
    assert len(trajectory) == 5  # the start, points 1, 3 and 5, the end
    x = trajectory[-2]
    expected = x + (sigmas[6] - sigmas[5]) * (x - net(x, sigmas[5])) / sigmas[5]
    torch.testing.assert_close(trajectory[-1], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("k", "h"), PAIRS)
def test_order(k, h):
    """The future point is the midpoint of the jump where 2 h = k + 1."""
    counts = [(k + 1) * n - k for n in (20, 40, 80)]
    errors = final_errors(Gaussian, counts, "logsnr", "pfdiff", pfdiff_k=k, pfdiff_h=h)
    assert order_of(errors, counts) == pytest.approx(2 if 2 * h == k + 1 else 1, abs=0.15)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pfdiff_k": 0}, "pfdiff_k=0: pfdiff skips 1..3 points"),
        ({"pfdiff_k": 4, "pfdiff_h": 2}, "pfdiff_k=4: pfdiff skips 1..3 points"),
        ({"pfdiff_h": 2}, "pfdiff_h=2: with pfdiff_k=1 choose 1..1"),
        ({"pfdiff_k": 3, "pfdiff_h": 0}, "pfdiff_h=0: with pfdiff_k=3 choose 1..3"),
        ({"pfdiff_k": 1.5}, "pfdiff_k=1.5 must be a whole number"),
        ({"predictor": Constant(0.5)}, "no predictor can be inserted into the solver 'pfdiff'"),
    ],
)
def test_mistakes_are_explained(options, text):
    net = Gaussian()
    with pytest.raises(ValueError) as caught:
        sample(net, noise(), solver="pfdiff", num_steps=4, **options)
    assert str(caught.value) == text and net.calls == []

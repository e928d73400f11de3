"""DM-NonUniform: weights against quadrature, objective against a transcription, schedules."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from toy import ToyNet

from solvers import get_schedule
from solvers.search.dmn import dmn_sigmas, error_bound, step_weights
from solvers.search.problem import Problem
from torch_utils.errors import UserError
from training.schedule_search import run_dmn

LAMBDAS = np.array([-4.0, -2.5, -2.2, -0.9, -0.8, 1.5, 2.0, 2.1, 4.0, 6.0])


def integral(lambdas, s, order, j):
    """int e^lambda l_j over step s; l_j is 1 at lambda_(s-j) and 0 at the step's other points."""
    nodes = [lambdas[s - k] for k in range(order)]

    def integrand(at):
        others = (node for k, node in enumerate(nodes) if k != j)
        return np.exp(at) * np.prod([(at - node) / (nodes[j] - node) for node in others])

    return quad(integrand, lambdas[s], lambdas[s + 1], epsabs=0, epsrel=1e-12)[0]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_weights_are_integrals_of_the_lagrange_basis(order):
    for s in range(order - 1, len(LAMBDAS) - 1):
        expected = [integral(LAMBDAS, s, order, j) for j in range(order)]
        np.testing.assert_allclose(step_weights(LAMBDAS, s, order), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["pixel", "latent"])
@pytest.mark.parametrize("points", [5, 8, 10])
def test_objective(kind, points):
    """The bound for order 3 by quadrature, with the error of variance-preserving models."""
    lambdas = LAMBDAS[:points]
    n = points - 1
    alpha, noise = 1 / np.sqrt(1 + np.exp(-2 * lambdas)), 1 / np.sqrt(1 + np.exp(2 * lambdas))
    error = noise / alpha if kind == "pixel" else noise**2 / alpha
    signed, total = dict.fromkeys(range(n), 0.0), 0.0
    for s in range(n):
        order = 1 if s in (0, n - 1) else 2 if s in (1, n - 2) else 3
        terms = {s - j: error[s - j] * integral(lambdas, s, order, j) for j in range(order)}
        if order == 1:
            total += abs(terms[s])
        elif s < 3 and n <= 7:
            total += sum(value**2 for value in terms.values()) ** 0.5
        else:
            for j, value in terms.items():
                signed[j] += value
    total += sum(abs(value) for value in signed.values())
    assert error_bound(lambdas, kind) == pytest.approx(total, rel=1e-9)


def test_first_order_is_best_on_equal_steps():
    """The bound is sum(e^h - 1), which is convex: equal steps in lambda minimise it."""
    start = get_schedule(7, 0.002, 80)
    found = dmn_sigmas(7, 0.002, 80, max_order=1, initial=start)
    lambdas = -np.log(start.numpy())
    assert error_bound(lambdas, max_order=1) == pytest.approx(np.expm1(np.diff(lambdas)).sum())
    np.testing.assert_allclose(found, get_schedule(7, 0.002, 80, "logsnr"), rtol=1e-4)


@pytest.mark.parametrize("num_steps", [3, 5, 9])
@pytest.mark.parametrize("kind, low, high", [("pixel", 0.002, 80.0), ("latent", 0.03, 14.6)])
def test_schedules(kind, low, high, num_steps):
    sigmas = dmn_sigmas(num_steps, low, high, kind)
    assert sigmas.dtype == torch.float64 and len(sigmas) == num_steps
    assert sigmas[0] == high and sigmas[-1] == low and (sigmas[1:] < sigmas[:-1]).all()
    start = get_schedule(num_steps, low, high, "logsnr" if kind == "pixel" else "time_uniform", 1)
    bounds = [error_bound(-np.log(grid.numpy()), kind) for grid in (sigmas, start)]
    # One inner point of three in the middle of lambda is optimal for pixels already.
    assert bounds[0] <= bounds[1] if (kind, num_steps) == ("pixel", 3) else bounds[0] < 0.7 * bounds[1]


def test_the_solver_and_the_kind_of_network_matter():
    plain = dmn_sigmas(5, 0.002, 80)
    for changed in ({"max_order": 1}, {"lower_order_final": False}, {"kind": "latent"}):
        assert (dmn_sigmas(5, 0.002, 80, **changed) / plain - 1).abs().max() > 0.01
    assert torch.equal(plain, dmn_sigmas(5, 0.002, 80, max_order=4))


def test_latents_start_in_the_time_of_the_network():
    net = ToyNet(discrete=True)
    ends = (net.sigma_min, net.sigma_max)
    start = get_schedule(4, *ends, "discrete", 1, net)
    assert torch.equal(dmn_sigmas(4, *ends, "latent", net=net), dmn_sigmas(4, *ends, "latent", initial=start))


def test_two_points_are_the_ends():
    assert dmn_sigmas(2, 0.1, 10).tolist() == [10, 0.1]


def test_mistakes():
    cases = {
        "kind='voxel': choose from pixel, latent": lambda: dmn_sigmas(4, 0.1, 10, "voxel"),
        "max_order=0": lambda: dmn_sigmas(4, 0.1, 10, max_order=0),
        "num_steps=1": lambda: dmn_sigmas(1, 0.1, 10),
        "0 < sigma_min < sigma_max": lambda: dmn_sigmas(4, 10, 0.1),
        "instead of num_steps=4": lambda: dmn_sigmas(4, 0.1, 10, initial=[10, 1, 0.1]),
        "strictly decreasing": lambda: dmn_sigmas(3, 0.1, 10, initial=[30, 20, 0.1]),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize("latent, kind", [(False, "pixel"), (True, "latent")])
def test_auto_asks_the_network_whether_it_samples_latents(latent, kind):
    net = ToyNet(discrete=True)
    net.latent = latent
    problem = Problem(net=net, solver="dpmpp", num_steps=5)
    own = dmn_sigmas(5, net.sigma_min, net.sigma_max, kind, net=net)
    assert torch.equal(run_dmn(problem, kind="auto").sigmas, own)

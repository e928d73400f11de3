"""DM-NonUniform: time steps that minimise a bound on the error of a multistep exponential integrator.

Xue et al. 2024, "Accelerating Diffusion Sampling with Optimized Time Steps". Nothing is asked of
the network: its error at noise level sigma is assumed known up to a factor. Everything is in lambda
= -ln sigma, in which the data-prediction solvers (DPM-Solver++, UniPC) integrate e^lambda D exactly
for a polynomial D.
"""

import warnings

import numpy as np
import torch

from solvers.schedules import check_sigmas, get_schedule
from torch_utils.errors import UserError

NETWORK_KINDS = ("pixel", "latent")
HIGHEST_ORDER = 3
SMALLEST_GAP = 1e-3  # of the mean gap in lambda: the weights have a pole where two points meet
FEW_INTERVALS = (
    7  # up to here the errors of the first steps are added as if they were independent (the paper's setting)
)


def step_weights(lambdas: np.ndarray, s: int, order: int) -> np.ndarray:
    """Weights of the network's outputs in step s: int e^lambda l_j(lambda) over [lambda_s, lambda_s+1], [order].

    l_j: the Lagrange basis on the last ``order`` (1 to 3) points, of which lambda_s comes first
        here.
    """
    h = lambdas[s + 1] - lambdas[s]
    # Moments int_0^h e^u u^m du, u = lambda - lambda_s.
    m0 = np.expm1(h)
    m1 = h * np.exp(h) - m0
    if order == 1:
        weights = [m0]
    elif order == 2:
        a = lambdas[s] - lambdas[s - 1]
        weights = [m0 + m1 / a, -m1 / a]
    else:
        m2 = h * h * np.exp(h) - 2 * m1
        a, b = lambdas[s] - lambdas[s - 1], lambdas[s] - lambdas[s - 2]
        weights = [
            m0 + ((a + b) * m1 + m2) / (a * b),
            -(m2 + b * m1) / (a * (b - a)),
            (m2 + a * m1) / (b * (b - a)),
        ]
    return np.exp(lambdas[s]) * np.array(weights)


def error_prior(lambdas: np.ndarray, kind: str) -> np.ndarray:
    """The assumed error of D at each point up to a factor: sigma (pixel), sigma^2 / sqrt(1 + sigma^2) (latent)."""
    sigmas = np.exp(-lambdas)
    return sigmas if kind == "pixel" else sigmas**2 / np.sqrt(1 + sigmas**2)


def error_bound(lambdas: np.ndarray, kind: str = "pixel", max_order: int = 3, lower_order_final: bool = True) -> float:
    """The objective: a bound on the final error, up to a factor, for increasing lambdas [N+1].

    Steps of order 1 and all steps from the fourth on (from the second on for more than
    FEW_INTERVALS intervals) add up worst-case: what one evaluation contributes to several steps is
    summed with its sign before the absolute value is taken. The steps before contribute the root of
    the sum of their squares.
    """
    intervals = len(lambdas) - 1
    prior = error_prior(lambdas, kind)
    independent = 3 if intervals <= FEW_INTERVALS else 0
    total = 0.0
    of_point = np.zeros(intervals)
    for s in range(intervals):
        order = min(s + 1, max_order, intervals - s if lower_order_final else max_order)
        points = np.arange(s, s - order, -1)
        terms = prior[points] * step_weights(lambdas, s, order)
        if order == 1 or s < independent:
            total += np.sqrt((terms**2).sum())
        else:
            of_point[points] += terms
    return float(total + np.abs(of_point).sum())


def dmn_sigmas(
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    kind: str = "pixel",
    *,
    max_order: int = 3,
    lower_order_final: bool = True,
    initial=None,
    net=None,
) -> torch.Tensor:
    """The noise levels with the least error bound, from sigma_max down to sigma_min, float64 [num_steps].

    kind: "pixel" or "latent", the assumed error of the network (``error_prior``). max_order (1 to
    3; a higher one counts as 3), lower_order_final: of the solver that the schedule is for.
    initial: where to start, a schedule [num_steps];
    default: uniform in ln sigma for pixels, in the network's time for latents (its noise table if
    net has one). The problem is not convex, so the result depends on it; it is never worse than the
    start.

    Raises UserError on impossible values.
    """
    from scipy.optimize import LinearConstraint, minimize

    if kind not in NETWORK_KINDS:
        raise UserError(f"kind='{kind}': choose from {', '.join(NETWORK_KINDS)}")
    if max_order < 1:
        raise UserError(f"max_order={max_order} must be at least 1")
    if initial is None:
        of_latents = "discrete" if hasattr(net, "sigma_inv") else "time_uniform"
        initial = get_schedule(num_steps, sigma_min, sigma_max, "logsnr" if kind == "pixel" else of_latents, 1, net)
    start = check_sigmas(initial).cpu().clone()
    if len(start) != num_steps:
        raise UserError(f"the initial schedule has {len(start)} noise levels instead of num_steps={num_steps}")
    start[0], start[-1] = sigma_max, sigma_min
    start = check_sigmas(start).numpy()
    ends = -np.log(start[[0, -1]])
    intervals = num_steps - 1
    unit = (ends[1] - ends[0]) / intervals

    def objective(inner):
        lambdas = np.concatenate([ends[:1], inner, ends[1:]])
        return error_bound(lambdas, kind, min(max_order, HIGHEST_ORDER), lower_order_final)

    best = -np.log(start)[1:-1]
    if intervals > 1:
        gaps = np.eye(intervals, intervals - 1) - np.eye(intervals, intervals - 1, k=-1)
        offset = np.zeros(intervals)
        offset[0], offset[-1] = -ends[0], ends[1]  # the gaps are gaps @ inner + offset
        constraint = LinearConstraint(gaps, SMALLEST_GAP * unit - offset, np.inf, keep_feasible=True)
        with warnings.catch_warnings():  # the quasi-Newton update has nothing to learn from the last, tiny steps
            warnings.filterwarnings("ignore", "delta_grad == 0.0", UserWarning)
            found = minimize(objective, best, method="trust-constr", constraints=constraint).x
        widths = gaps @ found + offset
        if np.isfinite(found).all() and (widths > 0).all() and objective(found) < objective(best):
            best = found
    sigmas = torch.from_numpy(np.concatenate([start[:1], np.exp(-best), start[-1:]]))
    return check_sigmas(sigmas)

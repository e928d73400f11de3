"""DM-NonUniform: time steps with the least error bound of a multistep exponential integrator.

Xue et al. 2024, "Accelerating Diffusion Sampling with Optimized Time Steps". The network is not
called: its error at noise level sigma is assumed, up to a factor. The variable is lambda = -ln
sigma. In it the data-prediction solvers (DPM-Solver++, UniPC) integrate e^lambda D exactly if D is
a polynomial.
"""

import warnings

import numpy as np
import torch

from solvers.schedules import check_sigmas, get_schedule
from torch_utils.errors import UserError

NETWORK_KINDS = ("pixel", "latent")
HIGHEST_ORDER = 3
SMALLEST_GAP = 1e-3  # share of the mean gap in lambda: the weights have a pole where two points meet
FEW_INTERVALS = 7  # up to this number the errors of the first steps count as independent (the paper's setting)


def step_weights(lambdas: np.ndarray, s: int, order: int) -> np.ndarray:
    """Weights [order] of the network's outputs in step s, newest first.

    The integrals of e^lambda l_j(lambda) from lambda_s to lambda_s+1, with l_j the Lagrange basis.

    lambdas: points [N+1], increasing.
    s: index of the step.
    order: number of outputs that the step uses, 1 to 3.
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
    """The assumed error of D at each point, up to a factor.

    lambdas: points [N+1].
    kind: "pixel": sigma. "latent": sigma^2 / sqrt(1 + sigma^2).
    """
    sigmas = np.exp(-lambdas)
    return sigmas if kind == "pixel" else sigmas**2 / np.sqrt(1 + sigmas**2)


def error_bound(lambdas: np.ndarray, kind: str = "pixel", max_order: int = 3, lower_order_final: bool = True) -> float:
    """The objective: a bound on the final error, up to a factor.

    Steps of order 1, and with up to FEW_INTERVALS intervals the first three steps, contribute the
    root of the sum of squares of their terms. For all other steps the terms of one evaluation are
    added with their signs, and then the absolute values of all evaluations.

    lambdas: points [N+1], increasing.
    kind: see ``error_prior``. Default pixel.
    max_order, lower_order_final: options of the solver. Default 3, True.
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
    """The noise levels with the least error bound, float64 [num_steps].

    num_steps: number of time steps.
    sigma_min, sigma_max: the range.
    kind: the assumed error of the network, see ``error_prior``. Default pixel.
    max_order: order of the solver that the schedule is for; above 3 it counts as 3. Default 3.
    lower_order_final: option of that solver. Default True.
    initial: schedule [num_steps] to start from. The problem is not convex, so the result depends on
        it; the result is never worse. Default: uniform in ln sigma for pixels, in the network's
        time for latents.
    net: the denoiser, for its noise table. Default None.

    Raises UserError for impossible values.
    """
    from scipy.optimize import LinearConstraint, minimize

    if kind not in NETWORK_KINDS:
        raise UserError(f"kind='{kind}': choose from {', '.join(NETWORK_KINDS)}")
    if max_order < 1:
        raise UserError(f"max_order={max_order} must be at least 1")
    if initial is None:
        of_latents = "discrete" if hasattr(net, "sigma_inv") else "time_uniform"
        initial = get_schedule(num_steps, sigma_min, sigma_max, "logsnr" if kind == "pixel" else of_latents, 1, net)
    levels = check_sigmas(initial).cpu().clone()
    if len(levels) != num_steps:
        raise UserError(f"the initial schedule has {len(levels)} noise levels instead of num_steps={num_steps}")
    levels[0], levels[-1] = sigma_max, sigma_min
    start = check_sigmas(levels).numpy()
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
        with warnings.catch_warnings():  # the last steps are too small for a quasi-Newton update
            warnings.filterwarnings("ignore", "delta_grad == 0.0", UserWarning)
            found = minimize(objective, best, method="trust-constr", constraints=constraint).x
        widths = gaps @ found + offset
        if np.isfinite(found).all() and (widths > 0).all() and objective(found) < objective(best):
            best = found
    sigmas = torch.from_numpy(np.concatenate([start[:1], np.exp(-best), start[-1:]]))
    return check_sigmas(sigmas)

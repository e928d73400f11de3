"""DEIS: tAB-DEIS and rhoAB-DEIS.

Zhang & Chen 2023, "Fast Sampling of Diffusion Models with Exponential Integrator".
"""

import copy
import functools

import numpy as np
import torch

from models.denoiser import beside
from models.noise import VPTime
from solvers.solver import Option, Solver, add_scaled, order_option, register, weighted_sum
from torch_utils.transfer import to_device

# Of the Gauss-Legendre quadrature in ln sigma. The integrand's singularities are pi/2 away from the
# real axis, so these points reach rounding error on any interval, even from 80 to 0.002.
POINTS = 64
PUBLISHED_POINTS = 10000
CURVE = VPTime(0.002, 80.0)


def lagrange_basis(at: torch.Tensor, nodes: list[torch.Tensor]) -> list[torch.Tensor]:
    """The Lagrange polynomials of nodes [...] at points [...,n], one tensor [...,n] per node."""
    basis = []
    for j, node in enumerate(nodes):
        value = torch.ones_like(at)
        for other in nodes[:j] + nodes[j + 1 :]:
            value = value * ((at - other.unsqueeze(-1)) / (node - other).unsqueeze(-1))
        basis.append(value)
    return basis


LEGENDRE = functools.cache(np.polynomial.legendre.leggauss)


def gauss_legendre(start: torch.Tensor, end: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and weights [...,count] of the Gauss-Legendre quadrature from start to end [...]."""
    points, weights = (to_device(torch.as_tensor(v).to(start.dtype), start.device) for v in LEGENDRE(count))
    half = (0.5 * (end - start)).unsqueeze(-1)
    return start.unsqueeze(-1) + half * (1 + points), half * weights


@register("deis")
class DEIS(Solver):
    """DEIS multistep (Zhang & Chen 2023).

    The direction is extrapolated by the polynomial through the newest max_order points and
    integrated exactly. The first step is an Euler step, then the order rises by one per step.

    deis_mode: variable of the polynomial; both have the same order of accuracy. Default tab.
        tab: the time of the variance-preserving SDE with linear beta(t) and noise from 0.002 to 80,
        for any schedule.
        rhoab: sigma.
    original_code: reproduce the published code. tab: the integral is a sum of 10000 samples. rhoab
        with max_order=4: all steps after the fourth use its coefficients. Default False.
    """

    summary = "DEIS: multistep by exact integration of a polynomial, order 1-4"
    options = {
        "max_order": order_option(4),
        "deis_mode": Option(("tab", "rhoab"), "tab", "the variable of the polynomial"),
        "original_code": Option(bool, False, "reproduce the published code where it deviates"),
    }
    highest_order = 4
    one_step = False

    def setup(self, net, sigmas, predictor=None):
        solver = copy.copy(super().setup(net, sigmas, predictor))
        solver.grid = sigmas
        return solver

    def update(self, x, history, sigma_next, index, total, scale=1.0):
        count = min(self.max_order, len(history))
        sigmas = [sigma for _, sigma in reversed(history[-count:])]
        stale = self.original_code and self.deis_mode == "rhoab" and self.max_order == 4 and index >= 4
        if stale and total == len(self.grid) - 1:  # the published code has no learned points
            *sigmas, sigma_next = (self.grid[k] for k in (3, 2, 1, 0, 4))
        weights = self.constants(sigmas, sigma_next)
        outputs = (output for output, _ in reversed(history[-count:]))
        return add_scaled(x, scale, weighted_sum([w.to(x.dtype) for w in weights], outputs))

    def constants(self, sigmas: list, sigma_next) -> list[torch.Tensor]:
        """``coefficients``, computed once per step of a schedule.

        With gradients, or noise levels per sample, they are computed in every call.
        """
        levels = (*sigmas, sigma_next)
        if any(level.ndim or level.requires_grad or level.device.type != "cpu" for level in levels):
            return self.coefficients(sigmas, sigma_next)
        return _constants(self.deis_mode, self.original_code, *map(float, levels))

    def coefficients(self, sigmas: list, sigma_next) -> list[torch.Tensor]:
        """Coefficients of the directions in a step, each shaped like the noise levels.

        sigmas: noise levels of the directions, newest first, each a scalar or [B,1,1,1].
        sigma_next: a scalar or [B,1,1,1].

        float64; where a predictor on another device than the CPU places the points, float32.
        """
        *sigmas, target = _alike([*sigmas, sigma_next])
        start, dtype = sigmas[0], sigmas[0].dtype
        if len(sigmas) == 1:
            return [target - start]
        nodes = sigmas if self.deis_mode == "rhoab" else [CURVE.sigma_inv(sigma) for sigma in sigmas]
        if self.deis_mode == "rhoab":
            points, weights = gauss_legendre(start, target, 2)  # exact for cubics
        elif self.original_code:
            span = (CURVE.sigma_inv(target) - nodes[0]).unsqueeze(-1)
            u = torch.linspace(0, 1, PUBLISHED_POINTS, dtype=dtype, device=start.device)
            points = nodes[0].unsqueeze(-1) + span * u
            weights = CURVE.dsigma_dt(points) * span / PUBLISHED_POINTS
        else:
            logs, weights = gauss_legendre(start.log(), target.log(), POINTS)
            points, weights = CURVE.sigma_inv(logs.exp()), weights * logs.exp()
        return [(weights * basis).sum(-1) for basis in lagrange_basis(points, nodes)]


def _alike(levels: list[torch.Tensor]) -> list[torch.Tensor]:
    """The noise levels in float64 on the CPU, or in float32 on the device of some of them."""
    place = next((level for level in levels if level.device.type != "cpu"), None)
    if place is None:
        return [level.to(torch.float64) for level in levels]
    return [beside(level.to(torch.float32), place) for level in levels]


@functools.lru_cache(maxsize=4096)
def _constants(mode: str, original_code: bool, *levels: float) -> list[torch.Tensor]:
    """``DEIS.coefficients`` of noise levels that are plain numbers, the last one the target."""
    solver = DEIS(deis_mode=mode, original_code=original_code)
    *sigmas, target = (torch.tensor(level, dtype=torch.float64) for level in levels)
    return solver.coefficients(sigmas, target)

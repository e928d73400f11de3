"""The stochastic sampler of EDM.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".
"""

import math

from solvers.sampler import afs_direction
from solvers.solver import Heun, Option, Point, State, register
from torch_utils.errors import UserError


@register("edm")
class EDM(Heun):
    """EDM's stochastic sampler (Karras et al. 2022, Algorithm 2): noise before every Heun step.

    If S_min <= sigma <= S_max, noise of standard deviation S_noise sqrt(sigma_hat^2 - sigma^2)
    raises the noise level from sigma to sigma_hat = (1 + gamma) sigma. gamma = min(S_churn / N,
    sqrt(2) - 1) for a schedule of N noise levels. The Heun step starts at sigma_hat.

    S_churn = 0 is heun. ``denoise_to_zero`` is the algorithm's last step, to sigma = 0, without
    noise before it; then there are 2 N - 1 evaluations. AFS applies at sigma_hat. The callback gets
    the state before the noise and the denoised image after it. sigma_hat may exceed the network's
    sigma_max by a factor of up to sqrt(2), as published; a lower S_max avoids this.
    """

    summary = "EDM's stochastic sampler: Heun after fresh noise, order 2 without noise; 2 evaluations per step"
    options = {
        "S_churn": Option(float, 0.0, "amount of fresh noise over the whole schedule"),
        "S_min": Option(float, 0.0, "lowest noise level with fresh noise"),
        "S_max": Option(float, math.inf, "highest noise level with fresh noise"),
        "S_noise": Option(float, 1.0, "factor of the fresh noise's standard deviation"),
    }
    can_teach = False
    stochastic = True
    per_sample = False

    def __init__(self, **values):
        super().__init__(**values)
        for name in ("S_churn", "S_min", "S_noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name}={value} must be a finite number >= 0")
        if not self.S_max >= self.S_min:
            raise UserError(f"S_max={self.S_max} must be a number >= S_min={self.S_min}")

    def setup(self, net, sigmas, predictor=None):
        if self.S_churn > 0:
            self.check_noise(net)
        return super().setup(net, sigmas, predictor)

    def gamma(self, sigma: float, levels: int) -> float:
        """The relative increase of sigma, in a schedule of ``levels`` noise levels."""
        if not self.S_min <= sigma <= self.S_max:
            return 0.0
        return min(self.S_churn / levels, math.sqrt(2) - 1)

    def step(self, run, state, i):
        gamma = self.gamma(run.sigmas[i].item(), len(run.sigmas))
        if gamma == 0:
            return (yield from super().step(run, state, i))
        cur, nxt = run.sigma(i, state.x), run.sigma(i + 1, state.x)
        hat = (1 + gamma) * cur
        x = state.x + self.S_noise * (hat**2 - cur**2).sqrt() * run.noise(state.x)
        free = i == 0 and run.afs
        d = afs_direction(run.net, x, hat, run.afs, run.cond) if free else (yield Point(x, hat))
        if run.observer is not None:
            run.observer(i, cur, state.x, x - hat * d)
        d_next = yield Point(x + (nxt - hat) * d, nxt, run.sigma_cond(i + 1))
        return State(x + (nxt - hat) * self.combine(d, d_next, self.r), (), state.updates + 1)

"""Stochastic exponential multistep: the reverse-time SDE in few steps."""

from dataclasses import replace

import torch

from solvers.solver import EXPONENTIAL_OPTIONS, Option, Solver, order_option, register
from torch_utils.errors import UserError


@register("sde")
class SDE(Solver):
    """Exponential multistep method for the reverse-time SDE, one draw of noise per interval.

    For a step from s to t let m be the model output, h = ln(s / t), z fresh noise and
    m' = (m - m_before) h / h_before, or zero at order 1. With predict_x0, and without it, x becomes

        (t/s)^2 x + (1 - e^-2h) m + (1 - (1 - e^-2h) / 2h) m' + t sqrt(1 - e^-2h) z
        x - 2t ((e^h - 1) m + ((e^h - 1) / h - 1) m') + sqrt(s^2 - t^2) z

    These are the stochastic updates of the MR sampler (Li et al. 2025, arXiv 2502.07856) for
    x = image + sigma * noise. Order 1 with predict_x0 is ancestral sampling (Ho et al. 2020). Order
    2 integrates the linear interpolation of m in ln sigma exactly.

    midpoint: weight m' by (1 - e^-2h) / 2 instead, as in SDE-DPM-Solver++(2M) (Lu et al. 2022). The
        order is the same. Needs predict_x0 and max_order=2. Default False.
    predict_x0: the model outputs are denoised images, else directions. Default True.
    lower_order_final: the last step has order 1. Default True.
    """

    summary = "reverse SDE: stochastic exponential multistep, order 1-2"
    options = {
        "max_order": order_option(2),
        **{name: EXPONENTIAL_OPTIONS[name] for name in ("predict_x0", "lower_order_final")},
        "midpoint": Option(bool, False, "the weights of SDE-DPM-Solver++(2M)"),
    }
    highest_order = 2
    one_step = False
    can_teach = can_learn = False
    stochastic = True

    def __init__(self, **values):
        super().__init__(**values)
        if self.midpoint and not (self.predict_x0 and self.max_order == 2):
            raise UserError("midpoint=True needs predict_x0=True and max_order=2")

    def setup(self, net, sigmas, predictor=None):
        self.check_noise(net)
        return super().setup(net, sigmas, predictor)

    def output(self, x, d, sigma):
        return x - sigma * d if self.predict_x0 else d

    def update(self, x, history, sigma_next, index, total, scale=1.0):
        """The mean of the state at sigma_next; ``step`` adds the noise."""
        m, s = history[-1]
        h = (s / sigma_next).log()
        order = min(self.max_order, len(history), total - index if self.lower_order_final else 2)
        if self.predict_x0:
            first = -torch.expm1(-2 * h)
            second = first / 2 if self.midpoint else 1 - first / (2 * h)
            mean = (sigma_next / s) ** 2 * x + first * m
        else:
            first = -2 * sigma_next * torch.expm1(h)
            second = first / h + 2 * sigma_next
            mean = x + first * m
        if order == 1:
            return mean
        before, s_before = history[-2]
        return mean + second * (h / (s_before / s).log()) * (m - before)

    def step(self, run, state, i):
        cur, nxt = run.sigma(i, state.x), run.sigma(i + 1, state.x)
        d = yield run.at(state.x, i)
        state = self.make_update(state, d, cur, nxt, run.updates)
        std = (nxt / cur if self.predict_x0 else 1.0) * (cur**2 - nxt**2).sqrt()
        return replace(state, x=state.x + std * run.noise(state.x))

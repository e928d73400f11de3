"""EVODiff (arXiv 2509.26096): a second-order predictor-corrector without training that adapts to sample and channel."""

import torch

from solvers.rules import Option, Rule, State, register

LIMIT = 2.0  # of every projection coefficient


def projection(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """<a, b> / <b, b> over the pixels of each sample and channel, [B,C,1,1]; 0 where b is 0."""
    dot, square = (a * b).sum((-2, -1), keepdim=True), (b * b).sum((-2, -1), keepdim=True)
    return torch.where(square > 0, dot / square, torch.zeros_like(dot))


def bounded(a, b):
    return projection(a, b).clamp(-LIMIT, LIMIT)


@register("evodiff")
class EVODiff(Rule):
    """EVODiff (arXiv 2509.26096), multistep, in data prediction: what the difference of two denoised images says about the
    next one is weighted per sample and channel by inner products over the pixels.

    The first step is Euler's. Every further one but the last goes to a probe point first; the evaluation there shapes
    the step and serves the next interval, so an interval costs one. lower_order_final: the last step, which has no
    evaluation at its end, is the published shortened one, which multiplies the image by 1 - sqrt(sigma_last
    sigma_before); else it is the step to the probe. The callback gets the probe points, a trajectory has the states.
    """

    summary = "EVODiff: adaptive multistep predictor-corrector, order 1"
    options = {"lower_order_final": Option(bool, True, "lower order in the last steps")}
    one_step = False
    keep = 2
    can_learn = False
    can_teach = False

    def advance(self, run, state: State, i: int) -> State:
        x, cur, nxt, last = state.x, run.sigma(i, state.x), run.sigma(i + 1, state.x), i + 1 == run.intervals
        history = state.history or ((x - cur * run.direction_at(x, i), cur),)
        m0 = history[-1][0]
        ratio = nxt / cur
        euler = ratio * x + (1 - ratio) * m0
        if i == 0:
            probe = following = euler
        else:
            m1, before = history[-2]
            steps = (before / cur).log() / (cur / nxt).log()
            half = 0.5 * (1 - ratio)  # the paper's 0.5 sigma h, h = 1 / nxt - 1 / cur
            share = 0.5 * (1 - ((nxt + cur) / (run.sigma(0, x) + cur)) ** 2)
            usual = (ratio / (cur / before)).sqrt()

            def excess(new, old):
                """(new - beta old, beta): what of ``new`` the older image does not explain."""
                beta = (1 - share) * usual + share * bounded(new, old)
                return new - beta * old, beta

            d1, beta = excess(m0, m1)
            place = ((0.25 * beta.abs()).sigmoid() * steps).clamp(0.25 * steps, 1.5 * steps)
            probe = euler + half * d1 / place
            if last:
                following = self.last_step(euler, m0, m1, cur, nxt) if self.lower_order_final else probe
        if last:
            return State(following, history, state.updates + 1)
        m2 = probe - nxt * run.direction_at(probe, i + 1)
        if i > 0:
            d2, _ = excess(m2, m0)
            # The slopes over the previous and over this interval; a common factor 1 / h drops out.
            p, q = d1 / steps, steps * d2
            eta = 0.5 * (0.5 * bounded(q + p, q - p)).abs().sigmoid()
            bend = (1 - eta) * q - eta * p
            # 0.5 / place * (d1 - bend) projected on d1: sigma h has dropped out.
            zeta = (projection(0.5 * (d1 - bend) / place, d1).abs() - 0.5).sigmoid()
            following = euler + half * bend / zeta
        return State(following, (*history, (m2, nxt))[-self.keep :], state.updates + 1)

    def last_step(self, euler, m0, m1, cur, nxt):
        ratio = nxt / cur
        rest = 1 - 0.5 * torch.where(ratio < 0.5, ratio, ratio - 0.5).sqrt()
        return (1 - (nxt * cur).sqrt()) * euler + 0.5 * (1 - ratio) * (m0 - rest * m1)

"""EVODiff (arXiv 2509.26096): a predictor-corrector without training, adaptive per channel."""

import torch

from solvers.solver import Option, Solver, State, register

LIMIT = 2.0  # of every projection coefficient
LONG_RUN = 20  # intervals above which zeta has its second form


def projection(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """<a, b> / <b, b> over the pixels of each sample and channel, [B,C,1,1]; 0 where b is 0."""
    dot, square = (a * b).sum((-2, -1), keepdim=True), (b * b).sum((-2, -1), keepdim=True)
    return torch.where(square > 0, dot / square, torch.zeros_like(dot))


def bounded(a, b):
    return projection(a, b).clamp(-LIMIT, LIMIT)


@register("evodiff")
class EVODiff(Solver):
    """EVODiff (arXiv 2509.26096), multistep, in data prediction. Follows the published code.

    The differences of denoised images are weighted per sample and channel by inner products over
    the pixels. The first step is an Euler step. Every later step evaluates at a probe point. The
    step uses this evaluation, and so does the next interval: an interval costs one evaluation. The
    callback gets the probe points, a trajectory has the states.

    lower_order_final: True: the last step needs no evaluation at its end, and multiplies the image
        by 1 - sqrt(sigma_last sigma_before). False: the last step is like the others and costs one
        more evaluation, at sigma_last. A schedule of one interval is an Euler step in both cases.
        Default True.
    """

    summary = "EVODiff: adaptive multistep predictor-corrector, order 1"
    options = {"lower_order_final": Option(bool, True, "lower order in the last steps")}
    one_step = False
    keep = 2
    can_learn = False
    can_teach = False

    def evaluations(self, intervals, afs=False, learned=False):
        return intervals + (intervals > 1 and not self.lower_order_final) - bool(afs)

    def step(self, run, state, i):
        x, cur, nxt, last = state.x, run.sigma(i, state.x), run.sigma(i + 1, state.x), i + 1 == run.intervals
        history = state.history or ((x - cur * (yield run.at(x, i)), cur),)
        m0 = history[-1][0]
        ratio = nxt / cur
        euler = ratio * x + (1 - ratio) * m0
        if last and (i == 0 or self.lower_order_final):
            following = euler if i == 0 else self.last_step(euler, m0, history[-2][0], cur, nxt)
            return State(following, history, state.updates + 1)
        if i == 0:
            following = euler
            m2 = euler - nxt * (yield run.at(euler, i + 1))
        else:
            following, m2 = yield from self.usual_step(run, i, euler, history)
        return State(following, (*history, (m2, nxt))[-self.keep :], state.updates + 1)

    def usual_step(self, run, i, euler, history):
        """The steps with a probe point. Returns (next state, denoised image at the probe).

        euler: the state [B,C,H,W] after an Euler step.
        history: (denoised image, sigma) of the last two evaluations.
        """
        (m1, before), (m0, cur) = history[-2:]
        first, nxt, final = run.sigma(0, euler), run.sigma(i + 1, euler), run.sigma(-1, euler)
        ratio = nxt / cur
        length = 1 - ratio  # the paper's sigma h with h = 1 / nxt - 1 / cur
        steps = (before / cur).log() / (cur / nxt).log()
        share = 0.5 * (1 - ((nxt + final) / (first + final)) ** 2)
        usual = (ratio / (cur / before)).sqrt()

        def excess(new, old):
            """(new - beta old, beta): the part of ``new`` that the older image does not predict."""
            beta = (1 - share) * usual + share * bounded(new, old)
            return new - beta * old, beta

        d1, beta = excess(m0, m1)
        place = (0.25 * beta.abs()).sigmoid() * steps
        place = torch.minimum(torch.maximum(place, 0.25 * steps), 1.5 * steps)
        probe = euler + 0.5 * length * d1 / place
        m2 = probe - nxt * (yield run.at(probe, i + 1))
        d2, _ = excess(m2, m0)
        # Differences over the previous and over this interval; a common factor 1 / h drops out.
        p, q = d1 / steps, steps * d2
        eta = 0.5 * (0.5 * bounded(q + p, q - p)).abs().sigmoid()
        bend = (1 - eta) * q - eta * p
        shift = 0.5 * length * (d1 - bend) / place
        deviation = (bounded(shift, d1) / length).abs() - 0.5
        if run.intervals > LONG_RUN:
            reach = bounded(m0, (m0 - m1) / (1 / nxt - 1 / cur))
            deviation = -deviation * (reach * (2 - ratio**2)).sigmoid()
        return euler + 0.5 * length * bend / deviation.sigmoid(), m2

    @staticmethod
    def last_step(euler, m0, m1, cur, nxt):
        ratio = nxt / cur
        rest = 1 - 0.5 * torch.where(ratio < 0.5, ratio, ratio - 0.5).sqrt()
        return (1 - (nxt * cur).sqrt()) * euler + 0.5 * (1 - ratio) * (m0 - rest * m1)

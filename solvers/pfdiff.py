"""PFDiff: past and future directions on Euler steps.

Wang et al. 2024, "PFDiff: Training-Free Acceleration of Diffusion Models Combining Past and Future
Scores".
"""

from solvers.solver import Option, Solver, State, register
from torch_utils.errors import UserError

MOST_SKIPPED = 3


@register("pfdiff")
class PFDiff(Solver):
    """PFDiff-k_h on Euler steps (Wang et al. 2024): one evaluation per k + 1 intervals.

    The first interval is an Euler step. Later, at point i and with the previous direction d:

        future point     x_f = x_i + (sigma_{i+h} - sigma_i) d        without an evaluation
        its direction    d = (x_f - D(x_f; sigma_{i+h})) / sigma_{i+h}
        jump             x_{i+k+1} = x_i + (sigma_{i+k+1} - sigma_i) d

    This is the published variant on DDIM without noise (eta = 0). If fewer than k + 1 intervals are
    left, the jump ends at the last point and the future point is the next one, as in the published
    code. If one interval is left, it is an Euler step. NFE = 1 + ceil((intervals - 1) / (k + 1));
    the finest schedule for NFE = n has (k + 1) n - k intervals.

    The order is 2 if the future point is in the middle of the jump (2 h = k + 1), otherwise 1. With
    k = 1 and equal steps the evaluated points are those of ipndm with max_order=2 on every second
    noise level. The callback gets the future points.

    pfdiff_k: number of points that every evaluation skips, 1..3. Default 1.
    pfdiff_h: how many points ahead to evaluate, 1..pfdiff_k. Default 1.
    """

    summary = "PFDiff on Euler steps: one evaluation per k + 1 intervals, order 1-2"
    options = {
        "pfdiff_k": Option(int, 1, "points that every evaluation skips, 1 to 3"),
        "pfdiff_h": Option(int, 1, "how many points ahead to evaluate, 1 to pfdiff_k"),
    }
    can_teach = False
    can_learn = False
    one_step = False

    def __init__(self, **values):
        super().__init__(**values)
        if not 1 <= self.pfdiff_k <= MOST_SKIPPED:
            raise UserError(f"pfdiff_k={self.pfdiff_k}: {self.name} skips 1..{MOST_SKIPPED} points")
        if not 1 <= self.pfdiff_h <= self.pfdiff_k:
            raise UserError(f"pfdiff_h={self.pfdiff_h}: with pfdiff_k={self.pfdiff_k} choose 1..{self.pfdiff_k}")

    def stride(self, i, intervals):
        return 1 if i == 0 else min(self.pfdiff_k + 1, intervals - i)

    def evaluations(self, intervals, afs=False, learned=False):
        jumps = -(-(intervals - 1) // (self.pfdiff_k + 1))
        return 1 + jumps - bool(afs)

    def step(self, run, state, i):
        x, cur = state.x, run.sigma(i, state.x)
        stride = self.stride(i, run.intervals)
        future, point = i, x
        if state.history:
            future = i + (self.pfdiff_h if stride > self.pfdiff_k else min(1, stride - 1))
            d = state.history[-1][0]
            point = x + (run.sigma(future, x) - cur) * d
        d = yield run.at(point, future)
        x = x + (run.sigma(i + stride, x) - cur) * d
        return State(x, ((d, run.sigma(future, x)),), state.updates + 1)

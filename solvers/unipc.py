"""UniPC: multistep predictor-corrector.

Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
Models".
"""

import copy
import math

import torch

from solvers.solver import EXPONENTIAL_OPTIONS, DPMSolverPP, Option, Point, State, order_option, register


def phi_functions(z, count: int) -> list[torch.Tensor]:
    """phi_1 .. phi_count at z, with phi_1 = (e^z - 1) / z and phi_k+1 = (phi_k - 1 / k!) / z.

    z: a number other than 0, or a scalar tensor.

    Returns float64 scalars, with gradients to z.
    """
    z = torch.as_tensor(z, dtype=torch.float64)
    if abs(z) < 1:  # the recursion cancels here: phi_k(z) = sum over j >= 0 of z^j / (j + k)!
        series = [[1 / math.factorial(j + k) for j in range(18)] for k in range(1, count + 1)]
        return list(torch.tensor(series, dtype=torch.float64) @ z ** torch.arange(18))
    values = [torch.expm1(z) / z]
    for k in range(1, count):
        values.append((values[-1] - 1 / math.factorial(k)) / z)
    return values


@register("unipc")
class UniPC(DPMSolverPP):
    """UniPC multistep (Zhao et al. 2023), in data (predict_x0) or noise prediction.

    Every interval but the last predicts the next point, evaluates there and corrects the point with
    this evaluation. The next interval reuses the evaluation, so the corrector is free. It raises
    the order of accuracy to max_order + 1. The first interval has a lower order, and so have the
    last ones with lower_order_final. The callback gets the predicted points, a trajectory has the
    corrected ones.

    variant: B(h) = h (bh1) or e^h - 1 (bh2). It matters only where the published code fixes a
        weight instead of solving for it: in the corrector of order 1 and the predictor of order 2.
        Default bh2.
    predict_x0, lower_order_final, thresholding: see ``DPMSolverPP``.
    original_code: with fewer than max_order intervals the last one has a corrector too, which costs
        one more evaluation. Default False.
    """

    summary = "UniPC multistep predictor-corrector, order 1-3"
    options = {
        "max_order": order_option(3),
        "variant": Option(("bh1", "bh2"), "bh2", "the function B(h) of UniPC"),
        **EXPONENTIAL_OPTIONS,
        "original_code": Option(bool, False, "reproduce the published code where it deviates"),
    }
    can_learn = False
    per_sample = False

    def setup(self, net, sigmas, predictor=None):
        solver = copy.copy(super().setup(net, sigmas, predictor))
        # Scalars on the CPU: some devices have no float64, and reading from a device waits for it.
        solver.grid = sigmas.to("cpu").to(torch.float64).unbind()
        return solver

    def corrects_last(self, intervals: int) -> bool:
        return self.original_code and intervals < self.max_order

    def evaluations(self, intervals, afs=False, learned=False):
        return super().evaluations(intervals, afs, learned) + self.corrects_last(intervals)

    def step(self, run, state, i):
        cur, nxt = self.grid[i], self.grid[i + 1]
        last = i + 1 == run.intervals
        history = state.history
        if not history:
            sigma = run.sigma(i, state.x)
            history = ((self.output(state.x, (yield run.at(state.x, i)), sigma), sigma),)
        order = self.order(i, run.intervals)
        h = (cur / nxt).log()
        z = -h if self.predict_x0 else h
        newest = history[-1][0]
        # Differences to the newest output, and their places: 0 is the interval's start, 1 its end.
        places = [(cur / self.grid[i - k]).log() / h for k in range(1, order)]
        differences = [history[-1 - k][0] - newest for k in range(1, order)]
        # The exact solution for a constant model output.
        factor, weight = (nxt / cur, 1.0) if self.predict_x0 else (1.0, nxt)
        base = factor * state.x - weight * torch.expm1(z) * newest

        def extrapolate(differences, places, fixed):
            weights = self.weights(z, places, fixed) if places else []
            terms = (w * difference for w, difference in zip(weights, differences, strict=True))
            return base - weight * sum(terms, start=0.0)

        x = extrapolate(differences, places, fixed=order == 2)
        if last and not self.corrects_last(run.intervals):
            return State(x, history, state.updates + 1)
        sigma = run.sigma(i + 1, x)
        # The callback is called at the start of an interval, so the last point has no index.
        d = yield Point(x, sigma, run.sigma_cond(i + 1), None if last else i + 1)
        output = self.output(x, d, sigma)
        corrected = extrapolate([*differences, output - newest], [*places, 1.0], fixed=order == 1)
        return State(corrected, (*history, (output, sigma))[-self.keep :], state.updates + 1)

    def weights(self, z, places: list, fixed: bool) -> list[torch.Tensor]:
        """Weights of the differences that integrate polynomials of degree len(places) exactly.

        z: length of the step in lambda, signed.
        places: places of the differences in the interval, 0 at its start and 1 at its end.
        fixed: the only weight is B / (2 place) instead, which is correct to leading order.
        """
        z, *places = (torch.as_tensor(value, dtype=torch.float64) for value in (z, *places))
        if fixed:
            return [0.5 * (z if self.variant == "bh1" else torch.expm1(z)) / places[0]]
        count, nodes = len(places), torch.stack(places)
        # int_0^1 z e^(z (1 - s)) s^k ds = k! z phi_{k+1}(z) is the exact result for the output s^k.
        moments = [math.factorial(k) * z * phi for k, phi in enumerate(phi_functions(z, count + 1))][1:]
        powers = torch.stack([nodes**k for k in range(1, count + 1)])
        return list(torch.linalg.solve(powers, torch.stack(moments)))

"""iPNDM (Zhang & Chen 2023) with variable steps: Adams-Bashforth on any grid.

Hairer, Norsett & Wanner 1993, "Solving Ordinary Differential Equations I", Section III.5.
"""

from solvers.solver import Option, Solver, add_scaled, order_option, register, weighted_sum


def adams_bashforth_weights(sigmas, sigma_next, published=False) -> list:
    """Weights of the directions in a step, newest first, each shaped like the noise levels.

    The interpolating polynomial, in Newton's form, is averaged over the step. h is the length of
    the step; u, v and w are those of the steps before, newest first.

    sigmas: 1 to 4 noise levels of the directions, newest first, each a scalar or [B,1,1,1].
    sigma_next: noise level at the end of the step, a scalar or [B,1,1,1].
    published: keep the three errors of the published code. They lower the accuracy of orders 3 and
        4 on unequal steps. Default False.
    """
    h = sigma_next - sigmas[0]
    steps = [newer - older for newer, older in zip(sigmas[:-1], sigmas[1:], strict=True)]
    weights = [1.0] + [0.0] * len(steps)

    def add(factor, difference):
        for k, part in enumerate(difference):
            weights[k] = weights[k] + factor * part

    if len(steps) >= 1:
        u = steps[0]
        add(h / (2 * u), (1, -1))
    if len(steps) >= 2:
        v = steps[1]
        second = (1, -1 - u / v, u / v)  # u (u + v) times the divided difference
        if published:
            add((1 - h**2 / (3 * u * (u + v))) / 2, second)
        else:
            add((1 - h / (3 * (h + u))) * h * (h + u) / (2 * u * (u + v)), second)
    if len(steps) >= 3:
        w = steps[2]
        q = u * (u + v) / (v * (v + w))
        before = (0, 1, -1 - v / w, u / v if published else v / w)  # the same one point earlier
        third = [a - q * b for a, b in zip((*second, 0), before, strict=True)]
        sign = 1 if published else -1
        average = (1 - h / (3 * (h + u))) / 2 + sign * (1 - h / (2 * (h + u))) * h / (6 * (h + u + v))
        add(average * h * (h + u) * (h + u + v) / (u * (u + v) * (u + v + w)), third)
    return weights


@register("ipndm_v")
class IPNDMV(Solver):
    """Adams-Bashforth with the weights of the actual steps.

    Exact on any grid if d is a polynomial in sigma of degree below the order. With equal steps it
    is ipndm. The first step is an Euler step, then the order rises by one per step.

    original_code: use the published weights of orders 3 and 4, which are not exact on unequal
        steps. If step lengths change smoothly, order 3 stays 3 and order 4 becomes 2. Default
        False.
    """

    summary = "iPNDM with the weights of unequal steps, order 1-4"
    options = {
        "max_order": order_option(4),
        "original_code": Option(bool, False, "reproduce the published code where it deviates"),
    }
    highest_order = 4
    one_step = False

    def update(self, x, history, sigma_next, index, total, scale=1.0):
        outputs, sigmas = zip(*reversed(history[-self.keep :]), strict=True)
        weights = adams_bashforth_weights(sigmas, sigma_next, self.original_code)
        return add_scaled(x, scale * (sigma_next - sigmas[0]), weighted_sum(weights, outputs))

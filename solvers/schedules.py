"""Schedules: the noise levels from sigma_max to sigma_min where solvers evaluate the network."""

import math

import torch

from models.noise import VP_EPS, VPTime
from torch_utils.errors import UserError


def _polynomial(u, lo, hi, rho, net, original_code):
    """Karras et al. 2022, eq. 5."""
    return (hi ** (1 / rho) + u * (lo ** (1 / rho) - hi ** (1 / rho))) ** rho


def _logsnr(u, lo, hi, rho, net, original_code):
    """Uniform in ln sigma, half the log signal-to-noise ratio; rho is not used."""
    return (math.log(hi) + u * (math.log(lo) - math.log(hi))).exp()


MOST_STEPS = 1_000_000  # far beyond any use; larger numbers would exhaust the memory

# Smallest relative gap between neighbouring noise levels. A multistep solver divides differences of
# network outputs by the gap; below these values the result is rounding noise.
SMALLEST_GAPS = {torch.float32: 1e-5, torch.float64: 1e-14}


def _time_uniform(u, lo, hi, rho, net, original_code):
    """Uniform (rho = 1) in the time of the VP SDE, linear beta (Song et al. 2021, Appendix C)."""
    return VPTime(lo, hi).sigma((1 + u * (VP_EPS ** (1 / rho) - 1)) ** rho)


def _discrete(u, lo, hi, rho, net, original_code):
    """Uniform (rho = 1) in the time index of a network trained on a discrete noise table."""
    if net is None or not hasattr(net, "sigma_inv") or not hasattr(net, "sigma"):
        raise UserError("schedule_type=discrete needs a network with a discrete noise table (latent diffusion)")
    first = float(net.sigma_inv(torch.tensor(hi, dtype=torch.float64)))
    last = float(net.sigma_inv(torch.tensor(lo, dtype=torch.float64)))
    # The published code takes the root of the last time only: right if the first time is 1.
    top = first if original_code else first ** (1 / rho)
    return net.sigma((top + u * (last ** (1 / rho) - top)) ** rho)


SCHEDULES = {
    "polynomial": _polynomial,
    "logsnr": _logsnr,
    "time_uniform": _time_uniform,
    "discrete": _discrete,
}


def get_schedule(
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    schedule_type: str = "polynomial",
    schedule_rho: float = 7,
    net=None,
    device=None,
    original_code: bool = False,
) -> torch.Tensor:
    """Noise levels from sigma_max down to sigma_min, float64 [num_steps].

    num_steps: number of time steps, one more than intervals.
    sigma_min, sigma_max: the range.
    schedule_type: name in ``SCHEDULES``; default polynomial.
    schedule_rho: its exponent; default 7.
    net: only for ``discrete``, a denoiser with ``sigma(t)`` and ``sigma_inv(sigma)``; default None.
    device: of the result; default: the CPU.
    original_code: the published code's ``discrete`` for rho != 1; default False.

    Raises UserError for an unknown type and impossible values.
    """
    if schedule_type not in SCHEDULES:
        raise UserError(f"unknown schedule_type '{schedule_type}'; choose from {', '.join(SCHEDULES)}")
    if isinstance(num_steps, bool) or not 2 <= _number("num_steps", num_steps) <= MOST_STEPS:
        raise UserError(
            f"num_steps={num_steps}: a schedule needs at least 2 time steps (a whole number, at most {MOST_STEPS})"
        )
    if int(num_steps) != num_steps:
        raise UserError(f"num_steps={num_steps}: a schedule needs at least 2 time steps (a whole number)")
    sigma_min, sigma_max = _number("sigma_min", sigma_min), _number("sigma_max", sigma_max)
    rho = _number("schedule_rho", schedule_rho)
    if not (math.isfinite(sigma_max) and 0 < sigma_min < sigma_max):
        raise UserError(f"a schedule needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    if not (math.isfinite(rho) and rho > 0):
        raise UserError(f"schedule_rho={schedule_rho} must be a positive number")
    u = torch.arange(int(num_steps), dtype=torch.float64) / (int(num_steps) - 1)
    sigmas = SCHEDULES[schedule_type](u, sigma_min, sigma_max, rho, net, original_code).to("cpu", torch.float64)
    return check_sigmas(sigmas, device, torch.float64)  # time_uniform is not monotone for a large sigma_min


def check_sigmas(sigmas, device=None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return an explicit schedule as a float64 tensor [N] (or [N,B,1,1,1]), with its gradients.

    sigmas: noise levels [N], a list or a tensor; or [N,B,1,1,1], a schedule for each sample.
    device: of the result; default: that of sigmas.
    dtype: precision of the arithmetic that will use the schedule; default float32.

    Raises UserError unless the noise levels are finite, positive and strictly decreasing in this
    precision, and at least ``SMALLEST_GAPS`` apart.
    """
    sigmas = levels_tensor("sigmas", sigmas)
    values = sigmas.detach().cpu()
    if not (values.ndim == 1 or values.ndim == 5 and values[0, 0].numel() == 1) or len(values) < 2:
        raise UserError("sigmas: give at least two noise levels")
    if not torch.isfinite(values).all() or not (values[1:] < values[:-1]).all() or (values[-1] <= 0).any():
        raise UserError(f"sigmas must be finite, strictly decreasing and positive, got {_some(values)}")
    used = values.to(dtype)
    precision = str(dtype).removeprefix("torch.")
    if not torch.isfinite(used).all() or (used[-1] <= 0).any():
        raise UserError(f"sigmas: {precision} cannot represent {_some(values)}; choose other noise levels")
    close = (used[1:] >= used[:-1]) | (values[1:] > values[:-1] * (1 - SMALLEST_GAPS.get(dtype, 0.0)))
    if close.any():
        first, *sample = close.nonzero()[0].tolist()
        pair = " and ".join(repr(values[(i, *sample)].item()) for i in (first, first + 1))
        raise UserError(f"sigmas {pair} nearly coincide: {precision} cannot tell them apart; leave one of them out")
    return _to_device(sigmas if sigmas.requires_grad else values, device)


def _some(values: torch.Tensor) -> str:
    """The values as text; a long text is shortened in the middle."""
    text = str(values.tolist())
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-40:]}"


def levels_tensor(name: str, values, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return the values as a tensor with their gradients. UserError if they are not numbers."""
    try:
        return torch.as_tensor(values, dtype=dtype)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name} must be a list of numbers, got {str(values)[:100]}") from None


def _number(name: str, value) -> float:
    """Return a number of Python, numpy or torch as a float. UserError for anything else."""
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name}={value!r} must be a number") from None


def refine(sigmas: torch.Tensor, extra: int) -> torch.Tensor:
    """The schedule with more noise levels in every interval, evenly in ln sigma.

    sigmas: noise levels [N].
    extra: number of noise levels to insert into every interval.

    Returns [(extra + 1) (N - 1) + 1] noise levels.
    """
    parts = [
        torch.logspace(math.log(a), math.log(b), extra + 2, base=math.e, dtype=torch.float64)[:-1]
        for a, b in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)
    ]
    fine = torch.cat([*parts, sigmas[-1:].cpu()])
    fine[:: extra + 1] = sigmas.cpu()
    return fine.to(sigmas.device)


def _to_device(sigmas, device):
    if device is not None and torch.device(device).type == "mps":
        sigmas = sigmas.float()  # MPS has no float64
    return sigmas.to(device) if device is not None else sigmas


SCHEDULE_NAMES = ("num_steps", "schedule_type", "schedule_rho", "sigma_min", "sigma_max")

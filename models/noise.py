"""Noise processes: maps between the time t that a network was trained with and the noise level.

Every process has the interface of ``NoiseProcess``. The arithmetic keeps the dtype of its input.
"""

import math

import torch

from torch_utils.errors import UserError
from torch_utils.transfer import to_device

VP_EPS = 1e-3  # the time of sigma_min; sigma_max is at time 1
_STEPS = 1000  # number of training times of pixel networks


class NoiseProcess:
    """Base class: a monotone map between time t and noise level sigma. All methods are elementwise.

    sigma_min, sigma_max: range of noise levels for sampling.
    """

    sigma_min: float
    sigma_max: float

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Noise level at time t."""
        raise NotImplementedError

    def sigma_inv(self, sigma: torch.Tensor) -> torch.Tensor:
        """Time t of a noise level, the inverse of ``sigma``."""
        raise NotImplementedError

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """Time input of the network for a noise level, in the units of its training."""
        raise NotImplementedError


class TimeOfProcess:
    """Mix-in for denoisers: t <-> sigma of the ``process`` that the network was trained on."""

    process: NoiseProcess

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Noise level at time t in (0, 1], of any shape."""
        return self.process.sigma(torch.as_tensor(t))

    def sigma_inv(self, sigma: torch.Tensor) -> torch.Tensor:
        """Time t of a noise level, the inverse of ``sigma``."""
        return self.process.sigma_inv(torch.as_tensor(sigma))


class VPTime(NoiseProcess):
    """Variance-preserving SDE with linear beta(t), the curve of the schedule ``time_uniform``.

    sigma(t)^2 + 1 = exp(beta_d t^2 / 2 + beta_min t) (Song et al. 2021, Appendix C), with the betas
    chosen such that sigma is sigma_min at t = VP_EPS and sigma_max at t = 1.
    """

    def __init__(self, sigma_min: float, sigma_max: float):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        log_lo, log_hi = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        self.beta_d = 2 * (log_lo / VP_EPS - log_hi) / (VP_EPS - 1)
        self.beta_min = log_hi - self.beta_d / 2

    def sigma(self, t):
        return torch.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t).sqrt()

    def sigma_inv(self, sigma):
        return ((self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2)).sqrt() - self.beta_min) / self.beta_d

    def dsigma_dt(self, t):
        """Derivative of ``sigma`` at time t."""
        sigma = self.sigma(t)
        return (self.beta_d * t + self.beta_min) * (sigma**2 + 1) / (2 * sigma)


def _interpolate(x: torch.Tensor, xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    """Piecewise linear through the points (xs, ys), xs ascending; extrapolates beyond them."""
    left = (torch.searchsorted(xs, x.contiguous()) - 1).clamp(0, len(xs) - 2)
    return ys[left] + (x - xs[left]) * (ys[left + 1] - ys[left]) / (xs[left + 1] - xs[left])


class DiscreteTime(NoiseProcess):
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise with a table of a at t = 1/N, 2/N, ..., 1.

    x = x_t / sqrt(a_t) has noise level sigma = sqrt((1 - a) / a). log sqrt(a) is interpolated
    linearly between the times of the table and extrapolated linearly beyond them (Lu et al. 2022,
    appendix D.4), so that any sigma > 0 has a time. The timestep is N t - 1, with fractions.

    alphas_cumprod: [N], the table. It is rounded to float32, as in the checkpoints: the published
        extrapolation depends on this rounding.

    Raises UserError unless a falls from step to step and stays positive.
    """

    def __init__(self, alphas_cumprod: torch.Tensor):
        self._use_table(alphas_cumprod.to(torch.float32).log() / 2)

    def _use_table(self, log_alphas: torch.Tensor) -> None:
        """Set the table log sqrt(a) [N] and the range of noise levels."""
        steps = len(log_alphas)
        times = torch.linspace(0, 1, steps + 1, dtype=log_alphas.dtype)[1:]
        if steps < 2 or not (log_alphas.isfinite().all() and log_alphas[0] <= 0 and (log_alphas.diff() < 0).all()):
            raise UserError("the noise table is unusable: alphas_cumprod must decrease and stay in (0, 1]")
        self._tables = torch.stack([times, log_alphas])
        self._copies: dict = {}
        self.sigma_min, self.sigma_max = self.sigma(torch.tensor([1 / steps, 1], dtype=torch.float64)).tolist()

    @classmethod
    def of_scaled_linear_betas(cls, start: float, end: float, steps: int) -> "DiscreteTime":
        """The "scaled linear" schedule of latent diffusion: sqrt(beta) in equal steps."""
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
        return cls((1 - betas).cumprod(0))

    def __len__(self) -> int:
        return self._tables.shape[1]

    def _with_tables(self, value) -> tuple[torch.Tensor, torch.Tensor]:
        """``value`` as a floating-point tensor, and the tables with its device and dtype."""
        value = torch.as_tensor(value)
        if not value.is_floating_point():  # a table converted to integers would be zeros
            value = value.to(torch.get_default_dtype())
        key = (value.device, value.dtype)
        if key not in self._copies:
            self._copies[key] = to_device(self._tables.to(value.dtype), value.device)
        return value, self._copies[key]

    def sigma(self, t):
        t, (times, log_alphas) = self._with_tables(t)
        return (-2 * _interpolate(t, times, log_alphas)).expm1().sqrt()

    def sigma_inv(self, sigma):
        sigma, (times, log_alphas) = self._with_tables(sigma)
        return _interpolate(sigma.square().log1p() / 2, -log_alphas, times)

    def timestep(self, sigma):
        return len(self) * self.sigma_inv(sigma) - 1


class MeanReverting(DiscreteTime):
    """The mean-reverting process of IR-SDE (Luo et al. 2023), for images in [-1, 1].

    x_t = mu + alpha (x_0 - mu) + lambda sqrt(1 - alpha^2) noise around the degraded image mu, with
    alpha = exp(-theta_bar(t)) and lambda = 2 max_sigma / 255. x = mu + (x_t - mu) / alpha has the
    noise level sigma = lambda sqrt(1 / alpha^2 - 1). The timestep is T t.

    max_sigma: standard deviation of the stationary noise, for images in 0..255.
    T: number of time steps. Default 100.
    schedule: schedule of theta: "cosine" (default), "linear" or "constant".
    eps: alpha at the last time step. Default 0.005.
    original_code: theta_bar includes the first theta, as in the MR sampler's own table (Li et al.
        2025). The networks were trained without it. Default False.
    """

    THETAS = ("cosine", "linear", "constant")

    def __init__(
        self, max_sigma: float, T: int = 100, schedule: str = "cosine", eps: float = 0.005, original_code=False
    ):
        if schedule not in self.THETAS:
            raise UserError(f"schedule '{schedule}' of theta is unknown; choose from {', '.join(self.THETAS)}")
        if not (T >= 2 and 0 < eps < 1 and max_sigma > 0):
            raise UserError(f"max_sigma={max_sigma}, T={T}, eps={eps}: need max_sigma > 0, T >= 2 and 0 < eps < 1")
        self.scale = 2 * max_sigma / 255
        self._use_table(self.alphas(T, schedule, eps, original_code)[1:].log())

    @classmethod
    def alphas(cls, T: int, schedule: str, eps: float, original_code: bool = False) -> torch.Tensor:
        """alpha at the time steps 0..T, float64 [T + 1]."""
        if schedule == "cosine":
            t = torch.arange(T + 3, dtype=torch.float64) / (T + 2)
            curve = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
            thetas = 1 - (curve / curve[0])[1:-1]  # as published; these are not the betas of this curve
        elif schedule == "linear":
            thetas = torch.linspace(0.1 / (T + 1), 20 / (T + 1), T + 1, dtype=torch.float64)
        else:
            thetas = torch.ones(T + 1, dtype=torch.float64)
        total = thetas.cumsum(0) - (0 if original_code else thetas[0])
        return (total / total[-1] * math.log(eps)).exp()

    def sigma(self, t):
        return self.scale * super().sigma(t)

    def sigma_inv(self, sigma):
        return super().sigma_inv(torch.as_tensor(sigma) / self.scale)

    def timestep(self, sigma):
        return len(self) * self.sigma_inv(sigma)

    def alpha(self, sigma):
        """Factor of the image in x_t at a noise level."""
        return self.scale / (self.scale**2 + sigma**2).sqrt()


class LinearNoise(NoiseProcess):
    """Variance-preserving SDE with linear beta(t), t in 0.001 .. 1: the limit of 1000 steps.

    sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1 (Song et al. 2021, Appendix C). The timestep
    is 999 t. The order of operations is that of the original code. In float32 it changes the
    smallest t by 0.1 %, so ``VPTime`` cannot be used here.
    """

    beta_d, beta_min = 19.9, 0.1

    def __init__(self):
        self.sigma_min, self.sigma_max = (self.sigma(torch.tensor(t)).item() for t in (1e-3, 1.0))

    def sigma(self, t):
        return ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()

    def sigma_inv(self, sigma):
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d

    def timestep(self, sigma):
        return (_STEPS - 1) * self.sigma_inv(sigma)


class CosineNoise(NoiseProcess):
    """a(t) proportional to cos^2((t + 0.008) / 1.008 pi / 2) (Nichol & Dhariwal 2021, eq. 17).

    The timestep is 1000 t - 1. sigma_max is 80, as in Karras et al. 2022 for the same network,
    although the last of the 1000 steps have far higher noise levels.
    """

    shift = 0.008

    def __init__(self):
        self.sigma_min, self.sigma_max = self.sigma(torch.tensor(1 / _STEPS, dtype=torch.float64)).item(), 80.0

    def _angle(self, t):
        return (t + self.shift) / (1 + self.shift) * math.pi / 2

    def sigma(self, t):
        return ((math.cos(self._angle(0)) / torch.cos(self._angle(t))) ** 2 - 1).sqrt()

    def sigma_inv(self, sigma):
        angle = torch.acos(math.cos(self._angle(0)) / (1 + sigma**2).sqrt())
        return angle * (2 / math.pi) * (1 + self.shift) - self.shift

    def timestep(self, sigma):
        return _STEPS * self.sigma_inv(sigma) - 1


def vp_scale(sigma):
    """c_in of a variance-preserving network: its input is x / sqrt(1 + sigma^2)."""
    return (1 + sigma**2) ** -0.5


def vp_denoised(prediction: str, x, sigma, output):
    """D(x; sigma) from the output of a variance-preserving network.

    prediction: one of ``VariancePreserving.PREDICTIONS``.
    x: state [B,C,H,W], not scaled.
    sigma: noise level of x.
    output: output of the network [B,C,H,W].
    """
    if prediction == "epsilon":
        return x - sigma * output
    if prediction == "sample":
        return output
    return x / (1 + sigma**2) - sigma * (1 + sigma**2) ** -0.5 * output


class VariancePreserving(DiscreteTime):
    """``DiscreteTime`` with input scaling and prediction type, as in diffusers.

    alphas_cumprod: [N], see ``DiscreteTime``.
    prediction: kind of the network's output: "epsilon" (the noise), "sample" (x0) or
        "v_prediction" (sqrt(a) noise - sqrt(1 - a) x0; Salimans & Ho 2022, Appendix D). Default
        epsilon.
    """

    PREDICTIONS = ("epsilon", "v_prediction", "sample")

    def __init__(self, alphas_cumprod: torch.Tensor, prediction: str = "epsilon"):
        if prediction not in self.PREDICTIONS:
            raise UserError(f"prediction_type '{prediction}' is not supported; known: {', '.join(self.PREDICTIONS)}")
        super().__init__(alphas_cumprod)
        self.prediction = prediction

    def sigma_of_timestep(self, timestep: torch.Tensor) -> torch.Tensor:
        """The inverse of ``timestep``."""
        return self.sigma((timestep + 1) / len(self))

    def scale(self, sigma):
        """c_in, the factor of x at the network's input."""
        return vp_scale(sigma)

    def denoised(self, x, sigma, output):
        """D(x; sigma) from the network's output."""
        return vp_denoised(self.prediction, x, sigma, output)


class RectifiedFlow(NoiseProcess):
    """Rectified flow, y_t = (1 - t) x0 + t noise, of networks that predict noise - x0.

    Liu et al. 2022; Esser et al. 2024. x = y_t / (1 - t) has noise level sigma = t / (1 - t), so
    y = x / (1 + sigma) and the timestep is N sigma / (1 + sigma). ``sigma`` and ``sigma_inv`` use
    the time u in (0, 1) before the shift: t = shift u / (1 + (shift - 1) u), hence
    sigma = shift u / (1 - u). At u = 1 sigma is infinite, so the range is u = 1/N .. 1 - 1/N.

    steps: N. Default 1000.
    shift: see Esser et al. 2024, Section 5.3.2. Default: 1, no shift.
    """

    def __init__(self, steps: int = 1000, shift: float = 1.0):
        self.steps, self.shift = int(steps), float(shift)
        if self.steps < 3 or not (math.isfinite(self.shift) and self.shift > 0):
            raise UserError(f"a flow scheduler with {steps} steps and shift {shift} is not supported")
        ends = torch.tensor([1 / self.steps, 1 - 1 / self.steps], dtype=torch.float64)
        self.sigma_min, self.sigma_max = self.sigma(ends).tolist()

    def sigma(self, t):
        return self.shift * t / (1 - t)

    def sigma_inv(self, sigma):
        return sigma / (self.shift + sigma)

    def sigma_of_timestep(self, timestep):
        return (timestep / (self.steps - timestep)).clamp(max=self.sigma_max)

    def timestep(self, sigma):
        return self.steps * sigma / (1 + sigma)

    def scale(self, sigma):
        return 1 / (1 + sigma)

    def denoised(self, x, sigma, output):
        return (x - sigma * output) / (1 + sigma)

"""The noise of each family: its time t, the noise level sigma, and the way between them."""

import math

import torch

from torch_utils.errors import UserError

VP_EPS = 1e-3  # the time of sigma_min; sigma_max is at time 1


class VPTime:
    """Time of the variance-preserving SDE with linear beta(t) that reaches sigma_min at time VP_EPS and sigma_max at 1:
    sigma(t)^2 + 1 = exp(beta_d t^2 / 2 + beta_min t) (Song et al. 2021, Appendix C), the curve of ``time_uniform``."""

    def __init__(self, sigma_min: float, sigma_max: float):
        log_lo, log_hi = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        self.beta_d = 2 * (log_lo / VP_EPS - log_hi) / (VP_EPS - 1)
        self.beta_min = log_hi - self.beta_d / 2

    def time(self, sigma):
        return ((self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2)).sqrt() - self.beta_min) / self.beta_d

    def sigma(self, time):
        return torch.expm1(0.5 * self.beta_d * time**2 + self.beta_min * time).sqrt()

    def slope(self, time):
        """d sigma / d time."""
        sigma = self.sigma(time)
        return (self.beta_d * time + self.beta_min) * (sigma**2 + 1) / (2 * sigma)


def _interpolate(x: torch.Tensor, xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    """Piecewise linear through the points (xs, ys), xs ascending; the outer pieces continue beyond them."""
    left = (torch.searchsorted(xs, x.contiguous()) - 1).clamp(0, len(xs) - 2)
    return ys[left] + (x - xs[left]) * (ys[left + 1] - ys[left]) / (xs[left + 1] - xs[left])


class DiscreteTime:
    """t in (0, 1] <-> sigma for a process known at the times 1/N, 2/N, ..., 1.

    log sqrt(a) is interpolated linearly between these times and extended linearly beyond them (Lu et al. 2022,
    appendix D.4), so that any sigma > 0 has a time. alphas_cumprod: [N], a at these times. The tables are rounded to
    float32, as a is in the checkpoints: far beyond the last time, the published continuation is that of rounded slopes.
    Raises UserError for a table that is not of noise that grows.
    """

    def __init__(self, alphas_cumprod: torch.Tensor):
        steps = len(alphas_cumprod)
        log_alphas = alphas_cumprod.to(torch.float32).log() / 2
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float32)[1:]
        if steps < 2 or not (log_alphas.isfinite().all() and log_alphas[0] <= 0 and (log_alphas.diff() < 0).all()):
            raise UserError(
                "the noise table is unusable: the share of the image has to fall from step to step, above 0"
            )
        self._tables = torch.stack([times, log_alphas])
        self._copies: dict = {}

    @classmethod
    def of_scaled_linear_betas(cls, start: float, end: float, steps: int) -> "DiscreteTime":
        """sqrt(beta) in equal steps, the schedule of latent diffusion."""
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
        return cls((1 - betas).cumprod(0))

    def __len__(self) -> int:
        return self._tables.shape[1]

    def _with_tables(self, value) -> tuple[torch.Tensor, torch.Tensor]:
        """value as a tensor of floats, and the tables like it."""
        value = torch.as_tensor(value)
        if not value.is_floating_point():  # a table of integers would be zeros
            value = value.to(torch.get_default_dtype())
        key = (value.device, value.dtype)
        if key not in self._copies:
            self._copies[key] = self._tables.to(*key)
        return value, self._copies[key]

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        t, (times, log_alphas) = self._with_tables(t)
        return (-2 * _interpolate(t, times, log_alphas)).expm1().sqrt()

    def t(self, sigma: torch.Tensor) -> torch.Tensor:
        sigma, (times, log_alphas) = self._with_tables(sigma)
        return _interpolate(sigma.square().log1p() / 2, -log_alphas, times)

    def index(self, sigma: torch.Tensor) -> torch.Tensor:
        """What the network is told of the time: the number of the step, counted from 0 and with fractions."""
        return len(self) * self.t(sigma) - 1


_STEPS = 1000  # of the networks' training


class LinearNoise:
    """The variance-preserving process with linear beta(t), t in 0.001 .. 1, as continuous limit of the 1000 steps.

    sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1 (Song et al. 2021, Appendix C). The arithmetic keeps the dtype and
    the order of operations of the reference implementation: in float32 the smallest t depend on them by 0.1 %.
    """

    beta_d, beta_min = 19.9, 0.1

    def sigma(self, t):
        return ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()

    def sigma_inv(self, sigma):
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d

    def step(self, t):
        """The time the network was trained with, 0 .. 999."""
        return (_STEPS - 1) * t

    def sigma_range(self) -> tuple[float, float]:
        return self.sigma(torch.tensor(1e-3)).item(), self.sigma(torch.tensor(1.0)).item()


class CosineNoise:
    """alpha_bar(t) proportional to cos^2((t + 0.008) / 1.008 pi / 2) (Nichol & Dhariwal 2021, eq. 17); step 1000 t - 1.

    Sampling stops at sigma 80, as in Karras et al. 2022 for the same network: the last of the 1000 steps lie far above.
    """

    shift = 0.008

    def _angle(self, t):
        return (t + self.shift) / (1 + self.shift) * math.pi / 2

    def sigma(self, t):
        return ((math.cos(self._angle(0)) / torch.cos(self._angle(t))) ** 2 - 1).sqrt()

    def sigma_inv(self, sigma):
        angle = torch.acos(math.cos(self._angle(0)) / (1 + sigma**2).sqrt())
        return angle * (2 / math.pi) * (1 + self.shift) - self.shift

    def step(self, t):
        return _STEPS * t - 1

    def sigma_range(self) -> tuple[float, float]:
        return self.sigma(torch.tensor(1 / _STEPS, dtype=torch.float64)).item(), 80.0


class VariancePreserving:
    """Networks for x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, with a_t known at the times 1/N, ..., 1.

    x = x_t / sqrt(a_t) has sigma = sqrt((1 - a) / a). alphas_cumprod: [N]. prediction: what the network's output is,
    "epsilon" (noise), "v_prediction" (sqrt(a) noise - sqrt(1 - a) x0; Salimans & Ho 2022, Appendix D) or "sample" (x0).
    """

    PREDICTIONS = ("epsilon", "v_prediction", "sample")

    def __init__(self, alphas_cumprod: torch.Tensor, prediction: str = "epsilon"):
        if prediction not in self.PREDICTIONS:
            raise UserError(f"prediction_type '{prediction}' is not supported; known: {', '.join(self.PREDICTIONS)}")
        self.prediction = prediction
        self._time = DiscreteTime(alphas_cumprod)
        steps = len(alphas_cumprod)
        self.sigma_min, self.sigma_max = self.sigma(torch.tensor([1 / steps, 1], dtype=torch.float64)).tolist()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self._time.sigma(t)

    def sigma_inv(self, sigma: torch.Tensor) -> torch.Tensor:
        return self._time.t(sigma)

    def sigma_of_time(self, time: torch.Tensor) -> torch.Tensor:
        """The noise level at a time as ``time`` counts it."""
        return self._time.sigma((time + 1) / len(self._time))

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """What the network is told of the noise level: the number of the step from 0, with fractions."""
        return self._time.index(sigma)

    def scale(self, sigma):
        """What x is multiplied with on its way into the network."""
        return (1 + sigma**2) ** -0.5

    def denoised(self, x, sigma, output):
        if self.prediction == "epsilon":
            return x - sigma * output
        if self.prediction == "sample":
            return output
        return x / (1 + sigma**2) - sigma * (1 + sigma**2) ** -0.5 * output


class RectifiedFlow:
    """Networks for y_t = (1 - t) x0 + t noise that predict noise - x0 (Liu et al. 2022; Esser et al. 2024).

    x = y_t / (1 - t) has sigma = t / (1 - t), so y = x / (1 + sigma) and t = sigma / (1 + sigma). The noise is infinite
    at t = 1, so the range ends one of the N steps before. shift: t = shift u / (1 + (shift - 1) u) for u uniform in
    time (Esser et al. 2024, Section 5.3.2), that is sigma = shift u / (1 - u); ``sigma`` and ``sigma_inv`` are about u from 0 to 1, where
    sigma is infinite: schedules stay within sigma_min .. sigma_max, the levels of u = 1 / N and 1 - 1 / N.
    """

    def __init__(self, steps: int = 1000, shift: float = 1.0):
        self.steps, self.shift = int(steps), float(shift)
        if self.steps < 3 or not (math.isfinite(self.shift) and self.shift > 0):
            raise UserError(f"a flow scheduler with {steps} steps and shift {shift} is not supported")
        ends = torch.tensor([1 / self.steps, 1 - 1 / self.steps], dtype=torch.float64)
        self.sigma_min, self.sigma_max = self.sigma(ends).tolist()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.shift * t / (1 - t)

    def sigma_inv(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma / (self.shift + sigma)

    def sigma_of_time(self, time: torch.Tensor) -> torch.Tensor:
        return (time / (self.steps - time)).clamp(max=self.sigma_max)

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.steps * sigma / (1 + sigma)

    def scale(self, sigma):
        return 1 / (1 + sigma)

    def denoised(self, x, sigma, output):
        return (x - sigma * output) / (1 + sigma)

"""Inverse problems without training: a denoiser of the posterior, given y = A x_0 + sigma_y noise.

Solvers, schedules and learned solvers work on ``Posterior`` as on any denoiser. ``red_diff`` solves
the same problems by optimisation.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from models.denoiser import Denoiser, member
from torch_utils.errors import UserError
from torch_utils.images import decode_image

DEFAULT_STD = 0.5  # standard deviation of the data if the network does not have it
_PASSED_ON: tuple[str, ...] = (
    "sigma_min",
    "sigma_max",
    "img_channels",
    "img_resolution",
    "label_dim",
    "evals_per_call",
    "D",
)
_PASSED_ON += ("data_mean", "data_std", "dataset_name", "source_path", "weights_hash")


class Operator:
    """A linear map A from images to observations; subclasses have ``forward`` and ``adjoint``."""

    needs_noise = False  # A A^T may be singular, so that solve needs c > 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A x of images x [B,C,H,W]."""
        raise NotImplementedError

    def adjoint(self, r: torch.Tensor) -> torch.Tensor:
        """A^T r, images [B,C,H,W]."""
        raise NotImplementedError

    def solve(self, r: torch.Tensor, c) -> torch.Tensor:
        """(A A^T + c)^-1 r, by conjugate gradients.

        r: residual in the shape of an observation.
        c: number >= 0, a scalar or [B,1,1,1].
        """
        return conjugate_gradients(lambda v: self.forward(self.adjoint(v)) + c * v, r)


def conjugate_gradients(apply: Callable, r: torch.Tensor, iterations: int = 100, tolerance: float = 1e-6):
    """Solve apply(v) = r for a symmetric positive ``apply``, separately for each sample.

    apply: the linear map.
    r: right side [B,...].
    iterations: largest number of iterations. Default 100.
    tolerance: stop at this residual, relative to r. Default 1e-6.
    """

    def dot(a, b):
        return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (r.ndim - 1))

    v, residual, step = torch.zeros_like(r), r, r
    norm = first = dot(r, r)
    for _ in range(iterations):
        image = apply(step)
        length = norm / dot(step, image).clamp(min=1e-30)
        v, residual = v + length * step, residual - length * image
        before, norm = norm, dot(residual, residual)
        if (norm <= tolerance**2 * first).all():
            break
        step = residual + norm / before.clamp(min=1e-30) * step
    return v


class Inpaint(Operator):
    """Keep the pixels where the mask is 1; the observation has zeros elsewhere.

    mask: a function of (H, W) that returns [H,W] of zeros and ones.
    """

    def __init__(self, mask: Callable[[int, int], torch.Tensor]):
        self._mask = mask

    def forward(self, x):
        return x * self._mask(*x.shape[-2:]).to(x)

    adjoint = forward

    def solve(self, r, c):
        return r / (1 + c)


class Average(Operator):
    """Means over blocks of k x k pixels; super-resolution is its inverse problem."""

    def __init__(self, k: int):
        self.k = k

    def forward(self, x):
        if x.shape[-1] % self.k or x.shape[-2] % self.k:
            raise UserError(f"sr:{self.k}: images of {x.shape[-2]}x{x.shape[-1]} pixels cannot be divided by {self.k}")
        return F.avg_pool2d(x, self.k)

    def adjoint(self, r):
        return F.interpolate(r, scale_factor=self.k, mode="nearest") / self.k**2

    def solve(self, r, c):
        return r / (1 / self.k**2 + c)


class Blur(Operator):
    """Circular blur with a Gaussian of standard deviation ``std`` pixels."""

    needs_noise = True

    def __init__(self, std: float):
        self.std = std

    def _spectrum(self, x) -> torch.Tensor:
        """Fourier transform of the kernel, real, for images like x."""
        rows, columns = (
            torch.exp(-2 * (math.pi * self.std * frequencies(size, dtype=x.dtype, device=x.device)) ** 2)
            for size, frequencies in ((x.shape[-2], torch.fft.fftfreq), (x.shape[-1], torch.fft.rfftfreq))
        )
        return rows[:, None] * columns

    def _filter(self, x, spectrum):
        return torch.fft.irfft2(torch.fft.rfft2(x) * spectrum, s=x.shape[-2:])

    def forward(self, x):
        return self._filter(x, self._spectrum(x))

    adjoint = forward

    def solve(self, r, c):
        return self._filter(r, 1 / (self._spectrum(r).square() + c))


class Gray(Operator):
    """The mean of the colour channels."""

    def __init__(self, channels: int = 3):
        self.channels = channels

    def forward(self, x):
        return x.mean(1, keepdim=True)

    def adjoint(self, r):
        return r.expand(-1, self.channels, -1, -1) / self.channels

    def solve(self, r, c):
        return r / (1 / self.channels + c)


def random_mask(missing: float, seed: int = 0) -> Callable[[int, int], torch.Tensor]:
    """A function (H, W) -> mask [H,W]; the share ``missing`` of its pixels, from seed, is 0."""

    def mask(height: int, width: int) -> torch.Tensor:
        order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))
        kept = torch.ones(height * width)
        kept[order[: round(missing * height * width)]] = 0
        return kept.reshape(height, width)

    return mask


def _mask_from_file(path: Path) -> Callable[[int, int], torch.Tensor]:
    """The mask in a picture: white pixels are kept, black ones are missing."""
    try:
        kept = torch.from_numpy(decode_image(path.read_bytes(), str(path)) > 127).any(0).float()
    except OSError:
        raise UserError(f"inpaint: cannot read the mask {path}") from None

    def mask(height: int, width: int) -> torch.Tensor:
        if kept.shape != (height, width):
            size = "x".join(map(str, kept.shape))
            raise UserError(f"inpaint: the mask {path} has {size} pixels, the images have {height}x{width}")
        return kept

    return mask


OPERATORS = "inpaint:SHARE, inpaint:MASK.png, sr:FACTOR, blur:STD, gray, or module:function"


def make_operator(text: str, channels: int = 3) -> Operator:
    """Make the operator that a text describes.

    text: ``inpaint:0.5`` (this share of the pixels is missing, the same ones in every image),
        ``inpaint:mask.png`` (white is kept), ``sr:4`` (means over 4 x 4 pixels), ``blur:2.0``
        (Gaussian, standard deviation in pixels), ``gray``, or ``module:function``. The function
        returns an object with ``forward``, ``adjoint`` and optionally ``solve``; the default is
        conjugate gradients.
    channels: number of image channels, for ``gray``. Default 3.
    """
    name, _, value = text.partition(":")
    wrong = UserError(f"observe={text!r} is not an operator: use {OPERATORS}")
    if name == "gray" and not value:
        return Gray(channels)
    if name not in ("inpaint", "sr", "blur"):
        if not value:
            raise wrong
        return _own_operator(name, value)
    if name == "inpaint" and value.lower().endswith((".png", ".jpg", ".jpeg")):
        return Inpaint(_mask_from_file(Path(value)))
    try:
        number = float(value)
    except ValueError:
        raise wrong from None
    if name == "inpaint" and 0 < number < 1:
        return Inpaint(random_mask(number))
    if name == "sr" and number == int(number) and number >= 2:
        return Average(int(number))
    if name == "blur" and 0 < number < 1000:
        return Blur(number)
    raise wrong


def _own_operator(module: str, function: str):
    try:
        operator = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise UserError(f"observe={module}:{function}: {error}; use {OPERATORS}") from None
    missing = [name for name in ("forward", "adjoint") if not callable(getattr(operator, name, None))]
    if missing:
        raise UserError(f"observe={module}:{function}: the returned object has no method {missing[0]}")
    if not hasattr(operator, "solve"):
        own = operator
        operator = Operator()
        operator.forward, operator.adjoint = own.forward, own.adjoint  # type: ignore[method-assign]
    return operator


class Posterior(Denoiser):
    """D of the posterior of x_0 given x and y, with x_0 given x modelled as N(D(x; sigma), r^2 I).

    r^2 = s^2 sigma^2 / (s^2 + sigma^2) with the standard deviation s of the data. Without Jacobian

        D_y = D + A^T (A A^T + sigma_y^2 / r^2)^-1 (y - A D)

    the mean of that Gaussian (DDNM+, Wang et al. 2023; DiffPIR, Zhu et al. 2023). With Jacobian

        D_y = D + sigma^2 J^T A^T (r^2 A A^T + sigma_y^2)^-1 (y - A D),   J = dD/dx

    pseudo-inverse guidance (Song et al. 2023). Both are exact for Gaussian data with covariance
    s^2 I.

    net: a denoiser of images, without guidance.
    operator: A, see ``Operator``.
    y: observations [B,...].
    sigma_y: standard deviation of their noise, in the units of images in [-1, 1].
    jacobian: use the form with Jacobian. It costs a backward pass per evaluation, and with few
        steps it is unstable on real networks (docs/inverse_problems.md). Default False.

    Raises UserError for guided and latent networks, and for y of another shape.
    """

    def __init__(self, net, operator, y: torch.Tensor, sigma_y: float, jacobian: bool = False):
        super().__init__()
        if member(net, "latent") or member(net, "guided"):
            kind = "samples latents, while the observation is of images" if member(net, "latent") else "is guided"
            raise UserError(f"inverse problems need an unguided denoiser of images: this network {kind}")
        if member(net, "few_step") is not None:
            raise UserError("inverse problems need the original network, not one that was fine-tuned for few steps")
        if not (math.isfinite(sigma_y) and sigma_y >= 0):
            raise UserError(f"sigma_y={sigma_y}: the noise of the observation is a number >= 0")
        if sigma_y == 0 and getattr(operator, "needs_noise", False):
            raise UserError("sigma_y=0: this operator loses information, so the noise must be above 0")
        self.net, self.operator, self.y, self.sigma_y, self.jacobian = net, operator, y, float(sigma_y), jacobian
        for name in _PASSED_ON:
            setattr(self, name, member(net, name))
        std = member(net, "data_std")
        self.std = DEFAULT_STD if std is None else float(std)

    @property
    def bottleneck(self):
        return self.net.bottleneck

    @property
    def noise_embedding(self):
        return member(self.net, "noise_embedding")

    def make_cond(self, generator=None, labels=None) -> dict:
        return member(self.net, "make_cond")(generator, labels)

    def draw_latents(self, generators, dtype: torch.dtype = torch.float32, size=None):
        return member(self.net, "draw_latents")(generators, dtype, size)

    def forward(self, x, sigma, **cond):
        sigma = torch.as_tensor(sigma, device=x.device, dtype=x.dtype)
        if sigma.numel() > 1:
            sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
        variance = (self.std * sigma) ** 2 / (self.std**2 + sigma**2)
        noise = self.sigma_y**2 / variance
        if not self.jacobian:
            denoised = self.net(x, sigma, **cond)
            return denoised + self.operator.adjoint(self.operator.solve(self._residual(denoised), noise))
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            denoised = self.net(at, sigma, **cond)
            observed = self.operator.forward(denoised)
            v = self.operator.solve(self._residual(denoised.detach()), noise) / variance
            (pull,) = torch.autograd.grad((v.detach() * observed).sum(), at)
        return (denoised + sigma**2 * pull).detach()

    def _residual(self, denoised):
        observed = self.operator.forward(denoised)
        if observed.shape != self.y.shape:
            raise UserError(
                f"the operator makes observations {list(observed.shape)} of the images, y has {list(self.y.shape)}"
            )
        return self.y.to(observed) - observed


WEIGHTS = {"linear": lambda s: s, "sqrt": lambda s: s**0.5, "square": lambda s: s**2, "const": lambda s: 1.0}


def red_diff(
    net,
    operator,
    y: torch.Tensor,
    sigmas: Sequence[float],
    noise: Callable[[], torch.Tensor],
    *,
    start: torch.Tensor,
    lr: float = 0.1,
    regularisation: float = 0.25,
    weight: str = "linear",
    observation: float = 1.0,
    cond: dict | None = None,
) -> torch.Tensor:
    """RED-diff (Mardani et al. 2023, arXiv 2305.04391): find an image mu [B,C,H,W] by optimisation.

    For every noise level there is one Adam step (betas 0.9, 0.99) on

        observation mean (y - A mu)^2 / 2 + regularisation w(sigma) mean(sg[eps_net - eps] mu)

    with eps_net = (x - D(x; sigma)) / sigma at x = mu + sigma eps. One evaluation per level.

    net: a denoiser of images.
    operator: A, with ``forward``.
    y: observations [B,...].
    sigmas: noise levels, one step each, in descending order.
    noise: returns eps [B,C,H,W] for each step.
    start: initial mu; in the paper the pseudo-inverse of the observation.
    lr: learning rate. Default 0.1.
    regularisation: weight of the prior. Default 0.25.
    weight: w: "linear" (default), "sqrt", "square" or "const".
    observation: weight of the misfit. Default 1.
    cond: keyword arguments of net. Default: none.
    """
    if weight not in WEIGHTS:
        raise UserError(f"weight={weight!r}: choose from {', '.join(WEIGHTS)}")
    with torch.enable_grad():
        mu = start.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([mu], lr=lr, betas=(0.9, 0.99))
        for sigma in sigmas:
            eps = noise().to(mu)
            with torch.no_grad():
                x = mu + sigma * eps
                pull = (x - net(x, sigma, **(cond or {})).to(x)) / sigma - eps
            prior = regularisation * WEIGHTS[weight](sigma) * (pull * mu).mean()
            misfit = observation * (y.to(mu) - operator.forward(mu)).square().mean() / 2
            optimizer.zero_grad()
            (prior + misfit).backward()
            optimizer.step()
    return mu.detach()

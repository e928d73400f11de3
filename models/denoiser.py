"""The interface of all networks: D(x; sigma), an estimate of the clean image.

Every family of pretrained networks is adapted to this call, in variance-exploding coordinates:
x = image + sigma * noise. Solvers, distillation and evaluation use nothing else of a network.
"""

import inspect
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from torch_utils.errors import UserError

BOTTLENECK_SIZE = 8  # the predictor reads an 8x8 map


class Denoiser(torch.nn.Module):
    """Base class of all denoisers.

    Subclasses implement ``forward(x, sigma, **cond)`` with x [B,C,H,W] and sigma a scalar, [B] or
    [B,1,1,1]; the result is float32, of x's shape. Every denoiser has these attributes:

    sigma_min, sigma_max: floats, the noise range that the network supports.
    img_channels, img_resolution: of the space that is sampled (of the latents, for latent models).
    label_dim: number of classes, 0 for unconditional networks.
    bottleneck: the submodule whose output is the U-Net bottleneck.
    noise_embedding: the linear layer whose output [B or 1, E] conditions the blocks on the noise
        level, or None.
    evals_per_call: network evaluations that one call costs.
    latent: whether samples are latents, which ``decode`` turns into images.
    guided: whether a classifier or the difference of two evaluations steers D.
    guidance_rate: strength of the guidance; None where the network takes no guidance.
    takes_prompts: whether ``make_cond`` needs prompts.
    data_mean, data_std: statistics of the training data, an image [C,H,W] and a number, or None.
    D: extra dimensions of PFGM++, whose noise is Student-t with D degrees of freedom; None for
        Gaussian noise.
    can_autocast: whether the network can run in mixed precision.
    autocast: dtype of its matrix work (torch.bfloat16, torch.float16), or None for its own dtype.
    compiled: a ``models.compile.CompiledForward`` that replaces ``forward``, or None.
    dataset_name, source_path, weights_hash: name, file and SHA-256 of a network that was loaded
        with ``create_model``; else None.

    ``sigma(t)`` and ``sigma_inv(sigma)`` exist only for networks with a time of their own
    (``models.noise.TimeOfProcess``).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    img_channels: int
    img_resolution: int
    label_dim: int = 0
    evals_per_call: int = 1
    latent: bool = False
    guided: bool = False
    guidance_rate: float | None = None
    data_mean: torch.Tensor | None = None
    data_std: float | None = None
    D: int | None = None
    can_autocast: bool = False
    autocast: torch.dtype | None = None
    compiled = None
    dataset_name: str | None = None
    source_path: str | None = None
    weights_hash: str | None = None

    def __call__(self, x, sigma, *args, **cond):
        if self.compiled is None or args:
            return super().__call__(x, sigma, *args, **cond)
        return self.compiled(x, sigma, cond)

    @property
    def bottleneck(self) -> torch.nn.Module:
        raise NotImplementedError(f"{type(self).__name__} does not say where its bottleneck is")

    @property
    def noise_embedding(self) -> torch.nn.Module | None:
        return None

    def make_cond(self, generator=None, labels=None) -> dict:
        """Keyword arguments of ``forward`` for one batch.

        generator: ``torch_utils.seeds.SeededGenerators`` of the batch; class labels are drawn from it.
        labels: class indices, an int for the whole batch or a sequence of B ints, instead of the draw.

        Text-to-image networks also take prompts (one string for the whole batch, or a sequence of
        B) and negative_prompt (one string, for the unconditional side of the guidance).
        Unconditional networks return an empty dict.
        """
        return {}

    @property
    def takes_prompts(self) -> bool:
        """Whether ``make_cond`` needs prompts."""
        return "prompts" in inspect.signature(member(self, "make_cond")).parameters

    def draw_latents(self, generators, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Starting noise [B,C,H,W] of a batch, on the CPU: x = prior mean + sigma_max * noise.

        Standard normal z for D = None. Else z / rms(e) with e ~ N(0, I_D), which is Student-t with
        D degrees of freedom, the perturbation kernel of PFGM++ (Xu et al. 2023). z is drawn first,
        so a seed has the same z for every D.

        generators: ``torch_utils.seeds.SeededGenerators`` of the batch.
        dtype: in which the noise is drawn; default float32.
        """
        z = generators.randn((self.img_channels, self.img_resolution, self.img_resolution), dtype)
        return z if member(self, "D") is None else z / rms_of_extra(generators.randn((self.D,), dtype))

    def prior_mean(self, **cond):
        """Mean of the state at the highest noise level: 0, or a tensor [B,C,H,W] (restoration)."""
        return 0.0

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Samples to images in [-1, 1]; the identity for pixel models."""
        return x

    def mixed_precision(self, device: torch.device) -> torch.autocast:
        """Context in which matrix work runs in the dtype ``autocast``."""
        return torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)


def member(net, name: str):
    """``net.name``; where a network of one's own does not have it, what ``Denoiser`` has by default.

    For functions that accept any callable D(x, sigma, **cond). Elsewhere networks are denoisers.
    """
    if hasattr(net, name):
        return getattr(net, name)
    default = inspect.getattr_static(Denoiser, name)
    return default.__get__(net) if hasattr(default, "__get__") else default


def rms_of_extra(extra: torch.Tensor) -> torch.Tensor:
    """Root mean square [B,1,1,1] of the extra dimensions of PFGM++, extra [B,D] ~ N(0, 1)."""
    return extra.square().mean(1).sqrt().reshape(-1, 1, 1, 1)


class PreconditionedDenoiser(Denoiser):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) around a network F (Karras et al. 2022, eq. 7).

    Subclasses implement ``scalings`` and ``predict``. ``predict`` runs under ``autocast``; the
    arithmetic around it is float32.
    """

    can_autocast = True

    def scalings(self, sigma: torch.Tensor) -> tuple:
        """(c_skip, c_out, c_in, c_noise) for sigma [B,1,1,1] or [1,1,1,1]; c_noise in any shape."""
        raise NotImplementedError

    def predict(self, x: torch.Tensor, c_noise: torch.Tensor, sigma: torch.Tensor, **cond) -> torch.Tensor:
        """F for the network's input x [B,C,H,W] = c_in x; c_noise: [B] or [1]; sigma: [B or 1,1,1,1]."""
        raise NotImplementedError

    def forward(self, x, sigma, *args, **cond):
        x, sigma = standard_inputs(x, sigma)
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        with self.mixed_precision(x.device):
            output = self.predict(c_in * x, c_noise.flatten(), sigma, *args, **cond)
        return self.combine(c_skip, x, c_out, output.to(torch.float32))

    def combine(self, c_skip, x: torch.Tensor, c_out, output: torch.Tensor) -> torch.Tensor:
        """D from the state x and the network's output, both float32 [B,C,H,W]."""
        return torch.addcmul(c_skip * x, c_out, output)


def standard_inputs(x: torch.Tensor, sigma) -> tuple[torch.Tensor, torch.Tensor]:
    """x as float32 [B,C,H,W], and sigma (a number, [B] or [B,1,1,1]) as float32 [B or 1,1,1,1]."""
    return x.to(torch.float32), torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)


def edm_scalings(sigma: torch.Tensor, sigma_data: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(c_skip, c_out, c_in) of Karras et al. 2022, Table 1."""
    variance = sigma**2 + sigma_data**2
    return sigma_data**2 / variance, sigma * sigma_data / variance.sqrt(), 1 / variance.sqrt()


def bottleneck_map(feature, batch: int) -> torch.Tensor:
    """Input of the predictor, [batch,8,8]: the channel mean of the bottleneck, without gradient.

    feature: output [B',C,H,W] of the bottleneck module, or a tuple that begins with it. Under
        guidance B' is a multiple of the batch; the conditional rows, which come last, are used.
    batch: number of images.
    """
    feature = (feature[0] if isinstance(feature, tuple) else feature).detach()
    if feature.shape[0] != batch:
        feature = feature[-batch:]
    feature = feature.mean(dim=1)
    if feature.shape[-2:] != (BOTTLENECK_SIZE, BOTTLENECK_SIZE):
        feature = F.adaptive_avg_pool2d(feature.unsqueeze(1), BOTTLENECK_SIZE).squeeze(1)
    return feature


class BottleneckReader:
    """Holds the bottleneck feature of the latest call of a denoiser."""

    def __init__(self):
        self._feature = None

    def keep(self, feature) -> None:
        """feature: the bottleneck module's output, or the finished map [B,8,8]."""
        self._feature = feature

    def read(self, batch: int) -> torch.Tensor:
        """The map of the latest call, [batch,8,8]; see ``bottleneck_map``."""
        if self._feature is None:
            raise RuntimeError("the denoiser's bottleneck module was not run by the latest call")
        feature, self._feature = self._feature, None
        is_map = isinstance(feature, torch.Tensor) and feature.ndim == 3
        return feature.detach() if is_map else bottleneck_map(feature, batch)


@contextmanager
def read_bottleneck(net: torch.nn.Module):
    """Yields a BottleneckReader attached to ``net`` and detaches it afterwards.

    A hook on ``net.bottleneck`` reads the feature. A compiled graph ignores hooks, so it returns the
    map itself.
    """
    reader = BottleneckReader()
    compiled = member(net, "compiled")
    if compiled is not None:
        with compiled.shown_to(reader):
            yield reader
        return
    handle = net.bottleneck.register_forward_hook(lambda module, inputs, output: reader.keep(output))
    try:
        yield reader
    finally:
        handle.remove()


def add_shift(embedding: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The noise embedding [B' or 1, E] plus shift [1, E] or [B, E]; under guidance B' = k B."""
    if len(shift) > 1:
        shift = shift.repeat(len(embedding) // len(shift), 1)
    return embedding + shift.to(embedding.dtype)


def embedding_layer(net: torch.nn.Module) -> torch.nn.Module:
    """``net.noise_embedding``; raises UserError where the network has none."""
    layer = member(net, "noise_embedding")
    if layer is None:
        raise UserError(f"{type(net).__name__} does not say where its noise embedding is: leave the head 'time' out")
    return layer


def call_shifted(net: torch.nn.Module, shift: torch.Tensor, x, sigma, **cond) -> torch.Tensor:
    """D(x; sigma) with ``shift`` added to the embedding of the noise level.

    shift: [1, E] or [B, E]; gradients flow to it.

    Raises UserError where the network has no ``noise_embedding``.
    """
    layer, compiled = embedding_layer(net), member(net, "compiled")
    if compiled is not None:
        return compiled(x, sigma, cond, shift)
    handle = layer.register_forward_hook(lambda module, inputs, output: add_shift(output, shift))
    try:
        return net(x, sigma, **cond)
    finally:
        handle.remove()

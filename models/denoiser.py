"""The interface of all networks: D(x; sigma), an estimate of the clean image.

Every family of pretrained networks is adapted to this interface, in variance-exploding coordinates:
x = image + sigma * noise. Solvers, distillation and evaluation use only this interface.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F

from torch_utils.errors import UserError
from torch_utils.transfer import to_device

BOTTLENECK_SIZE = 8  # the predictor reads an 8x8 map


def beside(number: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``number`` on the device of x, with its gradient; x: any tensor there.

    A 0-d tensor of the CPU becomes an argument of a kernel, so the host does not wait for a copy.
    """
    if number.device == x.device or number.requires_grad or number.ndim:
        return to_device(number, x.device)
    return torch.full((), float(number), dtype=number.dtype, device=x.device)


class Denoiser(torch.nn.Module):
    """Base class of all denoisers.

    Subclasses implement ``forward(x, sigma, **cond)`` with x [B,C,H,W] and sigma a scalar, [B] or
    [B,1,1,1]; the result is float32, of x's shape. In a call sigma may
    also be a scalar on the CPU for x on another device; ``forward`` gets it on the device of x.
    Every denoiser has these attributes:

    sigma_min, sigma_max: range of noise levels that the network supports.
    img_channels, img_resolution: shape of the samples (images, or latents of latent models).
    label_dim: number of classes, 0 for unconditional networks.
    bottleneck: the submodule whose output is the U-Net bottleneck.
    noise_embedding: the linear layer whose output [B or 1, E] conditions the blocks on the noise
        level, or None.
    evals_per_call: number of network evaluations per call.
    latent: whether samples are latents, which ``decode`` turns into images.
    guided: whether D is guided by a classifier or by a second evaluation.
    guidance_rate: strength of the guidance; None if the network does not support guidance.
    takes_prompts, takes_images: whether ``make_cond`` needs prompts, or degraded images.
    data_mean, data_std: statistics of the training data, an image [C,H,W] and a number, or None.
    D: extra dimensions of PFGM++, whose noise is Student-t with D degrees of freedom; None for
        Gaussian noise.
    can_autocast: whether the network can run in mixed precision.
    autocast: dtype of matrix products (torch.bfloat16, torch.float16), or None for its own dtype.
    compiled: a ``models.compile.CompiledForward`` that replaces ``forward``, or None.
    choose_level: function of sigma that a compiled network calls first, or None; of 8-bit networks.
    few_step: ``models.few_step.FewStep`` of a network that was fine-tuned for few steps, or None.
    dataset_name, source_path, weights_hash: name, file and SHA-256 of a network that was loaded
        with ``create_model``; else None.

    Networks that were trained with a time t also have ``sigma(t)`` and ``sigma_inv(sigma)``
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
    choose_level: Callable[[Any], None] | None = None
    few_step = None
    dataset_name: str | None = None
    source_path: str | None = None
    weights_hash: str | None = None

    def __call__(self, x, sigma, *args, **cond):
        if isinstance(sigma, torch.Tensor):
            sigma = beside(sigma, x)
        if self.compiled is None or args:
            return super().__call__(x, sigma, *args, **cond)
        return self.compiled(x, sigma, cond)

    def _apply(self, fn, recurse=True):
        """Moves ``data_mean``, an attribute, with the parameters."""
        if self.data_mean is not None:
            self.data_mean = fn(self.data_mean)
        return super()._apply(fn, recurse)

    @property
    def bottleneck(self) -> torch.nn.Module:
        raise NotImplementedError(f"{type(self).__name__} has no bottleneck: define this property")

    @property
    def torso(self) -> torch.nn.Module | None:
        """The part that runs in the dtype ``autocast``, whose weights may have this dtype."""
        return None

    @property
    def noise_embedding(self) -> torch.nn.Module | None:
        return None

    @property
    def block_layers(self) -> list[torch.nn.Module]:
        """The linear layers that pass the noise embedding to the residual blocks, in order."""
        return find_block_layers(self)

    def make_cond(self, generator=None, labels=None) -> dict:
        """Keyword arguments of ``forward`` for one batch; an empty dict for unconditional networks.

        generator: ``torch_utils.seeds.SeededGenerators`` of the batch, to draw classes from.
            Default None.
        labels: class of all images, or one class per image. Default: None, drawn at random.

        Text-to-image networks also take prompts (one string for the whole batch, or a sequence of
        B) and negative_prompt (one string, for the unconditional side of the guidance).
        """
        return {}

    @property
    def takes_prompts(self) -> bool:
        """Whether ``make_cond`` needs prompts."""
        return "prompts" in inspect.signature(member(self, "make_cond")).parameters

    def draw_latents(
        self, generators, dtype: torch.dtype = torch.float32, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Starting noise [B,C,H,W] of a batch, on the CPU: x = prior mean + sigma_max * noise.

        generators: ``torch_utils.seeds.SeededGenerators`` of the batch.
        dtype: dtype in which the noise is drawn. Default float32.
        size: (H, W), for networks that take any. Default: the network's resolution.

        For D = None the noise is standard normal z. Else it is z / rms(e) with e ~ N(0, I_D). That
        is Student-t with D degrees of freedom, the perturbation kernel of PFGM++ (Xu et al. 2023).
        z is drawn first, so a seed has the same z for every D.
        """
        size = size or (self.img_resolution, self.img_resolution)
        z = generators.randn((self.img_channels, *size), dtype)
        return z if member(self, "D") is None else z / rms_of_extra(generators.randn((self.D,), dtype))

    def prior_mean(self, **cond):
        """Mean of the state at the highest noise level: 0, or a tensor [B,C,H,W] (restoration)."""
        return 0.0

    @property
    def takes_images(self) -> bool:
        """Whether ``make_cond`` needs degraded images: the network restores them."""
        return "images" in inspect.signature(member(self, "make_cond")).parameters

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Turn samples into images in [-1, 1]; the identity for pixel models."""
        return x

    def mixed_precision(self, device: torch.device) -> torch.autocast:
        """Context in which matrix products run in the dtype ``autocast``."""
        return torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)


def member(net, name: str):
    """``net.name``, or the default of ``Denoiser`` if net does not have it.

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
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), F the network (Karras et al. 2022, eq. 7).

    Subclasses implement ``scalings`` and ``predict``. ``predict`` runs under ``autocast``; the
    arithmetic around it is float32.
    """

    can_autocast = True

    @property
    def torso(self):
        return getattr(self, "model", None)

    def scalings(self, sigma: torch.Tensor) -> tuple:
        """(c_skip, c_out, c_in, c_noise) for sigma [B or 1,1,1,1]; c_noise in any shape."""
        raise NotImplementedError

    def predict(self, x: torch.Tensor, c_noise: torch.Tensor, sigma: torch.Tensor, **cond) -> torch.Tensor:
        """The network's output F [B,C,H,W].

        x: input of the network, c_in times the state [B,C,H,W].
        c_noise: [B] or [1].
        sigma: noise level, [B or 1,1,1,1].
        cond: as for ``forward``.
        """
        raise NotImplementedError

    def forward(self, x, sigma, *args, **cond):
        x, sigma = standard_inputs(x, sigma)
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        with self.mixed_precision(x.device):
            output = self.predict(c_in * x, c_noise.flatten(), sigma, *args, **cond)
        return self.combine(c_skip, x, c_out, output.to(torch.float32))

    def combine(self, c_skip, x: torch.Tensor, c_out, output: torch.Tensor) -> torch.Tensor:
        """D = c_skip x + c_out output; x and output float32 [B,C,H,W]."""
        return torch.addcmul(c_skip * x, c_out, output)


class RestorationMixin:
    """Mix-in for networks that restore images: ``forward`` takes the degraded image mu."""

    img_channels: int
    parameters: Callable[..., Any]

    def make_cond(self, generator=None, labels=None, images: torch.Tensor | None = None) -> dict:
        """{"mu": images}; images: degraded images [B,C,H,W] in [-1, 1], of any size."""
        if labels is not None:
            raise UserError("this network restores images: it takes no class")
        if images is None:
            raise UserError("this network restores images: give --images, a folder of degraded images")
        if images.ndim != 4 or images.shape[1] != self.img_channels:
            raise UserError(f"images: expected [B,{self.img_channels},H,W], got {list(images.shape)}")
        return {"mu": images.to(next(self.parameters()).device, torch.float32)}

    def prior_mean(self, mu: torch.Tensor | None = None, **cond):
        return 0.0 if mu is None else mu


def standard_inputs(x: torch.Tensor, sigma) -> tuple[torch.Tensor, torch.Tensor]:
    """x as float32 [B,C,H,W], and sigma (a number, [B] or [B,1,1,1]) as float32 [B or 1,1,1,1]."""
    level = beside(torch.as_tensor(sigma, dtype=torch.float32), x)
    return x.to(torch.float32), level.reshape(-1, 1, 1, 1)


def edm_scalings(sigma: torch.Tensor, sigma_data: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(c_skip, c_out, c_in) of Karras et al. 2022, Table 1."""
    variance = sigma**2 + sigma_data**2
    return sigma_data**2 / variance, sigma * sigma_data / variance.sqrt(), 1 / variance.sqrt()


def bottleneck_map(feature, batch: int) -> torch.Tensor:
    """Input of the predictor, [batch,8,8]: the channel mean of the bottleneck, without gradient.

    feature: output [B',C,H,W] of the bottleneck module, or a tuple that begins with it. With
        guidance B' is a multiple of the batch; the conditional rows come last and are used.
    batch: number of images.
    """
    feature = (feature[0] if isinstance(feature, tuple) else feature).detach()
    if feature.shape[0] != batch:
        feature = feature[-batch:]
    feature = feature.mean(dim=1)
    if feature.shape[-2:] != (BOTTLENECK_SIZE, BOTTLENECK_SIZE):
        feature = F.adaptive_avg_pool2d(feature.unsqueeze(1), BOTTLENECK_SIZE).squeeze(1)
    return feature


class NoFeature(torch.nn.Module):
    """The bottleneck of networks without one: zeros, so that a predictor uses noise levels only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), 1, BOTTLENECK_SIZE, BOTTLENECK_SIZE)


class BottleneckReader:
    """Holds the bottleneck feature of the latest call of a denoiser."""

    def __init__(self):
        self._feature = None

    def keep(self, feature) -> None:
        """Store the output of the bottleneck module, or the finished map [B,8,8]."""
        self._feature = feature

    def read(self, batch: int) -> torch.Tensor:
        """The map of the latest call, [batch,8,8]; see ``bottleneck_map``."""
        if self._feature is None:
            raise RuntimeError("the latest call of the denoiser did not run its bottleneck module")
        feature, self._feature = self._feature, None
        is_map = isinstance(feature, torch.Tensor) and feature.ndim == 3
        return feature.detach() if is_map else bottleneck_map(feature, batch)


@contextmanager
def read_bottleneck(net: torch.nn.Module):
    """Context with a BottleneckReader that reads every call of net.

    A hook on ``net.bottleneck`` reads the feature. A compiled graph ignores hooks, so it returns
    the map itself.
    """
    reader = BottleneckReader()
    compiled = member(net, "compiled")
    if compiled is not None:
        with compiled.shown_to(reader):
            yield reader
        return
    bottleneck = cast(torch.nn.Module, net.bottleneck)
    handle = bottleneck.register_forward_hook(lambda module, inputs, output: reader.keep(output))
    try:
        yield reader
    finally:
        handle.remove()


# Names of the layers between noise embedding and block: EDM's U-Nets, OpenAI's, those of diffusers.
_BLOCK_LAYERS = ("affine", "emb_layers", "time_emb_proj")


def find_block_layers(network: torch.nn.Module) -> list[torch.nn.Module]:
    """See ``Denoiser.block_layers``."""
    found = []
    for block in network.modules():
        for layer in (getattr(block, name, None) for name in _BLOCK_LAYERS):
            if isinstance(layer, torch.nn.Module):
                found.append([inner for inner in layer.modules() if hasattr(inner, "out_features")][-1])
    return found


def add_shift(embedding: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The noise embedding [B' or 1, E] plus shift [1, E] or [B, E]; with guidance B' = k B."""
    if len(shift) > 1:
        shift = shift.repeat(len(embedding) // len(shift), 1)
    return embedding + shift.to(embedding.dtype)


def embedding_layer(net) -> torch.nn.Module:
    """``net.noise_embedding``. Raises UserError if the network has none."""
    layer = member(net, "noise_embedding")
    if layer is None:
        raise UserError(f"{type(net).__name__} has no noise_embedding: leave the heads 'time' and 'blocks' out")
    return layer


def shifted_layers(net, blocks: bool) -> list[torch.nn.Module]:
    """The layers whose outputs a span solver shifts.

    blocks: not only ``net.noise_embedding``, but also all ``net.block_layers``.

    Raises UserError if the network has none.
    """
    layers = [embedding_layer(net)]
    if blocks:
        layers += member(net, "block_layers")
        if len(layers) == 1:
            raise UserError(f"{type(net).__name__} has no block_layers: use the head 'time' instead of 'blocks'")
    return layers


def shift_hooks(layers: list[torch.nn.Module], shift: Callable[[], torch.Tensor | None]) -> list:
    """Hooks that add a shift to the outputs of layers; returns their handles.

    layers: see ``shifted_layers``.
    shift: returns the shifts of all layers beside each other, [1, E] or [B, E], or of the first
        layer only, or None: no shift.
    """
    handles, start = [], 0
    for layer in layers:
        width = cast(int, layer.out_features)
        place = slice(start, start + width)

        def add(module, inputs, output, place=place):
            given = shift()
            return output if given is None or given.shape[1] <= place.start else add_shift(output, given[:, place])

        handles.append(layer.register_forward_hook(add))
        start += width
    return handles


def call_shifted(net: torch.nn.Module, shift: torch.Tensor, x, sigma, **cond) -> torch.Tensor:
    """D(x; sigma) with ``shift`` added to the embedding of the noise level.

    shift: [1, E] or [B, E], with E the width of the noise embedding, or of it and all block layers;
        gradients flow to it.

    Raises UserError if the network has no ``noise_embedding``.
    """
    embedding, compiled = embedding_layer(net), member(net, "compiled")
    if compiled is not None:
        return compiled(x, sigma, cond, shift)
    blocks = shift.shape[1] > cast(int, embedding.out_features)
    handles = shift_hooks(shifted_layers(net, blocks), lambda: shift)
    try:
        return net(x, sigma, **cond)
    finally:
        for handle in handles:
            handle.remove()

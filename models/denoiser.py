"""The one interface between networks and everything else: D(x; sigma), an estimate of the clean image.

Every family of pretrained networks is adapted to this call in variance-exploding coordinates, x = image + sigma * noise.
Solvers, distillation and evaluation know nothing else about a network.
"""

import inspect
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from torch_utils.errors import UserError

BOTTLENECK_SIZE = 8  # the predictor reads an 8x8 map


class Denoiser(torch.nn.Module):
    """Base class of all denoisers.

    Subclasses implement ``forward(x, sigma, **cond)`` with x [B,C,H,W] and sigma a scalar, [B] or [B,1,1,1]; the result is
    float32, of x's shape. Attributes that solvers and command lines read:

    sigma_min, sigma_max       the noise range the network supports
    img_channels, img_resolution   of the space that is sampled
    label_dim                  number of classes, 0 = unconditional
    bottleneck                 the submodule whose output is the U-Net bottleneck
    noise_embedding            the linear layer whose output [B or 1, E] tells the blocks the noise level, or None
    evals_per_call             network evaluations one call costs
    latent                     whether samples are latents, which ``decode`` turns into images
    guided                     whether a classifier or the difference of two evaluations steers D
    data_mean, data_std        optional statistics of the training data (a broadcastable image and a scalar), else None
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    img_channels: int
    img_resolution: int
    label_dim: int = 0
    evals_per_call: int = 1
    latent: bool = False
    guided: bool = False
    data_mean: torch.Tensor | None = None
    data_std: float | None = None
    compiled = None  # models.compile.CompiledForward, which then stands in for forward

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

        generator: ``torch_utils.seeds.SeededGenerators`` of the batch, from which class labels are drawn; labels: class
        indices (an int for the whole batch, or a sequence of B ints) that replace the draw. Unconditional: an empty dict.

        Text-to-image networks also take prompts (one string for the whole batch, or a sequence of B) and negative_prompt
        (one string, for the unconditional side of the guidance); ``takes_prompts`` says which networks these are.
        """
        return {}

    @property
    def takes_prompts(self) -> bool:
        """Whether ``make_cond`` needs prompts."""
        return "prompts" in inspect.signature(self.make_cond).parameters

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Samples to images in [-1, 1]; the identity for pixel models."""
        return x


def bottleneck_map(feature, batch: int) -> torch.Tensor:
    """What the predictor reads of a bottleneck module's output [B',C,H,W] (or a tuple that begins with it): [batch,8,8].

    That is the channel mean, without a gradient. Under guidance the conditional rows, which come last, are taken.
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

    It is attached by a hook on ``net.bottleneck``; a compiled graph, which would not see it, returns the map itself.
    """
    reader = BottleneckReader()
    compiled = getattr(net, "compiled", None)
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
    """The noise embedding [B' or 1, E] plus shift [1, E] or [B, E]; guidance may have the batch several times, B' = k B."""
    if len(shift) > 1:
        shift = shift.repeat(len(embedding) // len(shift), 1)
    return embedding + shift.to(embedding.dtype)


def embedding_layer(net: torch.nn.Module) -> torch.nn.Module:
    """``net.noise_embedding``; UserError where a network does not have it."""
    layer = getattr(net, "noise_embedding", None)
    if layer is None:
        raise UserError(f"{type(net).__name__} does not say where its noise embedding is: leave the head 'time' out")
    return layer


def call_shifted(net: torch.nn.Module, shift: torch.Tensor, x, sigma, **cond) -> torch.Tensor:
    """D(x; sigma) with shift, [1, E] or [B, E], added to the embedding of the noise level; gradients flow to it.

    Raises UserError where the network does not say which of its layers puts that out.
    """
    layer, compiled = embedding_layer(net), getattr(net, "compiled", None)
    if compiled is not None:
        return compiled(x, sigma, cond, shift)
    handle = layer.register_forward_hook(lambda module, inputs, output: add_shift(output, shift))
    try:
        return net(x, sigma, **cond)
    finally:
        handle.remove()

"""The one interface between networks and everything else: D(x; sigma), an estimate of the clean image.

Every family of pretrained networks is adapted to this call in variance-exploding coordinates, x = image + sigma * noise.
Solvers, distillation and evaluation know nothing else about a network.
"""

import inspect
from contextlib import contextmanager

import torch
import torch.nn.functional as F

BOTTLENECK_SIZE = 8  # the predictor reads an 8x8 map


class Denoiser(torch.nn.Module):
    """Base class of all denoisers.

    Subclasses implement ``forward(x, sigma, **cond)`` with x [B,C,H,W] and sigma a scalar, [B] or [B,1,1,1]; the result is
    float32, of x's shape. Attributes that solvers and command lines read:

    sigma_min, sigma_max       the noise range the network supports
    img_channels, img_resolution   of the space that is sampled
    label_dim                  number of classes, 0 = unconditional
    bottleneck                 the submodule whose output is the U-Net bottleneck
    evals_per_call             network evaluations one call costs
    data_mean, data_std        optional statistics of the training data (a broadcastable image and a scalar), else None
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    img_channels: int
    img_resolution: int
    label_dim: int = 0
    evals_per_call: int = 1
    data_mean: torch.Tensor | None = None
    data_std: float | None = None

    @property
    def bottleneck(self) -> torch.nn.Module:
        raise NotImplementedError(f"{type(self).__name__} does not say where its bottleneck is")

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


class BottleneckReader:
    """Holds the channel mean of the bottleneck feature of the latest call of a denoiser, [B,8,8]."""

    def __init__(self, net: torch.nn.Module):
        self._evals_per_call = getattr(net, "evals_per_call", 1)
        self._feature: torch.Tensor | None = None

    def _hook(self, module, inputs, output) -> None:
        self._feature = output[0] if isinstance(output, tuple) else output

    def read(self, batch: int) -> torch.Tensor:
        """The feature of the latest call, detached. Under guidance the conditional rows, which come last, are taken."""
        if self._feature is None:
            raise RuntimeError("the denoiser's bottleneck module was not run by the latest call")
        feature = self._feature.detach()
        if feature.shape[0] != batch:
            feature = feature[-batch:]
        feature = feature.mean(dim=1)
        if feature.shape[-2:] != (BOTTLENECK_SIZE, BOTTLENECK_SIZE):
            feature = F.adaptive_avg_pool2d(feature.unsqueeze(1), BOTTLENECK_SIZE).squeeze(1)
        self._feature = None
        return feature


@contextmanager
def read_bottleneck(net: torch.nn.Module):
    """Yields a BottleneckReader attached to ``net.bottleneck`` and detaches it afterwards."""
    reader = BottleneckReader(net)
    handle = net.bottleneck.register_forward_hook(reader._hook)
    try:
        yield reader
    finally:
        handle.remove()

"""Optional heads of a span student: what a table cannot do, because it depends on the sample or leaves the span.

All start at zero, so that a student with new heads makes exactly the images that it made without. Their networks are in
float32 and small; the order of use is: learn the table first, then its heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

HEADS = ("sample", "spatial", "time")
FEATURES, HIDDEN, RANK = 5, 16, 4
LIFT_CHANNELS = 16
LIFTED = 2  # the last so many steps


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).to(torch.float32)


def slope_features(x, sigma, slope, before) -> torch.Tensor:
    """What the sample head knows of a sample, float32 [B,5]: log of the root mean square of the slope at x, its cosines
    with the slope before it (0 where there is none) and with x, mean and standard deviation of D = x - sigma slope."""
    state, g, denoised = _flat(x), _flat(slope), _flat(x - sigma * slope)
    turn = g.new_zeros(len(g)) if before is None else F.cosine_similarity(g, _flat(before))
    size = (g.norm(dim=1) / math.sqrt(g.shape[1])).clamp(min=1e-8).log()
    return torch.stack([size, turn, F.cosine_similarity(g, state), denoised.mean(1), denoised.std(1, correction=0)], 1)


def _initialise(module: nn.Module, seed: int) -> None:
    """Weights U(+-1 / sqrt(fan_in)) that do not depend on torch's generator, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                bound = 1 / math.sqrt(layer.weight[0].numel())
                layer.weight.copy_((2 * torch.rand(layer.weight.shape, generator=generator) - 1) * bound)
                layer.bias.zero_()


class SampleHead(nn.Module):
    """Corrections of the coefficients for every sample: V phi(features), phi a network 5 -> 16 -> 4 that all steps share
    and V zero at first. AMED's and DLMS's dependence on the sample without a look into the network.

    free: for each step how many entries of its row are free; first: how many before them are not.
    """

    def __init__(self, free: list[int], first: list[int]):
        super().__init__()
        self.free, self.first = free, first
        self.hidden = nn.utils.skip_init(nn.Linear, FEATURES, HIDDEN)
        self.code = nn.utils.skip_init(nn.Linear, HIDDEN, RANK)
        self.mix = nn.ParameterList(nn.Parameter(torch.zeros(n, RANK)) for n in free)
        _initialise(self, 0)

    def forward(self, i: int, features: torch.Tensor) -> torch.Tensor:
        """What to add to the row of step i: float64 [B, entries of the row] of sum zero, on the head's device
        (float32 on MPS)."""
        own = self.code(F.silu(self.hidden(features))) @ self.mix[i].T
        if own.device.type != "mps":
            own = own.to(torch.float64)
        return torch.cat([own.new_zeros(len(own), self.first[i]), own, -own.sum(1, keepdim=True)], 1)


class SpatialHead(nn.Module):
    """A direction outside the span for each of the last two steps: two convolutions of 3x3 over the state, the denoised
    image and all slopes, the second zero at first."""

    def __init__(self, channels: int, slopes: dict[int, int]):
        super().__init__()
        self.read, self.write = nn.ModuleDict(), nn.ModuleDict()
        for i, count in slopes.items():
            inputs = channels * (2 + count)
            self.read[str(i)] = nn.utils.skip_init(nn.Conv2d, inputs, LIFT_CHANNELS, 3, padding=1)
            self.write[str(i)] = nn.utils.skip_init(nn.Conv2d, LIFT_CHANNELS, channels, 3, padding=1)
        _initialise(self, 1)
        for layer in self.write.values():
            nn.init.zeros_(layer.weight)

    def forward(self, i: int, x, sigma, slopes: list, slope) -> torch.Tensor | None:
        """The direction [B,C,H,W] for step i from x at sigma, in the dtype of x; None where there is no lift. slope: the one
        at x."""
        if str(i) not in self.read:
            return None
        images = torch.cat([x / (1 + sigma**2).sqrt(), x - sigma * slope, *slopes], 1).to(torch.float32)
        return self.write[str(i)](F.silu(self.read[str(i)](images))).to(x.dtype)


class TimeHead(nn.Module):
    """A vector for each call, added to the network's embedding of the noise level: the time scale a_i moves that embedding
    along one curve, this in every direction. Zero at first.

    MTEO (arXiv 2603.22375) learns such vectors for every layer."""

    def __init__(self, calls: int, width: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(calls, width))

    def forward(self, first: int, count: int) -> torch.Tensor:
        """[count, width]: those of the calls ``first`` .. ``first + count - 1``."""
        return self.vectors[first : first + count]

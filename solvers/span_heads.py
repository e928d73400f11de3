"""Optional heads of a span solver: small float32 networks beside the table.

Unlike a table, they depend on the sample or leave the span of the directions. All outputs are zero
at first, so that new heads do not change the images. Train the table first, then the heads.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

HEADS: tuple[str, ...] = ("sample", "spatial", "time", "blocks")
SHIFTS = ("time", "blocks")  # heads that act inside the network; at most one of them
FEATURES, HIDDEN, RANK = 5, 16, 4
LIFT_CHANNELS = 16
LIFTED = 2  # number of last steps with a spatial head


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).to(torch.float32)


def direction_features(x, sigma, direction, before) -> torch.Tensor:
    """Inputs of the sample head, float32 [B,5].

    These are the log of the root mean square of the direction, its cosines with the previous
    direction (0 without one) and with x, and mean and standard deviation of D = x - sigma d.

    x: state [B,C,H,W].
    sigma: noise level of x.
    direction: direction d at x.
    before: the previous direction, or None.
    """
    state, g, denoised = _flat(x), _flat(direction), _flat(x - sigma * direction)
    length = g.norm(dim=1)

    def cosine(other):
        return (g * other).sum(1) / (length * other.norm(dim=1)).clamp(min=1e-16)

    turn = g.new_zeros(len(g)) if before is None else cosine(_flat(before))
    size = (length / math.sqrt(g.shape[1])).clamp(min=1e-8).log()
    spread, mean = torch.std_mean(denoised, 1, correction=0)
    return torch.stack([size, turn, cosine(state), mean, spread], 1)


def _initialise(module: nn.Module, seed: int) -> None:
    """Set weights to U(+-1 / sqrt(fan_in)) without torch's global generator, and biases to zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                bound = 1 / math.sqrt(layer.weight[0].numel())
                layer.weight.copy_((2 * torch.rand(layer.weight.shape, generator=generator) - 1) * bound)
                if layer.bias is not None:
                    layer.bias.zero_()


class SampleHead(nn.Module):
    """Coefficient net: offsets V phi(features) of the coefficients, for every sample.

    phi is a network 5 -> 16 -> 4 that all steps share. V is zero at first. As in AMED and DLMS the
    coefficients depend on the sample, but the network's bottleneck is not used.

    free: number of learned offsets in the row of each step.
    first: number of entries before the learned ones, for each step.
    """

    def __init__(self, free: list[int], first: list[int]):
        super().__init__()
        self.free, self.first = free, first
        self.hidden = nn.utils.skip_init(nn.Linear, FEATURES, HIDDEN)
        self.code = nn.utils.skip_init(nn.Linear, HIDDEN, RANK)
        self.mix = nn.ParameterList(nn.Parameter(torch.zeros(n, RANK)) for n in free)
        _initialise(self, 0)

    def forward(self, i: int, features: torch.Tensor) -> torch.Tensor:
        """Offsets of the coefficients of step i, [B, number of directions], of sum zero.

        features: [B,5], see ``direction_features``.

        Returns float64 on the CPU, float32 elsewhere.
        """
        own = self.code(F.silu(self.hidden(features))) @ self.mix[i].T
        if own.device.type == "cpu":
            own = own.to(torch.float64)
        return torch.cat([own.new_zeros(len(own), self.first[i]), own, -own.sum(1, keepdim=True)], 1)


class SpatialHead(nn.Module):
    """Residual net: a direction outside the span for each of the last two steps.

    Two 3x3 convolutions of the state, the denoised image and all directions. The second is zero at
    first.

    channels: number of image channels.
    directions: {step: number of its directions} for each step with this head.
    """

    def __init__(self, channels: int, directions: dict[int, int]):
        super().__init__()
        self.read, self.write = nn.ModuleDict(), nn.ModuleDict()
        for i, count in directions.items():
            inputs = channels * (2 + count)
            self.read[str(i)] = nn.utils.skip_init(nn.Conv2d, inputs, LIFT_CHANNELS, 3, padding=1)
            self.write[str(i)] = nn.utils.skip_init(nn.Conv2d, LIFT_CHANNELS, channels, 3, padding=1)
        _initialise(self, 1)
        for layer in self.write.values():
            nn.init.zeros_(cast(torch.Tensor, layer.weight))

    def forward(self, i: int, x, sigma, directions: list, direction) -> torch.Tensor | None:
        """The direction [B,C,H,W] to add in step i, in the dtype of x. None if it has no head.

        x: state [B,C,H,W] at noise level sigma.
        directions: all directions so far.
        direction: the direction at x.
        """
        if str(i) not in self.read:
            return None
        images = torch.cat([x / (1 + sigma**2).sqrt(), x - sigma * direction, *directions], 1).to(torch.float32)
        return self.write[str(i)](F.silu(self.read[str(i)](images))).to(x.dtype)


class TimeHead(nn.Module):
    """Embedding offset: one vector per call, added to the network's embedding of the noise level.

    The time scale a_i moves this embedding along a curve; the vector moves it in any direction. It
    is zero at first. The head "blocks" has a longer vector: it also shifts what every residual
    block gets from the embedding, as MTEO does (arXiv 2603.22375).

    calls: number of network calls of a trajectory.
    width: of the embedding; for "blocks" with the inputs of all blocks.
    """

    def __init__(self, calls: int, width: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(calls, width))

    def forward(self, first: int, count: int) -> torch.Tensor:
        """The vectors [count, width] of ``count`` calls from number ``first`` on."""
        return self.vectors[first : first + count]

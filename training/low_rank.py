"""Low-rank adapters: a weight W is trained as W + up down, with few numbers in up and down.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), with a
scale of 1. A convolution counts as the matrix [out, in * height * width].
"""

import copy
import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from models import edm_unet

_LAYERS = (nn.Linear, nn.Conv2d, edm_unet.Linear, edm_unet.Conv2d)


class LowRank(nn.Module):
    """weight -> weight + up down, where up begins at 0.

    shape: of the weight.
    rank: at most the rank that the weight can have.
    """

    def __init__(self, shape: torch.Size, rank: int, device=None, dtype=None):
        super().__init__()
        columns = math.prod(shape[1:])
        rank = min(rank, shape[0], columns)
        self.up = nn.Parameter(torch.zeros(shape[0], rank, device=device, dtype=dtype))
        down = torch.randn(rank, columns, dtype=dtype) / math.sqrt(columns)  # drawn on the CPU on every device
        self.down = nn.Parameter(down.to(device))

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)


def add_adapters(net: nn.Module, rank: int, seed: int = 0, whole: tuple[str, ...] = ()) -> None:
    """Freezes a network and gives its linear and convolutional layers adapters, in place.

    rank: of the adapters.
    seed: of their initial values. Default 0.
    whole: layers that are trained as a whole: those with one of these texts in their name.
    """
    net.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in list(net.named_modules()):
            if any(part in name for part in whole):
                layer.requires_grad_(True)
            elif isinstance(layer, _LAYERS) and layer.weight is not None:
                weight = layer.weight
                adapter = LowRank(weight.shape, rank, weight.device, weight.dtype)
                parametrize.register_parametrization(layer, "weight", adapter)


@torch.no_grad()
def merged(net: nn.Module) -> nn.Module:
    """A copy of the network with its adapters added to the weights."""
    net = copy.deepcopy(net)
    for layer in list(net.modules()):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    return net

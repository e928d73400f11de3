"""A perceptual distance that needs no further network: features of the denoiser's own encoder.

What a denoiser computes on its way to the bottleneck describes an image better than its pixels do (it is trained on the
very images in question), and it is not the network by which samples are judged afterwards. Compared like LPIPS (Zhang
et al. 2018): every position's feature vector is divided by its norm, at several resolutions, bottleneck included.
"""

from collections.abc import Mapping

import torch

from torch_utils.errors import UserError

DEFAULT_SIGMA = 0.1  # of images in [-1, 1]: hardly any noise, and the encoder still has to look at the whole image


class DenoiserFeatures:
    """Activations of a denoiser's encoder, the last one of every resolution up to the bottleneck.

    net: a Denoiser with a bottleneck; sigma: the noise level it is told (default: 0.1, or the nearest that it supports);
    cond: passed on to it. Calling it with clean samples x [B,C,H,W] runs the network once and gives a list of tensors
    [B,C_i,H_i,W_i], finest first, with gradients to x. Under guidance the rows of the conditional side are taken. Raises
    UserError for a network without such activations.
    """

    def __init__(self, net, sigma: float | None = None, cond: Mapping | None = None):
        low, high = getattr(net, "sigma_min", 0.0), getattr(net, "sigma_max", float("inf"))
        self.net, self.cond = net, dict(cond or {})
        self.sigma = min(max(DEFAULT_SIGMA, low), high) if sigma is None else float(sigma)
        if not self.sigma > 0:
            raise UserError(f"sigma={sigma}: features need a positive noise level")
        self.modules: list[torch.nn.Module] | None = None

    def __call__(self, x: torch.Tensor, cond: Mapping | None = None) -> list[torch.Tensor]:
        cond = self.cond if cond is None else cond
        if self.modules is None:
            with torch.no_grad():
                self.modules = self._find(x[:1], {name: _first(value) for name, value in cond.items()})
        outputs = self._run(self.modules, x, cond)
        return [outputs[module][-len(x) :] for module in self.modules]

    def _run(self, modules, x, cond) -> dict[torch.nn.Module, torch.Tensor]:
        """What each of the modules gave in one call of the network, in the order in which they ended; maps only."""
        outputs = {}

        def keep(module, inputs, output):
            tensors = output if isinstance(output, tuple | list) else (output,)
            maps = [value for value in tensors if isinstance(value, torch.Tensor) and value.ndim == 4]
            if maps:
                outputs.pop(module, None)  # of a module that runs twice, the second time counts
                outputs[module] = maps[0]

        handles = [module.register_forward_hook(keep) for module in modules]
        try:
            self.net(x, torch.full((), self.sigma, dtype=x.dtype, device=x.device), **cond)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def _find(self, x, cond) -> list[torch.nn.Module]:
        """The last module of every resolution among the blocks that end before the bottleneck, and the bottleneck."""
        names = dict(self.net.named_modules())
        bottleneck = getattr(self.net, "bottleneck", None)
        if bottleneck is None or bottleneck is getattr(self.net, "no_feature", None):
            raise UserError(f"{type(self.net).__name__} has no bottleneck: its features cannot be compared")
        outputs = self._run([module for name, module in names.items() if name], x, cond)
        ended = list(outputs)
        if bottleneck not in outputs:
            raise UserError(
                f"the bottleneck of {type(self.net).__name__} gives no map: its features cannot be compared"
            )
        ended = ended[: ended.index(bottleneck) + 1]
        inner = {part for module in ended for part in module.modules() if part is not module}
        last = {outputs[module].shape[-1]: module for module in ended if module not in inner}
        return list(dict.fromkeys([*last.values(), bottleneck]))


def _first(value):
    return value[:1] if isinstance(value, torch.Tensor) and value.ndim else value


def feature_distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """Distance between two lists of maps [B,C_i,H_i,W_i]: squared differences of the normalised feature vectors,
    averaged over positions and over the maps; [B], between 0 and 4."""

    def unit(maps):
        return maps / (maps.square().sum(1, keepdim=True) + 1e-10).sqrt()

    parts = [(unit(x) - unit(y)).square().sum(1).flatten(1).mean(1) for x, y in zip(a, b, strict=True)]
    return torch.stack(parts).mean(0)

"""How far apart two images look to the denoiser itself: distances between features of its frozen encoder.

A perceptual distance that needs no download and fits the data of the network, latents included. It is compared as LPIPS
compares features (Zhang et al. 2018, Eq. 1), without learned weights. It is never the network that FID is measured with.
"""

import torch

from torch_utils.errors import UserError

DEFAULT_SIGMA = 0.1  # of images in [-1, 1]: little noise, and the encoder still has to look at the whole image


class _Enough(Exception):
    """Ends a forward pass at the bottleneck: the decoder is not wanted."""


def _as_map(output) -> torch.Tensor | None:
    output = output[0] if isinstance(output, (tuple, list)) and len(output) else output
    return output if isinstance(output, torch.Tensor) and output.ndim == 4 else None


class DenoiserFeatures:
    """features(x, cond=None) -> the encoder's last map at each of its resolutions, finest first, each [B,C,h,w] float32.

    net: a Denoiser, whose parameters are left alone; x [B,C,H,W] clean images (or latents), with gradients if they
    require some. sigma: the noise level that the network is told (None: 0.1, or the nearest it supports); no noise is added. cond: keyword arguments of net, of
    every call or of one. The pass ends at ``net.bottleneck``, so a call costs about half an evaluation, and hooks on the
    whole network do not see it. Raises UserError where the network has no such encoder.
    """

    def __init__(self, net: torch.nn.Module, sigma: float | None = None, cond=None):
        if sigma is None:
            sigma = min(max(DEFAULT_SIGMA, net.sigma_min), net.sigma_max)
        if not (net.sigma_min <= sigma <= net.sigma_max):
            raise UserError(
                f"features at sigma={sigma:g}: it must lie in the network's range, {net.sigma_min:g}..{net.sigma_max:g}"
            )
        self.net, self.sigma, self.cond = net, float(sigma), dict(cond or {})
        self._chosen: list[torch.nn.Module] | None = None

    def __call__(self, x: torch.Tensor, cond=None) -> list[torch.Tensor]:
        cond = self.cond if cond is None else cond
        if self._chosen is None:
            self._chosen = self._choose(x.detach(), cond)
        finished = self._run(x, cond, self._chosen)
        return [finished[module][-len(x) :].float() for module in self._chosen]

    def _run(self, x, cond, modules) -> dict[torch.nn.Module, torch.Tensor]:
        """The maps that these modules put out up to the bottleneck, in the order in which they finish."""
        finished: dict[torch.nn.Module, torch.Tensor] = {}
        bottleneck = self.net.bottleneck

        def hook(module, inputs, output):
            value = _as_map(output)
            if value is not None and len(value) % len(x) == 0:
                finished.pop(module, None)  # a module that runs again has its latest place and value
                finished[module] = value
            if module is bottleneck:
                raise _Enough

        handles = [module.register_forward_hook(hook) for module in dict.fromkeys([*modules, bottleneck])]
        try:
            self.net(x, torch.as_tensor(self.sigma, dtype=x.dtype, device=x.device), **cond)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return finished

    def _choose(self, x, cond) -> list[torch.nn.Module]:
        """The outermost modules that finish up to the bottleneck, the last one at each resolution."""
        names = {module: name for name, module in self.net.named_modules() if name}
        with torch.enable_grad():
            finished = self._run(x.requires_grad_(), cond, names)
        if self.net.bottleneck not in finished or not finished[self.net.bottleneck].requires_grad:
            raise UserError("this network has no encoder whose features could be compared: choose another loss")
        done = {names[module] for module in finished}
        last: dict[tuple, torch.nn.Module] = {}
        for module, value in finished.items():
            parts = names[module].split(".")
            inside = any(".".join(parts[:depth]) in done for depth in range(1, len(parts)))
            if value.requires_grad and not inside:
                last[tuple(value.shape[-2:])] = module
        return list(last.values())


def feature_distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """[B]: the squared distance between feature vectors of unit length, averaged over places and then over the layers.

    a, b: lists of [B,C,h,w] maps or [B,C] vectors, as from ``DenoiserFeatures``. Between 0 and 4.
    """
    distances = []
    for one, other in zip(a, b, strict=True):
        squared = ((_unit(one) - _unit(other)) ** 2).sum(dim=1)
        distances.append(squared.flatten(1).mean(dim=1) if squared.ndim > 1 else squared)
    return torch.stack(distances).mean(dim=0)


def _unit(feature: torch.Tensor) -> torch.Tensor:
    # The root of a sum that is never 0, as a vector of zeros would have no gradient.
    return feature / (feature.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()

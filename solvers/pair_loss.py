"""What a final sample is compared by: distances to the teacher's sample of the same noise.

A distance is a sum of weighted terms, written ``features+0.2*huber``. Terms are the entries of ``TERMS``, or the name of a
feature network of your own, ``package.module:function``.
"""

import importlib
import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F

from solvers.feature_loss import DenoiserFeatures, feature_distance
from torch_utils.errors import MissingExtra, UserError

HUBER = 0.00054  # width of the pseudo-Huber loss, times the root of the dimension (Song & Dhariwal 2023, Section 3.3)
LPIPS_LEAST = 64  # smaller images are enlarged: VGG halves them four times


def l2(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[B]: mean squared difference."""
    return (x - target).square().flatten(1).mean(dim=1)


def huber(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[B]: pseudo-Huber, sqrt(|x - y|^2 + c^2) - c, divided by sqrt(d): about the root mean square difference."""
    return (l2(x, target) + HUBER**2).sqrt() - HUBER


class FeatureTerm:
    """Distance of the features of the denoiser's own encoder."""

    def __init__(self, net, sigma: float | None):
        self.features = DenoiserFeatures(net, sigma)

    def __call__(self, x, target, cond):
        with torch.no_grad():
            wanted = self.features(target, cond)
        return feature_distance(self.features(x, cond), wanted)


class OwnTerm:
    """Distance of the features of ``package.module:function``: function(net) returns what makes of images [B,C,H,W] in
    [-1, 1] a tensor, or a list of tensors, [B,C] or [B,C,H,W]."""

    def __init__(self, net, place: str):
        module, _, name = place.partition(":")
        try:
            function = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            raise UserError(f"--loss={place}: cannot import {module} ({error}): put it on PYTHONPATH") from None
        if not callable(function):
            raise UserError(f"--loss={place}: {module} has no function '{name}'")
        self.net, self.place, self.extract = net, place, function(net)
        if not callable(self.extract):
            raise UserError(f"--loss={place}: it returned {type(self.extract).__name__}, not a function of images")

    def _features(self, x) -> list[torch.Tensor]:
        found = self.extract(self.net.decode(x) if hasattr(self.net, "decode") else x)
        found = list(found) if isinstance(found, (list, tuple)) else [found]
        if not all(isinstance(f, torch.Tensor) and f.ndim in (2, 4) and len(f) == len(x) for f in found):
            raise UserError(f"--loss={self.place}: its features must be tensors [B,C] or [B,C,H,W]")
        return found

    def __call__(self, x, target, cond):
        with torch.no_grad():
            wanted = self._features(target)
        return feature_distance(self._features(x), wanted)


class LPIPSTerm:
    """LPIPS with VGG (Zhang et al. 2018), from the package 'lpips', on decoded images."""

    def __init__(self, net):
        try:
            import lpips
        except ImportError:
            raise MissingExtra("lpips", "lpips", "--loss=lpips") from None
        try:
            self.network = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
        except OSError as error:  # URLError and its kin: the weights of VGG are downloaded
            raise UserError(f"--loss=lpips: cannot get the weights of VGG ({error}): use --loss=features") from None
        self.net = net

    def _images(self, x):
        images = self.net.decode(x) if hasattr(self.net, "decode") else x
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        if images.shape[-1] < LPIPS_LEAST:
            images = F.interpolate(images, size=LPIPS_LEAST, mode="bilinear", align_corners=False)
        return images

    def __call__(self, x, target, cond):
        with torch.no_grad():
            target = self._images(target)
        return self.network.to(x.device)(self._images(x), target).flatten()


TERMS: dict[str, str] = {
    "l2": "mean squared difference",
    "huber": "pseudo-Huber, about the root mean square difference",
    "features": "features of the denoiser's own encoder",
    "lpips": "LPIPS with VGG (pip install -e '.[lpips]')",
}
_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def parse_loss(text: str) -> list[tuple[float, str]]:
    """``"features+0.2*huber"`` -> [(1, "features"), (0.2, "huber")]. Raises UserError on anything else."""
    terms = []
    for part in str(text).split("+"):
        weight, star, name = part.rpartition("*")
        name = name.strip()
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--loss={text}: '{part.strip()}' should be a weight above 0, a star and a term")
        if name not in TERMS and not _OWN.fullmatch(name):
            raise UserError(f"--loss={text}: unknown term '{name}'; choose from {', '.join(TERMS)}, or module:function")
        terms.append((value, name))
    names = [name for _, name in terms]
    if len(set(names)) < len(names):
        raise UserError(f"--loss={text}: name each term only once")
    return terms


def own_code(text: str) -> list[str]:
    """The terms of a loss that are code of the user's."""
    return [name for _, name in parse_loss(text) if ":" in name]


def _make_term(name: str, net, feature_sigma: float | None) -> Callable:
    if name == "features":
        return FeatureTerm(net, feature_sigma)
    if name == "lpips":
        return LPIPSTerm(net)
    if ":" in name:
        return OwnTerm(net, name)
    plain = {"l2": l2, "huber": huber}[name]
    return lambda x, target, cond: plain(x, target)


class PairLoss:
    """loss(x, target, cond) -> [B], the weighted sum of the terms of ``text`` (see ``parse_loss``).

    x, target: [B,C,H,W] samples of net, latents where it is a latent model; feature_sigma: the noise level that the
    denoiser is told where its features are compared (None: as ``DenoiserFeatures`` chooses). Gradients flow to x.
    """

    def __init__(self, text: str, net, feature_sigma: float | None = None):
        self.terms = [(weight, _make_term(name, net, feature_sigma)) for weight, name in parse_loss(text)]

    def __call__(self, x, target, cond) -> torch.Tensor:
        x, target = x.float(), target.float()
        return sum(weight * term(x, target, cond) for weight, term in self.terms)

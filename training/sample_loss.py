"""Losses of final samples: distance to the teacher's sample, and between distributions."""

import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F

from models.denoiser import beside, member
from torch_utils.errors import MissingExtra, UserError
from torch_utils.functions import find_function

DEFAULT_SIGMA = 0.1  # for images in [-1, 1]: little noise, but the encoder still uses the whole image


class _Enough(Exception):
    """Ends a forward pass at the bottleneck, since the decoder is not needed."""


def _as_map(output) -> torch.Tensor | None:
    output = output[0] if isinstance(output, (tuple, list)) and len(output) else output
    return output if isinstance(output, torch.Tensor) and output.ndim == 4 else None


class DenoiserFeatures:
    """features(x, cond=None) -> the encoder's last map at each resolution, finest first.

    net: a Denoiser; its parameters are not changed.
    sigma: noise level that the network is conditioned on; no noise is added. Default None: 0.1, or
        the nearest that the network supports.
    cond: keyword arguments of net for every call. Default None.

    x: clean images or latents [B,C,H,W]; gradients flow to it. The maps are float32 [B,C,h,w]. A
    call ends at ``net.bottleneck``, so it costs about half an evaluation, and hooks on the whole
    network do not see it. Raises UserError if the network does not have such an encoder.
    """

    def __init__(self, net: torch.nn.Module, sigma: float | None = None, cond=None):
        if sigma is None:
            sigma = min(max(DEFAULT_SIGMA, net.sigma_min), net.sigma_max)
        if not (net.sigma_min <= sigma <= net.sigma_max):
            raise UserError(
                f"features at sigma={sigma:g}: must be in the network's range, {net.sigma_min:g}..{net.sigma_max:g}"
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
        """The outputs of these modules up to the bottleneck, in the order in which they finish."""
        finished: dict[torch.nn.Module, torch.Tensor] = {}
        bottleneck = self.net.bottleneck

        def hook(module, inputs, output):
            value = _as_map(output)
            if value is not None and len(value) % len(x) == 0:
                finished.pop(module, None)  # a module that runs again counts with its last call
                finished[module] = value
            if module is bottleneck:
                raise _Enough

        handles = [module.register_forward_hook(hook) for module in dict.fromkeys([*modules, bottleneck])]
        try:
            torch.nn.Module.__call__(self.net, x, beside(torch.tensor(self.sigma, dtype=x.dtype), x), **cond)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return finished

    def _choose(self, x, cond) -> list[torch.nn.Module]:
        """The outermost modules up to the bottleneck, the last one at each resolution."""
        names = {module: name for name, module in self.net.named_modules() if name}
        with torch.enable_grad():
            finished = self._run(x.requires_grad_(), cond, names)
        if self.net.bottleneck not in finished or not finished[self.net.bottleneck].requires_grad:
            raise UserError("this network has no encoder with features to compare: choose another loss")
        done = {names[module] for module in finished}
        last: dict[tuple, torch.nn.Module] = {}
        for module, value in finished.items():
            parts = names[module].split(".")
            inside = any(".".join(parts[:depth]) in done for depth in range(1, len(parts)))
            if value.requires_grad and not inside:
                last[tuple(value.shape[-2:])] = module
        return list(last.values())


def feature_distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """[B]: squared distance of feature vectors of unit length, averaged over places and layers.

    a, b: lists of maps [B,C,h,w] or vectors [B,C], as from ``DenoiserFeatures``.

    The result is between 0 and 4.
    """
    distances = []
    for one, other in zip(a, b, strict=True):
        squared = ((_unit(one) - _unit(other)) ** 2).sum(dim=1)
        distances.append(squared.flatten(1).mean(dim=1) if squared.ndim > 1 else squared)
    return torch.stack(distances).mean(dim=0)


def _unit(feature: torch.Tensor) -> torch.Tensor:
    # The sum is never 0, since the root has no gradient there.
    return feature / (feature.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()


HUBER = 0.00054  # width of the pseudo-Huber loss / sqrt(dimension) (Song & Dhariwal 2023, Section 3.3)
SCORE_SIGMA = 0.5  # of ``SampleScore``; the loss "features" has 0.2 by default
LPIPS_LEAST = 64  # smaller images are enlarged, since VGG halves them four times


def l2(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[B]: mean squared difference."""
    return (x - target).square().flatten(1).mean(dim=1)


def huber(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[B]: (sqrt(|x - y|^2 + c^2) - c) / sqrt(d), about the root mean square difference."""
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
    """Distance of the features of a user's function ``package.module:function``.

    function(net) returns a function from images [B,C,H,W] in [-1, 1] to a tensor, or a list of
    tensors, [B,C] or [B,C,H,W].
    """

    def __init__(self, net, place: str):
        function, _ = find_function(place, "--loss", ", ".join(TERMS))
        self.net, self.place, self.extract = net, place, function(net)
        if not callable(self.extract):
            raise UserError(
                f"--loss={place}: must return a function of images, but returned {type(self.extract).__name__}"
            )

    def _features(self, x) -> list[torch.Tensor]:
        found = self.extract(member(self.net, "decode")(x))
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
        except OSError as error:  # URLError and others, since the weights of VGG are downloaded
            raise UserError(f"--loss=lpips: cannot get the weights of VGG ({error}): use --loss=features") from None
        self.net = net

    def _images(self, x):
        images = member(self.net, "decode")(x)
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        if images.shape[-1] < LPIPS_LEAST:
            images = F.interpolate(images, size=LPIPS_LEAST, mode="bilinear", align_corners=False)
        return images

    def __call__(self, x, target, cond):
        with torch.no_grad():
            target = self._images(target)
        return self.network.to(x.device)(self._images(x), target).flatten()


# Terms by name: (net, feature_sigma) -> term(x, target, cond), which gives the losses [B].
TERMS: dict[str, Callable] = {
    "l2": lambda net, sigma: lambda x, target, cond: l2(x, target),
    "huber": lambda net, sigma: lambda x, target, cond: huber(x, target),
    "features": FeatureTerm,
    "lpips": lambda net, sigma: LPIPSTerm(net),
}
TERM_NAMES = f"{', '.join(TERMS)}, module:function"
_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def parse_loss(text: str) -> list[tuple[float, str]]:
    """The terms of a loss: ``"features+0.2*huber"`` -> [(1, "features"), (0.2, "huber")].

    Raises UserError on anything else.
    """
    terms = []
    for part in str(text).split("+"):
        weight, star, name = part.rpartition("*")
        name = name.strip()
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--loss={text}: '{part.strip()}' should be weight*term, with a weight above 0")
        if name not in TERMS and not _OWN.fullmatch(name):
            raise UserError(f"--loss={text}: unknown term '{name}'; choose from {', '.join(TERMS)}, or module:function")
        terms.append((value, name))
    names = [name for _, name in terms]
    if len(set(names)) < len(names):
        raise UserError(f"--loss={text}: name each term only once")
    return terms


def own_code(text: str) -> list[str]:
    """The terms of a loss that are the user's own code."""
    return [name for _, name in parse_loss(text) if ":" in name]


class PairLoss:
    """loss(x, target, cond) -> [B], the weighted sum of the terms of a text.

    text: see ``parse_loss``.
    net: the network.
    feature_sigma: see ``DenoiserFeatures``. Default None.

    x, target: samples of net [B,C,H,W], latents for a latent model. Gradients flow to x.
    """

    def __init__(self, text: str, net, feature_sigma: float | None = None):
        self.terms = [
            (weight, TERMS[name](net, feature_sigma) if name in TERMS else OwnTerm(net, name))
            for weight, name in parse_loss(text)
        ]

    def __call__(self, x, target, cond) -> torch.Tensor:
        x, target = x.float(), target.float()
        return sum(weight * term(x, target, cond) for weight, term in self.terms)


class SampleScore:
    """score(x, target, cond) -> [B]: distance to the teacher's samples that compares solvers.

    net: the network.
    by_features: whether the network has an encoder (``DenoiserFeatures``).

    The geometric mean of two distances: root mean square difference (pixels, or latents), and root
    of ``feature_distance`` at noise level ``SCORE_SIGMA``. A factor of either distance changes all
    scores alike, so they need no weights, and a solver is better if it gains more in one, in per
    cent, than it loses in the other. So solvers that are trained with different losses can be
    compared: pixels and features are treated alike, and the loss ``features`` uses another noise
    level. Without an encoder: the root mean square difference alone.
    """

    def __init__(self, net, by_features: bool):
        level = min(max(SCORE_SIGMA, net.sigma_min), net.sigma_max)
        self.features = DenoiserFeatures(net, level) if by_features else None

    @torch.no_grad()
    def __call__(self, x, target, cond) -> torch.Tensor:
        x, target = x.float(), target.float()
        rms = l2(x, target).sqrt()
        if self.features is None:
            return rms
        return (rms * feature_distance(self.features(x, cond), self.features(target, cond)).sqrt()).sqrt()


def mean_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[n]: the mean Euclidean distance of each x [n,d] to all y [m,d]."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").mean(dim=1)


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two samples [n,d] and [m,d] (Székely & Rizzo 2013).

    Unbiased: pairs of a sample with itself are left out. The expectation is zero exactly if the
    distributions are equal.
    """
    n, m = len(x), len(y)
    within = mean_distance(x, x).mean() * n / (n - 1) + mean_distance(y, y).mean() * m / (m - 1)
    return 2 * mean_distance(x, y).mean() - within


class DistributionTerm:
    """The energy distance between features of student samples and teacher samples, unpaired.

    net, feature_sigma: see ``DenoiserFeatures``.
    queue: number of student samples to remember.

    Features are means and standard deviations over the places of the maps of ``DenoiserFeatures``,
    standardised by those of the teacher's samples and divided by the root of their number. The
    student's second sample X' comes from a queue with features of the latest iterations: pairs
    within a batch would depend on the number of processes.
    """

    def __init__(self, net, feature_sigma: float, queue: int):
        self.features, self.length = DenoiserFeatures(net, feature_sigma), queue
        self.reference_features: torch.Tensor | None = None  # [N,d] of the teacher's samples
        self.queue: torch.Tensor | None = None  # [<= length, d] of the student's, newest last
        self._shift, self._scale = 0.0, 1.0

    def _pooled(self, x, cond) -> torch.Tensor:
        maps = self.features(x.float(), cond)
        parts = [(m.mean(dim=(2, 3)), (m.var(dim=(2, 3), correction=0) + 1e-6).sqrt()) for m in maps]
        return torch.cat([value for pair in parts for value in pair], dim=1)

    def vectors(self, x: torch.Tensor, cond) -> torch.Tensor:
        """Standardised features [B,d] of samples [B,C,H,W], with gradients."""
        return (self._pooled(x, cond) - self._shift) * self._scale

    @torch.no_grad()
    def set_reference(self, batches) -> None:
        """Takes the teacher's samples, (images, cond) pairs."""
        features = torch.cat([self._pooled(images, cond) for images, cond in batches])
        self._shift = features.mean(dim=0)
        self._scale = 1 / ((features.std(dim=0) + 1e-6) * math.sqrt(features.shape[1]))
        self.reference_features = (features - self._shift) * self._scale

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """[B]: terms whose mean has the gradient of the energy distance.

        This holds as if the queue came from the current student. Each sample moves both as X and as
        X', hence the factor 2 of the queue's term.
        """
        if self.queue is None:
            raise RuntimeError("the queue of the student's features is empty")
        return 2 * mean_distance(vectors, self.reference_features) - 2 * mean_distance(vectors, self.queue)

    def push(self, vectors: torch.Tensor) -> None:
        """Appends the features of an iteration, those of all processes, to the queue."""
        vectors = vectors.detach()
        kept = vectors if self.queue is None else torch.cat([self.queue, vectors])
        self.queue = kept[-self.length :]

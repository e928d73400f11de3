"""PSNR, SSIM and LPIPS of images and the ones that they should equal, paired by file name.

The conventions are those of published restoration results: 8-bit images, means over images of the
value of each image. docs/restoration.md names them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F

from torch_utils.errors import UserError
from torch_utils.images import ImageSource, paired
from torch_utils.progress import progress_bar

PEAK = 255.0
WINDOW, WINDOW_STD = 11, 1.5  # of SSIM, in pixels
METRICS = ("psnr", "ssim", "lpips")
CHANNELS = ("rgb", "y")


def luma(image: torch.Tensor) -> torch.Tensor:
    """The Y channel of ITU-R BT.601, 16..235, not rounded, of images [...,3,H,W] in 0..255.

    Grey images [...,1,H,W] stay as they are.
    """
    if image.shape[-3] == 1:
        return image
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=image.dtype, device=image.device) / PEAK
    return 16 + (image * weights[:, None, None]).sum(-3, keepdim=True)


def psnr(image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB [B] of images [B,C,H,W] in 0..255; infinite if equal."""
    return 10 * torch.log10(PEAK**2 / (image - other).square().flatten(1).mean(1))


def ssim(image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Structural similarity [B] of images [B,C,H,W] in 0..255 (Wang et al. 2004).

    Gaussian window of 11 x 11 pixels with standard deviation 1.5, K1 0.01, K2 0.03. The mean over
    the windows that lie in the image, and over the channels.

    Raises UserError for images that are smaller than the window.
    """
    if min(image.shape[-2:]) < WINDOW:
        raise UserError(f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels")
    offsets = torch.arange(WINDOW, dtype=image.dtype, device=image.device) - WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * WINDOW_STD**2))
    line = line / line.sum()

    def blur(values: torch.Tensor) -> torch.Tensor:
        flat = values.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, line.reshape(1, 1, -1, 1)), line.reshape(1, 1, 1, -1))

    mean, other_mean = blur(image), blur(other)
    variance = blur(image**2) - mean**2
    other_variance = blur(other**2) - other_mean**2
    covariance = blur(image * other) - mean * other_mean
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    similarity = (2 * mean * other_mean + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean**2 + other_mean**2 + c1) * (variance + other_variance + c2))
    return similarity.reshape(len(image), -1).mean(1)


@cache
def _lpips_network(device: torch.device):
    try:
        import lpips
    except ImportError:
        raise UserError("LPIPS needs its package: pip install lpips") from None
    try:
        return lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    except OSError as error:
        raise UserError(f"the weights of LPIPS cannot be loaded: {error}") from None


@torch.no_grad()
def lpips_distance(image: torch.Tensor, other: torch.Tensor, device: torch.device) -> torch.Tensor:
    """LPIPS [B] (AlexNet, Zhang et al. 2018) of images [B,C,H,W] in 0..255, by the package lpips.

    Grey images count as RGB images of equal channels.
    """
    network = _lpips_network(torch.device(device))
    both = [x.float().expand(-1, 3, -1, -1).to(device) / (PEAK / 2) - 1 for x in (image, other)]
    return network(*both).flatten().cpu()


@dataclass
class PairScores:
    """The result of ``compare_pairs``.

    names: of the images, without extension.
    scores: {metric: one value per image}.
    channels, crop: as given.
    """

    names: list[str]
    scores: dict[str, list[float]]
    channels: str
    crop: int

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.scores.items()}

    def line(self) -> str:
        scores = " ".join(f"{name.upper()} {value:.4f}" for name, value in self.means().items())
        return f"{scores} images={len(self.names)} channels={self.channels} crop={self.crop}"


def compare_pairs(
    images: str,
    ref: str,
    metrics: Sequence[str] = ("psnr", "ssim"),
    channels: str = "rgb",
    crop: int = 0,
    device: torch.device | str = "cpu",
) -> PairScores:
    """Compare every image of a folder or zip with the one of the same name in another.

    images, ref: the folders or zips.
    metrics: of ``METRICS``. Default PSNR and SSIM.
    channels: "rgb", or "y" for PSNR and SSIM of the Y channel. Default rgb.
    crop: pixels to leave out at every side; published results of super-resolution by a factor k
        leave out k. Default 0.
    device: of the network of LPIPS. Default CPU.

    Raises UserError for images without partner, pairs of different sizes, and unknown metrics.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise UserError(f"metrics={','.join(metrics)}: choose from {', '.join(METRICS)}")
    source, other = (ImageSource(path, uniform=False) for path in (images, ref))
    pairs = paired(source, other)
    measures = {"psnr": psnr, "ssim": ssim, "lpips": partial(lpips_distance, device=torch.device(device))}
    if "lpips" in metrics:
        _lpips_network(torch.device(device))  # fails before images are read
    found: dict[str, list[float]] = {name: [] for name in metrics}
    with progress_bar(len(pairs), unit="img", leave=False) as bar:
        for index, partner in pairs:
            image, target = (
                torch.tensor(part.read(number)).double()[None] for part, number in ((source, index), (other, partner))
            )
            if image.shape[2:] != target.shape[2:]:
                sizes = [f"{x.shape[3]}x{x.shape[2]}" for x in (image, target)]
                raise UserError(
                    f"{source.where(index)} has {sizes[0]} pixels, {other.where(partner)} {sizes[1]}: pairs need one size"
                )
            if image.shape != target.shape:  # a grey image is one of equal channels
                image, target = image.expand(-1, 3, -1, -1), target.expand(-1, 3, -1, -1)
            if crop:
                if 2 * crop >= min(image.shape[-2:]):
                    raise UserError(f"crop={crop} leaves nothing of {source.where(index)}")
                image, target = (x[..., crop:-crop, crop:-crop] for x in (image, target))
            for name in metrics:
                y = channels == "y" and name != "lpips"
                given = (luma(image), luma(target)) if y else (image, target)
                found[name].append(float(measures[name](*given)))
            bar.update()
    names = [source.names[index].rsplit(".", 1)[0] for index, _ in pairs]
    return PairScores(names, found, channels, crop)

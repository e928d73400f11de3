"""The images that sampling starts from: degraded ones, or observations of other images.

One file is one seed: file number k of the sorted names has the seed k, and its result has its name.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch

from models import zoo
from models.posterior import OPERATORS, Operator, Posterior, make_operator
from torch_utils.cli import PATH, Number
from torch_utils.errors import UserError
from torch_utils.images import ImageSource, from_uint8
from torch_utils.options import ALWAYS, flag


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Images that sampling starts from."""

    images: str | None = flag(
        "Restoration networks: folder or zip of degraded images, one result per file, under its name",
        kind=PATH,
        metavar="DIR|ZIP",
    )
    observe: str | None = flag(
        f"Inverse problem with a network of images: the operator that made the observations, {OPERATORS}",
        kind=PATH,
        metavar="OPERATOR",
        record=ALWAYS,
    )
    observations: str | None = flag(
        "Folder or zip of the observed images of --observe, one result per file", kind=PATH, metavar="DIR|ZIP"
    )
    noise_level: float = flag(
        "Standard deviation of the noise in the observations, for pixels in [-1, 1]", 0.05, Number(0), record=ALWAYS
    )
    jacobian: bool = flag(
        "Pseudo-inverse guidance with the Jacobian; unstable with few steps, twice the cost", False, record=ALWAYS
    )

    def check(self, written: frozenset[str]) -> None:
        """Raises UserError for contradicting flags. written: names of the user's flags."""
        if self.images is not None and self.observe is not None:
            raise UserError("--images restores with a restoration network, --observe with any other: give one of them")
        if (self.observe is None) != (self.observations is None):
            raise UserError("give both --observe, the operator, and --observations, the images that it made")
        for name in ("noise_level", "jacobian"):
            if self.observe is None and name in written:
                raise UserError(f"--{name} has no effect without --observe: leave it out")

    def check_name(self, dataset_name: str) -> None:
        """Raises UserError where the name of a network tells that the images do not fit it."""
        card = zoo.find_card(dataset_name)
        if card is None:
            return
        if card.takes_images and (self.images or self.observations) is None:
            raise UserError(f"{dataset_name} restores images: give --images, a folder of degraded images")
        check_kind(self.images is not None, self.observe is not None, card.takes_images)
        if self.observe is not None and card.family in ("ldm", "sd"):
            raise UserError(f"--observe needs a network of images: {dataset_name} samples latents")

    def open(self) -> "ImageInputs | None":
        """The images; None where sampling starts from noise alone."""
        path = self.images or self.observations
        if path is None:
            return None
        return ImageInputs(ImageSource(path, uniform=False), self.observe, self.noise_level, self.jacobian)


def check_kind(degraded: bool, observed: bool, restores: bool) -> None:
    """Raises UserError where --images or --observe is for the other kind of network.

    degraded, observed: which of the flags was given. restores: the network restores images.
    """
    if degraded and not restores:
        raise UserError("--images: this network does not restore images; use --observe and --observations")
    if observed and restores:
        raise UserError("--observe: this network restores images; give the degraded images as --images")


class ImageInputs:
    """The images of a folder by seed.

    source: the images, of any sizes.
    observe: text of the operator (``make_operator``); None: for a restoration network.
    noise_level: of the observations.
    jacobian: see ``Posterior``.
    """

    def __init__(self, source: ImageSource, observe: str | None = None, noise_level: float = 0.0, jacobian=False):
        self.source, self.observe, self.noise_level, self.jacobian = source, observe, noise_level, jacobian
        self.names = [str(PurePosixPath(name).with_suffix("")) for name in source.names]
        name, count = Counter(self.names).most_common(1)[0]
        if count > 1:
            raise UserError(f"{source.path}: {count} results would have the name {name}.png; rename the images")
        self._operator: Operator | None = None

    def __len__(self) -> int:
        return len(self.names)

    def check_seeds(self, seeds: Sequence[int]) -> None:
        """Raises UserError for a seed without a file."""
        wrong = [seed for seed in seeds if seed >= len(self)]
        if wrong:
            raise UserError(
                f"--seeds: file number {wrong[0]} does not exist, {self.source.path} holds {len(self)} images (0-"
                f"{len(self) - 1})"
            )

    def check(self, net) -> None:
        """Raises UserError where the network and the images do not go together."""
        check_kind(self.observe is None, self.observe is not None, net.takes_images)
        self.source.expect(None if self.observe else net.img_channels)
        if self.observe is not None:
            self._operator = make_operator(self.observe, net.img_channels)
            Posterior(net, self._operator, torch.empty(0), self.noise_level, self.jacobian)  # refuses some networks

    def size(self, seed: int) -> tuple[int, int]:
        """(height, width) of an image."""
        return self.source.size(seed)

    def order(self, seeds: Sequence[int]) -> list[int]:
        """The seeds with images of equal size side by side."""
        return sorted(seeds, key=lambda seed: (*self.size(seed), seed))

    def same_size(self, seeds: Sequence[int]) -> int:
        """How many of the first seeds have images of one size."""
        first = self.size(seeds[0])
        return next((i for i, seed in enumerate(seeds) if self.size(seed) != first), len(seeds))

    def read(self, seeds: Sequence[int]) -> torch.Tensor:
        """The images [B,C,H,W] in [-1, 1]."""
        return from_uint8(torch.stack([torch.tensor(self.source.read(seed)) for seed in seeds]))

    def prepare(self, net, seeds: Sequence[int], device) -> tuple:
        """(denoiser of these images, size of the noise or None, arguments of make_cond)."""
        images = self.read(seeds).to(device)
        if self.observe is None:
            return net, tuple(images.shape[-2:]), {"images": images}
        return Posterior(net, self._operator, images, self.noise_level, self.jacobian), None, {}

    def record(self) -> dict:
        """What the results depend on."""
        return {"inputs": str(self.source.path), "inputs_sha256": self.source.digest()}

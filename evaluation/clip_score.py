"""CLIP score: the mean cosine similarity between images and their captions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluation.clip import DEFAULT_CLIP, ClipNetwork, ImagePreparation
from evaluation.reading import choose_indices, read_batches
from models import zoo
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.images import ImageSource, note
from torch_utils.memory import explained_oom
from torch_utils.progress import progress_bar
from torch_utils.prompts import Captions, read_captions
from torch_utils.transfer import one_ahead

_EXAMPLES = 5  # number of ignored images that are named


@dataclass(frozen=True)
class ClipResult:
    clip_score: float  # mean cosine
    clip_score_x100_clamped: float  # mean of 100 max(0, cosine)
    standard_error: float | None  # of clip_score; None for one image
    definition: str
    images: int
    images_without_caption: int
    images_without_caption_first: list[str]
    images_without_number: int
    images_without_number_first: list[str]
    captions: int
    model: str
    model_revision: str | None
    weights_sha256: str
    image_size: list[int]
    preprocessing: dict
    precision: str
    source: str
    prompts: str
    seed: int | None

    def line(self) -> str:
        model = "_".join(self.model.split())
        return f"CLIP score {self.clip_score:.4f} images={self.images} model={model} weights={self.weights_sha256[:12]}"


@dataclass(frozen=True)
class Pairs:
    """Images with captions, in the order of their seed numbers or names.

    indices: indices into the ImageSource.
    captions: their captions.
    without_caption: names of images without a caption.
    without_number: names of images that are not named after a seed number.
    """

    indices: list[int]
    captions: list[str]
    without_caption: list[str]
    without_number: list[str]


def pair(source: ImageSource, captions: Captions) -> Pairs:
    """Find the caption of each image: by file name if the captions have names, else by seed number.

    Raises UserError if no image has a caption, or two images have the same number.
    """
    named = captions.by_name
    if named and not named.keys().isdisjoint(source.names):
        indices = [index for index, name in enumerate(source.names) if name in named]
        lost = [name for name in source.names if name not in named]
        return Pairs(indices, [named[source.names[index]] for index in indices], lost, [])
    if named is not None and captions.by_row:
        examples = f"such as {next(iter(named))}" if named else "some of them more than once"
        raise UserError(
            f"{source.path}: none of the images has a caption: the captions have file names, {examples}; remove that"
            " column if the rows are in the order of the seed numbers"
        )
    return pair_by_seed(source, captions.by_seed)


def pair_by_seed(source: ImageSource, prompts: Mapping[int, str]) -> Pairs:
    """Find the caption of each image by its seed number.

    Raises UserError if no image has a caption, or two images have the same number.
    """
    found, unnumbered = source.by_seed()
    if not found:
        raise UserError(f"{source.path}: no image is named after its seed number, like 000123.png ({unnumbered[0]})")
    seeds = sorted(found)
    kept = [seed for seed in seeds if seed in prompts]
    if not kept:
        raise UserError(
            f"no image has a caption: the images have the numbers {seeds[0]} to {seeds[-1]}, the captions {min(prompts)}"
            f" to {max(prompts)}"
        )
    lost = [source.names[found[seed]] for seed in seeds if seed not in prompts]
    return Pairs([found[seed] for seed in kept], [prompts[seed] for seed in kept], lost, unnumbered)


@dataclass(frozen=True)
class _Prepared:
    """Source for ``read_batches`` that also prepares the images for the network.

    It does not hold the network, which worker processes must not touch.
    """

    source: ImageSource
    prepare: ImagePreparation
    shape: tuple[int, int, int]
    itemsize = 4  # bytes per number

    @property
    def conversions(self) -> Counter:
        return self.source.conversions

    def read(self, index: int, done: Counter) -> np.ndarray:
        return self.prepare(self.source.read(index, done))


def image_similarities(
    source: ImageSource, indices: Sequence[int], captions: Sequence[str], network: ClipNetwork, batch: int
) -> np.ndarray:
    """Cosine similarity of each pair, float64 [N], computed by all ranks, with a progress bar."""
    own = slice(distributed.rank(), None, distributed.world_size())
    indices_here, captions_here = indices[own], captions[own]
    prepared = _Prepared(source, network.prepare, (3, *network.image_size))
    cosines: list[float] = []

    def started():
        first = 0
        for images in read_batches(prepared, indices_here, batch, network.device):
            distributed.check_peers()
            yield network.start(images, captions_here[first : first + len(images)])
            first += len(images)

    with (
        distributed.together(),
        progress_bar(len(indices_here), unit="img", desc="CLIP") as bar,
        explained_oom(network.device, f"lower --batch (now {batch})"),
    ):
        for result in one_ahead(started()):
            found = result().tolist()
            cosines.extend(found)
            bar.update(len(found))
    source.report_conversions(shared=True)
    result = np.empty(len(indices))
    for rank, part in enumerate(distributed.gather_objects(cosines)):
        result[rank :: distributed.world_size()] = part
    return result


def calculate_clip_score(
    images: str | Path,
    prompts: str | Path,
    *,
    model: str = DEFAULT_CLIP,
    column: str | None = None,
    num: int | None = None,
    seed: int = 0,
    batch: int = 64,
    device: torch.device | str = "cpu",
    amp: bool = False,
) -> ClipResult:
    """CLIP score of a folder or zip of images. Images without captions are reported and ignored.

    images: the folder or zip.
    prompts: file of captions, or "coco30k".
    model: see ``ClipNetwork``.
    column: column of the captions in a table. Default: found by its name.
    num: number of random pairs to use. Default: all.
    seed: seed of their choice. Default 0.
    batch: images per call of the network. Default 64.
    device: where the network runs. Default: the CPU.
    amp: see ``ClipNetwork``. Default False.
    """
    captions = read_captions(zoo.resolve_prompts(prompts), column)
    source = ImageSource(images, uniform=False)
    source.check_one_run()
    pairs = pair(source, captions)
    if num is not None and num > len(pairs.indices):
        raise UserError(f"--num={num}: only {len(pairs.indices)} images have a caption")
    chosen = choose_indices(len(pairs.indices), num, seed)
    _report("have no caption", pairs.without_caption, len(source))
    _report("are not named after a seed number", pairs.without_number, len(source))
    with distributed.local_main_first():
        network = ClipNetwork(model, device, amp)
    if len(set(distributed.gather_objects(network.digest))) > 1:
        raise UserError(f"--model={model}: the processes found different weights; pass one folder")
    cosines = image_similarities(
        source, [pairs.indices[i] for i in chosen], [pairs.captions[i] for i in chosen], network, batch
    )
    return ClipResult(
        clip_score=float(cosines.mean()),
        clip_score_x100_clamped=float(100 * cosines.clip(min=0).mean()),
        standard_error=float(cosines.std(ddof=1) / np.sqrt(len(cosines))) if len(cosines) > 1 else None,
        definition="clip_score: mean of cos(image, caption); clip_score_x100_clamped: mean of 100 * max(0, cos)",
        images=len(cosines),
        images_without_caption=len(pairs.without_caption),
        images_without_caption_first=pairs.without_caption[:_EXAMPLES],
        images_without_number=len(pairs.without_number),
        images_without_number_first=pairs.without_number[:_EXAMPLES],
        captions=len(captions.by_seed),
        model=network.model,
        model_revision=network.revision,
        weights_sha256=network.digest,
        image_size=list(network.image_size),
        preprocessing=network.preprocessing,
        precision=str(network.precision).removeprefix("torch."),
        source=str(images),
        prompts=str(prompts),
        seed=None if len(cosines) == len(pairs.indices) else seed,
    )


def _report(what: str, names: list[str], total: int) -> None:
    if names:
        examples = ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")
        note(f"{len(names)} of {total} images {what} and are left out: {examples}", "Warning")

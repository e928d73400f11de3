r"""Makes an uncompressed dataset zip in EDM's layout: 00000/img00000000.png, ..., dataset.json.

    python tools/dataset_tool.py --source=mnist_train.npz --dest=datasets/mnist-train.zip \
        --resolution=32 --transform=pad
    python -m tools.dataset_tool --source=photos --dest=datasets/photos.zip --resolution=64 \
        --transform=center-crop
    python -m tools.dataset_tool --source=train.zip --dest=few.zip --max_images=1000

Labels are those of the source's dataset.json. Without one, the folders of the first level (cat/,
dog/) are the classes, in the order of their names; dataset.json then lists them as "class_names".
docs/images.md says which files count and how they are read.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("tools.dataset_tool")

import io
import json
import re
import signal
import zipfile
from collections.abc import Callable, Iterator

import click
import numpy as np
from PIL import Image

from torch_utils.arrays import npz_names, read_npz
from torch_utils.cli import PATH, Command
from torch_utils.errors import UserError
from torch_utils.files import atomic_path, check_destination, remove_leftovers
from torch_utils.images import ImageSource, count_classes, evenly_spaced, note
from torch_utils.progress import progress_bar
from torch_utils.session import raised_sigterm

_IMAGE_KEYS = ("images", "x", "data", "arr_0")  # arr_0, arr_1: numpy's default names, as in the samples of ADM
_LABEL_KEYS = ("labels", "y", "arr_1")
_NAMES_SHOWN = 10
_IMAGES_PER_FOLDER = 1000


def parse_resolution(text: str | None) -> tuple[int, int] | None:
    """(width, height) of a text: "32" -> (32, 32); "64x32" -> (64, 32)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    if not match or not 1 <= int(match[1]) <= 16384 or not 1 <= int(match[2] or match[1]) <= 16384:
        raise UserError(f"--resolution={text}: must be a number or WIDTHxHEIGHT, like 32 or 64x32")
    return int(match[1]), int(match[2] or match[1])


class ArraySource:
    """The uint8 images [N,H,W] or [N,H,W,C] and integer labels [N] of an npz file.

    Has the interface of ImageSource.
    """

    def __init__(self, path: Path):
        self.path = path
        names = npz_names(path)
        image_key, label_key = _first_key(names, _IMAGE_KEYS), _first_key(names, _LABEL_KEYS)
        if image_key is None:
            raise UserError(f"{path}: no array named {' or '.join(_IMAGE_KEYS)}; it holds {names[:20]}")
        data = read_npz(path, (image_key, label_key))
        images, labels = data[image_key], data.get(label_key)
        if images.dtype != np.uint8 or not (images.ndim == 3 or images.ndim == 4 and images.shape[3] in (1, 3)):
            raise UserError(
                f"{path}: '{image_key}' is {images.dtype} {list(images.shape)}; expected uint8 [N,H,W], [N,H,W,1] or"
                " [N,H,W,3]"
            )
        if images.size == 0:
            raise UserError(f"{path}: '{image_key}' is empty")
        if labels is not None and (
            labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or int(labels.min()) < 0
        ):
            raise UserError(f"{path}: '{label_key}' must hold one integer from 0 up per image")
        self._images = images if images.ndim == 4 else images[..., None]
        self.labels = None if labels is None else [int(label) for label in labels]
        self.class_names = None

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> np.ndarray:
        return self._images[index].transpose(2, 0, 1)

    def where(self, index: int) -> str:
        return f"{self.path}: image {index}"


def _first_key(present: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((key for key in wanted if key in present), None)


def open_source(path: str | Path) -> ArraySource | ImageSource:
    path = Path(path)
    if not path.exists():
        raise UserError(f"--source={path}: no such file or folder")
    if path.suffix.lower() == ".npz":
        return ArraySource(path)
    source = ImageSource(path, uniform=False)
    source.expect(source.common_channels())
    return source


def find_labels(source: ArraySource | ImageSource, renumber: bool) -> tuple[list[int] | None, list[str] | None]:
    """The label of each image and the names of the classes (None: without). Prints their origin.

    source: the images.
    renumber: number the labels 0, 1, 2, ... in their order. The old labels become the names of
        classes without a name.
    """
    labels, names = source.labels, source.class_names
    if labels is None and isinstance(source, ImageSource) and (found := source.class_folders()) is not None:
        labels, names = found
        shown = ", ".join(f"{name}={label}" for label, name in enumerate(names[:_NAMES_SHOWN]))
        note(f"{source.path}: labels from {len(names)} folders: {shown}{', ...' if len(names) > _NAMES_SHOWN else ''}")
    if labels is None:
        return None, None
    if renumber:
        old = sorted(set(labels))
        number = {label: place for place, label in enumerate(old)}
        names = [names[label] if names is not None and label < len(names) else str(label) for label in old]
        return [number[label] for label in labels], names
    try:
        count_classes(labels, str(source.path))
    except UserError as error:  # may be intended: part of a larger set
        note(str(error), "Warning")
    return labels, names


def make_transform(kind: str, size: tuple[int, int] | None) -> Callable[[np.ndarray, str], np.ndarray]:
    """A function uint8 [H,W,C] -> uint8 [H',W',C] with (W', H') = size.

    kind: none: the image must already have this size.
        pad: zeros around an image that is not larger; an odd remainder goes right and below.
        center-crop: the largest centred part of this aspect ratio, resized with a Lanczos filter.
    size: (width, height), or None with kind "none".
    """
    if kind != "none" and size is None:
        raise UserError(f"--transform={kind} needs --resolution")

    def none(image: np.ndarray, where: str) -> np.ndarray:
        if size is not None and image.shape[:2] != (size[1], size[0]):
            found = f"{image.shape[1]}x{image.shape[0]}"
            raise UserError(f"{where}: {found} pixels, not {size[0]}x{size[1]}; use --transform=center-crop or pad")
        return image

    def pad(image: np.ndarray, where: str) -> np.ndarray:
        right, below = size[0] - image.shape[1], size[1] - image.shape[0]
        if right < 0 or below < 0:
            found = f"{image.shape[1]}x{image.shape[0]}"
            raise UserError(f"{where}: {found} pixels do not fit in {size[0]}x{size[1]}; use --transform=center-crop")
        return np.pad(image, ((below // 2, below - below // 2), (right // 2, right - right // 2), (0, 0)))

    def center_crop(image: np.ndarray, where: str) -> np.ndarray:
        height, width = image.shape[:2]
        scale = min(width / size[0], height / size[1])
        crop_w, crop_h = max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)
        left, top = (width - crop_w) // 2, (height - crop_h) // 2
        image = image[top : top + crop_h, left : left + crop_w]
        if image.shape[:2] != (size[1], size[0]):
            image = np.asarray(_to_pil(image).resize(size, Image.Resampling.LANCZOS))
        return image if image.ndim == 3 else image[:, :, None]

    return {"none": none, "pad": pad, "center-crop": center_crop}[kind]


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2] == 1 else image))


def _entries(source, indices: list[int], transform) -> Iterator[tuple[str, bytes]]:
    """Names and contents of PNG files, all of one shape."""
    shape = None
    for position, index in enumerate(indices):
        image = transform(source.read(index).transpose(1, 2, 0), source.where(index))
        shape = shape or image.shape
        if image.shape != shape:
            raise UserError(
                f"{source.where(index)}: {list(image.shape)} (height, width, channels), while the first image gives"
                f" {list(shape)}; use --resolution and --transform, and do not mix grey and colour"
            )
        buffer = io.BytesIO()
        _to_pil(image).save(buffer, format="png", compress_level=6)
        yield f"{position // _IMAGES_PER_FOLDER:05d}/img{position:08d}.png", buffer.getvalue()


def make_dataset(
    source: str | Path,
    dest: str | Path,
    resolution: tuple[int, int] | None = None,
    transform: str = "none",
    max_images: int | None = None,
    overwrite: bool = False,
    renumber: bool = False,
) -> int:
    """Writes the zip ``dest``. Returns the number of images.

    source: folder, zip or npz.
    dest: the zip.
    resolution: (width, height). Default None, as they are.
    transform: see ``make_transform``. Default "none".
    max_images: use this many, evenly spaced. Default None, all.
    overwrite: replace an existing file. Default False.
    renumber: see ``find_labels``. Default False.

    Equal sources give equal files, byte for byte.
    """
    dest = Path(dest)
    if dest.suffix.lower() != ".zip":
        raise UserError(f"--dest={dest}: must end in .zip")
    if dest.exists() and not overwrite:
        raise UserError(f"--dest={dest} exists; remove it or pass --overwrite=True")
    check_destination(dest, "--dest")
    apply = make_transform(transform, resolution)
    images = open_source(source)
    all_labels, class_names = find_labels(images, renumber)
    remove_leftovers(dest.parent)
    indices = evenly_spaced(len(images), max_images)
    names = []
    with atomic_path(dest) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        bar = progress_bar(len(indices), iterable=_entries(images, indices, apply), unit="img", desc=dest.name)
        for name, data in bar:
            archive.writestr(zipfile.ZipInfo(name), data)
            names.append(name)
        content = {"labels": None}
        if all_labels is not None:
            content["labels"] = [[name, all_labels[index]] for name, index in zip(names, indices, strict=True)]
        if class_names is not None:
            content["class_names"] = class_names
        archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps(content))
    if isinstance(images, ImageSource):
        images.report_conversions()
    return len(indices)


GROUPS = {
    "Images": "source resolution transform pad max_images",
    "Output": "dest overwrite renumber",
}


@click.command(cls=Command, groups=GROUPS)
@click.option(
    "--source", type=PATH, required=True, metavar="PATH", help="Folder, zip or npz (images or x, labels or y)"
)
@click.option("--dest", type=PATH, required=True, metavar="ZIP", help="The dataset zip to write")
@click.option("--resolution", metavar="N|WxH", default=None, help="Size of the output images")
@click.option(
    "--transform",
    type=click.Choice(["none", "center-crop", "pad"]),
    default="none",
    show_default=True,
    help="How images get this size",
)
@click.option("--pad", type=bool, default=False, show_default=True, help="The same as --transform=pad")
@click.option(
    "--max_images", "--max-images", type=click.IntRange(min=1), default=None, help="Use N images, evenly spaced"
)
@click.option("--overwrite", type=bool, default=False, show_default=True, help="Replace an existing --dest")
@click.option("--renumber", type=bool, default=False, show_default=True, help="Renumber the classes 0, 1, 2, ...")
def main(source, dest, resolution, transform, pad, max_images, overwrite, renumber):
    """Makes a dataset zip in EDM's layout from an npz file, a folder or a zip of images."""
    if pad and transform == "center-crop":
        raise UserError("--pad and --transform=center-crop exclude each other; choose one")
    transform = "pad" if pad else transform
    with raised_sigterm(also=(signal.SIGINT,)):  # leaves no partly written file
        count = make_dataset(source, dest, parse_resolution(resolution), transform, max_images, overwrite, renumber)
    print(f"{dest}: {count} images")


if __name__ == "__main__":
    main()

"""Images in folders and archives, read and written."""

import hashlib
import os
import re
import struct
import sys
import threading
import zipfile
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from torch_utils import distributed
from torch_utils.errors import UserError, parse_json, printable
from torch_utils.files import atomic_path
from torch_utils.image_decoding import decode_image, header_channels, open_image
from torch_utils.image_listing import describe, kind_of, list_folder, list_zip
from torch_utils.prompts import seed_of
from torch_utils.zip_file import check_member

_MAX_FILE_BYTES = 1 << 28  # of one unpacked image file, against zip bombs
_MOST_CLASSES = 1 << 16  # some of them may have no image
_LABEL_FILE = "dataset.json"
_SAMPLING_FILE = "sampling.json"  # of sample.py
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last chunk: no data, its name, its CRC


def is_whole_png(path: Path) -> bool:
    """Whether a file exists and ends like a PNG, which it may not after a power failure."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            return file.read() == _PNG_END
    except OSError:  # missing or too short
        return False


class ImageSource:
    """All images of a folder (recursively, links followed) or of a zip, sorted by relative name.

    path: the folder or zip.
    channels: 1 or 3, see ``expect``. Default None: if uniform, 1 if all images are grey, else 3.
    uniform: all images must have one shape. Default True.

    Formats and modes: torch_utils/image_decoding.py. Which files count:
    torch_utils/image_listing.py. The first process prints how many files were ignored. Beside a
    ``sampling.json`` of sample.py, ``grid.png`` and the files in ``inters/`` are not samples and
    are ignored.

    Attributes: ``names``, relative names with forward slashes; ``ignored``, number of ignored files
    by kind; ``records``, names of all ``sampling.json``; ``labels``, class of each image from
    ``dataset.json`` (``{"labels": [["00000/img.png", 3], ...]}``), or None; ``class_names``, names
    of the classes (``"class_names"`` in the same file), or None; ``shape``, (C, H, W) of all
    images, or of the first with ``uniform=False``; ``conversions``, number of converted images read
    so far, by kind.

    ``read`` may be called from threads and from forked workers.
    """

    def __init__(self, path: str | Path, channels: int | None = None, uniform: bool = True):
        self.path = Path(path)
        self.uniform = uniform
        self.conversions: Counter = Counter()
        self._sizes: dict[int, tuple[int, int]] = {}
        self._zip: zipfile.ZipFile | None = None
        self._zip_owner: int | None = None
        self._members: dict[str, zipfile.ZipInfo] = {}
        if not self.path.exists():
            raise UserError(f"{self.path}: no such folder or zip file")
        self.is_zip = not self.path.is_dir()
        if self.is_zip:
            if self.path.suffix.lower() != ".zip":
                raise UserError(f"{self.path}: expected a folder or a .zip of images")
            self._members, self.ignored = list_zip(self._open_zip())
            found = list(self._members)
            if sum(entry.compress_size for entry in self._members.values()) > self.path.stat().st_size:
                raise UserError(f"{self.path}: cannot be read (its members claim more bytes than the archive has)")
        else:
            found, self.ignored = list_folder(self.path)
        self.expect(channels)
        self._choose(found)
        self.labels, self.class_names = self._read_labels()

    def _choose(self, found: list[str]) -> None:
        """Sorts the files into images, records, the label file, and others, which are counted."""
        names, rest = [], []
        for name in found:
            kind = kind_of(name)
            if kind is None:
                names.append(name)
            else:
                rest.append((name, kind))
        self.records = sorted(name for name, kind in rest if _last(name) == _SAMPLING_FILE and kind == ".json")
        runs = {record.removesuffix(_SAMPLING_FILE) for record in self.records}
        grids = {f"{run}grid.png" for run in runs}.intersection(names)
        inters = {f"{run}inters/" for run in runs}
        strips = {name for name in names if name.removesuffix(_last(name)) in inters}
        self.names = sorted(set(names) - grids - strips)
        self._wrapper = _common_folder(self.names)
        folders = [self._wrapper[: at + 1] for at, letter in enumerate(self._wrapper) if letter == "/"]
        places = [f"{folder}{_LABEL_FILE}" for folder in ["", *folders]]
        kinds = dict(rest)
        self._label_file = next((place for place in places if place in kinds), None)
        known = {*self.records, self._label_file}
        self.ignored.update(kind for name, kind in rest if name not in known)
        self.ignored.update(["grid.png of sample.py"] * len(grids) + ["in inters/ of sample.py"] * len(strips))
        left_out = describe(self.ignored)
        if not self.names:
            raise UserError(f"{self.path}: holds no image" + (f"; {left_out}" if left_out else ""))
        if left_out:
            note(f"{self.path}: {left_out}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int]:
        if self._shape is None:
            if self.channels is None and self.uniform:
                self.channels = self.common_channels()
            self._shape = tuple(self._decode(0, Counter()).shape)
        return self._shape

    @property
    def num_classes(self) -> int:
        """The largest label + 1; 0 without labels."""
        return 0 if self.labels is None else max(self.labels) + 1

    def expect(self, channels: int | None, reason: str = "") -> None:
        """Sets the number of channels for reading.

        channels: 3: grey is repeated. 1: RGB becomes grey if its channels are equal, else it is
            refused. None: as the images are.
        reason: why, for the error. Default "": the other images.
        """
        self.channels, self._reason = channels, reason or "as the others are"
        self._shape: tuple[int, int, int] | None = None

    def common_channels(self) -> int:
        """1 if all images are grey, else 3. Reads headers up to the first RGB image."""
        return 3 if any(self._header_channels(name) == 3 for name in self.names) else 1

    def read(self, index: int, done: Counter | None = None) -> np.ndarray:
        """uint8 [C,H,W]. UserError with the name of a file that is unreadable or unlike the others.

        done: counts conversions, for a thread or another process. Default: ``conversions``.
        """
        expected = self.shape if self.uniform else None
        array = self._decode(index, self.conversions if done is None else done)
        if expected is not None and array.shape[1:] != expected[1:]:
            raise UserError(
                f"{self.where(index)}: {array.shape[2]}x{array.shape[1]} pixels, while {self.names[0]} has"
                f" {expected[2]}x{expected[1]}; all images must have one size"
            )
        return array

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of an image."""
        if index not in self._sizes:
            self._sizes[index] = tuple(self._decode(index, Counter()).shape[1:])
        return self._sizes[index]

    def where(self, index: int) -> str:
        """The name of an image, for messages."""
        return self._where(self.names[index])

    def fingerprint(self, index: int) -> str:
        """Name, size and CRC (zip) or modification time (folder) of an image."""
        name = self.names[index]
        if self.is_zip:
            entry = self._members[name]
            return f"{name}|{entry.file_size}|{entry.CRC:08x}"
        status = (self.path / name).stat()
        return f"{name}|{status.st_size}|{status.st_mtime_ns}"

    def digest(self) -> str:
        """Hash of the names and versions of all images."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(f"{self.fingerprint(index)}\n".encode())
        return digest.hexdigest()

    def by_seed(self) -> tuple[dict[int, int], list[str]]:
        """The index of the image of each seed, and the names that are not numbers.

        Raises UserError for two images with one number.
        """
        found: dict[int, int] = {}
        unnumbered = []
        for index, name in enumerate(self.names):
            seed = seed_of(name)
            if seed is None:
                unnumbered.append(name)
            elif seed in found:
                raise UserError(
                    f"{self.path}: {self.names[found[seed]]} and {name} have the same seed number; pass the folder of"
                    " one set of samples (or, if all are meant, a zip of them by tools/dataset_tool.py)"
                )
            else:
                found[seed] = index
        return found, unnumbered

    def check_one_run(self) -> None:
        """Raises UserError if the images are from several runs of sample.py."""
        if len(self.records) > 1:
            raise UserError(
                f"{self.path}: holds the samples of {len(self.records)} runs ({', '.join(self.records[:3])}"
                f"{', ...' if len(self.records) > 3 else ''}); pass the folder of one"
            )

    def class_folders(self) -> tuple[list[int], list[str]] | None:
        """Labels and class names from the folders of the first level, in the order of their names.

        None if an image is outside such a folder, if there is only one folder, or if the folders
        only divide a large set, as 00001/img00001234.png of a dataset zip and 001000/001234.png of
        sample.py. A folder around all images does not count.
        """
        parts = [name.removeprefix(self._wrapper).split("/") for name in self.names]
        names = sorted({part[0] for part in parts})
        if len(names) < 2 or min(map(len, parts)) < 2 or all(map(_is_numbered_block, self.names)):
            return None
        return [bisect_left(names, part[0]) for part in parts], names

    def report_conversions(self, shared: bool = False) -> None:
        """Prints the conversions so far. shared: sum over all processes. Default False."""
        total = sum(distributed.gather_objects(self.conversions), Counter()) if shared else self.conversions
        if total:
            note(f"{self.path}: images {', '.join(f'{kind}: {count}' for kind, count in sorted(total.items()))}")

    def _where(self, name: str) -> str:
        return f"{self.path}:{name}" if self.is_zip else str(self.path / name)

    def _decode(self, index: int, done: Counter) -> np.ndarray:
        with self._opened(self.names[index]) as file:
            data = file.read()
        array = decode_image(data, self.where(index), done)
        if len(array) == 1 and self.channels == 3:
            done["grey, made RGB"] += 1
            return np.repeat(array, 3, axis=0)
        if len(array) == 1 or self.channels != 1:
            return array
        if not (array == array[:1]).all():
            raise UserError(f"{self.where(index)}: RGB image, expected grey-scale, {self._reason}")
        done["RGB with equal channels, made grey"] += 1
        return array[:1]

    def header(self, index: int) -> dict[str, str]:
        """Format, mode and size of an image, without decoding it."""
        name = self.names[index]
        with self._opened(name) as file:
            image = open_image(file, self._where(name))
            return {"format": image.format, "mode": image.mode, "size": f"{image.width}x{image.height}"}

    def _header_channels(self, name: str) -> int:
        with self._opened(name) as file:
            return header_channels(file, self._where(name))

    def _open_zip(self) -> zipfile.ZipFile:
        if self._zip is None or self._zip_owner != os.getpid():  # a forked child needs its own file offset
            try:
                self._zip = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as exc:
                raise UserError(f"{self.path}: not a readable zip file ({exc})") from None
            self._zip_owner = os.getpid()
        return self._zip

    @contextmanager
    def _opened(self, name: str, most: int = _MAX_FILE_BYTES) -> Iterator:
        """The open file, of at most ``most`` bytes. Raises UserError with its name."""
        try:
            entry = self._members[name] if self.is_zip else None
            size = entry.file_size if self.is_zip else (self.path / name).stat().st_size
            if size > most:
                raise UserError(f"{self._where(name)}: unpacks to {size} bytes; at most {most} are read")
            if not self.is_zip:
                with (self.path / name).open("rb") as file:
                    yield file
                return
            check_member(self._open_zip(), entry)
            with self._open_zip().open(entry) as file:
                yield file
        except UserError:
            raise
        except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error, struct.error) as exc:
            # Cut, since the message may quote the file.
            raise UserError(f"{self._where(name)}: cannot be read ({str(exc)[:200]})") from None

    def _read_labels(self) -> tuple[list[int] | None, list[str] | None]:
        if self._label_file is None:
            return None, None
        where = self._where(self._label_file)
        folder = self._label_file.removesuffix(_LABEL_FILE)
        try:
            with self._opened(self._label_file, (1 << 20) + len(self) * 1024) as file:
                text = file.read()
            content = parse_json(text)
            pairs = content.get("labels") if isinstance(content, dict) else content
            if pairs is None:
                return None, None
            table = {folder + str(name).replace("\\", "/"): label for name, label in pairs}
        except (UnicodeDecodeError, TypeError, ValueError) as exc:
            if isinstance(exc, UserError):
                raise
            raise UserError(f'{where}: expected {{"labels": [["name.png", 3], ...]}} ({exc})') from None
        labels = []
        for name in self.names:
            label = table.get(name)
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < 1 << 63:
                raise UserError(f"{where}: the label of {name} is {label!r:.40}; expected an integer from 0 up")
            labels.append(label)
        names = content.get("class_names") if isinstance(content, dict) else None
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise UserError(f'{where}: "class_names" has to be a list of texts')
        return labels, names

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None, "_zip_owner": None}


def note(message: str, kind: str = "Note") -> None:
    """Prints one line to stderr, by the first process. Unprintable characters are escaped."""
    if distributed.rank() == 0:
        print(f"{kind}: {printable(message)}", file=sys.stderr)


def count_classes(labels: Sequence[int], where: str, gaps: bool = False) -> int:
    """The largest label + 1. UserError if classes in between have no images.

    labels: of all images.
    where: name of the set, for messages.
    gaps: allow classes without images, for a part of a larger set. Default False.
    """
    present = set(labels)
    count = max(present) + 1
    if len(present) < count and not (gaps and count <= _MOST_CLASSES):
        missing = next(label for label in range(count) if label not in present)
        raise UserError(
            f"{where}: the labels go up to {count - 1}, but {len(present)} of these {count} classes have images (the"
            f" first without is {missing}); number them 0, 1, 2, ...: tools/dataset_tool.py --renumber=True"
        )
    return count


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _common_folder(names: list[str]) -> str:
    """The folder, with its slash, that contains all these sorted names; "" if there is none."""
    if not names:
        return ""
    common = os.path.commonprefix([names[0], names[-1]])
    return common[: common.rfind("/") + 1]


def _is_numbered_block(name: str) -> bool:
    match = re.fullmatch(r"(?:.*/)?(\d{5,6})/(?:img)?(\d{6,8})\.\w+", name)
    return match is not None and int(match[1]) in (int(match[2]) // 1000, int(match[2]) // 1000 * 1000)


def evenly_spaced(total: int, count: int | None) -> list[int]:
    """``count`` of ``total`` indices, evenly spaced, since files are often sorted by class.

    count: default None or more than total: all.
    """
    count = total if count is None else min(int(count), total)
    return [i * total // count for i in range(count)]


def load_array(source: ImageSource | str | Path, max_images: int | None = None) -> np.ndarray:
    """uint8 [N,C,H,W]: all images, or ``max_images`` evenly spaced ones, in memory."""
    if not isinstance(source, ImageSource):
        source = ImageSource(source)
    if max_images is not None and max_images < 1:
        raise UserError(f"max_images={max_images}: must be at least 1")
    indices = evenly_spaced(len(source), max_images)
    array = np.empty((len(indices), *source.shape), dtype=np.uint8)
    for row, index in enumerate(indices):
        array[row] = source.read(index)
    source.report_conversions()
    return array


def paired(first: ImageSource, second: ImageSource) -> list[tuple[int, int]]:
    """Indices of the images of two sources that have the same name, in the order of the first.

    Names count with their folders, except one around all images, and without extension. Raises
    UserError unless every image has exactly one partner.
    """
    found: list[dict[str, int]] = []
    for source in (first, second):
        names: dict[str, int] = {}
        for index, name in enumerate(source.names):
            stem = str(PurePosixPath(name.removeprefix(source._wrapper)).with_suffix(""))
            if stem in names:
                both = f"{source.names[names[stem]]} and {name}"
                raise UserError(f"{source.path}: {both} have the same name without extension; pairs need one each")
            names[stem] = index
        found.append(names)
    mine, others = found
    for source, other, lonely in (
        (first, second, [name for name in mine if name not in others]),
        (second, first, [name for name in others if name not in mine]),
    ):
        if lonely:
            raise UserError(
                f"{source.path}: {len(lonely)} of {len(source)} images have no partner of the same name in"
                f" {other.path} ({', '.join(lonely[:3])}{', ...' if len(lonely) > 3 else ''})"
            )
    return [(index, others[name]) for name, index in mine.items()]


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> uint8, on the same device, rounded as in EDM and clipped."""
    return (images.detach() * 127.5 + 128).clip(0, 255).to(torch.uint8)


def from_uint8(pixels) -> torch.Tensor:
    """uint8 pixels, an array or tensor -> float32 tensor in [-1, 1]."""
    return torch.as_tensor(pixels).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images [B,C,H,W], in [-1, 1] or from ``to_pixels`` -> uint8 array [B,H,W,C].

    The conversion runs on the images' device, so that only bytes are copied.
    """
    pixels = images if images.dtype == torch.uint8 else to_pixels(images)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())


def image_grid(images: np.ndarray, columns: int, pad: int = 2, fill: int = 255) -> np.ndarray:
    """uint8 [N,H,W,C] -> one uint8 image [H',W',C], row by row.

    columns: images per row.
    pad: pixels between the images. Default 2.
    fill: their value. Default 255.
    """
    count, height, width, channels = images.shape
    if count < 1 or columns < 1:
        raise UserError(f"a grid needs at least one image and one column, got {count} and {columns}")
    columns = min(columns, count)
    rows = -(-count // columns)
    shape = (rows * (height + pad) - pad, columns * (width + pad) - pad, channels)
    grid = np.full(shape, fill, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + pad), index % columns * (width + pad)
        grid[top : top + height, left : left + width] = image
    return grid


def save_image(array: np.ndarray, path: str | Path) -> None:
    """Writes uint8 [H,W], [H,W,1] (grey) or [H,W,3] (RGB) as PNG, atomically; makes the folder."""
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise UserError(f"{path}: cannot write {array.dtype} {list(array.shape)} as PNG; expected uint8 grey or RGB")
    with atomic_path(path, durable=False) as temporary:
        try:
            Image.fromarray(array).save(temporary, format="PNG")
        except OSError as exc:
            raise UserError(f"cannot write {path}: {exc.strerror or exc}") from None


class ImageWriter:
    """Writes PNG files in background threads.

    threads: number of threads. Default 4.
    capacity: images that may wait. ``submit`` blocks if there are more. Default 256.

    Leaving the context waits for all files and raises the first error of a thread. ``submit``
    raises it if it is already known.
    """

    def __init__(self, threads: int = 4, capacity: int = 256):
        if threads < 1 or capacity < 1:
            raise UserError(f"ImageWriter needs at least one thread and room for one image, got {threads}, {capacity}")
        self._error: BaseException | None = None
        self._room = threading.Semaphore(threads + capacity)
        self._pool = ThreadPoolExecutor(threads)

    def submit(self, array: np.ndarray, path: str | Path) -> None:
        """Queues uint8 [H,W,C] to be written to ``path``. Do not change the array afterwards."""
        self._raise_error()
        self._room.acquire()
        self._pool.submit(self._write, array, path)

    def close(self) -> None:
        """Waits until all files are written and ends the threads. Raises the first error."""
        self._pool.shutdown()
        self._raise_error()

    def _write(self, array, path) -> None:
        try:
            if self._error is None:
                save_image(array, path)
        except BaseException as exc:  # raised again in the caller's thread
            self._error = self._error or exc
        finally:
            self._room.release()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, kind, value, traceback) -> None:
        try:
            self.close()
        except Exception:
            if value is None:  # an error of the block has priority
                raise

"""Images in: folders and zips of PNG and JPEG files, with the labels of EDM's ``dataset.json``; atomic files out."""

import errno
import io
import os
import re
import secrets
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from torch_utils.errors import UserError, parse_json

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg")
_CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3}  # file mode -> channels it is read as
_MAX_FILE_BYTES = 1 << 28  # of one zip entry, unpacked: a guard against zip bombs
_LABEL_FILE = "dataset.json"
_SAMPLING_FILE = "sampling.json"  # of sample.py


_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last chunk: no data, its name, its CRC
_LEFTOVER = re.compile(r"-[0-9a-f]{12}\.part$")
# What a full, protected or failing disk says, whoever meets it; other errors in the block of atomic_path are its own.
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM})
_LEFT_S = 3600.0  # a temporary file that nobody has written to for so long belongs to a program that was killed


@contextmanager
def atomic_path(dest: str | Path, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside ``dest`` that becomes ``dest`` when the block ends well and vanishes when not.

    durable: the contents reach the disk before the name does, so that a power cut leaves the old file or the new one;
    False for many small files that can be made again. Raises UserError where the file cannot be written.
    """
    dest = Path(dest)
    try:
        temporary = dest.parent / f".{dest.name[:80]}-{secrets.token_hex(6)}.part"
        try:
            file = temporary.open("xb")
        except FileNotFoundError:  # asked for only now: most files go to folders that exist
            dest.parent.mkdir(parents=True, exist_ok=True)
            file = temporary.open("xb")
        with file:
            mode = os.fstat(file.fileno()).st_mode
    except OSError as exc:
        raise UserError(f"cannot write {dest}: {exc.strerror or exc}") from None
    try:
        try:
            yield temporary
        except OSError as exc:
            if exc.errno in _DISK_ERRORS:
                raise UserError(f"cannot write {dest}: {exc.strerror or exc}") from None
            raise
        try:
            os.chmod(temporary, mode)  # some writers (safetensors) put a file for the owner's eyes only in its place
            if durable:
                _sync(temporary)
            os.replace(temporary, dest)
        except OSError as exc:
            reason = "it is a folder" if dest.is_dir() else exc.strerror or exc
            raise UserError(f"cannot write {dest}: {reason}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_destination(dest: str | Path, flag: str) -> None:
    """Raises UserError, before work is done for it, where the file ``dest``, given as ``flag``, could not be written."""
    dest = Path(dest)
    if dest.is_dir():
        raise UserError(f"{flag}={dest} is a folder; name the file to write")
    place = next((parent for parent in dest.parents if parent.exists()), Path())
    if not place.is_dir() or not os.access(place, os.W_OK):
        problem = "cannot be written to" if place.is_dir() else "is a file and no folder"
        raise UserError(f"{flag}={dest}: {place} {problem}; choose another place")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def remove_leftovers(folder: str | Path) -> int:
    """Removes the temporary files that killed programs left in a folder (not below it); returns how many."""
    removed = 0
    for path in Path(folder).glob(".*.part"):
        try:
            if _LEFTOVER.search(path.name) and time.time() - path.stat().st_mtime > _LEFT_S:
                path.unlink()
                removed += 1
        except FileNotFoundError:
            continue  # another process was faster
        except OSError as exc:
            raise UserError(f"cannot remove {path}: {exc.strerror or exc}") from None
    return removed


def decode_image(data: bytes, name: str) -> np.ndarray:
    """The bytes of a PNG or JPEG file -> uint8 [C,H,W] with C = 1 (grey) or 3 (RGB, palette).

    Raises UserError, naming the file, for anything that is not such an image: truncated files, 16-bit or transparent
    images, images beyond Pillow's decompression-bomb limit.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):  # Pillow itself only warns
                raise Image.DecompressionBombError
            channels = _CHANNELS.get(image.mode)
            if channels is None or "transparency" in image.info:
                mode = image.mode if channels is None else f"{image.mode} with transparency"
                raise UserError(f"{name}: image mode {mode} is not supported; convert it to 8-bit grey or RGB")
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
    except Image.DecompressionBombError:
        raise UserError(f"{name}: the image claims more than {Image.MAX_IMAGE_PIXELS} pixels; refused") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a readable PNG or JPEG image; remove or replace it") from None
    except (OSError, SyntaxError, ValueError, EOFError) as exc:  # what Pillow raises on damaged files
        if isinstance(exc, UserError):
            raise
        raise UserError(f"{name}: damaged image ({exc}); remove or replace it") from None
    if array.ndim == 2:
        array = array[:, :, None]
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def is_whole_png(path: Path) -> bool:
    """Whether a file is there and ends as a PNG does; a power cut can leave one that is empty or broken off."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            return file.read() == _PNG_END
    except OSError:  # not there, or shorter than that
        return False


class ImageSource:
    """All PNG and JPEG files of a folder (recursively) or of a zip, sorted by relative name.

    Beside a ``sampling.json`` of sample.py, ``grid.png`` and what lies in ``inters/`` accompany the samples: left out.

    names      relative names, with forward slashes
    labels     class of each image from ``dataset.json`` (``{"labels": [["00000/img.png", 3], ...]}``), or None
    shape      (C, H, W) of the first image, which all others must have; ``uniform=False`` lifts that
    channels   1 or 3: what every image must have (default: what the first one has)

    ``read`` may be called from threads and from forked workers.
    """

    def __init__(self, path: str | Path, channels: int | None = None, uniform: bool = True):
        self.path = Path(path)
        self.channels = channels
        self.uniform = uniform
        self._zip: zipfile.ZipFile | None = None
        self._zip_owner: int | None = None
        self._shape: tuple[int, int, int] | None = None
        if not self.path.exists():
            raise UserError(f"{self.path}: no such folder or zip file")
        if self.path.is_dir():
            self.is_zip = False
            found = (p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())
        elif self.path.suffix.lower() == ".zip":
            self.is_zip = True
            found = (entry.filename for entry in self._open_zip().infolist() if not entry.filename.endswith("/"))
        else:
            raise UserError(f"{self.path}: expected a folder or a .zip of PNG or JPEG images")
        found = list(found)
        self.names = sorted(name for name in found if name.lower().endswith(IMAGE_EXTENSIONS))
        if _SAMPLING_FILE in found:
            self.names = [name for name in self.names if name != "grid.png" and not name.startswith("inters/")]
        if not self.names:
            raise UserError(f"{self.path}: holds no PNG or JPEG image")
        self.labels = self._read_labels()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int]:
        if self._shape is None:
            self._shape = tuple(self._decode(0).shape)
        return self._shape

    @property
    def num_classes(self) -> int:
        """One more than the largest label; 0 without labels."""
        return 0 if self.labels is None else max(self.labels) + 1

    def read(self, index: int) -> np.ndarray:
        """uint8 [C,H,W]. Raises UserError, naming the file, where it is unreadable or unlike the others."""
        array = self._decode(index)
        expected = self.channels or (self.shape[0] if self.uniform else None)
        if expected is not None and array.shape[0] != expected:
            raise UserError(f"{self.where(index)}: {_colours(array.shape[0])}, expected {_colours(expected)}")
        if self.uniform and array.shape[1:] != self.shape[1:]:
            raise UserError(
                f"{self.where(index)}: {array.shape[2]}x{array.shape[1]} pixels, while {self.names[0]} has"
                f" {self.shape[2]}x{self.shape[1]}; all images must have one size"
            )
        return array

    def where(self, index: int) -> str:
        """How to name an image to a person."""
        return f"{self.path}:{self.names[index]}" if self.is_zip else str(self.path / self.names[index])

    def fingerprint(self, index: int) -> str:
        """Name, size and CRC (zip) or modification time (folder) of an image: changes when the file is replaced."""
        name = self.names[index]
        if self.is_zip:
            entry = self._open_zip().getinfo(name)
            return f"{name}|{entry.file_size}|{entry.CRC:08x}"
        status = (self.path / name).stat()
        return f"{name}|{status.st_size}|{status.st_mtime_ns}"

    def _decode(self, index: int) -> np.ndarray:
        return decode_image(self._read_bytes(self.names[index]), self.where(index))

    def _open_zip(self) -> zipfile.ZipFile:
        if self._zip is None or self._zip_owner != os.getpid():  # a forked child must not share the file offset
            try:
                self._zip = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as exc:
                raise UserError(f"{self.path}: not a readable zip file ({exc})") from None
            self._zip_owner = os.getpid()
        return self._zip

    def _read_bytes(self, name: str) -> bytes:
        where = f"{self.path}:{name}" if self.is_zip else str(self.path / name)
        try:
            if not self.is_zip:
                return (self.path / name).read_bytes()
            entry = self._open_zip().getinfo(name)
            if entry.file_size > _MAX_FILE_BYTES:
                raise UserError(f"{where}: unpacks to {entry.file_size} bytes; refused")
            if entry.compress_size > self.path.stat().st_size:  # zipfile would make room for it all first
                raise UserError(f"{where}: cannot be read (it claims more bytes than the archive has)")
            return self._open_zip().read(entry)
        except UserError:
            raise
        except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error, struct.error) as exc:
            raise UserError(f"{where}: cannot be read ({str(exc)[:200]})") from None  # it may quote the file

    def _read_labels(self) -> list[int] | None:
        listed = self._open_zip().namelist() if self.is_zip else os.listdir(self.path)
        if _LABEL_FILE not in listed:
            return None
        where = f"{self.path}:{_LABEL_FILE}" if self.is_zip else str(self.path / _LABEL_FILE)
        try:
            content = parse_json(self._read_bytes(_LABEL_FILE))
            pairs = content.get("labels") if isinstance(content, dict) else content
            if pairs is None:
                return None
            table = {str(name).replace("\\", "/"): label for name, label in pairs}
        except (UnicodeDecodeError, TypeError, ValueError) as exc:
            if isinstance(exc, UserError):
                raise
            raise UserError(f'{where}: expected {{"labels": [["name.png", 3], ...]}} ({exc})') from None
        labels = []
        for name in self.names:
            label = table.get(name)
            if isinstance(label, bool) or not isinstance(label, int) or label < 0:
                raise UserError(f"{where}: the label of {name} is {label!r}; expected an integer from 0 up")
            labels.append(label)
        return labels

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None, "_zip_owner": None}


def _colours(channels: int) -> str:
    return "grey-scale" if channels == 1 else "RGB" if channels == 3 else f"{channels} channels"


def evenly_spaced(total: int, count: int | None) -> list[int]:
    """``count`` (default and at most: all) of ``total`` indices, spread evenly: files are often sorted by class."""
    count = total if count is None else min(int(count), total)
    return [i * total // count for i in range(count)]


def load_array(source: ImageSource | str | Path, max_images: int | None = None) -> np.ndarray:
    """uint8 [N,C,H,W]: all images, or ``max_images`` evenly spaced ones. For sets that fit in memory."""
    if not isinstance(source, ImageSource):
        source = ImageSource(source)
    if max_images is not None and max_images < 1:
        raise UserError(f"max_images={max_images}: at least one image is needed")
    indices = evenly_spaced(len(source), max_images)
    array = np.empty((len(indices), *source.shape), dtype=np.uint8)
    for row, index in enumerate(indices):
        array[row] = source.read(index)
    return array

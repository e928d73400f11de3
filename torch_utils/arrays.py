"""NumPy archives from others, read as plain numbers and with bounded size."""

import io
import math
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from torch_utils.errors import UserError
from torch_utils.file_kind import explain
from torch_utils.files import atomic_path
from torch_utils.zip_file import open_zip, read_member

LEAST_ROOM, MOST_GROWTH = 1 << 26, 20  # a file may unpack to this many bytes + this many times its own size


def read_npz(path: str | Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an npz file. Pickled objects are refused.

    path: the file.
    names: arrays to read, if present. Default None: all.

    Unpacks at most 64 MiB plus twenty times the size of the file: a few bytes can announce
    terabytes, and 260 KB can hold 256 MiB of zeros. Raises UserError with the name of a file that
    cannot be read.
    """
    try:
        room = LEAST_ROOM + MOST_GROWTH * Path(path).stat().st_size
        with open_zip(path) as archive:
            members = {name.removesuffix(".npy"): info for name, info in archive.NameToInfo.items() if _is_array(name)}
            chosen = members if names is None else {name: members[name] for name in names if name in members}
            size = sum(info.file_size for info in chosen.values())
            if size > room:
                raise ValueError(f"it unpacks to {size} bytes, far more than it holds; save it with numpy.savez")
            return {name: _read(read_member(archive, info, room), info.filename) for name, info in chosen.items()}
    except OSError as exc:
        raise UserError(f"{path}: not a readable npz file ({exc.strerror or exc})") from None
    except Exception as exc:  # a damaged archive may raise anything in zipfile, zlib and numpy
        reason = explain(path, str(exc)[:200] or type(exc).__name__, reads=("zip",))
        raise UserError(f"{path}: not a readable npz file ({reason})") from None


def npz_names(path: str | Path) -> list[str]:
    """The names of the arrays in an npz file. UserError if it is not a zip archive."""
    try:
        with open_zip(path) as archive:
            return [name.removesuffix(".npy") for name in archive.NameToInfo if _is_array(name)]
    except (OSError, ValueError, zipfile.BadZipFile) as exc:
        reason = explain(path, exc, reads=("zip",))
        raise UserError(f"{path}: not a readable npz file ({reason})") from None


def _is_array(name: str) -> bool:
    return name.endswith(".npy")


def _read(content: bytearray, name: str) -> np.ndarray:
    """The array in a .npy file."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"{name} has the unknown version {version}")
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects, which are never loaded")
    if dtype.kind not in "biufcSU" or dtype.names or dtype.subdtype:
        raise ValueError(f"{name} holds values of the kind {dtype}")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"{name} announces {list(shape)} of {dtype}, but its size differs")
    values = np.frombuffer(content, dtype=dtype, count=count, offset=file.tell())
    if dtype.kind == "U" and dtype.itemsize:  # numpy does not check that these are characters
        codes = values.view(np.dtype(np.uint32).newbyteorder(dtype.byteorder))
        if codes.size and codes.max() > sys.maxunicode:
            raise ValueError(f"{name} holds text with invalid characters")
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


def write_npz(path: str | Path, compressed: bool = False, **arrays) -> None:
    """Writes an npz file atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)

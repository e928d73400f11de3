"""Numpy archives of other people, read as plain numbers and never larger than they may be."""

import math
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from torch_utils.errors import UserError
from torch_utils.file_kind import explain

MOST_BYTES = 1 << 32  # unpacked; FID statistics and caches take far less


def read_npz(
    path: str | Path, names: Iterable[str] | None = None, most_bytes: int = MOST_BYTES
) -> dict[str, np.ndarray]:
    """The arrays of an npz file, or those of ``names`` that are in it. No pickles: objects are refused.

    Nothing is allocated that the archive does not declare to hold, and no more than ``most_bytes`` together: a few bytes of
    a damaged or hostile file can announce terabytes. Raises UserError, naming the file, where it is not such a file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): info for name, info in archive.NameToInfo.items() if _is_array(name)}
            chosen = members if names is None else {name: members[name] for name in names if name in members}
            size = sum(info.file_size for info in chosen.values())
            if size > most_bytes:
                raise UserError(f"{path}: unpacks to {size} bytes, more than the {most_bytes} that are accepted here")
            return {name: _read(archive, info) for name, info in chosen.items()}
    except UserError:
        raise
    except OSError as exc:
        raise UserError(f"{path}: not a readable npz file ({exc.strerror or exc})") from None
    except Exception as exc:  # whatever a damaged archive provokes in zipfile, zlib and numpy
        reason = explain(path, str(exc)[:200] or type(exc).__name__, reads=("zip",))
        raise UserError(f"{path}: not a readable npz file ({reason})") from None


def npz_names(path: str | Path) -> list[str]:
    """The names of the arrays in an npz file. Raises UserError where it is not a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.NameToInfo if _is_array(name)]
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as exc:
        reason = explain(path, exc, reads=("zip",))
        raise UserError(f"{path}: not a readable npz file ({reason})") from None


def _is_array(name: str) -> bool:
    return name.endswith(".npy")


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{info.filename} has the unknown version {version}")
        shape, fortran, dtype = readers[version](file)
        if dtype.hasobject:
            raise ValueError(f"{info.filename} holds pickled objects, which are never loaded")
        if dtype.kind not in "biufcSU" or dtype.names or dtype.subdtype:
            raise ValueError(f"{info.filename} holds values of the kind {dtype}")
        count = math.prod(shape)
        if min(shape, default=0) < 0 or count * dtype.itemsize != info.file_size - file.tell():
            raise ValueError(f"{info.filename} announces {list(shape)} of {dtype}, which is not what it holds")
        values = np.frombuffer(bytearray(file.read()), dtype=dtype, count=count)
    if dtype.kind == "U" and dtype.itemsize:  # numpy itself trusts that these are characters
        codes = values.view(np.dtype(np.uint32).newbyteorder(dtype.byteorder))
        if codes.size and codes.max() > sys.maxunicode:
            raise ValueError(f"{info.filename} holds text that is none")
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)

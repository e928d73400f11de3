"""Zip archives from others: the size to unpack is bounded before unpacking."""

import os
import zipfile
from contextlib import contextmanager

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MOST_RATIO = 1032  # the largest growth of a deflate stream
_CHUNK = 1 << 20


class BadMember(ValueError):
    """A part of an archive that is refused; the message says why."""


@contextmanager
def open_zip(path_or_file):
    """The ``zipfile.ZipFile``. BadMember if zipfile does not support its directory."""
    try:
        with zipfile.ZipFile(path_or_file) as archive:
            yield archive
    except (NotImplementedError, OverflowError) as error:
        raise BadMember(f"its directory of contents cannot be used ({error})") from None


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most_bytes: int) -> bytearray:
    """The content of a stored or deflated part.

    archive, info: the archive and its entry.
    most_bytes: limit of the content, besides the size that the part announces.

    bz2 and lzma are refused: zipfile unpacks them without a limit, and 1.6 KB can hold 4 GiB.
    Raises BadMember (a ValueError) if a part is refused, and ``zipfile.BadZipFile`` if it is
    damaged.
    """
    check_member(archive, info, most_bytes)
    content = bytearray()
    with archive.open(info) as file:
        while chunk := file.read(min(_CHUNK, info.file_size + 1 - len(content))):
            content += chunk
    if len(content) != info.file_size:
        raise BadMember(f"the part {info.filename} has {len(content)} bytes instead of {info.file_size}")
    return content


def check_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most_bytes: int | None = None) -> None:
    """Raises BadMember if ``read_member`` would refuse the part."""
    if info.compress_type not in _METHODS:
        name = zipfile.compressor_names.get(info.compress_type, info.compress_type)
        raise BadMember(f"the part {info.filename} is packed with {name}; only stored and deflated parts are read")
    if info.flag_bits & 1:
        raise BadMember(f"the part {info.filename} is encrypted")
    held = os.fstat(archive.fp.fileno()).st_size if _is_file(archive.fp) else archive.fp.seek(0, os.SEEK_END)
    largest = info.compress_size * (_MOST_RATIO if info.compress_type == zipfile.ZIP_DEFLATED else 1)
    if info.compress_size > held or info.file_size > largest:
        raise BadMember(f"the part {info.filename} announces more than the file holds")
    if most_bytes is not None and info.file_size > most_bytes:
        raise BadMember(
            f"the part {info.filename} unpacks to {info.file_size} bytes, more than the {most_bytes} accepted here"
        )


def _is_file(file) -> bool:
    try:
        file.fileno()
    except (AttributeError, OSError):
        return False
    return True

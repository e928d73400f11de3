"""Zip archives of other people: what is unpacked is bounded by what is known before it is unpacked."""

import os
import zipfile
from contextlib import contextmanager

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MOST_RATIO = 1032  # no stream of deflate grows by more
_CHUNK = 1 << 20


class BadMember(ValueError):
    """A part of an archive that is not read; the message says why."""


@contextmanager
def open_zip(path_or_file):
    """The ``zipfile.ZipFile``; BadMember, too, where its directory asks for what zipfile cannot do."""
    try:
        with zipfile.ZipFile(path_or_file) as archive:
            yield archive
    except (NotImplementedError, OverflowError) as error:
        raise BadMember(f"its directory of contents cannot be used ({error})") from None


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most_bytes: int) -> bytearray:
    """The content of a part that is stored or deflated, no larger than it announces and than ``most_bytes``.

    bz2 and lzma are refused: zipfile unpacks them without a limit, whatever size they announce, and 1.6 KB can hold
    4 GiB. Raises BadMember (a ValueError) where a part is refused, and ``zipfile.BadZipFile`` where the checksum or
    anything else is wrong.
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
    """Raises BadMember where ``read_member`` would refuse to read."""
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

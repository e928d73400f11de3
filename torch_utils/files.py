"""Writing files atomically, and their checksums."""

import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch_utils.errors import UserError, parse_json

_LEFTOVER = re.compile(r"-[0-9a-f]{12}\.part$")


# Errors of a full, protected or failing disk; atomic_path passes on other errors of its block.
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM})
_LEFT_S = 3600.0  # a temporary file unchanged for so long is from a killed program


@contextmanager
def atomic_path(dest: str | Path, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside ``dest``, which becomes ``dest`` if the block succeeds.

    dest: the file to write.
    durable: write the contents to the disk before the name, so that a power failure leaves either
        the old or the new file. Default True; False for many small files that can be made again.

    If the block fails, the temporary file is removed. Raises UserError if the file cannot be
    written.
    """
    dest = Path(dest)
    try:
        temporary = dest.parent / f".{dest.name[:80]}-{secrets.token_hex(6)}.part"
        try:
            file = temporary.open("xb")
        except FileNotFoundError:  # checked only now, since most folders exist
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
            os.chmod(temporary, mode)  # some writers (safetensors) make files that only the owner may read
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
    """Raises UserError if the file ``dest``, given as ``flag``, cannot be written."""
    dest = Path(dest)
    if dest.is_dir():
        raise UserError(f"{flag}={dest} is a folder; name the file to write")
    place = next((parent for parent in dest.parents if parent.exists()), Path())
    if not place.is_dir() or not os.access(place, os.W_OK):
        problem = "cannot be written to" if place.is_dir() else "is a file, not a folder"
        raise UserError(f"{flag}={dest}: {place} {problem}; choose another place")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def remove_leftovers(folder: str | Path) -> int:
    """Removes the temporary files of killed programs in a folder. Returns how many."""
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


_CHUNK = 1 << 14  # the most that a broken connection loses


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


MOST_BYTES = 1 << 26  # far more than such files need


def read_json(path: str | Path, most_bytes: int = MOST_BYTES):
    """The content of a JSON file. Raises OSError, or ValueError if it is not JSON or too large."""
    with Path(path).open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes >> 20} MiB")
    return parse_json(data.decode("utf-8"))


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically. Bytes of file names that are not UTF-8 become escapes."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value, allow_nan: bool = True) -> None:
    """Writes a JSON file atomically. allow_nan=False: ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=2, allow_nan=allow_nan) + "\n")

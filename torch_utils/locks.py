"""Locks of files and folders between programs.

The operating system drops a lock when its process ends, so a killed program blocks nobody. Locks
work on local disks and on NFS (version 4, or 3 with its lock service). On a file system without
locks, a warning is printed and programs continue without.
"""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch_utils import distributed
from torch_utils.errors import UserError

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


def _try_lock(file) -> bool:
    """Takes an exclusive lock, which the system drops with the process. False if it is taken."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in _NO_LOCKS:
            print(f"warning: {file.name}: no locks here; do not start two commands for it at once", file=sys.stderr)
            return True
        if exc.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise
        return False
    return True


def _is_named(file, path: Path) -> bool:
    """Whether ``path`` is the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _take(path: Path):
    """The locked, open file ``path``; None if another program has the lock.

    Raises UserError if the file cannot be made.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+b")  # noqa: SIM115  (held beyond this function)
        except OSError as exc:
            raise UserError(f"cannot write {path}: {exc.strerror or exc}") from None
        if not _try_lock(file):
            file.close()
            return None
        # The previous holder removes the file at its end; then our lock is on a file without a
        # name.
        if _is_named(file, path):
            return file
        file.close()


def _release(file, path: Path) -> None:
    if os.name == "nt":  # an open file cannot be removed there, and a closed one may already be locked again
        file.close()
    else:
        path.unlink(missing_ok=True)
        file.close()


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Holds the lock file ``path`` during the block, and removes it afterwards.

    waiting: message before waiting for another holder.
    """
    announced = False
    while (file := _take(path)) is None:
        if not announced:
            print(waiting, file=sys.stderr)
            announced = True
        time.sleep(0.2)
    try:
        yield
    finally:
        _release(file, path)


@contextmanager
def held(path: Path, refusal: str) -> Iterator[None]:
    """``locked`` without waiting: UserError ``refusal`` if another program holds the lock."""
    file = _take(path)
    if file is None:
        raise UserError(refusal)
    try:
        yield
    finally:
        _release(file, path)


def is_held(path: Path) -> bool:
    """Whether a running program holds a lock file. Removes files of killed programs."""
    file = _take(path)
    if file is None:
        return True
    _release(file, path)
    if os.name == "nt":
        path.unlink(missing_ok=True)
    return False


@contextmanager
def only_command(path: Path, refusal: str) -> Iterator[None]:
    """``held`` for a command on several processes: the first takes the lock; a refusal ends all."""
    with ExitStack() as stack:
        with distributed.together():
            if distributed.rank() == 0:
                stack.enter_context(held(path, refusal))
        yield

"""Locks of files and folders between programs.

The operating system drops a lock when its process ends, however it ends: what a killed program leaves
behind stops nobody. Locks work on local disks and on NFS (version 4, or 3 with its lock service); a
file system without locks is pointed out, and programs then go on without.
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
    """Takes an exclusive lock that the operating system drops when the process ends; False if somebody has it."""
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
    """The locked, open file ``path``; None if another program has the lock. UserError where it cannot be made."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+b")  # noqa: SIM115  (held beyond this function)
        except OSError as exc:
            raise UserError(f"cannot write {path}: {exc.strerror or exc}") from None
        if not _try_lock(file):
            file.close()
            return None
        # The holder before us removes the file when it is done: then this lock is on a file without a name.
        if _is_named(file, path):
            return file
        file.close()


def _release(file, path: Path) -> None:
    if os.name == "nt":  # an open file cannot be removed there, and a closed one may be locked by the next already
        file.close()
    else:
        path.unlink(missing_ok=True)
        file.close()


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Holds the lock file ``path`` during the block and removes it afterwards. waiting: what is said before waiting for
    another holder."""
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
    """The same without waiting: UserError with the text ``refusal`` where another program holds the lock."""
    file = _take(path)
    if file is None:
        raise UserError(refusal)
    try:
        yield
    finally:
        _release(file, path)


def is_held(path: Path) -> bool:
    """Whether a running program holds a lock file; one that a killed program left is removed."""
    file = _take(path)
    if file is None:
        return True
    _release(file, path)
    if os.name == "nt":
        path.unlink(missing_ok=True)
    return False


@contextmanager
def only_command(path: Path, refusal: str) -> Iterator[None]:
    """``held`` for a command on several processes: the first one has the lock, a refusal ends all of them."""
    with ExitStack() as stack:
        with distributed.together():
            if distributed.rank() == 0:
                stack.enter_context(held(path, refusal))
        yield

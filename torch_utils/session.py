"""The frame of every command line: joins the process group, handles signals, ends all processes."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from torch_utils import distributed
from torch_utils.errors import Interrupted, UserError

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Yields a list that collects SIGINT and SIGTERM, which do not end the program meanwhile.

    A second Ctrl-C stops at once, except under torchrun, which sends us the terminal's Ctrl-C
    again.
    """
    received: list[int] = []

    def handler(number, frame):
        if received and number == signal.SIGINT and not distributed.launched_by_torchrun():
            raise KeyboardInterrupt
        received.append(number)

    with _handled(handler, STOPPING):
        yield received


class _Stopped(KeyboardInterrupt):
    """Raised by a signal handler. Not an ``Exception``, so that other code does not catch it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def raised_sigterm(also: tuple[int, ...] = ()) -> Iterator[None]:
    """SIGTERM raises Interrupted, so that incomplete files are removed.

    If another process has failed, its error is raised instead. also: further signals. Default ().
    """

    def handler(number, frame):
        distributed.check_peers()
        raise _Stopped(number)

    try:
        with _handled(handler, (signal.SIGTERM, *also)):
            yield
    except _Stopped as stopped:
        raise Interrupted(stopped.number) from None


@contextmanager
def _handled(handler, numbers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def any_signal(received: list[int]) -> int | None:
    """The signal that any process has received, on every process. One process asks nobody."""
    flags = [kind in received for kind in STOPPING]
    if distributed.world_size() > 1:
        flags = distributed.all_reduce_sum(torch.tensor(flags, dtype=torch.float32)).tolist()
    return next((int(kind) for kind, flag in zip(STOPPING, flags, strict=True) if flag), None)


_OF_COLLECTIVES = re.compile(r"gloo|nccl|closed by peer|reset by peer|broken pipe|socket", re.IGNORECASE)
_PATIENCE_S = 5.0  # a broken collective may be noticed before the reason for it arrives


@contextmanager
def session(device: str | None = None) -> Iterator[torch.device]:
    """Yields the device to use, as a member of the process group if torchrun started this process.

    An error in the block reaches all other processes, which then stop. An error caused by the end
    of another process is replaced by that process's error. SIGTERM raises Interrupted.
    """
    with raised_sigterm():
        try:
            yield distributed.init(device)
        except Exception as error:
            if _lost_contact(error):
                if distributed.peer_failed(within=_PATIENCE_S):
                    distributed.check_peers()
                raise UserError(f"lost the connection to another process: {str(error)[:300]}") from None
            distributed.report_failure(
                str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            )
            raise
        except KeyboardInterrupt as signalled:
            distributed.report_failure(str(signalled) or "Ctrl-C")
            raise
        finally:
            distributed.shutdown()


def _lost_contact(error: Exception) -> bool:
    """Whether a collective failed because of another process."""
    if isinstance(error, UserError) or distributed.world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _OF_COLLECTIVES.search(str(error)) is not None
    )

"""Two processes of a group, as torchrun starts them, but forked: importing torch takes seconds."""

import datetime
import multiprocessing
import os
import time
import traceback
from typing import NamedTuple

import pytest
import torch
from click.testing import CliRunner
from ports import reserve_port

from torch_utils import distributed

TIMEOUT = 120  # seconds, of an exchange: much longer than one takes, also on a busy machine
LONGEST = 300  # seconds, of both processes: far more than they take


class Both(NamedTuple):
    """Of a command in both processes, in the order of their ranks."""

    codes: list[int]
    outputs: list[str]


def _process(rank: int, port: int, work, results) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)  # a forked process does not have the threads of its parent
    results.put((rank, work(rank)))


def _run(work) -> dict:
    """{rank: what work(rank) returned}, without those that ended before."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system does not fork processes")
    context = multiprocessing.get_context("fork")
    results, found = context.Queue(), {}
    with reserve_port() as held:
        port = held.getsockname()[1]
        both = [context.Process(target=_process, args=(rank, port, work, results)) for rank in range(2)]
        for process in both:
            process.start()
        end = time.monotonic() + LONGEST
        while time.monotonic() < end and any(process.is_alive() for process in both):
            time.sleep(0.01)
            while not results.empty():  # a process with unread results does not end
                found.update([results.get()])
    hung = [rank for rank, process in enumerate(both) if process.is_alive()]
    for process in both:
        process.kill()
    assert not hung
    while not results.empty():
        found.update([results.get()])
    return found


def on_two(work, timeout: float = TIMEOUT) -> tuple[dict[int, str], float]:
    """({rank: "fine" or the error of ``work(rank)`` in a group}, seconds)."""

    def in_group(rank: int) -> str:
        distributed._TIMEOUT = datetime.timedelta(seconds=timeout)
        distributed.init("cpu")
        try:
            work(rank)
            return "fine"
        except Exception as exc:  # what the test looks at
            return f"{type(exc).__name__}: {exc}"
        finally:
            distributed.shutdown()

    started = time.perf_counter()
    return _run(in_group), time.perf_counter() - started


def call_on_two(command, *arguments) -> Both:
    """A click command with these arguments in both processes."""

    def called(_rank: int) -> tuple[int, str]:
        done = CliRunner().invoke(command, [str(argument) for argument in arguments])
        unexpected = [] if isinstance(done.exception, SystemExit | None) else traceback.format_exception(*done.exc_info)
        return done.exit_code, "".join([done.output, *unexpected])

    found = _run(called)
    assert sorted(found) == [0, 1]
    return Both(*([found[rank][part] for rank in range(2)] for part in range(2)))

"""Waiting for each other: longer than an exchange may take, but not for a process that has died."""

import datetime
import multiprocessing
import os
import time

import pytest
from ports import reserve_port

from torch_utils import distributed
from torch_utils.errors import UserError

TIMEOUT = 10  # seconds, of an exchange: much longer than one takes, also on a busy machine


def _process(rank: int, port: int, work, results) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    distributed._TIMEOUT = datetime.timedelta(seconds=TIMEOUT)
    distributed.init("cpu")
    try:
        work(rank)
        results.put((rank, "fine"))
    except Exception as exc:  # what the test looks at
        results.put((rank, f"{type(exc).__name__}: {exc}"))
    finally:
        distributed.shutdown()


def on_two(work) -> tuple[dict[int, str], float]:
    """(what became of each of two processes that do ``work(rank)``, seconds)"""
    context = multiprocessing.get_context("fork")
    results, started = context.Queue(), time.perf_counter()
    with reserve_port() as held:
        port = held.getsockname()[1]
        both = [context.Process(target=_process, args=(rank, port, work, results)) for rank in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
    hung = [rank for rank, process in enumerate(both) if process.is_alive()]
    for process in both:
        process.kill()
    assert not hung
    found = {}
    while not results.empty():
        rank, text = results.get()
        found[rank] = text
    return found, time.perf_counter() - started


def test_a_late_process_is_waited_for():
    """Longer than the timeout of an exchange; also where it comes with an error in the end."""

    def work(rank):
        if rank == 1:
            time.sleep(TIMEOUT + 3)
        distributed.agree(None)
        assert distributed.gather_objects(rank) == [0, 1]
        distributed.agree(UserError("too late") if rank == 1 else None)

    found, seconds = on_two(work)
    assert found == {0: "UserError: stopped because rank 1 failed: too late", 1: "UserError: too late"}
    assert seconds > TIMEOUT + 3


def test_a_dead_process_is_not_waited_for():
    def work(rank):
        if rank == 1:
            os._exit(3)
        distributed.agree(None)

    found, _ = on_two(work)  # which fails where a process is still waiting after a minute
    assert list(found) == [0] and not found[0].startswith("fine")


def test_without_other_processes():
    assert distributed.gather_objects(5) == [5]
    distributed.agree(None)
    with pytest.raises(UserError, match="mine"):
        distributed.agree(UserError("mine"))

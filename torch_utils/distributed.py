"""Processes of a run that watch each other: if one fails, all stop within seconds and say why.

A collective of torch waits for a missing process up to its timeout. Here every process has a TCP
connection to the first one, which the operating system closes when the process dies. The connection
carries errors (to all processes) and arrivals at barriers, which wait without a timeout.
"""

import datetime
import json
import os
import secrets
import socket
import sys
import threading
from collections import Counter
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from torch_utils.errors import UserError

_GRACE_S = 20.0  # time for the main thread to stop after a failure, since a collective may never end
_CONNECT_S = 60.0
_LONGEST = 1 << 16  # bytes of a message


class Peers:
    """The connections of this process. Made by ``join``; all methods are for the main thread."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        self.failure: str | None = None  # reason why the run has to end
        self._changed = threading.Condition()
        self._links: dict[int, socket.socket] = {}  # rank 0: to all others; others: to rank 0
        self._gone: set[int] = set()  # processes that left in good order
        self._arrived: Counter[int] = Counter()  # rank 0: number of processes at each barrier
        self._meeting, self._open = 0, 0  # this process's barrier, and the latest that all have reached
        self._closed = False
        self._sending = threading.Lock()  # threads send errors, too

    @classmethod
    def join(cls, rank: int, world_size: int) -> "Peers | None":
        """Connects all processes (a collective call). None on all if one cannot reach the first."""
        peers = cls(rank, world_size)
        address = os.environ["MASTER_ADDR"]
        offer = [None]
        listener = None
        if rank == 0:
            local = address in ("localhost", "127.0.0.1", "::1")
            family = socket.AF_INET6 if address == "::1" else socket.AF_INET
            dual = not local and socket.has_dualstack_ipv6()
            host = address if local else ""
            family = socket.AF_INET6 if dual else family
            listener = socket.create_server((host, 0), family=family, backlog=world_size, dualstack_ipv6=dual)
            offer = [(listener.getsockname()[1], secrets.token_hex(16))]
        dist.broadcast_object_list(offer, src=0)
        port, token = offer[0]
        try:
            if listener is not None:
                peers._accept(listener, token)
            else:
                link = socket.create_connection((address, port), timeout=_CONNECT_S)
                link.sendall(_encode({"token": token, "rank": rank}))
                link.settimeout(None)
                peers._links[0] = link
            connected = True
        except OSError:
            connected = False
        finally:
            if listener is not None:
                listener.close()
        everyone = [None] * world_size
        dist.all_gather_object(everyone, connected)
        if not all(everyone):
            if rank == 0:
                print("Note: processes cannot connect over TCP; a dead process is noticed late", file=sys.stderr)
            for link in peers._links.values():
                link.close()
            return None
        for other, link in peers._links.items():
            threading.Thread(target=peers._listen, args=(other, link), daemon=True).start()
        return peers

    def _accept(self, listener: socket.socket, token: str) -> None:
        """Waits for all other processes. Connections without the token are closed."""
        listener.settimeout(_CONNECT_S)
        while len(self._links) < self.world_size - 1:
            link, _ = listener.accept()
            link.settimeout(_CONNECT_S)
            try:
                hello = json.loads(_read_line(link))
                known = secrets.compare_digest(str(hello["token"]), token)
            except (ValueError, KeyError, TypeError, OSError):
                known = False
            if not known:
                link.close()
                continue
            link.settimeout(None)
            self._links[int(hello["rank"])] = link

    # Between the processes

    def _send(self, message: dict, to: int) -> None:
        with self._sending, suppress(OSError):  # the listening thread notices that it is gone
            self._links[to].sendall(_encode(message))

    def _listen(self, other: int, link: socket.socket) -> None:
        """Thread: receives the messages of another process until it closes the connection."""
        # ValueError: an incomplete message of a dead process.
        with suppress(OSError, ValueError), link.makefile("rb") as lines:
            for line in lines:
                self._take(other, json.loads(line))
        if other not in self._gone and not self._closed:
            self._fail(other, "it died without a word (killed, or out of memory?)")

    def _take(self, other: int, message: dict) -> None:
        if "error" in message:
            self._fail(int(message["rank"]), str(message["error"]))
        elif "arrived" in message:
            self._arrive(int(message["arrived"]))
        elif "open" in message:
            with self._changed:
                self._open = int(message["open"])
                self._changed.notify_all()
        elif "bye" in message:
            self._gone.add(other)

    def _arrive(self, meeting: int) -> None:
        with self._changed:
            self._arrived[meeting] += 1
            if self._arrived[meeting] < self.world_size:
                return
            del self._arrived[meeting]
            self._open = meeting
            self._changed.notify_all()
        for other in self._links:
            self._send({"open": meeting}, other)

    def _fail(self, rank: int, why: str) -> None:
        """Records the first failure. Rank 0 passes it on."""
        with self._changed:
            if self.failure is not None:
                return
            self.failure = f"stopped because rank {rank} failed: {why}"
            self._changed.notify_all()
        for other in self._links:
            if other != rank and (self.rank == 0 or rank == self.rank):
                self._send({"rank": rank, "error": why}, other)
        timer = threading.Timer(_GRACE_S, self._on_failure)
        timer.daemon = True
        timer.start()

    def _on_failure(self) -> None:
        print(f"Error [rank {self.rank}]: {self.failure}", file=sys.stderr, flush=True)
        os._exit(UserError.exit_code)

    # For the main thread

    def report(self, why: str) -> None:
        """Tells the others that this process fails. It ends after at most _GRACE_S seconds."""
        self._fail(self.rank, " ".join(why.split())[:2000])

    def check(self) -> None:
        """Raises UserError if another process has failed."""
        if self.failure is not None:
            raise UserError(self.failure)

    def wait_for_failure(self, seconds: float) -> bool:
        """Whether a failure becomes known within ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: self.failure is not None, seconds)

    def wait_for_all(self) -> None:
        """Waits without limit until all processes are here. UserError if one of them fails."""
        self.check()
        self._meeting += 1
        if self.rank == 0:
            self._arrive(self._meeting)
        else:
            self._send({"arrived": self._meeting}, 0)
        with self._changed:
            while self._open < self._meeting and self.failure is None:
                self._changed.wait(1.0)
            arrived = self._open >= self._meeting
        if not arrived:
            self.check()

    def close(self) -> None:
        """Leaves in good order. After a failure it sends nothing, since the others know."""
        self._closed = True
        for other, link in self._links.items():
            if self.failure is None:
                self._send({"bye": True}, other)
            with suppress(OSError):  # already closed by the other side
                link.shutdown(socket.SHUT_WR)  # the reading thread ends when the other side closes


def _encode(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read_line(link: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < _LONGEST:
        byte = link.recv(1)
        if not byte:
            break
        data += byte
    return data


_TIMEOUT = datetime.timedelta(minutes=30)  # of a collective of torch
_peers: Peers | None = None


def launched_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if launched_by_torchrun() else 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0")) if launched_by_torchrun() else 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if launched_by_torchrun() else 1


def pick_device(device: str | None = None) -> torch.device:
    """The device of this process.

    device: as in torch. Default None or "auto": this process's GPU, else MPS, else the CPU.
    """
    if device in (None, "", "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank() % torch.cuda.device_count())
        if torch.backends.mps.is_available() and world_size() == 1:
            return torch.device("mps")
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device={device} is not a device; use cpu, cuda, cuda:1 or mps") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device={device}: PyTorch finds no CUDA device; use --device=cpu")
        if chosen.index is None:
            chosen = torch.device("cuda", local_rank() % torch.cuda.device_count())
        elif chosen.index >= torch.cuda.device_count():
            raise UserError(f"--device={device}: there are only {torch.cuda.device_count()} CUDA devices")
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps: this machine has no MPS device; use --device=cpu")
    elif chosen.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device={device} is not supported; use cpu, cuda or mps")
    return chosen


def init(device: str | None = None) -> torch.device:
    """Joins the process group if torchrun started this process. Returns the device to use."""
    global _peers
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if launched_by_torchrun() and not dist.is_initialized():
        if os.name == "nt":
            os.environ.setdefault("USE_LIBUV", "0")
        _init_process_group(chosen)
        _peers = Peers.join(rank(), world_size()) if world_size() > 1 else None
    return chosen


def _init_process_group(device: torch.device) -> None:
    """Joins the group: tensors of GPUs travel through NCCL, everything else through gloo."""
    if device.type != "cuda":
        dist.init_process_group("gloo", timeout=_TIMEOUT)
        return
    store, own, world = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    place = f"{socket.gethostname()}/{torch.cuda.get_device_properties(device).uuid}"
    check_own_device(store, own, world, place)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=store, rank=own, world_size=world, timeout=_TIMEOUT, device_id=device
    )


def check_own_device(store: dist.Store, own: int, world: int, place: str) -> None:
    """Raises UserError on every process if two have the same device, which NCCL refuses.

    place: names the device of this process among all machines.
    """
    store.set(f"device of {own}", place)
    places = [store.get(f"device of {rank}").decode() for rank in range(world)]
    for rank, other in enumerate(places):
        if (first := places.index(other)) != rank:
            raise UserError(
                f"the processes {first} and {rank} share one GPU of {other.partition('/')[0]}: start one process for"
                " each GPU (--nproc_per_node), or use --device=cpu"
            )


def shutdown() -> None:
    global _peers
    if _peers is not None:
        _peers.close()
        _peers = None
    if dist.is_initialized():
        dist.destroy_process_group()


def check_peers() -> None:
    """Raises UserError if another process has failed. Takes no time; for loops without exchange."""
    if _peers is not None:
        _peers.check()


def report_failure(why: str) -> None:
    """Tells all other processes that this one fails.

    They end at their next communication, or after 20 seconds.
    """
    if _peers is not None:
        _peers.report(why)


def peer_failed(within: float) -> bool:
    """Whether a process has failed, or fails within the given seconds."""
    return _peers is not None and _peers.wait_for_failure(within)


def wait_for_all() -> None:
    """Waits for all processes without limit. UserError if one fails."""
    if _peers is not None:
        _peers.wait_for_all()


def barrier() -> None:
    wait_for_all()
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # through gloo, whatever the device: no stream has to be waited for


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place. Returns the tensor. Those of the CPU travel through gloo."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value, source: int = 0):
    """The value of rank ``source``, on every rank."""
    if not dist.is_initialized():
        return value
    wait_for_all()
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value, group=None) -> list:
    """The values of all ranks, in rank order, on every rank. group: default None, all processes."""
    if not dist.is_initialized():
        return [value]
    wait_for_all()
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def agree(error: Exception | None) -> None:
    """Raises on every rank if any rank has an error, so that no rank waits in a collective.

    The rank with the error does not wait for the others, which learn of it here or in
    ``check_peers``.
    """
    if error is not None and _peers is not None:
        report_failure(f"{error}")
        raise error
    errors = gather_objects(None if error is None else f"{error}")  # without connections between processes
    if error is not None:
        raise error
    for index, message in enumerate(errors):
        if message is not None:
            raise UserError(f"stopped because rank {index} failed: {message}")


@contextmanager
def together():
    """Context for work between two collectives: an error in one process stops all."""
    error = None
    try:
        yield
    except Exception as exc:  # agree() raises it on every rank
        error = exc
    agree(error)


def on_main(function, *arguments):
    """Calls a function on rank 0 once all ranks are here. All get its result or its error."""
    wait_for_all()
    result = None
    with together():
        if rank() == 0:
            result = function(*arguments)
    return broadcast_object(result)


@contextmanager
def local_main_first():
    """Context that the first process of each machine runs before the others (downloads, caches).

    If it fails there, every process fails.
    """
    if local_rank() == 0:
        with together():
            yield
    else:
        agree(None)
        yield


def print0(*args, **kwargs) -> None:
    """print on rank 0 only."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)

"""Processes of one run that know of each other: when one fails or is killed, all stop within seconds and say why.

A collective of torch would wait for a process that is gone, or far behind, up to its timeout. Here every process holds
a TCP connection to the first one, which the operating system closes the moment its owner dies. Over it go errors (to
everybody) and arrivals at a meeting point, where processes wait for each other without a timeout.
"""

import json
import os
import secrets
import socket
import sys
import threading
from collections import Counter
from contextlib import suppress

import torch.distributed as dist

from torch_utils.errors import UserError

_GRACE_S = 20.0  # for the main thread to stop by itself after a failure; it may be inside a collective that never ends
_CONNECT_S = 60.0
_LONGEST = 1 << 16  # bytes of a message


class Peers:
    """This process's end of the connections. Make it with ``join``; all methods are for the main thread."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        self.failure: str | None = None  # why the run has to end
        self._changed = threading.Condition()
        self._links: dict[int, socket.socket] = {}  # to all others on rank 0, to rank 0 on them
        self._gone: set[int] = set()  # who has left in good order
        self._arrived: Counter[int] = Counter()  # rank 0: processes at each meeting
        self._meeting, self._open = 0, 0  # the meeting this process is at, and the latest that all have reached
        self._closed = False
        self._sending = threading.Lock()  # errors are sent by threads, too

    @classmethod
    def join(cls, rank: int, world_size: int) -> "Peers | None":
        """Connects all processes; a collective call. None, on all of them, where some cannot reach the first one."""
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
                print("Note: processes cannot watch each other over TCP; a dead one is noticed late", file=sys.stderr)
            for link in peers._links.values():
                link.close()
            return None
        for other, link in peers._links.items():
            threading.Thread(target=peers._listen, args=(other, link), daemon=True).start()
        return peers

    def _accept(self, listener: socket.socket, token: str) -> None:
        """Waits for all others. Who does not know the token is not one of us."""
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
        with self._sending, suppress(OSError):  # it is gone; the listening thread learns of that
            self._links[to].sendall(_encode(message))

    def _listen(self, other: int, link: socket.socket) -> None:
        """Thread: what one other process says, until its end of the connection is closed."""
        with suppress(OSError, ValueError), link.makefile("rb") as lines:  # ValueError: half a message of one that died
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
        """The first failure counts. Rank 0 passes it on."""
        with self._changed:
            if self.failure is not None:
                return
            self.failure = f"stopped because rank {rank} failed: {why}"
            self._changed.notify_all()
        for other in self._links:
            if other != rank and (self.rank == 0 or rank == self.rank):
                self._send({"rank": rank, "error": why}, other)
        timer = threading.Timer(_GRACE_S, self._give_up)
        timer.daemon = True
        timer.start()

    def _give_up(self) -> None:
        print(f"Error [rank {self.rank}]: {self.failure}", file=sys.stderr, flush=True)
        os._exit(UserError.exit_code)

    # For the main thread

    def report(self, why: str) -> None:
        """Tells the others that this process fails; no more than _GRACE_S later it has ended."""
        self._fail(self.rank, " ".join(why.split())[:2000])

    def check(self) -> None:
        """Raises UserError once another process has failed."""
        if self.failure is not None:
            raise UserError(self.failure)

    def wait_for_failure(self, seconds: float) -> bool:
        """Whether a failure becomes known within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.failure is not None, seconds)

    def meet(self) -> None:
        """Waits, as long as it takes, until all processes are here. Raises UserError when one of them fails."""
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
        """Leaves in good order; after a failure without a word, which the others know of already."""
        self._closed = True
        for other, link in self._links.items():
            if self.failure is None:
                self._send({"bye": True}, other)
            with suppress(OSError):  # closed from there already
                link.shutdown(socket.SHUT_WR)  # the thread that reads it ends when the other side closes, too


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

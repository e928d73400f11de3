"""Real processes of the command lines, and faults that are put into them.

Every process is one that a shell could have started: own pid, files for its output, and the
environment of torchrun where there are several. They are forked from one warm process
(``python fault_tools.py``), which saves seconds of imports each.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from ports import reserve_port

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {name: name for name in ("sample", "train", "fid", "compare")}
PROGRAMS |= {"denoiser": "tools.train_denoiser", "download": "fault_tools"}
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# --------------------------------------------------------------------------------------------------
# In the tests


@dataclass
class Group:
    """The processes of one run, rank by rank."""

    launcher: "Launcher"
    pids: list[int]
    files: list[Path]
    started: float = field(default_factory=time.monotonic)

    def wait(self, timeout: float = 400) -> list[int]:
        """Exit codes as of ``subprocess`` (-9: killed). A run that hangs is killed and fails."""
        deadline = time.monotonic() + timeout
        while not all(self.launcher.poll(pid) is not None for pid in self.pids):
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {timeout} s: {self.texts()}")
            time.sleep(0.005)
        return [self.launcher.poll(pid) for pid in self.pids]

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to some ranks (default: all) that are still there."""
        there = [self.pids[rank] for rank in ranks or range(len(self.pids))]
        for pid in [pid for pid in there if self.launcher.poll(pid) is None]:
            with suppress(ProcessLookupError):  # it has ended in this moment
                os.kill(pid, number)

    def running(self) -> bool:
        return any(self.launcher.poll(pid) is None for pid in self.pids)

    def out(self, rank: int = 0) -> str:
        return self._text(rank, ".out")

    def err(self, rank: int = 0) -> str:
        return self._text(rank, ".err")

    def _text(self, rank: int, kind: str) -> str:
        path = self.files[rank].with_suffix(kind)
        return path.read_text() if path.exists() else ""  # it has hardly started

    def texts(self) -> str:
        return "\n".join(self.out(rank) + self.err(rank) for rank in range(len(self.pids)))

    def wait_until(self, condition, timeout: float = 400) -> None:
        """Until something is true; the run must not end before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.running() and time.monotonic() < deadline, self.texts()
            time.sleep(0.002)


class Launcher:
    """Starts programs. wrapper: a command that the warm process runs under (unshare ...)."""

    def __init__(self, folder: Path, wrapper: tuple[str, ...] = ()):
        self.folder, self._count, self._ended, self._held = folder, 0, {}, []
        environment = {key: value for key, value in os.environ.items() if key not in OF_TORCHRUN}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        command = [*wrapper, sys.executable, "-u", __file__]
        self._unread = b""
        self._warm = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=folder, env=environment
        )
        assert self._take() == "ready"

    @property
    def pid(self) -> int:
        return self._warm.pid

    def start(
        self, program: str, *arguments, ranks: int = 1, fault: dict | None = None, own: dict | None = None
    ) -> Group:
        """fault: see ``inject``; own: arguments of single ranks, {1: ("--model_path=...",)}."""
        pids, files, port = [], [], None
        if ranks > 1:
            self._held.append(reserve_port())
            port = self._held[-1].getsockname()[1]
        for rank in range(ranks):
            self._count += 1
            files.append(self.folder / f"{self._count:04d}-{program}.{rank}")
            values = (rank, rank, ranks, "127.0.0.1", port)
            more = (own or {}).get(rank, ())
            order = {
                "program": program,
                "arguments": [str(argument) for argument in (*arguments, *more)],
                "environment": dict(zip(OF_TORCHRUN, map(str, values), strict=True)) if ranks > 1 else {},
                "files": str(files[-1]),
                "fault": fault or {},
            }
            self._warm.stdin.write(json.dumps(order).encode() + b"\n")
            pids.append(self._answer("pid"))
        return Group(self, pids, files)

    def poll(self, pid: int) -> int | None:
        while pid not in self._ended and (self._unread or select.select([self._warm.stdout], [], [], 0)[0]):
            self._take()
        return self._ended.get(pid)

    def _answer(self, key: str) -> int:
        while (answer := self._take()).get(key) is None:
            continue
        return answer[key]

    def _take(self) -> dict:
        while b"\n" not in self._unread:
            data = os.read(self._warm.stdout.fileno(), 1 << 16)
            assert data, "the warm process has died"
            self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        answer = json.loads(line)
        if "ended" in answer:
            self._ended[answer["ended"]] = answer["code"]
        return answer

    def close(self) -> None:
        self._warm.stdin.close()
        self._warm.wait(200)
        self._warm.stdout.close()
        for held in self._held:
            held.close()


@contextmanager
def launcher(folder: Path, wrapper: tuple[str, ...] = ()):
    started = Launcher(folder, wrapper)
    try:
        yield started
    finally:
        started.close()


def usage() -> dict:
    """Of this process: resident memory in MiB, and what its open descriptors stand for."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    opened = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # closed by another thread, or that of the listing
            opened.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return {"mebibytes": pages * resource.getpagesize() / 2**20, "opened": opened}


# --------------------------------------------------------------------------------------------------
# Faults, in the process that they befall


def inject(fault: dict) -> None:
    """Arms the faults that a dict describes; with "rank", on that rank only.

    nan, boom, hang, slow: from call N of the network on: NaN in row 0, an exception, no return,
        X seconds per call.
    oom: network calls with more than N samples fail ("oom_kind": cuda or cpu).
    file_limit: no file beyond N bytes.
    kill_in_write: SIGKILL in the middle of the N-th torch.save.
    grace: seconds that peers get to stop by themselves.
    usage: no fault, but a file that gets a line with ``usage()`` at every call of the network.
    """
    if "grace" in fault:
        import_module("torch_utils.distributed")._GRACE_S = fault["grace"]
    if fault.get("rank") not in (None, int(os.environ.get("RANK", "0"))):
        return
    if "file_limit" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["file_limit"], resource.RLIM_INFINITY))
    if "kill_in_write" in fault:
        _kill_in_write(fault["kill_in_write"])
    if fault.keys() & {"nan", "boom", "hang", "slow", "oom", "usage"}:
        create_model = import_module("models").create_model
        spoilt = _spoilt(create_model, fault)
        for module in list(sys.modules.values()):  # wherever it was imported to
            if getattr(module, "create_model", None) is create_model:
                module.create_model = spoilt


def _spoilt(create_model, fault: dict):
    calls = 0

    def before(module, inputs):
        nonlocal calls
        calls += 1
        if "usage" in fault:
            with open(fault["usage"], "a") as file:
                print(json.dumps(usage()), file=file)
        time.sleep(fault.get("slow", 0))
        if calls >= fault.get("hang", calls + 1):
            print("hanging", flush=True)
            time.sleep(3600)
        if calls >= fault.get("boom", calls + 1):
            raise ZeroDivisionError("boom")
        if len(inputs[0]) > fault.get("oom", len(inputs[0])):
            import torch

            if fault.get("oom_kind") == "cpu":
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def after(module, inputs, output):
        if calls < fault.get("nan", calls + 1):
            return output
        output = output.clone()
        output[0] = float("nan")
        return output

    def load(*arguments, **more):
        net = create_model(*arguments, **more)
        net.register_forward_pre_hook(before)
        net.register_forward_hook(after)
        return net

    return load


def _kill_in_write(number: int) -> None:
    """Half of the file is on the disk when the process dies."""
    import torch

    save, count = torch.save, 0

    def dying(value, path):
        nonlocal count
        count += 1
        save(value, path)
        if count == number:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = dying


# --------------------------------------------------------------------------------------------------
# The warm process


def main(arguments: list[str]) -> None:
    """The program "download": URL, file and perhaps its SHA-256."""
    from torch_utils.download import download_file

    url, path, *sha256 = arguments
    download_file([url], Path(path), *sha256)


def _run(order: dict) -> None:
    for name, descriptor in (("/dev/null", 0), (order["files"], 1), (order["files"], 2)):
        if descriptor:
            name = str(Path(name).with_suffix(".out" if descriptor == 1 else ".err"))
        opened = os.open(name, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(order["environment"])
    inject(order["fault"])
    sys.argv = [order["program"], *order["arguments"]]
    program = import_module(PROGRAMS[order["program"]])
    if order["program"] == "download":
        program.main(order["arguments"])
    else:
        program.main()


def _fork(order: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _run(order)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _warm_up() -> None:
    """Imports everything, also what torch only imports when it is used first."""
    for name in PROGRAMS.values():
        import_module(name)
    import torch

    from models.edm import EDMDenoiser

    with torch.device("meta"):
        EDMDenoiser(8, 1, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.Adam([parameter]).step()


def _serve() -> None:
    _warm_up()
    print('"ready"', flush=True)
    children, pending, open_ = set(), b"", True
    while open_ or children:
        if open_ and select.select([0], [], [], 0.005)[0]:
            data = os.read(0, 1 << 16)
            open_ = bool(data)
            pending += data
            while b"\n" in pending:
                line, pending = pending.split(b"\n", 1)
                children.add(pid := _fork(json.loads(line)))
                print(json.dumps({"pid": pid}), flush=True)
        if not open_:
            for child in children:
                os.kill(child, signal.SIGKILL)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            children.discard(pid)
            print(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)
        time.sleep(0 if open_ else 0.005)


if __name__ == "__main__":
    sys.modules["fault_tools"] = sys.modules["__main__"]
    _serve()

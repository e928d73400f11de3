"""The same script on one process, on many GPUs and on many CPU processes.

Without torchrun there is no process group at all and every function here is trivial. Under torchrun the group uses nccl
where CUDA is present and gloo otherwise. Functions that exchange objects wait for slow processes without a limit and end
at once where one fails (torch_utils/peers.py); torch_utils/session.py is the frame that command lines run in.
"""

import datetime
import os
from contextlib import contextmanager

import torch
import torch.distributed as dist

from torch_utils.errors import UserError
from torch_utils.peers import Peers

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
    """The device this process should use. ``None`` or "auto": this process's GPU, else MPS, else the CPU."""
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
            raise UserError(f"--device={device}: this PyTorch sees no CUDA device; use --device=cpu")
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
    """Joins the process group when torchrun started us; returns the device to compute on."""
    global _peers
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if launched_by_torchrun() and not dist.is_initialized():
        if os.name == "nt":
            os.environ.setdefault("USE_LIBUV", "0")
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
        _peers = Peers.join(rank(), world_size()) if world_size() > 1 else None
    return chosen


def shutdown() -> None:
    global _peers
    if _peers is not None:
        _peers.close()
        _peers = None
    if dist.is_initialized():
        dist.destroy_process_group()


def check_peers() -> None:
    """Raises UserError where another process has failed. For loops that exchange nothing; takes no time."""
    if _peers is not None:
        _peers.check()


def report_failure(why: str) -> None:
    """Tells all other processes that this one fails: they end, too, at their next exchange or in 20 seconds."""
    if _peers is not None:
        _peers.report(why)


def peer_failed(within: float) -> bool:
    """Whether the failure of a process is known, or gets known within so many seconds."""
    return _peers is not None and _peers.wait_for_failure(within)


def meet() -> None:
    """Waits for all processes, however long they take; UserError where one fails meanwhile."""
    if _peers is not None:
        _peers.meet()


def barrier() -> None:
    meet()
    if dist.is_initialized():
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[torch.cuda.current_device()])
        else:
            dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; returns the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value, source: int = 0):
    """The value that rank ``source`` holds, on every rank."""
    if not dist.is_initialized():
        return value
    meet()
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value, group=None) -> list:
    """The values of all ranks, in rank order, on every rank. group: another one than the default of all processes."""
    if not dist.is_initialized():
        return [value]
    meet()
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def agree(error: Exception | None) -> None:
    """Raises on every rank when any rank has an error: nobody is left waiting in the next collective.

    The rank with the error does not wait for the others; they learn of it here or in ``check_peers``.
    """
    if error is not None and _peers is not None:
        report_failure(f"{error}")
        raise error
    errors = gather_objects(None if error is None else f"{error}")  # one process, or none that watches the others
    if error is not None:
        raise error
    for index, message in enumerate(errors):
        if message is not None:
            raise UserError(f"stopped because rank {index} failed: {message}")


@contextmanager
def together():
    """Context for what processes do on their own between two exchanges: an error of one of them stops all."""
    error = None
    try:
        yield
    except Exception as exc:  # raised by agree(), on every rank
        error = exc
    agree(error)


@contextmanager
def local_main_first():
    """The first process of each machine runs the block before the others do (downloads, caches).

    If it fails there, every process fails.
    """
    error = None
    if local_rank() == 0:
        try:
            yield
        except Exception as exc:  # re-raised by agree() below, on every rank
            error = exc
        agree(error)
    else:
        agree(None)
        yield


def print0(*args, **kwargs) -> None:
    """print on rank 0 only."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)

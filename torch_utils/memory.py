"""Out of memory on every kind of device: recognising it, and finding a batch that fits."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
import torch

from torch_utils.errors import UserError

AUTO = "auto"
_SIGNS = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_cpu.cpp", "std::bad_alloc"),
    # CUDA libraries with their own allocation; cuBLAS fails to make a handle without memory.
    *("cublas_status_alloc_failed", "cublascreate(", "cudnn_status_alloc_failed", "device_allocation_failed"),
    *("cusolver_status_alloc_failed", "cufft_alloc_failed"),
    "invalid buffer size",  # MPS, for one tensor beyond its limit
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. CUDA has its own exception, the CPU and MPS a RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def peak_memory() -> float:
    """MB of this process at its peak; pages of a mapped file, which the system may drop, count."""
    import resource  # does not exist on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def release_memory() -> None:
    """Frees the memory of a failed attempt. Call it after ``except``, which keeps tensors alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def first_batch(device: torch.device) -> int:
    """The first batch size to try; larger ones are not faster."""
    return 64 if device.type == "cpu" else 512


class BatchSize(click.ParamType):
    """A number of images, or "auto"."""

    name = "N|auto"

    def convert(self, value, param, ctx):
        if value == AUTO:
            return value
        return click.IntRange(min=1).convert(value, param, ctx)


@contextmanager
def explained_oom(device: torch.device | str, advice: str) -> Iterator[None]:
    """Turns a failed allocation in the block into a UserError.

    advice: what to do, such as "lower --batch (now 64)".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{device} is out of memory: {advice}") from None

"""Out of memory, on every kind of device: what tells it from other errors, and a batch that fits."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import click
import torch

from torch_utils.errors import UserError

AUTO = "auto"
_SIGNS = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_cpu.cpp", "std::bad_alloc"),
    # Libraries of CUDA that allocate on their own; a handle of cuBLAS that cannot be made lacks memory, too.
    *("cublas_status_alloc_failed", "cublascreate(", "cudnn_status_alloc_failed", "device_allocation_failed"),
    *("cusolver_status_alloc_failed", "cufft_alloc_failed"),
    "invalid buffer size",  # MPS, for one tensor beyond its limit
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: CUDA has a class of its own for that, the CPU and MPS raise a RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def release_memory() -> None:
    """Gives back what a failed attempt held; call it outside of the ``except`` block, whose error keeps tensors alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def first_batch(device: torch.device) -> int:
    """Where the search for a batch that fits begins: beyond it larger batches make no network faster."""
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
    """An allocation that fails in the block becomes a UserError; advice: "lower --batch (now 64)"."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{device} is out of memory: {advice}") from None

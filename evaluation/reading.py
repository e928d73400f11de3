"""Batches of images read by threads or processes, and feature statistics over them."""

import math
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from evaluation.frechet import FeatureStatistics
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.images import ImageSource

_BATCHES_AHEAD = 3
_MAX_WORKERS = 8


def choose_indices(count: int, num: int | None, seed: int) -> Sequence[int]:
    """All ``count`` indices, or ``num`` random ones in order, which depend on the seed only."""
    return range(count) if num in (None, count) else np.sort(np.random.default_rng(seed).permutation(count)[:num])


class _Chunks(torch.utils.data.Dataset):
    """Batches of an ImageSource by number, as tensors uint8 [B,C,H,W]."""

    def __init__(self, source: ImageSource, indices: Sequence[int], batch: int):
        self.source = source
        self.chunks = [indices[start : start + batch] for start in range(0, len(indices), batch)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> tuple[torch.Tensor | UserError, dict[str, int]]:
        """(images, {kind of conversion: number of images}).

        A UserError is returned, because raising it in a worker adds the traceback to its message.
        """
        done = Counter()
        try:
            images = np.stack([self.source.read(int(index), done) for index in self.chunks[number]])
        except UserError as error:
            return error, {}
        return torch.from_numpy(images), dict(done)  # DataLoader would double a Counter


def choose_workers(device: torch.device | str, source: ImageSource, batch: int) -> int:
    """Number of processes to decode images. 0: threads, on the CPU, where the network is slower.

    Batches use shared memory, and containers may have little. At most a fourth of it is used.
    """
    shared = Path("/dev/shm")
    if torch.device(device).type != "cuda" or not shared.is_dir():
        return 0
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    image = math.prod(source.shape) * getattr(source, "itemsize", 1)
    room = shutil.disk_usage(shared).free // 4 // processes // (_BATCHES_AHEAD * batch * image)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = min(_MAX_WORKERS, cores // processes, room)
    return wanted if wanted > 1 else 0


def read_batches(
    source: ImageSource,
    indices: Sequence[int],
    batch: int,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> Iterator[torch.Tensor]:
    """Read batches of images [B,C,H,W], uint8 from an ImageSource, decoded in advance.

    source: the images, an ImageSource or what has its ``read``, ``shape`` and ``conversions``;
        ``itemsize`` is the number of bytes of a value. Default 1.
    indices: which of them, in this order.
    batch: images per batch.
    device: where they are used. For CUDA the batches are in pinned memory. Default: the CPU.
    workers: number of processes that decode; 0: threads. Default: see ``choose_workers``.
    """
    chunks = _Chunks(source, indices, batch)
    pinned = torch.device(device).type == "cuda"
    if workers is None:
        workers = choose_workers(device, source, batch)
    workers = min(workers, len(chunks))
    for images, done in _by_processes(chunks, workers, pinned) if workers else _by_threads(chunks, pinned):
        if isinstance(images, UserError):
            raise images
        source.conversions.update(done)
        yield images


def _by_processes(chunks: _Chunks, workers: int, pinned: bool) -> Iterable:
    return torch.utils.data.DataLoader(
        chunks, batch_size=None, num_workers=workers, prefetch_factor=_BATCHES_AHEAD, pin_memory=pinned
    )


def _by_threads(chunks: _Chunks, pinned: bool) -> Iterator:
    def load(number: int):
        images, done = chunks[number]
        return images.pin_memory() if pinned and isinstance(images, torch.Tensor) else images, done

    with ThreadPoolExecutor(max_workers=min(_BATCHES_AHEAD, os.cpu_count() or 1)) as pool:
        pending: deque = deque()
        try:
            for number in range(len(chunks)):
                pending.append(pool.submit(load, number))
                if len(pending) >= _BATCHES_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def compute_statistics(
    images: ImageSource | Iterable[torch.Tensor],
    detector: Callable[[torch.Tensor], torch.Tensor],
    *,
    indices: Sequence[int] | None = None,
    batch: int = 250,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    on_batch: Callable[[torch.Tensor], None] | None = None,
) -> FeatureStatistics:
    """Statistics of the features of images, summed over all ranks.

    images: an ImageSource, which the ranks share; or an iterable of uint8 batches [B,C,H,W] of
        *this* rank, for instance straight from a sampler.
    detector: an ``evaluation.detectors.FeatureDetector``, or any function from a batch to [B,D]
        with ``feature_dim``.
    indices: which images of an ImageSource. Default: all.
    batch, workers: see ``read_batches``. Default 250, None.
    device: where the statistics are computed. Default: the CPU.
    on_batch: called with the features of each batch. Default None.
    """
    statistics = FeatureStatistics(detector.feature_dim, device)
    if isinstance(images, ImageSource):
        indices = range(len(images)) if indices is None else indices
        indices = indices[distributed.rank() :: distributed.world_size()]
        images = read_batches(images, indices, batch, device, workers)
    for images_of_batch in images:
        distributed.check_peers()
        features = detector(images_of_batch)
        statistics.append(features)
        if on_batch is not None:
            on_batch(features)
    return statistics.all_reduce()

"""Images out: conversion to 8 bits, grids, and background writing of PNG files that appear only whole."""

import queue
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from torch_utils.errors import UserError
from torch_utils.image_data import atomic_path


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> uint8, on their device; values beyond the range are clipped (EDM's rounding)."""
    return (images.detach() * 127.5 + 128).clip(0, 255).to(torch.uint8)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images [B,C,H,W], in [-1, 1] or as ``to_pixels`` gives them -> uint8 array [B,H,W,C].

    The conversion runs on the images' device, so that only bytes are copied from it.
    """
    pixels = images if images.dtype == torch.uint8 else to_pixels(images)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())


def image_grid(images: np.ndarray, columns: int, pad: int = 2, fill: int = 255) -> np.ndarray:
    """uint8 [N,H,W,C] -> one uint8 image [H',W',C], row by row, ``pad`` pixels of value ``fill`` between the images."""
    count, height, width, channels = images.shape
    if count < 1 or columns < 1:
        raise UserError(f"a grid needs at least one image and one column, got {count} and {columns}")
    columns = min(columns, count)
    rows = -(-count // columns)
    shape = (rows * (height + pad) - pad, columns * (width + pad) - pad, channels)
    grid = np.full(shape, fill, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + pad), index % columns * (width + pad)
        grid[top : top + height, left : left + width] = image
    return grid


def save_image(array: np.ndarray, path: str | Path) -> None:
    """Writes uint8 [H,W], [H,W,1] (grey) or [H,W,3] (RGB) as PNG; creates the folder, replaces ``path`` atomically."""
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise UserError(f"{path}: cannot write {array.dtype} {list(array.shape)} as PNG; expected uint8 grey or RGB")
    with atomic_path(path, durable=False) as temporary:
        try:
            Image.fromarray(array).save(temporary, format="PNG")
        except OSError as exc:
            raise UserError(f"cannot write {path}: {exc.strerror or exc}") from None


class ImageWriter:
    """Writes PNG files in background threads.

    ``submit`` returns at once unless ``capacity`` images are waiting already (bounded memory). Leaving the context
    waits for all files and raises the first error that a thread met; ``submit`` raises it if it is known by then.
    """

    def __init__(self, threads: int = 4, capacity: int = 256):
        if threads < 1 or capacity < 1:
            raise UserError(f"ImageWriter needs at least one thread and room for one image, got {threads}, {capacity}")
        self._queue: queue.Queue = queue.Queue(capacity)
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, array: np.ndarray, path: str | Path) -> None:
        """Queues uint8 [H,W,C] to be written to ``path``. The array must not be changed afterwards."""
        self._raise_error()
        self._queue.put((array, path))

    def close(self) -> None:
        """Waits until everything is written and ends the threads; raises the first error."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        self._raise_error()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # keeps emptying the queue, so that nobody waits for room in it for ever
            try:
                save_image(*item)
            except BaseException as exc:  # raised again in the caller's thread
                self._error = self._error or exc

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, kind, value, traceback) -> None:
        try:
            self.close()
        except Exception:
            if value is None:  # an error of the block itself goes first
                raise

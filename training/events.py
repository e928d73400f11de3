"""Statistics and images of a run as an event file of TensorBoard, beside stats.jsonl."""

import json
from pathlib import Path

import numpy as np

from torch_utils.errors import MissingExtra

EXTRA = "tensorboard"
_AXES = ("kimg", "iteration")


def summary_writer() -> type:
    """TensorBoard's writer. Raises MissingExtra if the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("tensorboard", EXTRA, "--tensorboard") from None
    return SummaryWriter


class EventFile:
    """The event file of one part of a run. The step of an event is the number of samples trained.

    folder: of the run. If it has no event files yet, the lines of its stats.jsonl are written
        first.
    kimg: where this part of the run begins, in thousands of samples. Later events of an earlier
        part are dropped.

    Raises MissingExtra without the package tensorboard.
    """

    def __init__(self, folder: Path, kimg: float):
        known = any(folder.glob("events.out.tfevents.*"))
        step = round(kimg * 1000) + 1 if known else None
        self._writer = summary_writer()(folder, purge_step=step)
        stats = folder / "stats.jsonl"
        if not known and stats.is_file():
            for line in stats.read_text(encoding="utf-8").splitlines():
                self.scalars(json.loads(line))

    def scalars(self, record: dict) -> None:
        """Writes a line of stats.jsonl. A list with a value per interval becomes NAME/0, NAME/1."""
        step = round(record["kimg"] * 1000)
        for name, value in record.items():
            values = value if isinstance(value, list) else [value]
            for k, number in enumerate(values if name not in _AXES else []):
                self._writer.add_scalar(f"{name}/{k}" if len(values) > 1 else name, number, step)
        self._writer.flush()  # a killed run keeps what stats.jsonl has

    def image(self, name: str, pixels: np.ndarray, kimg: float) -> None:
        """Writes a picture, uint8 [H,W,C]."""
        self._writer.add_image(name, pixels, round(kimg * 1000), dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

"""The frame of all trainings: state, share of a batch, iterations, interruption, NaN."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.session import Interrupted, any_signal, deferred_signals
from training.run_folder import RunLog


class NotFinite(Exception):
    """A loss or gradient is NaN or infinite. Raised on every process.

    ranks: processes where it is. Default (): unknown.
    interval: first interval of the schedule where it is. Default None: unknown.
    """

    def __init__(self, ranks: Sequence[int] = (), interval: int | None = None):
        super().__init__("loss or gradient not finite")
        self.ranks, self.interval = list(ranks), interval

    @classmethod
    def found(cls, own_finite: bool, interval: int | None = None) -> "NotFinite":
        """The exception to raise. Every process calls this.

        own_finite: the loss of this process is finite. If all are finite and only their sum is not,
            all ranks are named.
        interval: see the class.
        """
        finite = distributed.gather_objects(own_finite)
        return cls([rank for rank, ok in enumerate(finite) if not ok] or range(len(finite)), interval)


def loss_scale_of(net) -> float:
    """Factor of a loss that is a mean over pixels, for its backward pass: about their number.

    Without it, gradients of float16 networks vanish in the smallest numbers of float16. It is a
    power of two, so in float32 it changes nothing.
    """
    numbers = net.img_channels * net.img_resolution**2
    return 2.0 ** round(math.log2(numbers))


class BaseTrainer:
    """Base class of a trainer whose state can be saved and restored.

    Subclasses set ``device`` and ``iteration`` (iterations done), and call ``split_batch``. Their
    ``iterate()`` does one iteration.
    """

    kept: Mapping[str, str] = {}  # entry of the state -> attribute: a module, an optimizer or a plain value
    iteration = 0
    loss_unit = 1.0  # factor of the printed loss; stats.jsonl has the trained loss

    def split_batch(self, batch: int, batch_gpu: int | None = None) -> None:
        """Sets ``batch``, ``share`` (samples of this process) and ``chunk`` (per network call).

        batch: samples per iteration over all processes.
        batch_gpu: largest number of samples per network call. Default None: the whole share.
        """
        self.batch, self.share = batch, batch // distributed.world_size()
        self.chunk = min(batch_gpu or self.share, self.share)

    def state(self, copied: bool = True) -> dict:
        """Everything that the next iteration depends on.

        copied: copy the tensors. Default True; False saves memory if the state is only written to a
            file.
        """
        state = {}
        for entry, name in self.kept.items():
            part = getattr(self, name)
            value = dict(part.state_dict()) if hasattr(part, "state_dict") else part
            if copied and isinstance(part, torch.nn.Module):  # dense copies, also of views
                value = {key: tensor.clone() for key, tensor in value.items()}
            elif copied:
                value = copy.deepcopy(value)
            state[entry] = value
        return state

    def load_state(self, state: Mapping) -> None:
        """Restores a ``state``. Raises RuntimeError, ValueError or KeyError if it does not fit."""
        for entry, name in self.kept.items():
            part = getattr(self, name)
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(state[entry])
            else:
                setattr(self, name, copy.deepcopy(state[entry]))


class BaseRun:
    """A trainer and its folder: iterations until the end or a signal, and the output.

    trainer: a ``BaseTrainer``.
    options: of the run; ``batch`` is the number of samples per iteration over all processes.
    folder: for log, states and results. Default None: without log.
    elapsed: seconds trained in earlier parts of the run. Default 0.
    """

    def __init__(self, trainer: BaseTrainer, options, folder: str | Path | None = None, elapsed: float = 0.0):
        self.trainer, self.options = trainer, options
        if folder is not None:
            self.folder, self.log = Path(folder), RunLog(folder)
        self._elapsed_before, self._start = elapsed, time.monotonic()
        self._saved_at = -1  # iteration of the newest state on disk

    def finished(self) -> bool:
        """Whether the run is finished; the same on every process."""
        raise NotImplementedError

    def iterate(self):
        """One iteration. Returns its statistics. Raises NotFinite."""
        return self.trainer.iterate()

    def show(self, bar: tqdm, statistics, seconds: float) -> None:
        """Updates the progress bar after an iteration that took ``seconds``."""
        raise NotImplementedError

    def after_iteration(self, stopping: bool) -> None:
        """Logs and saves what is due. stopping: a signal ends the run, so save everything."""
        raise NotImplementedError

    def on_interruption(self) -> str:
        """Called if a signal ends the run early. Returns the note of ``Interrupted``."""
        return ""

    def failure_text(self, error: NotFinite) -> str:
        """What went wrong and what to do. The trainer is as before the iteration."""
        raise NotImplementedError

    def on_failure(self, error: NotFinite) -> None:
        """Called for a loss that is not finite. Raises UserError unless the run has a result."""
        raise UserError(self.failure_text(error)) from None

    def progress_bar(self) -> tqdm:
        raise NotImplementedError

    @property
    def elapsed(self) -> float:
        """Seconds of training, including earlier parts of the run."""
        return self._elapsed_before + time.monotonic() - self._start

    @property
    def nimg(self) -> int:
        return self.trainer.iteration * self.options.batch

    @property
    def kimg(self) -> float:
        """Thousands of samples trained on."""
        return self.nimg / 1000

    def loop(self) -> None:
        """Trains to the end.

        Raises Interrupted after SIGINT or SIGTERM, with everything saved, and UserError on every
        process for a loss that is not finite.
        """
        with deferred_signals() as received, self.progress_bar() as bar:
            while not self.finished():
                begin = time.monotonic()
                try:
                    statistics = self.iterate()
                except NotFinite as error:
                    self.on_failure(error)
                    break
                self.show(bar, statistics, time.monotonic() - begin)
                stop = any_signal(received)
                self.after_iteration(stop is not None)
                if stop is not None and not self.finished():
                    bar.close()
                    raise Interrupted(stop, self.on_interruption())

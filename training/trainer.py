"""What every trainer has in common: its state, its share of a batch, and what it raises where a loss is not finite."""

import copy
import math
from collections.abc import Mapping, Sequence

import torch

from torch_utils import distributed


class NotFinite(Exception):
    """A loss or gradient is NaN or infinite. It is raised on every process.

    ranks: processes where it is. Default: not known.
    interval: first interval of the schedule where it is. Default: not known.
    """

    def __init__(self, ranks: Sequence[int] = (), interval: int | None = None):
        super().__init__("loss or gradient not finite")
        self.ranks, self.interval = list(ranks), interval

    @classmethod
    def found(cls, own_finite: bool, interval: int | None = None) -> "NotFinite":
        """The exception to raise; every process calls this.

        own_finite: whether the loss of this process is finite. If it is on all of them, only their
            sum is not, and all are named.
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
    """Base class: a training with a state that can be saved and restored.

    Subclasses set ``device`` and ``iteration``, the number of iterations done, and call
    ``split_batch``; their ``iterate()`` does one iteration.
    """

    kept: Mapping[str, str] = {}  # entry of the state -> attribute: a module, an optimizer or a plain value
    iteration = 0

    def split_batch(self, batch: int, batch_gpu: int | None = None) -> None:
        """Sets ``batch``, ``share`` (samples of this process) and ``chunk`` (per network call).

        batch: samples per iteration over all processes.
        batch_gpu: samples per network call at most. Default: the whole share.
        """
        self.batch, self.share = batch, batch // distributed.world_size()
        self.chunk = min(batch_gpu or self.share, self.share)

    def state(self, copied: bool = True) -> dict:
        """Everything that the next iteration depends on.

        copied: False for a state that is only written to a file: no memory for copies. Default: True.
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

"""Copies between the host and a device that let neither of them wait for the other."""

import copy
from collections.abc import Iterable, Iterator

import torch


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """``tensor`` on the device, with its gradient, which comes back in one copy.

    The copy to a CUDA device goes through pinned memory, so that the host does not wait for it.
    """
    if tensor.device == torch.device(device) or (tensor.device.type == "cpu" == torch.device(device).type):
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Moved.apply(tensor, device)
    return _copy(tensor.detach(), device)


def module_on(module: torch.nn.Module, device: torch.device | str) -> torch.nn.Module:
    """The module if all of it is on this device, else a copy there, made without waiting."""
    device = torch.empty(0, device=device).device  # with its number
    if all(value.device == device for value in (*module.parameters(), *module.buffers())):
        return module
    return copy.deepcopy(module)._apply(lambda value: to_device(value.detach(), device))


def to_pinned(value):
    """A CUDA tensor in pinned memory of the host, to copy it back without waiting.

    Anything else stays what it is, but for tensors of other devices, which come to the CPU.
    """
    if not isinstance(value, torch.Tensor) or value.device.type == "cpu":
        return value
    host = value.cpu()
    return host.pin_memory() if value.device.type == "cuda" else host


def _copy(tensor: torch.Tensor, device) -> torch.Tensor:
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor if tensor.is_pinned() else tensor.pin_memory()
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


class _Moved(torch.autograd.Function):
    """The copy for a tensor with a gradient: pinning has no derivative of its own."""

    @staticmethod
    def forward(ctx, tensor, device):
        ctx.source = tensor.device
        return _copy(tensor.detach(), device)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.source), None


class Arrival:
    """A copy of a tensor to the host, under way: ``read`` waits for it and returns it.

    From a CUDA device the copy runs behind the work that was started before it, and work that is
    started later does not delay it.
    """

    def __init__(self, tensor: torch.Tensor):
        self._host, self._event = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host.cpu()


def one_ahead(items: Iterable) -> Iterator:
    """The items, each of them only after the next one was made; an error follows the last item."""
    items, before, error = iter(items), [], None
    while True:
        try:
            item = next(items)
        except StopIteration:
            break
        except Exception as exception:
            error = exception
            break
        yield from before
        before = [item]
    yield from before
    if error is not None:
        raise error

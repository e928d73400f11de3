"""Copies between the host and a device that let neither of them wait for the other."""

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

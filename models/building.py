"""Building a network from the constructor arguments and weights of a file."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from models.denoiser import Denoiser
from torch_utils.errors import UserError, brief


@dataclass(frozen=True)
class Family:
    """A family of networks: how to build one from weights in memory, and how to read its files.

    name: its name in ``build_denoiser`` and in ``<checkpoint>.json``.
    build: function (config, state_dict, guidance_type, guidance_rate, device) -> denoiser with
        copies of the weights on the device. Uses ``build_empty``, ``load_weights`` and
        ``check_guidance``.
    load: function (path, guidance_type, guidance_rate, device) -> denoiser of a checkpoint. It may
        also have the keywords config (constructor arguments instead of the published ones),
        dataset_name and path_classifier.
    """

    name: str
    build: Callable
    load: Callable

    def create(self, config, state_dict, guidance_type, guidance_rate, device, file=None) -> Denoiser:
        """``build``, frozen and in evaluation mode. file: of the weights, for errors."""
        try:
            net = self.build(config, state_dict, guidance_type, guidance_rate, device)
        except UserError as error:
            raise error if file is None else UserError(f"checkpoint {file}: {error}") from None
        return net.eval().requires_grad_(False)


_LONGEST_LIST = 32  # longest list among a network's arguments: levels, resolutions, taps of a filter
_LARGEST_SIZE = 1 << 20  # largest whole number among them
_PARTS_PER_TENSOR, _LEAST_PARTS = 4, 1000  # limit of modules and parameters; networks have about two per tensor


def _check_arguments(config, what: str) -> None:
    """Raises UserError for numbers and lists that are far too large for any network."""
    for name, value in config.items() if isinstance(config, Mapping) else ():
        if name == "scheduler_config":  # of the learning rate; published files have 10^13 there
            continue
        if isinstance(value, Mapping):
            _check_arguments(value, what)
            continue
        parts = value if isinstance(value, list | tuple) else [value]
        sizes = [part for part in parts if isinstance(part, int)]
        if len(parts) > _LONGEST_LIST or any(abs(size) > _LARGEST_SIZE for size in sizes):
            raise UserError(f"these are not the arguments of {what}: {brief(name)}={brief(value)} is too large")


@contextmanager
def _as_many_parts_as(tensors: int, what: str):
    """Context that stops a constructor with far more modules and parameters than weights.

    The product of small arguments can be huge.
    """
    left = parts = _PARTS_PER_TENSOR * tensors + _LEAST_PARTS

    def count(*_) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(f"these are not the arguments of {what}: more than {parts} parts for {tensors} weights")

    hooks = (register_module_module_registration_hook, register_module_parameter_registration_hook)
    handles = [register(count) for register in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def build_empty(constructor: Callable, config: Mapping, what: str, tensors: int = 10_000) -> torch.nn.Module:
    """Return ``constructor(**config)`` on the meta device, without memory for the weights.

    constructor: class of the network.
    config: its arguments.
    what: name of the network for error messages.
    tensors: number of tensors in the checkpoint, which limits the size of the network.

    Raises UserError if the constructor does not accept the arguments.
    """
    _check_arguments(config, what)
    try:
        with torch.device("meta"), _as_many_parts_as(tensors, what):
            return constructor(**config)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError, MemoryError) as exc:
        if isinstance(exc, UserError) and str(exc).startswith("these are not"):
            raise
        raise UserError(f"these are not the arguments of {what}: {str(exc)[:200] or type(exc).__name__}") from None


def load_weights(net: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], device: str | torch.device) -> None:
    """Copy the tensors of ``state_dict`` into ``net``, in the dtypes of net's tensors.

    net: a network from ``build_empty``.
    state_dict: {name: tensor}. One tensor is copied at a time, so that a memory-mapped file is
        never in memory as a whole.
    device: where the weights are put.

    Raises UserError if names or shapes differ.
    """
    expected = net.state_dict()
    check_weights(expected, state_dict)
    copies = {name: state_dict[name].detach().to(device, own.dtype, copy=True) for name, own in expected.items()}
    net.load_state_dict(copies, strict=True, assign=True)


def check_guidance(allowed: tuple[str, ...], kind: str | None, rate: float | None, owner: str) -> None:
    """Raises UserError if ``owner`` does not take the guidance type, or the rate has no effect."""
    kind = kind or "none"
    if kind not in allowed:
        raise UserError(f"{owner} does not take guidance_type '{kind}'; use {' or '.join(allowed)}")
    if kind in ("none", "uncond") and rate not in (None, 0, 1):
        raise UserError(f"guidance_rate {rate:g} has no effect with guidance_type '{kind}'; leave it out")


def check_weights(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Raises UserError if names or shapes differ; the message names a few of them."""
    shapes = [
        f"{name[:200]} {list(given[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(name[:200] for name in names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", [name for name in expected if name not in given]),
            ("unexpected", [name for name in given if name not in expected]),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise UserError(f"the weights do not fit the network's configuration: {'; '.join(problems)}")

"""Denoisers: network architectures, their loaders, and the table of pretrained networks.

The two functions here are the way in: ``create_model`` for a network of the table (or a file of one's own) and
``build_denoiser`` for hyper-parameters and weights that are in memory already.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from models.denoiser import Denoiser
from torch_utils.errors import UserError

__all__ = ["Denoiser", "build_denoiser", "create_model"]

# Network family -> the function that builds it, as "module:function", imported when the family is asked for. It takes
# (config, state_dict, guidance_type, guidance_rate, device) and returns the denoiser, filled with copies of the weights
# on the device; ``lay_out``, ``fill_weights`` and ``check_guidance`` below are its tools.
FAMILIES = {
    "edm": "models:_build_edm",
    "cm": "models.cm:build_cm",
    "adm": "models.adm:build_adm",
    "ldm": "models.ldm:build_ldm",
    "sd": "models.sd:build_sd",
}


def create_model(
    dataset_name: str,
    model_path: str | Path | None = None,
    guidance_type: str | None = None,
    guidance_rate: float | None = None,
    device: str | torch.device = "cpu",
) -> Denoiser:
    """A pretrained denoiser, frozen and in evaluation mode, on ``device``.

    dataset_name: a name of ``models.zoo``, or "custom" for any EDM network at ``model_path``. Without ``model_path``
    the file is the embedded one or is downloaded to ``./src/<dataset_name>/``; every process of a torchrun has to call
    this. The result also has ``dataset_name``, ``source_path`` and ``weights_hash`` (SHA-256 of the file).

    Raises UserError for unknown names, guidance that the network does not take, and files that are not this network.
    """
    from models import zoo
    from models.edm import load_edm_network
    from torch_utils.download import sha256_of

    card = None if dataset_name == zoo.CUSTOM else zoo.get_card(dataset_name)
    check_guidance(card.guidance if card else ("none",), guidance_type, guidance_rate, f"dataset_name '{dataset_name}'")
    path = zoo.resolve(dataset_name, model_path)
    net = load_edm_network(path)
    if card is not None:
        expected = _describe(card.channels, card.resolution, card.label_dim)
        found = _describe(net.img_channels, net.img_resolution, net.label_dim)
        if found != expected:
            raise UserError(f"checkpoint {path} is {found}, but dataset_name '{dataset_name}' expects {expected}")
    net.dataset_name = dataset_name
    net.source_path = str(path)
    net.weights_hash = sha256_of(path)
    if net.data_mean is not None:  # an attribute, which Module.to does not move
        net.data_mean = net.data_mean.to(device)
    return net.to(device).eval().requires_grad_(False)


def build_denoiser(
    family: str,
    config: Mapping,
    state_dict: Mapping[str, torch.Tensor],
    guidance_type: str | None = None,
    guidance_rate: float | None = None,
    device: str | torch.device = "cpu",
) -> Denoiser:
    """A denoiser of a known family from its constructor arguments and its weights, frozen and in evaluation mode.

    config: the constructor arguments under the names of the original code. state_dict: tensors under the names of the
    official checkpoints; every name and shape has to fit. The tensors are copied, as float32 (the torso of a U-Net as
    float16 where config says use_fp16).

    Raises UserError for unknown families, unusable arguments, and weights that do not belong to them.
    """
    if family not in FAMILIES:
        raise UserError(f"network family '{family}' is unknown; available: {', '.join(FAMILIES)}")
    module, _, function = FAMILIES[family].partition(":")
    build = getattr(importlib.import_module(module), function)
    return build(config, state_dict, guidance_type, guidance_rate, device).eval().requires_grad_(False)


def lay_out(constructor: Callable, config: Mapping, what: str) -> torch.nn.Module:
    """``constructor(**config)`` on the meta device, without memory for the weights; a UserError naming ``what`` if refused."""
    try:
        with torch.device("meta"):  # the initial values would be overwritten anyway
            return constructor(**config)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as exc:
        raise UserError(f"these are not the arguments of {what}: {exc}") from None


def fill_weights(net: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], device: str | torch.device) -> None:
    """Gives a laid-out network copies of these tensors, on ``device`` and in the dtype of the network's own ones.

    One tensor is copied at a time, so a memory-mapped ``state_dict`` is never in memory as a whole. Raises UserError
    where names or shapes differ.
    """
    expected = net.state_dict()
    _check_weights(expected, state_dict)
    copies = {name: state_dict[name].detach().to(device, own.dtype, copy=True) for name, own in expected.items()}
    net.load_state_dict(copies, strict=True, assign=True)


def _build_edm(config, state_dict, guidance_type, guidance_rate, device) -> Denoiser:
    from models.edm import EDMDenoiser

    net = lay_out(EDMDenoiser, config, "an EDM network")
    check_guidance(("none",) if net.label_dim else ("none", "uncond"), guidance_type, guidance_rate, "this network")
    fill_weights(net, state_dict, device)
    return net


def check_guidance(allowed: tuple[str, ...], kind: str | None, rate: float | None, whom: str) -> None:
    """Raises UserError for a guidance type that ``whom`` does not take, or a rate that would be without effect."""
    kind = kind or "none"
    if kind not in allowed:
        raise UserError(f"{whom} does not take guidance_type '{kind}'; use {' or '.join(allowed)}")
    if kind in ("none", "uncond") and rate not in (None, 0, 1):
        raise UserError(f"guidance_rate {rate:g} has no effect with guidance_type '{kind}'; leave it out")


def _describe(channels: int, resolution: int, label_dim: int) -> str:
    return f"{channels}x{resolution}x{resolution} {f'with {label_dim} classes' if label_dim else 'unconditional'}"


def _check_weights(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Raises UserError, naming a few of them, where names or shapes differ."""
    shapes = [
        f"{name} {list(given[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", [name for name in expected if name not in given]),
            ("unexpected", [name for name in given if name not in expected]),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise UserError(f"the weights do not fit the network's configuration: {'; '.join(problems)}")

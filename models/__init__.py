"""Denoisers: network architectures, their loaders, and the table of pretrained networks.

The two functions here are the way in: ``create_model`` for a network of the table (or a file of one's own) and
``build_denoiser`` for hyper-parameters and weights that are in memory already.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from models.denoiser import Denoiser
from torch_utils.errors import UserError, brief

__all__ = ["Denoiser", "build_denoiser", "create_model", "use_tokenizer"]

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


# Network family -> the function that reads its checkpoints, and which of these it takes as keywords besides the guidance
# and the device: config (constructor arguments instead of the published ones), dataset_name, path_classifier.
LOADERS = {
    "edm": ("models:_load_edm", ("config", "dataset_name")),
    "cm": ("models.cm:load_cm", ("config", "dataset_name")),
    "adm": ("models.adm:load_adm", ("config", "dataset_name", "path_classifier")),
    "ldm": ("models.ldm:load_ldm", ("config", "dataset_name")),
    "sd": ("models.sd:load_sd", ("config",)),
}


def create_model(
    dataset_name: str,
    model_path: str | Path | None = None,
    guidance_type: str | None = None,
    guidance_rate: float | None = None,
    device: str | torch.device = "cpu",
) -> Denoiser:
    """A pretrained denoiser, frozen and in evaluation mode, on ``device``.

    dataset_name: a name of ``models.zoo``, "custom" for any network at ``model_path``, or "diffusers", where that is a
    folder or a hub id. Without ``model_path`` the file is the embedded one or is downloaded to ``./src/<dataset_name>/``;
    every process of a torchrun has to call this. A network of other sizes than the published ones is described by
    ``<model_path>.json`` (``models.zoo.own_settings``); without it, "custom" is an EDM network. Under guidance_type "cg"
    the classifier lies beside ``model_path``, under its published name. guidance_type: None is the network's default;
    guidance_rate: None is 7.5 under "cfg" (diffusers: the pipeline's default) and 1 under "cg".

    On the CPU its convolution weights lie channels last (``models.execution.prepare_network`` changes that, the precision, and
    whether it is compiled). The result also has ``dataset_name``, ``source_path`` and ``weights_hash``: the SHA-256 of the file, or of the list of
    hashes where a classifier or a description belongs to the network.

    Raises UserError for unknown names, guidance that the network does not take, and files that are not this network.
    """
    from models import zoo
    from models.execution import prepare_network

    card = zoo.find_card(dataset_name)
    if dataset_name == zoo.DIFFUSERS:
        from models.diffusers_model import load_diffusers

        if not model_path:
            raise UserError("dataset_name 'diffusers' needs --model_path, the folder or the hub id of a pipeline")
        return load_diffusers(model_path, guidance_type, guidance_rate, device)
    if card is not None:
        kind = guidance_type or card.guidance[0]
        check_guidance(card.guidance, kind, guidance_rate, f"dataset_name '{dataset_name}'")
    path = zoo.resolve(dataset_name, model_path)
    family, config = zoo.own_settings(path) or (card.family if card else "edm", None)
    if family not in LOADERS or card is not None and family != card.family:
        expected = f"dataset_name '{dataset_name}' is of family {card.family}" if card else f"use {', '.join(LOADERS)}"
        raise UserError(f"{path}.json names the network family '{family}': {expected}")
    classifier = None
    if guidance_type == "cg" and guidance_rate != 0:
        classifier = zoo.resolve_companion(dataset_name, model_path)
    loader, takes = LOADERS[family]
    given = {"config": config, "dataset_name": dataset_name, "path_classifier": classifier}
    net = _find(loader)(
        path,
        **{name: given[name] for name in takes},
        guidance_type=guidance_type,
        guidance_rate=guidance_rate,
        device=device,
    )
    net.dataset_name = dataset_name
    net.source_path = str(path)
    net.weights_hash = _hash_files(path, classifier, config)
    return prepare_network(net.eval().requires_grad_(False))


def use_tokenizer(net: Denoiser, folder: str | Path) -> None:
    """Gives a text-to-image network the tokenizer in a local folder (vocab.json and merges.txt), or of a hub id."""
    encoder = getattr(net, "cond_stage_model", None)
    if encoder is None:
        raise UserError("this network does not need a tokenizer, or brings its own: leave --tokenizer_path out")
    encoder.tokenizer = str(folder)


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
    build = _find(FAMILIES[family])
    return build(config, state_dict, guidance_type, guidance_rate, device).eval().requires_grad_(False)


def _find(place: str) -> Callable:
    """The function at "module:function"."""
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)


_LONGEST_LIST = 32  # of a list among a network's arguments: levels, resolutions, taps of a filter
_LARGEST_SIZE = 1 << 20  # of any whole number among them
_PARTS_PER_TENSOR, _LEAST_PARTS = 4, 1000  # modules and parameters; networks have about two for each of their tensors


def _check_arguments(config, what: str) -> None:
    """UserError where a number is far beyond any network's, or a list far longer."""
    for name, value in config.items() if isinstance(config, Mapping) else ():
        if name == "scheduler_config":  # of the learning rate; published files have 10^13 there
            continue
        if isinstance(value, Mapping):
            _check_arguments(value, what)
            continue
        parts = value if isinstance(value, list | tuple) else [value]
        sizes = [part for part in parts if isinstance(part, int)]
        if len(parts) > _LONGEST_LIST or any(abs(size) > _LARGEST_SIZE for size in sizes):
            raise UserError(f"these are not the arguments of {what}: {brief(name)}={brief(value)} is too much")


@contextmanager
def _as_many_parts_as(tensors: int, what: str):
    """Ends what makes far more modules and parameters than there are weights: products of small numbers can be huge."""
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


def lay_out(constructor: Callable, config: Mapping, what: str, tensors: int = 10_000) -> torch.nn.Module:
    """``constructor(**config)`` on the meta device, without memory for the weights; a UserError naming ``what`` if refused.

    tensors: how many weights there are for it, or far more than anybody has.
    """
    _check_arguments(config, what)
    try:
        with torch.device("meta"), _as_many_parts_as(tensors, what):
            return constructor(**config)  # the initial values would be overwritten anyway
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError, MemoryError) as exc:
        if isinstance(exc, UserError) and str(exc).startswith("these are not"):
            raise
        raise UserError(f"these are not the arguments of {what}: {str(exc)[:200] or type(exc).__name__}") from None


def fill_weights(net: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], device: str | torch.device) -> None:
    """Gives a laid-out network copies of these tensors, on ``device`` and in the dtype of the network's own ones.

    One tensor is copied at a time, so a memory-mapped ``state_dict`` is never in memory as a whole. Raises UserError
    where names or shapes differ.
    """
    expected = net.state_dict()
    check_weights(expected, state_dict)
    copies = {name: state_dict[name].detach().to(device, own.dtype, copy=True) for name, own in expected.items()}
    net.load_state_dict(copies, strict=True, assign=True)


def _build_edm(config, state_dict, guidance_type, guidance_rate, device) -> Denoiser:
    from models.edm import EDMDenoiser

    net = lay_out(EDMDenoiser, config, "an EDM network", len(state_dict))
    _check_edm_guidance(net, guidance_type, guidance_rate)
    fill_weights(net, state_dict, device)
    return net


def _load_edm(path, *, config, dataset_name, guidance_type, guidance_rate, device) -> Denoiser:
    from models import zoo
    from models.edm import load_edm_network
    from torch_utils.weights_file import read_weights

    if config is not None:
        try:
            return build_denoiser("edm", config, read_weights(path), guidance_type, guidance_rate, device)
        except UserError as error:
            raise UserError(f"checkpoint {path}: {error}") from None
    net = load_edm_network(path)
    if (card := zoo.find_card(dataset_name)) is not None:
        expected = _describe(card.channels, card.resolution, card.label_dim)
        found = _describe(net.img_channels, net.img_resolution, net.label_dim)
        if found != expected:
            raise UserError(f"checkpoint {path} is {found}, but dataset_name '{dataset_name}' expects {expected}")
    else:
        _check_edm_guidance(net, guidance_type, guidance_rate)
    if net.data_mean is not None:  # an attribute, which Module.to does not move
        net.data_mean = net.data_mean.to(device)
    return net.to(device)


def _check_edm_guidance(net: Denoiser, guidance_type, guidance_rate) -> None:
    check_guidance(("none",) if net.label_dim else ("none", "uncond"), guidance_type, guidance_rate, "this network")


def _hash_files(path: Path, classifier: Path | None, config: Mapping | None) -> str:
    from torch_utils.download import known_sha256

    parts = [known_sha256(file) for file in (path, classifier) if file is not None]
    if config is not None:
        parts.append(hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest())
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def check_guidance(allowed: tuple[str, ...], kind: str | None, rate: float | None, whom: str) -> None:
    """Raises UserError for a guidance type that ``whom`` does not take, or a rate that would be without effect."""
    kind = kind or "none"
    if kind not in allowed:
        raise UserError(f"{whom} does not take guidance_type '{kind}'; use {' or '.join(allowed)}")
    if kind in ("none", "uncond") and rate not in (None, 0, 1):
        raise UserError(f"guidance_rate {rate:g} has no effect with guidance_type '{kind}'; leave it out")


def _describe(channels: int, resolution: int, label_dim: int) -> str:
    return f"{channels}x{resolution}x{resolution} {f'with {label_dim} classes' if label_dim else 'unconditional'}"


def check_weights(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Raises UserError, naming a few of them, where names or shapes differ."""
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

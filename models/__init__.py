"""Denoisers: network architectures, their loaders, and the table of pretrained networks.

The two functions here are the way in: ``create_model`` for a network of the table (or a file of one's own) and
``build_denoiser`` for hyper-parameters and weights that are in memory already.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from models.building import Family, check_guidance
from models.denoiser import Denoiser
from torch_utils.errors import UserError

__all__ = ["Denoiser", "build_denoiser", "create_model", "use_tokenizer"]


def families() -> dict[str, Family]:
    """All families of networks by name, loaded when first asked for: solvers need the interface alone."""
    from models import adm, cm, edm, ldm, sd

    return {family.name: family for family in (edm.FAMILY, cm.FAMILY, adm.FAMILY, ldm.FAMILY, sd.FAMILY)}


def __getattr__(name):
    if name == "FAMILIES":
        return families()
    raise AttributeError(f"module 'models' has no attribute '{name}'")


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
    ``<model_path>.json`` (``models.zoo.read_sidecar``); without it, "custom" is an EDM network. Under guidance_type "cg"
    the classifier lies beside ``model_path``, under its published name. guidance_type: None is the network's default;
    guidance_rate: None is 7.5 under "cfg" (diffusers: the pipeline's default) and 1 under "cg".

    On the CPU its convolution weights lie channels last (``models.compile.prepare_network`` changes that, the precision, and
    whether it is compiled). The result also has ``dataset_name``, ``source_path`` and ``weights_hash``: the SHA-256 of the file, or of the list of
    hashes where a classifier or a description belongs to the network.

    Raises UserError for unknown names, guidance that the network does not take, and files that are not this network.
    """
    from models import zoo
    from models.compile import prepare_network

    card = zoo.find_card(dataset_name)
    if dataset_name == zoo.DIFFUSERS:
        from models.diffusers import load_diffusers

        if not model_path:
            raise UserError("dataset_name 'diffusers' needs --model_path, the folder or the hub id of a pipeline")
        return load_diffusers(model_path, guidance_type, guidance_rate, device)
    if card is not None:
        kind = guidance_type or card.guidance[0]
        check_guidance(card.guidance, kind, guidance_rate, f"dataset_name '{dataset_name}'")
    path = zoo.resolve(dataset_name, model_path)
    family, config = zoo.read_sidecar(path) or (card.family if card else "edm", None)
    known = families()
    if family not in known or card is not None and family != card.family:
        expected = f"dataset_name '{dataset_name}' is of family {card.family}" if card else f"use {', '.join(known)}"
        raise UserError(f"{path}.json names the network family '{family}': {expected}")
    classifier = None
    if guidance_type == "cg" and guidance_rate != 0:
        classifier = zoo.resolve_companion(dataset_name, model_path)
    load = known[family].load
    given = {"config": config, "dataset_name": dataset_name, "path_classifier": classifier}
    net = load(
        path,
        **{name: given[name] for name in inspect.signature(load).parameters if name in given},
        guidance_type=guidance_type,
        guidance_rate=guidance_rate,
        device=device,
    )
    net.dataset_name = dataset_name
    net.source_path = model_path if zoo.is_remote(model_path) else str(path)
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
    known = families()
    if family not in known:
        raise UserError(f"network family '{family}' is unknown; available: {', '.join(known)}")
    return known[family].create(config, state_dict, guidance_type, guidance_rate, device)


def _hash_files(path: Path, classifier: Path | None, config: Mapping | None) -> str:
    from torch_utils.download import known_sha256

    parts = [known_sha256(file) for file in (path, classifier) if file is not None]
    if config is not None:
        parts.append(hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest())
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()

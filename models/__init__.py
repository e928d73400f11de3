"""Denoisers: network architectures, their loaders, and the table of pretrained networks.

``create_model`` loads a network of the table, or a file of your own. ``build_denoiser`` takes a
configuration and weights that are in memory already.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import torch

import amed  # noqa: F401 (its docstring says why)
from models.building import Family, check_guidance
from models.denoiser import Denoiser
from models.wrapped import load_own, wrap
from torch_utils.errors import UserError
from torch_utils.functions import names_function

__all__ = ["Denoiser", "build_denoiser", "create_model", "use_tokenizer", "wrap"]


def families() -> dict[str, Family]:
    """All families of networks, {name: Family}. Imported here because solvers do not need them."""
    from models import adm, cm, edm, ldm, mr, sd

    return {family.name: family for family in (edm.FAMILY, cm.FAMILY, adm.FAMILY, ldm.FAMILY, sd.FAMILY, mr.FAMILY)}


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
    dtype: str = "fp32",
) -> Denoiser:
    """Load a pretrained denoiser, frozen and in evaluation mode.

    dataset_name: a name of ``models.zoo``; "custom" for any network at model_path; "diffusers" for
        a diffusers pipeline.
    model_path: file of the network. For "custom" it may be "module:function", your own function
        that returns a ``Denoiser``. For "diffusers" it is a folder or a hub id.
        ``<model_path>.json`` describes a network of other sizes than the published ones
        (``models.zoo.read_sidecar``); without it, "custom" is an EDM network. Default: the embedded
        file, or the published one, which is downloaded to ``./src/<dataset_name>/``.
    guidance_type: "cfg", "cg", "uncond" or "none". "cg" needs the classifier beside model_path,
        under its published name. Default: that of the network.
    guidance_rate: strength of the guidance. Default: 7.5 for "cfg" (that of the pipeline for
        "diffusers"), 1 for "cg".
    device: where the weights are put. Default: the CPU.

    All processes of torchrun must call this. The result has ``dataset_name``, ``source_path`` and
    ``weights_hash``: the SHA-256 of the file, or of the list of hashes if a classifier or a
    description belongs to the network. ``models.compile.prepare_network`` changes its precision,
    memory format (channels last on the CPU) and compilation.

    Raises UserError for unknown names, guidance that the network does not support, and files that
    are not this network.
    """
    from models import zoo
    from models.compile import choose_dtype, prepare_network

    card = zoo.find_card(dataset_name)
    if dataset_name == zoo.DIFFUSERS:
        from models.diffusers import load_diffusers

        if not model_path:
            raise UserError("dataset_name 'diffusers' needs --model_path, the folder or the hub id of a pipeline")
        chosen = choose_dtype(dtype, torch.device(device))
        return load_diffusers(model_path, guidance_type, guidance_rate, device, chosen)
    if dtype not in ("fp32", "auto"):
        raise UserError(f"--dtype={dtype} is for pipelines (--dataset_name=diffusers); use --amp={dtype}")
    remote = zoo.is_remote(model_path)
    if model_path and not remote and names_function(str(model_path)) and not Path(model_path).exists():
        if card is not None:
            raise UserError(f"--model_path={model_path} is code of your own: use it with --dataset_name={zoo.CUSTOM}")
        check_guidance(("none",), guidance_type, guidance_rate, "a network of your own")
        net = load_own(str(model_path), device)
        net.dataset_name = dataset_name
        return prepare_network(net)
    if card is not None:
        kind = guidance_type or card.guidance[0]
        check_guidance(card.guidance, kind, guidance_rate, f"dataset_name '{dataset_name}'")
    path = zoo.resolve(dataset_name, model_path)
    family, config = zoo.read_sidecar(path) or (card.family if card else "edm", None)
    known = families()
    if family not in known or card is not None and family != card.family:
        expected = f"choose from {', '.join(known)}"
        if card:
            expected = f"dataset_name '{dataset_name}' has family '{card.family}'; use --dataset_name=custom"
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
    net.source_path = model_path if remote else str(path)
    net.weights_hash = _hash_files(path, classifier, config)
    return prepare_network(net.eval().requires_grad_(False))


def use_tokenizer(net: Denoiser, folder: str | Path) -> None:
    """Set the tokenizer of a text-to-image network.

    folder: a local folder with vocab.json and merges.txt, or a hub id.

    Raises UserError if the network does not need a tokenizer.
    """
    encoder = getattr(net, "cond_stage_model", None)
    if encoder is None:
        raise UserError("this network needs no tokenizer, or has its own: leave --tokenizer_path out")
    encoder.tokenizer = str(folder)


def build_denoiser(
    family: str,
    config: Mapping,
    state_dict: Mapping[str, torch.Tensor],
    guidance_type: str | None = None,
    guidance_rate: float | None = None,
    device: str | torch.device = "cpu",
) -> Denoiser:
    """Build a denoiser from its configuration and weights, frozen and in evaluation mode.

    family: name of the family.
    config: constructor arguments under the names of the original code.
    state_dict: tensors under the names of the official checkpoints; every name and shape must fit.
        They are copied as float32; with use_fp16 in config, the torso of a U-Net as float16.
    guidance_type, guidance_rate, device: see ``create_model``.

    Raises UserError for unknown families, unusable arguments, and weights that do not fit them.
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

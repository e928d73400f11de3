"""EDM networks from and to files: official pickles, and safetensors with the constructor arguments as metadata."""

import json

import torch

from models import check_weights, lay_out
from models.edm import EDMDenoiser
from torch_utils.errors import UserError, brief
from torch_utils.safe_pickle import PersistentObject, open_binary, safe_load
from torch_utils.tensor_file import is_safetensors, json_entry, read_safetensors, write_safetensors

_LARGEST = 1 << 14  # pixels
_STATISTICS = ("data_mean", "data_std")  # tensors of a file that are not weights


def load_edm_network(path_or_file) -> EDMDenoiser:
    """An EDM network from an official ``.pkl`` (or ``torch.save`` of one), or a ``.safetensors`` file of this project.

    path_or_file: a path, or a binary file object. Nothing in the file is executed: the network is rebuilt from this
    project's code by class name and constructor arguments. Returned on the CPU, float32, in eval mode, its parameters
    without gradients.
    Raises UnsafePickleError where a pickle asks for more than data, UserError where the file holds something else.
    """
    with open_binary(path_or_file) as (file, name):
        start = file.tell()
        head = file.read(9)
        file.seek(start)
        if is_safetensors(head):
            return _from_safetensors(file.read(), name)
        content = safe_load(file)
    stored = content
    if isinstance(content, dict):
        if "ema" not in content:
            entries = list(content.items())[:8]
            found = ", ".join(f"{brief(key)} ({_describe(value)})" for key, value in entries) or "nothing"
            raise UserError(f"{name} holds no EDM network: there is no entry 'ema', but {found[:300]}")
        stored = content["ema"]
    if not isinstance(stored, PersistentObject) or stored.class_name != "EDMPrecond":
        raise UserError(f"{name} holds no EDM network (EDMPrecond): found {_describe(stored)}")
    return _build(stored.init_kwargs, stored.state_dict(), name)


def load_edm_safetensors(path) -> EDMDenoiser:
    """The network of a file made by ``save_edm_safetensors``. Raises UserError where it is another kind of file."""
    with open_binary(path) as (file, name):
        return _from_safetensors(file.read(), name)


def save_edm_safetensors(net: EDMDenoiser, path, extra_metadata: dict | None = None) -> None:
    """Writes weights (official names), constructor arguments and data statistics; atomically.

    extra_metadata: more entries of the metadata; values that are not strings are stored as JSON.
    """
    extra = extra_metadata or {}
    extra = {key: value if isinstance(value, str) else json.dumps(value) for key, value in extra.items()}
    if {"config", "family"} & extra.keys():
        raise ValueError("'config' and 'family' in the metadata describe the network and cannot be replaced")
    config = {**net.config, "sigma_min": net.sigma_min, "sigma_max": net.sigma_max}
    tensors = {key: value for key, value in net.state_dict().items() if key.startswith("model.")}
    for key in _STATISTICS:
        if getattr(net, key, None) is not None:
            tensors[key] = torch.as_tensor(getattr(net, key), dtype=torch.float32)
    write_safetensors(path, tensors, {"family": "edm", "config": json.dumps(config), **extra})


def _from_safetensors(data: bytes, name: str) -> EDMDenoiser:
    tensors, metadata = read_safetensors(data, name)
    config = json_entry(metadata, "config", name)
    statistics = {key: tensors.pop(key).to(torch.float32) for key in _STATISTICS if key in tensors}
    net = _build(config, tensors, name)
    if "data_mean" in statistics:
        shape = (net.img_channels, net.img_resolution, net.img_resolution)
        if statistics["data_mean"].shape != shape:
            raise UserError(f"{name}: data_mean has shape {list(statistics['data_mean'].shape)}, not {list(shape)}")
        net.data_mean = statistics["data_mean"]
    if "data_std" in statistics:
        if statistics["data_std"].numel() != 1:
            raise UserError(f"{name}: data_std is not a single number")
        net.data_std = float(statistics["data_std"])
    return net


def _build(config: dict, state: dict[str, torch.Tensor], name: str) -> EDMDenoiser:
    """The network with these arguments and weights.

    It is laid out without memory first, so that arguments which do not belong to the weights cost nothing.
    """
    try:
        net = lay_out(EDMDenoiser, config, "an EDM network", len(state))
        if not (0 < net.img_resolution <= _LARGEST and 0 < net.sigma_min < net.sigma_max and 0 < net.sigma_data < 1e6):
            raise UserError("its resolution or its noise levels are impossible")
        check_weights(net.state_dict(), state)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    weights = {key: value.to(torch.float32).contiguous() for key, value in state.items()}
    net.load_state_dict(weights, strict=True, assign=True)
    return net.eval().requires_grad_(False)


def _describe(value) -> str:
    if isinstance(value, PersistentObject):
        return f"an object of class {value.class_name}"
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(brief, list(value)[:8])) or 'no entries'}"
    return f"a {type(value).__name__}"

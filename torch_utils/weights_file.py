"""The weights in a checkpoint file of any of the usual containers, without running anything in it."""

import zipfile
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open

from torch_utils.errors import UserError
from torch_utils.file_kind import explain
from torch_utils.safe_pickle import ForeignName, PersistentObject, check_sharing, open_binary, safe_load_checkpoint
from torch_utils.tensor_file import is_safetensors


def read_weights(path) -> dict[str, torch.Tensor]:
    """Tensors by their names in the file, on the CPU, in the file's dtypes.

    Containers: ``.safetensors``; a state dict written with ``torch.save``; a PyTorch-Lightning checkpoint, of which the
    entry ``state_dict`` is taken and objects of foreign classes stay inert. Except for the torch.save format of before
    2020 the file is memory-mapped: a tensor takes memory only as it is used, and the operating system can drop it again.

    Raises UserError where the file cannot be read, is damaged, or holds something else.
    """
    with open_binary(path) as (file, name):
        head = file.read(9)
        if head[:4] == b"PK\x03\x04" and not _has_end(file):
            raise UserError(f"{name} is truncated: it lacks its end; download it again")
    if is_safetensors(head):
        try:
            with safe_open(path, framework="pt") as tensors:
                content = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise UserError(f"{name} is not a readable safetensors file ({explain(path, error)})") from None
    else:
        content = safe_load_checkpoint(path)
    if isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{name} holds no weights: it is {_describe(content)}, not a dictionary of tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            entry = f"its entry {_describe(key)} is {_describe(value)}, not a tensor"
            if not isinstance(key, str):
                entry = f"an entry is named by {_describe(key)}, not by a string"
            raise UserError(f"{name} holds no state dict: {entry}")
    check_sharing(content, name)
    return dict(content)


def _has_end(file) -> bool:
    """Whether a zip file has its directory, which is at its end."""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # it has one, with nonsense in it, which the loader will explain
        return True


def _describe(value) -> str:
    if isinstance(value, str):
        return f"'{value[:80]}'"
    if isinstance(value, (ForeignName, PersistentObject)):
        return f"of the class {getattr(value, 'name', None) or value.class_name}"
    return "empty" if value == {} else f"a {type(value).__name__}"

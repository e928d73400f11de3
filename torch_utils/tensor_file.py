"""Files of tensors: safetensors, training states, and weights in the usual containers."""

import io
import struct
import zipfile
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from torch_utils.errors import UserError, parse_json
from torch_utils.file_kind import explain
from torch_utils.files import atomic_path
from torch_utils.safe_pickle import ForeignName, PersistentObject, check_sharing, open_binary, safe_load_checkpoint


def is_safetensors(head: bytes) -> bool:
    """Whether a file with this beginning (at least 9 bytes) looks like a safetensors file."""
    return len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def write_safetensors(path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file atomically."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            temporary.write_bytes(safetensors.torch.save(tensors, metadata))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def write_state(path, state: dict) -> None:
    """Writes a dict of tensors, numbers and texts with torch.save, atomically, or UserError."""
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
            raise UserError(f"cannot write {path}: {reason} (is the disk full?)") from None


def read_safetensors(data: bytes, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a file. data: its bytes; name: for the UserError if it is damaged."""
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        reason = explain(io.BytesIO(data), error)
        raise UserError(f"{name} is not a readable safetensors file ({reason})") from None
    (length,) = struct.unpack("<Q", data[:8])
    return tensors, parse_json(data[8 : 8 + length]).get("__metadata__") or {}


def json_entry(metadata: dict[str, str], key: str, name: str) -> dict:
    """The JSON object ``key`` of the metadata. UserError if it is missing."""
    if key not in metadata:
        raise UserError(f"{name} has no '{key}' in its metadata; found: {', '.join(sorted(metadata)) or 'no metadata'}")
    try:
        value = parse_json(metadata[key])
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{name}: '{key}' in its metadata is not a JSON object")
    return value


def read_weights(path) -> dict[str, torch.Tensor]:
    """Tensors by their names in the file, on the CPU, in the file's dtypes.

    path: a ``.safetensors`` file, a state dict of ``torch.save``, or a PyTorch-Lightning
        checkpoint. Of the last, the entry ``state_dict`` is used, and objects of foreign classes
        stay inert.

    The file is memory-mapped, except for the torch.save format of before 2020: a tensor takes
    memory only when it is used. Raises UserError if the file is unreadable, damaged or something
    else.
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
    except zipfile.BadZipFile:  # it has a damaged one, which the loader explains
        return True


def _describe(value) -> str:
    if isinstance(value, str):
        return f"'{value[:80]}'"
    if isinstance(value, (ForeignName, PersistentObject)):
        return f"of the class {getattr(value, 'name', None) or value.class_name}"
    return "empty" if value == {} else f"a {type(value).__name__}"

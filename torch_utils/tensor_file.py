"""Safetensors files: tensors by name and string metadata, written whole or not at all."""

import io
import struct

import safetensors.torch
import torch
from safetensors import SafetensorError

from torch_utils.errors import UserError, parse_json
from torch_utils.file_kind import explain
from torch_utils.image_data import atomic_path


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with these (at least 9) bytes looks like a safetensors file."""
    return len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def write_safetensors(path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes to a temporary name in the same folder, then renames: a reader never sees half a file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            temporary.write_bytes(safetensors.torch.save(tensors, metadata))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def write_state(path, state: dict) -> None:
    """A dict of tensors, numbers and texts as a file of torch.save, whole or not at all; UserError where it cannot be."""
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
            raise UserError(f"cannot write {path}: {reason} (is the disk full?)") from None


def read_safetensors(data: bytes, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of the file whose bytes are ``data``; UserError naming ``name`` where it is damaged."""
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        reason = explain(io.BytesIO(data), error)
        raise UserError(f"{name} is not a readable safetensors file ({reason})") from None
    (length,) = struct.unpack("<Q", data[:8])
    return tensors, parse_json(data[8 : 8 + length]).get("__metadata__") or {}


def json_entry(metadata: dict[str, str], key: str, name: str) -> dict:
    """The JSON object under ``key`` of the metadata; UserError where there is none."""
    if key not in metadata:
        raise UserError(f"{name} has no '{key}' in its metadata; found: {', '.join(sorted(metadata)) or 'no metadata'}")
    try:
        value = parse_json(metadata[key])
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{name}: '{key}' in its metadata is not a JSON object")
    return value

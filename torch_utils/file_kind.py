"""Names what a file is that should have held weights: a pointer, a web page, another format."""

import contextlib
import io
import json
import pickletools
import re
import struct
import zipfile
from pathlib import Path

from torch_utils.errors import parse_json

_HEAD = 1 << 16  # bytes to inspect; texts that servers send instead of a file are shorter
_AGAIN = "download or copy it again"
_UNPACK = "unpack it first"
_CONVERT = "this program reads weights in safetensors and PyTorch files"

_BEGINNINGS = (
    (b"\x1f\x8b", f"compressed with gzip: {_UNPACK} (gunzip, or tar xf)"),
    (b"BZh", f"compressed with bzip2: {_UNPACK} (bunzip2, or tar xf)"),
    (b"\xfd7zXZ\0", f"compressed with xz: {_UNPACK} (unxz, or tar xf)"),
    (b"\x28\xb5\x2f\xfd", f"compressed with zstd: {_UNPACK} (unzstd, or tar xf)"),
    (b"7z\xbc\xaf\x27\x1c", f"a 7z archive: {_UNPACK}"),
    (b"Rar!\x1a\x07", f"a RAR archive: {_UNPACK}"),
    (b"GGUF", f"a GGUF file of llama.cpp or stable-diffusion.cpp: {_CONVERT}"),
    (b"\x89HDF\r\n\x1a\n", f"an HDF5 file (.h5, .keras) of Keras or TensorFlow: {_CONVERT}"),
    (b"\x93NUMPY", f"a NumPy array (.npy): {_CONVERT}"),
    (b"\x89PNG\r\n\x1a\n", f"a PNG image: {_CONVERT}"),
    (b"\xff\xd8\xff", f"a JPEG image: {_CONVERT}"),
    (b"%PDF-", f"a PDF document: {_CONVERT}"),
    (b"\x00\x05\x16\x07", "an AppleDouble file of macOS: use the file of the same name without '._'"),
    (b"\xff\xfe", f"text in UTF-16, as '>' of PowerShell writes it: {_AGAIN}, with 'curl -o' for example"),
)
_OFFICIAL_LFS = b"version https://git-lfs.github.com/spec/"
_END_OF_TENSORFLOW_INDEX = bytes.fromhex("57fb808b247547db")  # magic number of its sorted string table


def explain(path_or_file, reason: object, reads: tuple[str, ...] = ()) -> str:
    """Why a loader refuses a file: "it is ..." for a file of another kind, else ``reason``.

    path_or_file: a path, or a seekable binary file, inspected from its beginning.
    reason: what the loader found, such as an exception.
    reads: kinds that the loader can read, so that ``reason`` is better: "json", "zip". Default ().
    """
    try:
        if hasattr(path_or_file, "read"):
            kind = file_kind(path_or_file, reads)
        else:
            with Path(path_or_file).open("rb") as file:
                kind = file_kind(file, reads)
    except OSError:  # a folder, or no longer there; the reason says so
        kind = None
    return f"it is {kind}" if kind else str(reason)


def file_kind(file, reads: tuple[str, ...] = ()) -> str | None:
    """What a file is and what to do about it; None for weights and for unknown kinds.

    file: a seekable binary file.
    reads: kinds that count as weights here: "json", "zip". Default ().

    Nothing in the file is run. Only its beginning and its directory are read.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    file.seek(0)
    head = file.read(_HEAD)
    if not size:
        return f"empty: {_AGAIN}"
    if not head.strip(b"\0"):
        return f"full of zeros, like an interrupted download: {_AGAIN}"
    if head.startswith(_OFFICIAL_LFS):
        real = re.search(rb"^size (\d{1,15})\r?$", head, re.MULTILINE)
        of = f" of {int(real[1])} bytes" if real else ""
        return f"a Git LFS pointer to a file{of}, not that file: run 'git lfs pull', or download the file itself"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return None if "zip" in reads else _of_zip(file)
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    if head[257:262] == b"ustar":
        return f"a tar archive: {_UNPACK} (tar xf)"
    if tail == _END_OF_TENSORFLOW_INDEX:
        return f"the index of a TensorFlow checkpoint: {_CONVERT}"
    if head[4:8] == b"TFL3":
        return f"a TensorFlow Lite file: {_CONVERT}"
    # Protocol buffers lack a magic number; this matches the format version and the program name.
    if re.match(rb"\x08[\x01-\x20]\x12.[\x20-\x7e]{2}", head, re.DOTALL):
        return f"an ONNX file: {_CONVERT}"
    # MessagePack: a map of at most 15 or 65535 entries, whose first key is a string.
    if re.match(rb"(?:[\x81-\x8f]|\xde..)(?:[\xa1-\xbf]|\xd9.)[\x20-\x7e]{2}", head, re.DOTALL):
        return f"a MessagePack file of Flax (JAX): {_CONVERT}"
    if head[8:9] == b"{":
        return _of_safetensors(file, size)
    return _of_text(head, size, reads)


def _of_zip(file) -> str | None:
    try:
        if not zipfile.is_zipfile(file):
            return f"truncated: it lacks its end; {_AGAIN}"
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # the loader explains a damaged directory
        return None
    if any(re.fullmatch(r"[^/]*/?data\.pkl", member) for member in names):
        return None  # torch.save or TorchScript
    shown = ", ".join(_printable(member, 40) for member in names[:3]) + (", ..." if len(names) > 3 else "")
    if names and all(member.endswith(".npy") for member in names):
        return f"a NumPy archive (.npz) of {shown}: {_CONVERT}"
    return f"a zip archive ({shown or 'empty'}), but not one written by torch.save: {_UNPACK}"


def _of_safetensors(file, size: int) -> str | None:
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > 100_000_000:  # the limit of the format
        return None
    whole = 8 + length
    if whole <= size:
        try:
            entries = parse_json(file.read(length)).values()
            whole += max((entry["data_offsets"][1] for entry in entries if "data_offsets" in entry), default=0)
        except (ValueError, AttributeError, LookupError, TypeError):
            return None
    return f"truncated: it has {size} of {whole} bytes; {_AGAIN}" if size < whole else None


def _of_text(head: bytes, size: int, reads: tuple[str, ...]) -> str | None:
    start = head.decode("utf-8-sig", errors="replace").lstrip()
    if re.match(r"(<!--.*?-->\s*)?<(!doctype html|html|head|body)\b", start, re.IGNORECASE | re.DOTALL):
        title = re.search(r"<title[^>]*>([^<]{1,200})", start, re.IGNORECASE)
        called = f" ('{_printable(title[1], 60)}')" if title else ""
        return f"a web page{called}, such as a login or an error: {_AGAIN}, with the address of the file itself"
    if start.startswith("<?xml") or re.match(r"<Error>", start):
        code = re.search(r"<Code>([\w.-]{1,60})</Code>", start)
        if code:
            return f"the error of a server ({code[1]}) in XML: {_AGAIN}, with an address that is still valid"
        return f"an XML file: {_CONVERT}"
    if start[:1] in ("{", "["):
        if "json" in reads:
            return None
        if size <= _HEAD:
            with contextlib.suppress(ValueError):
                return _of_json(parse_json(start))
    if size > _HEAD or any(not (c.isprintable() or c.isspace()) or c == "\ufffd" for c in start) or _is_pickle(head):
        return None
    return f"a text file ('{_printable(start, 60)}'): {_AGAIN}"


def _of_json(content) -> str:
    if isinstance(content, dict):
        for key in ("error", "message", "detail", "errors"):
            if key in content:
                return f"the error of a server ('{_printable(json.dumps(content[key]), 80)}') in JSON: {_AGAIN}"
        if "weight_map" in content:
            return "the index of weights in several files: give the folder that holds them"
    return f"a JSON file: {_CONVERT}"


def _is_pickle(head: bytes) -> bool:
    """Whether the text consists of pickle instructions (the first protocols are text)."""
    try:
        return any(code.name == "STOP" for code, _, _ in pickletools.genops(head))
    except ValueError:
        return False


def _printable(text: str, most: int) -> str:
    """The beginning of a foreign text, without line ends and control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 4 * most]).split())[:most]

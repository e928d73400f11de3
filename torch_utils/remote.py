"""Files of other people, named by an address: ``https://host/file`` or ``hf:owner/name[/file]``.

Only safetensors are read, and JSON that describes one. A file is downloaded once and kept: https
files in the cache of this package, hub files in the hub's. With ``--offline`` only kept files are
found.

    https://host/folder/predictor.safetensors#sha256=1f3a...   with a checksum
    hf:owner/name                                              the predictor or network there
    hf:owner/name@v1/folder/file.safetensors                   a file of it, at a revision
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import requests

from torch_utils import distributed
from torch_utils.download import download_file, known_sha256, offline
from torch_utils.errors import UserError
from torch_utils.hub import hub_folder

_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?")
_SUFFIX = ".safetensors"
_REMEDY = "check the address, or give a file"


def cache_dir() -> Path:
    """Folder of downloads: $AMED_CACHE, $XDG_CACHE_HOME/amed-solver or ~/.cache/amed-solver."""
    if os.environ.get("AMED_CACHE"):
        return Path(os.environ["AMED_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amed-solver"


def is_remote(path) -> bool:
    """Whether a path of a command line is an address."""
    return isinstance(path, str) and re.match(r"https?://|hf:", path) is not None


def fetch(address: str, names: Sequence[str] = (f"*{_SUFFIX}",), description: bool = False) -> Path:
    """The local file of an address, downloaded if it is not there yet.

    address: see the module.
    names: patterns of the file in a repository where the address names none, the best first.
    description: also fetch ``<file>.json``, which may describe a network. Default: False.

    Every process of a torchrun has to call this. Raises UserError, with the address as given.
    """
    with distributed.local_main_first():
        if address.startswith("hf:"):
            return _from_hub(address, names)
        return _from_web(address, description)


def _check_name(name: str, address: str) -> None:
    if not name.endswith(_SUFFIX):
        raise UserError(f"{address}: only {_SUFFIX} files are read from other places, not '{name or address}'")


def _from_web(address: str, description: bool) -> Path:
    parts = urlsplit(address)
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise UserError(f"{address}: unencrypted addresses are not read; use https")
    name = PurePosixPath(unquote(parts.path)).name
    _check_name(name, address)
    digest = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", parts.fragment)
    if parts.fragment and not digest:
        raise UserError(f"{address}: after # a checksum is expected, sha256= and 64 digits")
    url = parts._replace(fragment="").geturl()
    path = cache_dir() / "web" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    download_file([url], path, sha256=digest[1] if digest else None, hint=_REMEDY)
    known_sha256(path, pinned=True)
    if (
        description
        and not path.with_name(name + ".json").exists()
        and not offline()
        and _exists(url + ".json", address)
    ):
        download_file([url + ".json"], path.with_name(name + ".json"), hint=_REMEDY)
    return path


def _exists(url: str, address: str) -> bool:
    """Whether there is a file at ``url``. UserError if the server does not say."""
    try:
        status = requests.head(url, timeout=30, allow_redirects=True).status_code
    except requests.RequestException as error:
        raise UserError(f"{address}: its description {url} cannot be looked for ({type(error).__name__})") from None
    if status not in (200, 403, 404, 410):
        raise UserError(f"{address}: its description {url} cannot be looked for (HTTP {status})")
    return status == 200


def _from_hub(address: str, names: Sequence[str]) -> Path:
    match = _HUB.fullmatch(address)
    if match is None or ".." in address:
        raise UserError(f"{address} is not an address of the hub: write hf:owner/name or hf:owner/name/file")
    file = match["file"]
    if file is not None:
        _check_name(file, address)
        names = (re.sub(r"([*?\[])", r"[\1]", file),)
    patterns = [*names, *(f"{name}.json" for name in names)]
    folder = Path(hub_folder(match["repo"], patterns, f"{address} cannot be downloaded", _REMEDY, match["revision"]))
    for name in names:
        if found := sorted(path for path in folder.glob(name) if path.is_file()):
            if len(found) > 1 and "[0-9]" not in name:
                there = ", ".join(path.relative_to(folder).as_posix() for path in found[:6])
                raise UserError(f"{address} has several such files: {there}; add one of them to the address")
            return found[-1]
    raise UserError(f"{address}: there is no {' or '.join(names)}; {_REMEDY}")

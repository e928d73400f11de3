"""Reference cases of the latent families, read from tests/golden/nets."""

import functools
import gzip
import json
from pathlib import Path

import numpy as np
import torch

NETS = Path(__file__).parent / "golden" / "nets"
TOLERANCE = 3e-5  # relative to the largest magnitude; what the reference allows for other convolution backends


@functools.cache
def tiny_case(name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(facts, weights, inputs and outputs) of a miniature network. Shared: do not change them."""
    folder = NETS / "tiny" / name
    return json.loads((folder / "config.json").read_text()), *map(
        _load_npz, (folder / "weights.npz", folder / "io.npz")
    )


def _load_npz(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@functools.cache
def manifest(name: str) -> dict:
    """Facts about an official file, with its ``tensors``: [name, shape, dtype] each."""
    with gzip.open(NETS / "manifests" / f"{name}.json.gz") as file:
        return json.load(file)


def meta_weights(facts: dict) -> dict[str, torch.Tensor]:
    """The tensors of an official file, without memory."""
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, shape, dtype in facts["tensors"]
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == torch.float32
    return ((found - expected).abs().max() / expected.abs().max()).item()


def same_settings(own: dict, official: dict) -> bool:
    """Whether ``own`` agrees with the official settings; of class names, in the last part."""
    return all(
        same_settings(value, official[key])
        if isinstance(value, dict)
        else official[key] == value or (key == "target" and official[key].rpartition(".")[2] == value)
        for key, value in own.items()
    )

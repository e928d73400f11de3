"""Recorded numbers of the published code of further systems (tests/golden/systems)."""

import json
from pathlib import Path

import numpy as np
import torch

from models.denoiser import Denoiser

GOLDEN = Path(__file__).parent / "golden" / "systems"


def arrays(name: str) -> dict[str, torch.Tensor]:
    """The arrays of ``<name>.npz``, under names that end in ``__<case>``."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def cases(name: str):
    """The settings of the cases, ``<name>.json``."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def assert_relative(ours, theirs, tolerance: float) -> None:
    """The largest difference is below ``tolerance`` times the largest recorded number."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:g}"


class Function(Denoiser):
    """A denoiser given by a function of (x, sigma)."""

    sigma_min, sigma_max, img_channels, img_resolution, label_dim = 0.0, 1e9, 1, 8, 0

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, sigma, **cond):
        return self.function(x, torch.as_tensor(sigma, dtype=x.dtype), **cond)

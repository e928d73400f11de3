"""The Fréchet distance between two sets of features (Heusel et al. 2017), computed in float64 without a matrix root.

FID = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), where the trace of the root is the sum of the roots of the
eigenvalues of A^T S2 A for any A with S1 = A A^T: a symmetric matrix, so nothing complex ever appears.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

from torch_utils import distributed
from torch_utils.arrays import read_npz, write_npz
from torch_utils.errors import UserError

_ROUNDING = 10 * np.finfo(np.float64).eps  # eigenvalues below this share of the largest are noise of the zero ones
_LONGEST_TEXT = 4096  # bytes of the name of a detector in a file


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians with means [D] and covariances [D,D], which may be singular.

    Raises UserError on shapes that do not fit, on numbers that are not finite and on asymmetric covariances.
    """
    mu1, sigma1 = _checked(mu1, sigma1, "first")
    mu2, sigma2 = _checked(mu2, sigma2, "second")
    if mu1.shape != mu2.shape:
        raise UserError(f"the statistics have {len(mu1)} and {len(mu2)} features; were they made by the same detector?")
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * _trace_of_root(sigma1, sigma2)
    return max(float(distance), 0.0)


def _checked(mu, sigma, which: str) -> tuple[np.ndarray, np.ndarray]:
    if np.iscomplexobj(mu) or np.iscomplexobj(sigma):
        raise UserError(f"the {which} statistics are complex numbers; were they made by another program?")
    mu = np.atleast_1d(np.asarray(mu, dtype=np.float64))
    sigma = np.atleast_2d(np.asarray(sigma, dtype=np.float64))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"the {which} statistics have mean {list(mu.shape)} and covariance {list(sigma.shape)}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"the {which} statistics hold numbers that are not finite; were the images or features broken?")
    if np.abs(sigma - sigma.T).max() > 1e-6 * np.abs(sigma).max():
        raise UserError(f"the {which} covariance is not symmetric")
    return mu, (sigma + sigma.T) / 2


def _trace_of_root(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    """tr (S1 S2)^(1/2) of two symmetric positive semi-definite matrices."""
    try:
        factor = scipy.linalg.cholesky(sigma1, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        factor = _factor_of_singular(sigma1)
    if factor.shape[1] == 0:
        return 0.0
    product = factor.T @ sigma2 @ factor
    values = np.linalg.eigvalsh((product + product.T) / 2)
    values = values[values > _ROUNDING * max(values[-1], 0.0)]
    return float(np.sqrt(values).sum())


def _factor_of_singular(sigma: np.ndarray) -> np.ndarray:
    """A [D,rank] with A A^T = sigma, where Cholesky's method finds a pivot that is not positive."""
    values, vectors = np.linalg.eigh(sigma)
    keep = values > _ROUNDING * max(values[-1], 0.0)
    return vectors[:, keep] * np.sqrt(values[keep])


@dataclass(frozen=True)
class Reference:
    """Saved statistics: mean [D], covariance [D,D], and what is known of their making."""

    mu: np.ndarray
    sigma: np.ndarray
    detector: str | None = None
    detector_sha256: str | None = None
    num: int | None = None

    def save(self, path: str | Path) -> None:
        """An npz with EDM's names ``mu`` and ``sigma`` (float64), and the other fields that are known."""
        extra = {"detector": self.detector, "detector_sha256": self.detector_sha256, "num": self.num}
        extra = {key: np.asarray(value) for key, value in extra.items() if value is not None}
        write_npz(path, mu=self.mu, sigma=self.sigma, **extra)

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Reads our files and EDM's. Raises UserError, naming the file."""
        data = read_npz(path, ("mu", "sigma", "detector", "detector_sha256", "num"))
        if not {"mu", "sigma"} <= data.keys():
            raise UserError(f"{path}: not FID statistics (an npz with mu and sigma); make them with fid.py ref")
        try:
            wide = [key for key in ("detector", "detector_sha256") if key in data and data[key].nbytes > _LONGEST_TEXT]
            if wide:
                raise ValueError(f"its '{wide[0]}' is no name but {data[wide[0]].nbytes} bytes")
            known = {
                key: kind(data[key].item())
                for key, kind in (("detector", str), ("detector_sha256", str), ("num", int))
                if key in data
            }
            return cls(*_checked(data["mu"], data["sigma"], "stored"), **known)
        except (TypeError, ValueError, ArithmeticError) as error:  # a UserError is a ValueError
            raise UserError(f"{path}: no usable FID statistics ({error}); make them anew with fid.py ref") from None


class FeatureStatistics:
    """Running float64 sums over features, from which mean and covariance follow; ranks add up theirs in one message."""

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        device = torch.device("cpu") if torch.device(device).type == "mps" else device  # MPS has no float64
        self.dim = dim
        self._sums = torch.zeros(
            [1 + dim + dim * dim], dtype=torch.float64, device=device
        )  # count, sum, outer products

    @property
    def count(self) -> int:
        return int(self._sums[0].item())

    def append(self, features: torch.Tensor) -> None:
        """features [B,D]."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"expected features [B,{self.dim}], got {list(features.shape)}")
        features = features.detach().to("cpu") if features.device.type == "mps" else features.detach()
        features = features.to(self._sums.device, torch.float64)
        self._sums[0] += len(features)
        self._sums[1 : 1 + self.dim] += features.sum(0)
        self._sums[1 + self.dim :].view(self.dim, self.dim).addmm_(features.T, features)

    def all_reduce(self) -> "FeatureStatistics":
        """Adds up the sums of all ranks, in place, on every rank."""
        distributed.wait_for_all()  # shares may take very different times
        distributed.all_reduce_sum(self._sums)
        return self

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and unbiased covariance [D,D] (as numpy.cov, and as EDM), float64."""
        count = self.count
        if count < 2:
            raise UserError(f"statistics need at least 2 images, there are {count}")
        sums = self._sums.cpu().numpy()
        mu = sums[1 : 1 + self.dim] / count
        sigma = (sums[1 + self.dim :].reshape(self.dim, self.dim) - np.outer(mu, mu) * count) / (count - 1)
        return mu, (sigma + sigma.T) / 2

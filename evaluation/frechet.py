"""The Fréchet distance between two sets of features (Heusel et al. 2017), in float64.

FID = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The trace of the matrix root is the sum of the
roots of the eigenvalues of A^T S2 A, for any A with S1 = A A^T. This matrix is symmetric, so that
no complex numbers occur.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

from torch_utils import distributed
from torch_utils.arrays import read_npz, write_npz
from torch_utils.errors import UserError

_ROUNDING = 10 * np.finfo(np.float64).eps  # eigenvalues below this share of the largest count as zero
_LONGEST_TEXT = 4096  # longest name of a detector in a file, in bytes


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians.

    mu1, mu2: means [D].
    sigma1, sigma2: covariances [D,D]; they may be singular.

    Raises UserError for wrong shapes, numbers that are not finite and asymmetric covariances.
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
        raise UserError(f"the {which} statistics have numbers that are not finite; check the images and the detector")
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
    """A [D,rank] with A A^T = sigma, for matrices without a Cholesky factor."""
    values, vectors = np.linalg.eigh(sigma)
    keep = values > _ROUNDING * max(values[-1], 0.0)
    return vectors[:, keep] * np.sqrt(values[keep])


@dataclass(frozen=True)
class Reference:
    """Saved statistics of features.

    mu, sigma: mean [D] and covariance [D,D].
    detector, detector_sha256: name and SHA-256 of the detector. Default: unknown.
    num: number of images. Default: unknown.
    """

    mu: np.ndarray
    sigma: np.ndarray
    detector: str | None = None
    detector_sha256: str | None = None
    num: int | None = None

    def save(self, path: str | Path) -> None:
        """Write an npz with EDM's entries ``mu`` and ``sigma`` (float64) and the known fields."""
        extra = {"detector": self.detector, "detector_sha256": self.detector_sha256, "num": self.num}
        extra = {key: np.asarray(value) for key, value in extra.items() if value is not None}
        write_npz(path, mu=self.mu, sigma=self.sigma, **extra)

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Read a file of ``save`` or of EDM. Raises UserError with its name if it is unusable."""
        data = read_npz(path, ("mu", "sigma", "detector", "detector_sha256", "num"))
        if not {"mu", "sigma"} <= data.keys():
            raise UserError(f"{path}: not FID statistics (an npz with mu and sigma); make them with fid.py ref")
        try:
            wide = [key for key in ("detector", "detector_sha256") if key in data and data[key].nbytes > _LONGEST_TEXT]
            if wide:
                raise ValueError(f"its '{wide[0]}' is not a name but {data[wide[0]].nbytes} bytes")
            known = {
                key: kind(data[key].item())
                for key, kind in (("detector", str), ("detector_sha256", str), ("num", int))
                if key in data
            }
            return cls(*_checked(data["mu"], data["sigma"], "stored"), **known)
        except (TypeError, ValueError, ArithmeticError) as error:  # a UserError is a ValueError
            raise UserError(f"{path}: unusable FID statistics ({error}); make them again with fid.py ref") from None


class FeatureStatistics:
    """Mean and covariance of features from running float64 sums, which processes can add up.

    dim: number of features D.
    device: where the sums are kept. Default: the CPU.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        device = torch.device("cpu") if torch.device(device).type == "mps" else device  # MPS has no float64
        self.dim = dim
        self.features: np.ndarray | None = None  # the features themselves, where they are kept
        self._sums = torch.zeros(
            [1 + dim + dim * dim], dtype=torch.float64, device=device
        )  # count, sum, outer products

    @property
    def count(self) -> int:
        return int(self._sums[0].item())

    def append(self, features: torch.Tensor) -> None:
        """Add features [B,D]."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"expected features [B,{self.dim}], got {list(features.shape)}")
        features = features.detach().to("cpu") if features.device.type == "mps" else features.detach()
        features = features.to(self._sums.device, torch.float64)
        self._sums[0] += len(features)
        self._sums[1 : 1 + self.dim] += features.sum(0)
        self._sums[1 + self.dim :].view(self.dim, self.dim).addmm_(features.T, features)

    def all_reduce(self) -> "FeatureStatistics":
        """Add up the sums of all ranks in place, on every rank."""
        distributed.wait_for_all()  # some ranks may take much longer than others
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

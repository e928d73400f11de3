"""Precision and recall of generated images (Kynkäänniemi et al. 2019): how many of them could be real, and how much of
what is real they cover. A second opinion beside FID, which mixes the two."""

import torch


def _radii(points: torch.Tensor, k: int) -> torch.Tensor:
    """[N]: distance of every point to its k-th neighbour among the others."""
    return torch.cdist(points, points).kthvalue(k + 1, dim=1).values  # the nearest is the point itself


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall), each in 0..1, from features [N,D] of real and [M,D] of generated images.

    precision: share of the generated that lie within the k-th-neighbour ball of some real one; recall: the reverse.
    Both depend on N and M: compare figures of equal numbers only. Raises ValueError for fewer than k + 1 of either, or
    where the widths differ.
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(f"features [N,D] and [M,D] are needed, not {list(real.shape)} and {list(generated.shape)}")
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"{k} neighbours need at least {k + 1} images of each kind")
    real, generated = real.double(), generated.double()
    apart = torch.cdist(real, generated)
    precision = (apart <= _radii(real, k)[:, None]).any(dim=0).double().mean()
    recall = (apart <= _radii(generated, k)[None, :]).any(dim=1).double().mean()
    return float(precision), float(recall)

"""Precision and recall of generated images (Kynkäänniemi et al. 2019).

Precision is the share of generated images that look real. Recall is the share of real images that
the generator covers. FID mixes the two.
"""

import torch


def _radii(points: torch.Tensor, k: int) -> torch.Tensor:
    """Distance [N] of every point to its k-th neighbour."""
    return torch.cdist(points, points).kthvalue(k + 1, dim=1).values  # the nearest one is the point itself


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall), each in 0..1.

    Precision is the share of generated images within the k-th-neighbour ball of a real one; recall
    is the reverse. Both depend on N and M, so compare values of equal numbers of images only.

    real: features [N,D] of real images, N > k.
    generated: features [M,D] of generated images, M > k.
    k: number of neighbours. Default 3.

    Raises ValueError for wrong shapes or too few images.
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

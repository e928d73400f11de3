"""Measures of two sets of features beside FID: KID, precision and recall, density and coverage.

KID: Binkowski et al. 2018. Precision, recall: Kynkäänniemi et al. 2019. Density, coverage: Naeem
et al. 2020. Distances are Euclidean, the arithmetic is in float64.
"""

from collections.abc import Sequence

import numpy as np
import torch

MANIFOLD = ("precision", "recall", "density", "coverage")
NEIGHBOURS = 3  # of precision and recall, as in the paper
NEIGHBOURS_OF_DENSITY = 5  # of density and coverage, as in theirs
_ROWS = 1024  # of a block of distances


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # Products of matrices are faster, but round near duplicates away from 0.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: torch.Tensor, k: int) -> torch.Tensor:
    """Distance of every point to its k-th neighbour among the others, [N]."""
    blocks = [_distances(part, points).kthvalue(k + 1, dim=1).values for part in points.split(_ROWS)]
    return torch.cat(blocks)  # the nearest is the point itself


def _checked(real: torch.Tensor, generated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(f"features [N,D] and [M,D] are needed, not {list(real.shape)} and {list(generated.shape)}")
    return real.double(), generated.double()


def manifold(
    real: torch.Tensor,
    generated: torch.Tensor,
    k: int = NEIGHBOURS,
    k_density: int = NEIGHBOURS_OF_DENSITY,
) -> dict[str, float]:
    """Precision, recall, density and coverage by name.

    real: features [N,D].
    generated: features [M,D].
    k: the ball around a point reaches to its k-th neighbour, for precision and recall. Default 3.
    k_density: the same for density and coverage. Default 5.

    Precision: share of the generated inside at least one ball of the real ones; recall: the
    reverse. These balls are closed. Density: mean number of real balls around a generated point,
    over k. Coverage: share of the real balls with a generated point. These balls are open, as in
    the code of their authors. All depend on N and M: compare figures of equal numbers only. Raises
    ValueError for fewer points than neighbours, or where the widths differ.
    """
    real, generated = _checked(real, generated)
    if min(len(real), len(generated)) <= max(k, k_density):
        raise ValueError(f"{max(k, k_density)} neighbours need at least {max(k, k_density) + 1} images of each kind")
    real_radii, generated_radii, balls = _radii(real, k), _radii(generated, k), _radii(real, k_density)
    precise, dense = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    nearest = torch.full_like(real_radii, float("inf"))
    for part, radii in zip(generated.split(_ROWS), generated_radii.split(_ROWS), strict=True):
        apart = _distances(part, real)
        precise += int((apart <= real_radii).any(1).sum())
        dense += int((apart < balls).sum())
        recalled |= (apart <= radii[:, None]).any(0)
        nearest = torch.minimum(nearest, apart.min(0).values)
    return {
        "precision": precise / len(generated),
        "recall": float(recalled.double().mean()),
        "density": dense / (k_density * len(generated)),
        "coverage": float((nearest < balls).double().mean()),
    }


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """(precision, recall) of ``manifold``."""
    found = manifold(real, generated, k, k)
    return found["precision"], found["recall"]


def kid(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Kernel distance: the unbiased MMD^2 with the kernel (x.y / D + 1)^3. It may be below zero.

    real: features [N,D].
    generated: features [M,D].
    """
    real, generated = _checked(real, generated)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        values = kernel(a, a)
        return (values.sum() - values.trace()) / (len(a) * (len(a) - 1))

    return float(within(real) + within(generated) - 2 * kernel(real, generated).mean())


def kid_of_subsets(
    real: torch.Tensor, generated: torch.Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """(mean, standard deviation) of ``kid`` over random subsets of both sets.

    real: features [N,D].
    generated: features [M,D].
    subsets: their number. Default 100.
    size: points of each set in a subset. Default 1000.
    seed: of the choice. Default 2020. Defaults and choice are those of torch-fidelity.

    The spread is that of overlapping subsets, not a confidence interval. Raises ValueError if a set
    is smaller than a subset.
    """
    if min(len(real), len(generated)) < size:
        raise ValueError(f"KID over subsets of {size} needs at least {size} images of each kind")
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        values.append(kid(*(points[random.choice(len(points), size, replace=False)] for points in (real, generated))))
    return float(np.mean(values)), float(np.std(values))


def groups_left_out(points: torch.Tensor, groups: int) -> Sequence[torch.Tensor]:
    """The points [N,D] without each of the interleaved groups, for a jackknife."""
    numbers = torch.arange(len(points)) % groups
    return [points[numbers != group] for group in range(groups)]

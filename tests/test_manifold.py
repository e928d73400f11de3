"""Precision and recall against a direct count, and where the answer is known."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from evaluation.precision_recall import precision_recall


def by_tree(real, generated, k):
    """The definition, with scipy's nearest neighbours."""

    def inside(centres, queries):
        radius = cKDTree(centres).query(centres, k + 1)[0][:, -1]
        return np.mean([bool((np.linalg.norm(centres - query, axis=1) <= radius).any()) for query in queries])

    return inside(real, generated), inside(generated, real)


@pytest.mark.parametrize("k", [1, 3])
def test_is_the_published_definition(k):
    generator = np.random.default_rng(k + 4)
    real, generated = generator.normal(size=(80, 5)), 0.6 * generator.normal(size=(60, 5)) + 0.8
    found = precision_recall(torch.from_numpy(real), torch.from_numpy(generated), k)
    assert found == pytest.approx(by_tree(real, generated, k), abs=1e-12)
    assert all(0 < share < 1 for share in found)


def test_the_balls_are_closed():
    """Kynkäänniemi et al. 2019, eq. 1, has "at most"; on a lattice many distances are equal."""
    real = torch.arange(10.0, dtype=torch.float64)[:, None]
    generated = torch.tensor([[-1.0], [10.0], [10.5], [4.5]], dtype=torch.float64)
    assert precision_recall(real, generated, k=1)[0] == 0.75
    assert precision_recall(generated, real, k=1)[1] == 0.75


def test_a_collapsed_generator_is_precise_and_does_not_cover():
    real = torch.randn(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    collapsed = real[:1] + 1e-3 * torch.randn(300, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1 and recall < 0.02
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)


def test_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match=r"\[9, 2\] and \[9, 3\]"):
        precision_recall(torch.zeros(9, 2), torch.zeros(9, 3))

"""Fréchet distance against scipy's root and closed forms; statistics against numpy.cov."""

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluation.frechet import FeatureStatistics, Reference, frechet_distance
from evaluation.reading import compute_statistics
from torch_utils.errors import UserError


def random_statistics(dim: int, count: int, seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((dim, dim)) / np.sqrt(dim)
    features = np.maximum(rng.standard_normal((count, dim)) @ mixing * scale, 0)
    return features.mean(0), np.cov(features, rowvar=False)


def with_sqrtm(mu1, sigma1, mu2, sigma2):
    root = np.real(scipy.linalg.sqrtm(sigma1 @ sigma2))
    return np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)


@pytest.mark.parametrize("dim, count, scale", [(1, 50, 1.1), (2, 50, 3.0), (64, 300, 1.2), (128, 1000, 1.02)])
def test_equals_sqrtm(dim, count, scale):
    one, two = random_statistics(dim, count, 1), random_statistics(dim, count, 2, scale)
    one, two = [(m, np.atleast_2d(s)) for m, s in (one, two)]
    assert frechet_distance(*one, *two) == pytest.approx(with_sqrtm(*one, *two), rel=1e-6)


def test_symmetric_and_zero_on_itself():
    one, two = random_statistics(96, 400, 3), random_statistics(96, 400, 4, 1.3)
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-10)
    assert frechet_distance(*one, *one) == pytest.approx(0, abs=1e-9)


def test_rounding_never_makes_a_distance_negative():
    found = []
    for seed in range(30):
        mu, sigma = random_statistics(24, 100, seed)
        found.append(frechet_distance(mu, sigma, mu, sigma * (1 + 1e-15)))
    assert min(found) >= 0 and max(found) < 1e-9


def test_commuting_gaussians():
    """In a shared eigenbasis: |mu1 - mu2|^2 + sum (sqrt(a) - sqrt(b))^2."""
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    a, b = rng.uniform(0.01, 5, 40), rng.uniform(0.01, 5, 40)
    mu1, mu2 = rng.standard_normal(40), rng.standard_normal(40)
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    found = frechet_distance(mu1, basis @ np.diag(a) @ basis.T, mu2, basis @ np.diag(b) @ basis.T)
    assert found == pytest.approx(expected, rel=1e-10)


def test_two_by_two():
    """tr (S1 S2)^(1/2) = sqrt(tr S1 S2 + 2 sqrt(det S1 det S2)) in two dimensions."""
    s1, s2 = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.5, -0.9], [-0.9, 3.0]])
    root = np.sqrt(np.trace(s1 @ s2) + 2 * np.sqrt(np.linalg.det(s1) * np.linalg.det(s2)))
    expected = 5.0 + np.trace(s1) + np.trace(s2) - 2 * root
    assert frechet_distance([1, 2], s1, [0, 0], s2) == pytest.approx(expected, rel=1e-12)


def test_singular_covariances():
    zero, eye = np.zeros((3, 3)), np.eye(3)
    assert frechet_distance([0, 0, 0], zero, [3, 4, 0], zero) == pytest.approx(25)
    assert frechet_distance([0, 0, 0], zero, [0, 0, 0], eye) == pytest.approx(3)
    assert frechet_distance([0, 0, 0], eye, [0, 0, 0], zero) == pytest.approx(3)
    apart1, apart2 = np.diag([4.0, 0, 0]), np.diag([0, 9.0, 0])  # no common direction: nothing cancels
    assert frechet_distance([0, 0, 0], apart1, [0, 0, 0], apart2) == pytest.approx(13)
    rank_one = np.outer([1.0, 2, 3], [1.0, 2, 3])
    assert frechet_distance([0, 0, 0], rank_one, [0, 0, 0], 4 * rank_one) == pytest.approx(14, rel=1e-7)


def test_fewer_samples_than_features():
    """Rank 29 in 100 dimensions, with its known root: S2 = 4 S1 gives (S1 S2)^(1/2) = 2 S1."""
    mu, sigma = random_statistics(100, 30, 6)
    assert frechet_distance(mu, sigma, mu, 4 * sigma) == pytest.approx(np.trace(sigma), rel=1e-6)
    full = random_statistics(100, 500, 7)
    one_way, other_way = frechet_distance(mu, sigma, *full), frechet_distance(*full, mu, sigma)
    assert one_way == pytest.approx(other_way, rel=1e-6)
    assert one_way == pytest.approx(with_sqrtm(mu, sigma, *full), rel=1e-4)  # sqrtm itself is inexact here


@pytest.mark.parametrize(
    "mu, sigma, message",
    [
        ([0, np.nan], np.eye(2), "not finite"),
        ([0, 0], np.array([[1, np.inf], [np.inf, 1]]), "not finite"),
        ([0, 0, 0], np.eye(3), "same detector"),
        ([0, 0], np.eye(3), "covariance"),
        ([0, 0], np.array([[1, 0.5], [0, 1]]), "symmetric"),
    ],
)
def test_impossible_statistics_are_errors(mu, sigma, message):
    with pytest.raises(UserError, match=message):
        frechet_distance(mu, sigma, [0, 0], np.eye(2))


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_symmetry_is_judged_relative_to_the_largest_entry(scale):
    """Files in float32 are symmetric up to 1e-7 of it; more than 1e-6 is another matrix."""
    for asymmetry, fine in ((1e-7, True), (5e-7, True), (3e-6, False), (1e-3, False)):
        sigma = scale * np.array([[2.0, 0.5], [0.5 + 2 * asymmetry, 1.0]])
        if fine:
            found = frechet_distance([0, 0], sigma, [0, 0], scale * np.array([[2.0, 0.5], [0.5, 1.0]]))
            assert 0 <= found < 1e-9 * scale
        else:
            with pytest.raises(UserError, match="not symmetric"):
                frechet_distance([0, 0], sigma, [0, 0], scale * np.eye(2))


def test_small_eigenvalues_count_and_rounding_does_not():
    """Against closed forms: the roots of tiny variances, and of the zero ones in a space of 300."""
    a, b = np.array([1.0, 1e-6, 1e-7]), np.array([4.0, 9e-6, 4e-7])
    found = frechet_distance(np.zeros(3), np.diag(a), np.zeros(3), np.diag(b))
    assert found - 1.0 == pytest.approx(4e-6 + 1e-7, rel=1e-8)
    singular = frechet_distance(np.zeros(4), np.diag([*a, 0.0]), np.zeros(4), np.diag([*b, 0.0]))
    assert singular - 1.0 == pytest.approx(4e-6 + 1e-7, rel=1e-8)
    factor = np.random.default_rng(10).standard_normal((300, 5))
    sigma = factor @ factor.T
    assert frechet_distance(np.zeros(300), sigma, np.zeros(300), 4 * sigma) == pytest.approx(np.trace(sigma), rel=1e-9)


def test_running_statistics_equal_numpy():
    features = np.random.default_rng(8).standard_normal((203, 17)).astype(np.float32) * 3 + 100
    statistics = FeatureStatistics(17)
    for start in range(0, 203, 50):
        statistics.append(torch.from_numpy(features[start : start + 50]))
    mu, sigma = statistics.moments()
    assert statistics.count == 203
    np.testing.assert_allclose(mu, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-8, atol=1e-8)


def test_statistics_need_two_images():
    statistics = FeatureStatistics(3)
    statistics.append(torch.ones([1, 3]))
    with pytest.raises(UserError, match="at least 2"):
        statistics.moments()


def test_statistics_of_a_stream_of_batches():
    class Means:
        feature_dim = 1

        def __call__(self, images):
            return images.float().mean(dim=(2, 3))

    batches = [torch.full([2, 1, 4, 4], value, dtype=torch.uint8) for value in (10, 20)]
    mu, sigma = compute_statistics(iter(batches), Means()).moments()
    assert mu[0] == 15
    assert sigma[0, 0] == pytest.approx(100 / 3)


def test_reference_round_trip_and_edm_files(tmp_path):
    mu, sigma = random_statistics(5, 40, 9)
    Reference(mu, sigma, "digits", "ab" * 32, 40).save(tmp_path / "own.npz")
    own = Reference.load(tmp_path / "own.npz")
    assert (own.detector, own.detector_sha256, own.num) == ("digits", "ab" * 32, 40)
    np.testing.assert_array_equal(own.sigma, sigma)
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    edm = Reference.load(tmp_path / "edm.npz")
    assert edm.detector is None
    np.testing.assert_array_equal(edm.mu, mu)


def test_unusable_references_are_errors(tmp_path):
    np.savez(tmp_path / "pickled.npz", mu=np.array([print], dtype=object), sigma=np.eye(1))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("pickled.npz", "other.npz", "array.npy", "text.npz"):
        with pytest.raises(UserError, match=name):
            Reference.load(tmp_path / name)

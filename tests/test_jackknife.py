"""The jackknife against scipy for a mean and against true Fréchet distances."""

import numpy as np
import pytest
import scipy.stats

from evaluation.frechet import frechet_distance
from evaluation.jackknife import interval_text, jackknife

GROUPS, FEATURES, IMAGES, REPETITIONS = 5, 8, 200, 200


def test_a_mean_of_equal_groups_has_the_textbook_interval():
    values = np.array([1.0, 2.0, 3.0, 4.0, 0.5])
    left_out = [np.delete(values, g).mean() for g in range(5)]
    estimate = jackknife(values.mean(), left_out)
    interval = scipy.stats.t.interval(0.95, 4, loc=values.mean(), scale=scipy.stats.sem(values))
    assert estimate.value == pytest.approx(values.mean()) and estimate.error == pytest.approx(scipy.stats.sem(values))
    assert (estimate.value - estimate.half_width, estimate.value + estimate.half_width) == pytest.approx(interval)
    narrow = scipy.stats.t.interval(0.8, 4, scale=scipy.stats.sem(values))
    assert jackknife(values.mean(), left_out, 0.8).half_width == pytest.approx(narrow[1])


def test_an_interval_of_a_score_ends_at_zero():
    assert interval_text(1.234, 0.05) == "1.23 ± 0.05" and interval_text(0.1, 0.1) == "0.10 ± 0.10"
    assert interval_text(0.1, 0.25) == "0.10 (0 to 0.35)"
    assert interval_text(1.234, 0.05, ".3g", ".1g") == "1.23 ± 0.05"


def test_the_bias_of_a_variance_is_removed():
    """The classical example: the variance with divisor N becomes the one with divisor N - 1."""
    values = np.random.default_rng(0).normal(size=12)
    estimate = jackknife(np.var(values), [np.var(np.delete(values, i)) for i in range(12)])
    assert estimate.value == pytest.approx(np.var(values, ddof=1), rel=1e-12)


def test_below_zero_means_the_whole_interval():
    assert jackknife(-1.0, [-1.1, -0.9, -1.0]).below_zero
    assert not jackknife(-0.1, [-1.1, 0.9, -0.1]).below_zero and not jackknife(1.0, [1.1, 0.9, 1.0]).below_zero
    assert not jackknife(0.0, [0.0, 0.0]).below_zero


@pytest.mark.parametrize("left_out", [[1.0], [], [[1.0, 2.0]]])
def test_fewer_than_two_groups_are_refused(left_out):
    with pytest.raises(ValueError, match="at least 2 groups"):
        jackknife(1.0, left_out)


def distance(features) -> float:
    """To the standard normal distribution."""
    moments = features.mean(0), np.cov(features, rowvar=False)
    return frechet_distance(*moments, np.zeros(FEATURES), np.eye(FEATURES))


def study(one, other, truth):
    """How often the intervals of a comparison of two methods on the same noise cover the truth.

    Returns (coverage of the jackknife's interval, its mean half width, coverage of the interval
    from the groups' own distances, mean half width of the interval of ``one`` alone).
    """
    rng, group = np.random.default_rng(0), np.arange(IMAGES) % GROUPS
    quantile, found = scipy.stats.t.ppf(0.975, GROUPS - 1), []
    for _ in range(REPETITIONS):
        noise = rng.normal(size=(IMAGES, FEATURES))
        both = one(noise), other(noise)
        whole = [distance(features) for features in both]
        left_out = np.array([[distance(features[group != g]) for g in range(GROUPS)] for features in both])
        estimate = jackknife(whole[0] - whole[1], left_out[0] - left_out[1])
        alone = jackknife(whole[0], left_out[0])
        own = [distance(both[0][group == g]) - distance(both[1][group == g]) for g in range(GROUPS)]
        naive = abs(np.mean(own) - truth) <= quantile * scipy.stats.sem(own)
        found.append([abs(estimate.value - truth) <= estimate.half_width, estimate.half_width, naive, alone.half_width])
    return np.mean(found, axis=0)


@pytest.mark.parametrize(
    ("one", "other", "truth"),
    [
        # N(m, s^2 I) has the squared distance D ((s - 1)^2 + m^2) to N(0, I).
        (lambda x: 1.1 * x, lambda x: 1.2 * x, FEATURES * (0.1**2 - 0.2**2)),
        (lambda x: x + 0.1, lambda x: 0.5 * x, FEATURES * (0.1**2 - 0.5**2)),
    ],
)
def test_the_interval_of_a_paired_difference_holds_the_truth_as_often_as_it_says(one, other, truth):
    coverage, width, naive, alone = study(one, other, truth)
    assert 0.91 <= coverage <= 0.99  # 0.95 give or take three standard errors of 200 repetitions
    assert naive < 0.8  # distances of small groups are biased, each method's by another amount


def test_pairing_makes_the_interval_narrow():
    coverage, width, _, alone = study(lambda x: 1.10 * x, lambda x: 1.11 * x, FEATURES * (0.1**2 - 0.11**2))
    assert width < alone / 4 and 0.91 <= coverage <= 0.99

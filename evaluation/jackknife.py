"""Confidence intervals of any statistic over groups of seeds: the delete-one-group jackknife.

The Fréchet distance is biased for small samples, so the mean of the distances of small groups does
not estimate the distance of all images. The jackknife computes the statistic without one group at a
time instead. These values give its standard error and its bias of first order in 1 / images
(Quenouille 1956, Tukey 1958).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its uncertainty.

    value: the statistic of all seeds, minus its estimated bias.
    error: standard error.
    half_width: half the width of the confidence interval around ``value``.
    """

    value: float
    error: float
    half_width: float

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.value + self.half_width < 0


def interval_text(value: float, half_width: float, form: str = ".2f", form_of_width: str | None = None) -> str:
    """The text "1.23 ± 0.05" of a score that cannot be negative.

    Where the interval would reach below 0 it ends there: "0.10 (0 to 0.35)".

    value, half_width: as in ``Estimate``.
    form: format of the value. form_of_width: of the half width; default: the same.
    """
    if half_width > value >= 0:
        return f"{value:{form}} (0 to {value + half_width:{form}})"
    return f"{value:{form}} ± {half_width:{form_of_width or form}}"


def jackknife(whole: float, left_out: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Estimate a statistic from its value on all seeds and its values with one group left out.

    whole: the statistic of all seeds.
    left_out: [G], G >= 2, the statistic of all seeds except those of group g. The groups should
        have about equal sizes.
    confidence: level of the interval (Student's t, G - 1 degrees of freedom). Default 0.95.

    For the paired difference of two methods, pass the difference of their values and the
    differences of their left-out values, group by group. Both methods need the same seeds in the
    same groups; then the common effect of a seed cancels.
    """
    values = np.asarray(left_out, dtype=np.float64)
    groups = len(values)
    if values.ndim != 1 or groups < 2:
        raise ValueError(f"the jackknife needs the values of at least 2 groups, not {list(values.shape)}")
    error = math.sqrt((groups - 1) / groups * float(np.square(values - values.mean()).sum()))
    value = float(whole) - (groups - 1) * float(values.mean() - whole)
    return Estimate(value, error, float(stdtrit(groups - 1, (1 + confidence) / 2)) * error)

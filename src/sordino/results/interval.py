"""Intervals of 95% of a mean difference, from few values.

Over paired values, such as the runs of two methods with the same seeds, an interval is Student's t on the differences.

Within one run, clients' differences are no independent sample: all clients are tested on the same pictures, and if they
share a prompt, their overall accuracies are even the same number. A run's interval therefore takes clients and test
pictures as two samples that are crossed (Cameron, Gelbach and Miller, Robust Inference with Multiway Clustering,
Journal of Business & Economic Statistics 2011, section 2): the variance is that over clients plus that over pictures,
less that over pairs of both, and never less than either of the first two. Its degrees of freedom are those of Welch
(Biometrika 1947) for a sum of two variances.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean difference of accuracies, as a fraction, and its interval of 95%.

    Attributes:
        mean: of the differences.
        low, high: the interval's ends; None if there are too few values for one.
    """

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def above(self) -> bool:
        """True if all of the interval is above zero."""
        return self.low is not None and self.low > 0

    @property
    def below(self) -> bool:
        """True if all of the interval is below zero."""
        return self.high is not None and self.high < 0

    def percent(self) -> str:
        """Return the interval's ends in percent, `-1.9 to 4.0`; a dash if there are none."""
        if self.low is None or self.high is None:
            return "-"
        return f"{points(self.low)} to {points(self.high)}"


def points(fraction: float) -> str:
    """Return a fraction in percent with one decimal, and no minus sign before a zero."""
    text = f"{100 * fraction:.1f}"
    return "0.0" if text == "-0.0" else text


def paired(differences: Sequence[float]) -> Interval:
    """Return Student's t interval of paired differences, at least one; one alone has a mean and no interval."""
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Interval(mean)
    return _around(mean, statistics.variance(differences) / count, count - 1)


def crossed(
    mean: float, clients: Sequence[float], pictures: int, over_pictures: float | None, over_pairs: float
) -> Interval:
    """Return the interval of one run's mean difference, over clients and over the test pictures that they share.

    Args:
        mean: of the difference.
        clients: the difference of each client, at least one.
        pictures: the number of test pictures.
        over_pictures: variance of the mean with pictures as its sample; None if there is only one.
        over_pairs: variance of the mean with pairs of a client and a picture as its sample.
    """
    # Each source of variance with its degrees of freedom; a source of one value tells nothing.
    parts: list[tuple[float, int]] = []
    if len(clients) > 1:
        parts.append((statistics.variance(clients) / len(clients), len(clients) - 1))
    if over_pictures is not None:
        parts.append((over_pictures, pictures - 1))
    if not parts:
        return Interval(mean)
    both = sum(variance for variance, _ in parts) - (over_pairs if len(parts) == 2 else 0.0)
    variance = max(both, *(part for part, _ in parts))
    if variance == 0:
        return Interval(mean, mean, mean)
    return _around(mean, variance, variance**2 / sum(part**2 / freedom for part, freedom in parts))


def _around(mean: float, variance: float, freedom: float) -> Interval:
    from scipy.special import stdtrit  # brings numpy, and reading a summary needs none

    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(variance)
    return Interval(mean, max(-1.0, mean - half), min(1.0, mean + half))  # no two accuracies differ by more

"""Means over seeds with Student's interval, and paired differences of two arms on the same seeds or problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean of some values, and an interval that covers the true mean in `LEVEL` of such samples.

    NaN at both ends where one value is all there is.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def over(values: Sequence[float]) -> Interval:
    """Return the mean of independent values: mean +- t * s / sqrt(n), t of n - 1 degrees of freedom (Student 1908)."""
    mean, count = fmean(values), len(values)
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    half = quantile((1 + LEVEL) / 2, count - 1) * stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired(before: Sequence[float], after: Sequence[float]) -> Interval:
    """Return the mean of after - before, pair by pair; raises `ValueError` where they are not as many."""
    return over([b - a for a, b in zip(before, after, strict=True)])


def quantile(probability: float, freedom: int) -> float:
    """Return the value that Student's t of `freedom` degrees stays below with `probability` (0.5 to below 1)."""
    low, high = 0.0, 1.0
    while distribution(high, freedom) < probability:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def distribution(value: float, freedom: int) -> float:
    """Return the probability that Student's t of `freedom` degrees stays below `value`.

    The finite sums for whole degrees of freedom: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    angle, odd = math.atan(value / math.sqrt(freedom)), freedom % 2
    cosine = math.cos(angle)
    term, total = cosine if odd else 1.0, 0.0
    for j in range((freedom - odd) // 2):
        total += term
        term *= (2 * j + 1 + odd) / (2 * j + 2 + odd) * cosine**2
    central = math.sin(angle) * total  # the probability of |t| below value, for odd degrees but for the angle
    return 0.5 + (2 / math.pi * (angle + central) if odd else central) / 2

"""Krippendorff's alpha: how far annotators agree beyond what chance would give.

1 is perfect agreement, 0 what labels shared out at random would reach, below 0 systematic disagreement. Any number of
annotators, any number of votes of each unit, nominal, ordinal or interval values (Krippendorff 2011, "Computing
Krippendorff's Alpha-Reliability"). numpy only; letters: P patterns of votes, K values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align_kit.errors import UserError, unknown

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray

LEVELS = ("nominal", "ordinal", "interval")
MAX_VALUES = 128  # a scale of 0 to 100 fits; free text does not, and K x K tables stay small
DRAWS = 1000  # of the bootstrap: the 2.5 % quantile then rests on 25 of them
FEWEST_DRAWS = 200  # where votes make so many patterns that each draw takes long; such intervals are narrow anyway
BUDGET = 20_000_000  # draws x patterns
COVERAGE = 0.95
FEWEST_UNITS = 10  # for an interval: resamples of a few units are all alike, and would seem sure


@dataclass(frozen=True)
class Scale:
    """What the values mean: their `level`, and for ordinal words their `order` from lowest to highest."""

    level: str = "nominal"
    order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise unknown("level of measurement", self.level, LEVELS)
        if self.order and self.level != "ordinal":
            raise UserError(f"level {self.level} has no order of values; write ordinal:{','.join(self.order)}")
        if len(set(self.order)) < len(self.order):
            raise UserError(f"the order {','.join(self.order)} names a value twice; name each once, lowest first")


NOMINAL = Scale()


@dataclass(frozen=True)
class Alpha:
    """An agreement: `alpha` with its bootstrap interval, or None and `why` it is undefined.

    `units` are those with at least two votes (the others say nothing about agreement), `votes` theirs, `unanimous` the
    units whose votes are all equal, `disagreement` the share of pairs of votes of one unit that differ.
    """

    alpha: float | None
    low: float | None
    high: float | None
    units: int
    votes: int
    unanimous: int
    disagreement: float | None
    values: tuple[str, ...]
    why: str = ""


class Tally:
    """Counts units by how often each value was voted for, so that millions of units take the room of their patterns."""

    def __init__(self) -> None:
        self.patterns: Counter[tuple[tuple[str, int], ...]] = Counter()

    @classmethod
    def of(cls, units: Iterable[Sequence[str]]) -> Tally:
        """Return the tally of `units`, each the votes that are there."""
        tally = cls()
        for votes in units:
            tally.add(votes)
        return tally

    def add(self, votes: Sequence[str]) -> None:
        """Count one unit; fewer than two votes make no pair and are left out."""
        self.count(tuple(sorted(Counter(votes).items())))

    def count(self, pattern: tuple[tuple[str, int], ...], units: int = 1) -> None:
        """Count `units` units whose votes are (value, how often), sorted by value."""
        if sum(count for _, count in pattern) >= 2:
            self.patterns[pattern] += units

    def values(self) -> list[str]:
        """Return all values voted for, in order; raises `UserError` where they are too many to be labels."""
        found = sorted({value for pattern in self.patterns for value, _ in pattern})
        if len(found) > MAX_VALUES:
            raise UserError(
                f"the annotators' columns hold {len(found)} different values, such as {found[0][:40]!r}: more than the "
                f"{MAX_VALUES} of a scale; name columns of labels, or round the scores"
            )
        return found


def alpha(tally: Tally, scale: Scale = NOMINAL, *, seed: int = 0) -> Alpha:
    """Return alpha of the units in `tally` with its interval.

    alpha = 1 - observed / expected disagreement (Krippendorff 2011), undefined where only one value was voted
    for. The interval is the plain bootstrap over units (Zapf et al. 2016 find it to keep its coverage), drawn from
    `seed`. Raises `UserError` for values that do not fit the scale.
    """
    import numpy as np

    values = tally.values()
    units = tally.patterns.total()
    unanimous = sum(times for pattern, times in tally.patterns.items() if len(pattern) == 1)
    if not units:
        return Alpha(None, None, None, 0, 0, 0, None, (), "no row has two votes")
    values, places = _placed(values, scale)
    counts_PK, times_P = _table(tally, values)
    votes = int(times_P @ counts_PK.sum(1))
    differ_P = _within(counts_PK, 1.0 - np.eye(len(values)))
    differing = float(times_P @ differ_P) / votes
    if len(values) == 1:
        why = f"all votes are {values[0]!r}: chance alone would agree as well"
        return Alpha(None, None, None, units, votes, unanimous, differing, tuple(values), why)
    (point,) = _alphas(counts_PK, [times_P], scale, places)
    low: float | None = None
    high: float | None = None
    if units >= FEWEST_UNITS:
        low, high = percentiles(_alphas(counts_PK, resampled(times_P, seed), scale, places))
    return Alpha(point, low, high, units, votes, unanimous, differing, tuple(values))


def resampled(times_P: Array, seed: int) -> Iterator[Array]:
    """Yield resamples of as many units as there are, each as how often every pattern was drawn (P)."""
    import numpy as np

    units, generator = int(times_P.sum()), np.random.default_rng(seed)
    for _ in range(max(FEWEST_DRAWS, min(DRAWS, BUDGET // len(times_P)))):
        yield generator.multinomial(units, times_P / units)


def percentiles(samples: Iterable[float]) -> tuple[float, float]:
    """Return the percentile interval of bootstrap samples; those that are undefined (NaN) are left out."""
    import numpy as np

    drawn = np.array(list(samples))
    low, high = np.quantile(drawn[np.isfinite(drawn)], [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def _placed(values: list[str], scale: Scale) -> tuple[list[str], Array | None]:
    """Return the values in the order of the scale, and on an interval scale where they stand."""
    import numpy as np

    if scale.level == "nominal":
        return values, None
    if scale.order:
        for value in values:
            if value not in scale.order:
                raise unknown("value on the ordinal scale", value, scale.order)
        return [value for value in scale.order if value in values], None
    numbers = {value: _number(value, scale.level) for value in values}
    values = sorted(values, key=numbers.__getitem__)
    return values, np.array([numbers[value] for value in values])


def _number(value: str, level: str) -> float:
    try:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    except ValueError:
        order = "; give their order, ordinal:low,middle,high" if level == "ordinal" else ""
        raise UserError(f"the vote {value!r} is no number, which level {level} needs{order}, or use nominal") from None


def _table(tally: Tally, values: list[str]) -> tuple[Array, Array]:
    """Return the votes for each value (P, K) of each pattern and how many units have the pattern (P)."""
    import numpy as np

    column = {value: place for place, value in enumerate(values)}
    counts_PK = np.zeros((len(tally.patterns), len(values)))
    for row, pattern in enumerate(tally.patterns):
        for value, count in pattern:
            counts_PK[row, column[value]] = count
    return counts_PK, np.array(list(tally.patterns.values()), dtype=float)


def _within(counts_PK: Array, distance_KK: Array) -> Array:
    """Return each pattern's share of the observed coincidences, times their distances (P).

    The coincidence matrix is o_ck = sum over units of n_c (n_k - [c = k]) / (m - 1); the distance of a value to itself
    is 0, so that the diagonal needs no care.
    """
    return ((counts_PK @ distance_KK) * counts_PK).sum(1) / (counts_PK.sum(1) - 1)  # type: ignore[no-any-return]


def _distances(totals_K: Array, scale: Scale, places: Array | None) -> Array:
    """Return the squared distances of all pairs of values (K, K); an ordinal scale's depend on how common they are."""
    import numpy as np

    if scale.level == "nominal":
        return 1.0 - np.eye(len(totals_K))
    if scale.level == "interval":
        assert places is not None
        return (places[:, None] - places[None]) ** 2  # type: ignore[no-any-return]
    # Votes ranked below a value and half of its own: the sum from c to k less half of both ends.
    middle_K = np.cumsum(totals_K) - totals_K / 2
    return (middle_K[:, None] - middle_K[None]) ** 2  # type: ignore[no-any-return]


def _alphas(counts_PK: Array, draws: Iterable[Array], scale: Scale, places: Array | None) -> Iterator[float]:
    """Yield alpha for each weighting (P) of the patterns; NaN where it is undefined."""
    import numpy as np

    distance_KK = _distances(counts_PK.sum(0), scale, places)
    within_P = _within(counts_PK, distance_KK)
    for times_P in draws:
        totals_K = times_P @ counts_PK
        if scale.level == "ordinal":
            distance_KK = _distances(totals_K, scale, places)
            within_P = _within(counts_PK, distance_KK)
        expected = totals_K @ distance_KK @ totals_K
        yield float(1 - (totals_K.sum() - 1) * (times_P @ within_P) / expected) if expected > 0 else np.nan

"""How many labels are the wrong way round: estimates from annotators' votes and from a reward model's margins.

Nobody sees the right label, so each estimate rests on an assumption, which it carries with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align_kit.preferences.alpha import Tally
from align_kit.preferences.measures import wilson

if TYPE_CHECKING:
    import numpy as np

BINS = 500  # of margins, beyond which they are averaged
RATE_STEPS = 250  # of the flip rate, from 0 to 1/2
SCALES = 81  # temperatures, from a hundredth to a hundred times the median margin
CHI_SQUARE = 3.8415  # the 95 % quantile of one degree of freedom (Wilks 1938)


@dataclass(frozen=True)
class Flips:
    """How often `what` is wrong with its 95 % interval, from how many rows, by which method and assumption."""

    what: str
    rate: float
    low: float
    high: float
    rows: int
    method: str
    assumption: str


def from_votes(tally: Tally, what: str, method: str) -> Flips | None:
    """Return the rate at which one vote is wrong, from how often two votes of a row differ; None without such rows.

    The one-coin model of Dawid and Skene (1979): each of K labels is replaced by another one, drawn evenly, with the
    rate e, independently. Two votes then agree with probability (1 - e)^2 + e^2 / (K - 1), which is solved for e, and
    so are the ends of Wilson's interval of the share of pairs that differ.
    """
    import numpy as np

    labels = len(tally.values())
    if not tally.patterns or labels < 2:
        return None
    size_P = np.array([sum(count for _, count in pattern) for pattern in tally.patterns], dtype=float)
    same_P = np.array([sum(count * (count - 1) for _, count in pattern) for pattern in tally.patterns])
    times_P = np.array(list(tally.patterns.values()), dtype=float)
    votes = times_P @ size_P
    differing = float(times_P @ (size_P - same_P / (size_P - 1)) / votes)
    # Rows count by their votes, as in alpha; a row's share of differing pairs varies no more than a yes or no would.
    low, high = wilson(differing, float(votes**2 / (times_P @ size_P**2)))
    assumption = (
        f"every vote is wrong equally often, independently of the others and of the row, and a wrong one falls evenly "
        f"on the other{'' if labels == 2 else f' {labels - 1}'} label{'s' * (labels > 2)} (one-coin model, Dawid and "
        "Skene 1979); what all get wrong alike is not seen"
    )
    rate, low, high = (vote_error(share, labels) for share in (differing, low, high))
    return Flips(what, rate, low, high, int(times_P.sum()), method, assumption)


def vote_error(differing: float, labels: int) -> float:
    """Return the rate e of wrong votes at which two votes of one row differ in a share `differing` of cases.

    The smaller root of (1 - e)^2 + e^2 / (K - 1) = 1 - differing; (K - 1) / K, pure chance, beyond what it can reach.
    """
    chance = (labels - 1) / labels
    return chance * (1 - math.sqrt(max(1 - differing / chance, 0.0)))


def majority_error(rate: float, votes: int) -> float:
    """Return how often most of `votes` two-way votes are wrong when each is with `rate`; even splits count half."""
    shares = [math.comb(votes, wrong) * rate**wrong * (1 - rate) ** (votes - wrong) for wrong in range(votes + 1)]
    return sum(shares[votes // 2 + 1 :]) + (shares[votes // 2] / 2 if votes % 2 == 0 else 0.0)


def from_margins(margins: Sequence[float] | np.ndarray) -> Flips | None:
    """Return the share of flipped pairs, from margins: the chosen side's score less the rejected side's.

    A pair is labelled as Bradley and Terry (1952) say of its margin m over a temperature T, and flipped with the rate
    e (Chowdhury et al. 2024, "Provably Robust DPO"): p = (1 - e) s(m / T) + e s(-m / T). e and T are those of the
    greatest likelihood, and the interval is the profile likelihood's. So a flip is what the scores are sure of and the
    label contradicts: disagreement at small margins counts as the scores' doubt. None without a margin beyond 0.
    """
    import numpy as np

    margins = np.asarray(margins, dtype=float)
    if not len(margins) or not np.median(np.abs(margins)) > 0:
        return None
    size_B, right_B, wrong_B = _binned(margins)
    rates_R = np.linspace(0, 0.5, RATE_STEPS + 1)
    scales = np.median(np.abs(margins)) * np.logspace(-2, 2, SCALES)
    profile_R = np.max([_likelihood(size_B / scale, right_B, wrong_B, rates_R) for scale in scales], axis=0)
    inside = rates_R[2 * (profile_R.max() - profile_R) <= CHI_SQUARE]
    assumption = (
        "the scores, at one temperature, are as often right as Bradley and Terry's model says, and flips come evenly "
        "on all pairs (Chowdhury et al. 2024); where the scores are wrong with confidence, that counts as flips"
    )
    best = float(rates_R[profile_R.argmax()])
    method = "the margins of the scores"
    return Flips("a label", best, float(inside[0]), float(inside[-1]), len(margins), method, assumption)


def _binned(margins: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean size of the margins in each bin, and how many there have the label with and against them."""
    import numpy as np

    ordered = margins[np.argsort(np.abs(margins), kind="stable")]
    bins = np.array_split(ordered, min(BINS, len(ordered)))
    size_B = np.array([np.abs(part).mean() for part in bins])
    # A margin of nothing speaks for either side.
    right_B = np.array([(part > 0).sum() + (part == 0).sum() / 2 for part in bins])
    return size_B, right_B, np.array([len(part) for part in bins]) - right_B


def _likelihood(size_B: np.ndarray, right_B: np.ndarray, wrong_B: np.ndarray, rates_R: np.ndarray) -> np.ndarray:
    """Return the log-likelihood of each flip rate (R), margins given in units of the temperature."""
    import numpy as np

    likely_B = 1 / (1 + np.exp(-np.minimum(size_B, 500.0)))
    share_RB = (1 - rates_R[:, None]) * likely_B + rates_R[:, None] * (1 - likely_B)
    tiny = np.finfo(float).tiny
    return np.log(np.maximum(share_RB, tiny)) @ right_B + np.log(np.maximum(1 - share_RB, tiny)) @ wrong_B  # type: ignore[no-any-return]

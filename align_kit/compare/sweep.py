"""Which learning rate to try next: a walk that ends when the best one has a worse neighbour on either side.

Every arm starts from the same rate and walks by the same rule, so none is assumed to want more than another; the rates
lie on one grid, a factor `FACTOR` apart, and two steps of it are ten times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FACTOR = math.sqrt(10)
MOST = 8  # rates tried for one arm: from the start this reaches some 3000 times as far, or so little

LOSS, REWARD = "held-out loss", "held-out reward"  # what a rate can be chosen by
# By learning rate what it is chosen by, less being better: a reward is turned round. A run that diverged counts as
# infinitely bad.
Losses = Mapping[float, float]


def grid(start: float, place: int) -> float:
    """Return the rate `place` steps above `start`, to two digits."""
    return float(f"{start * FACTOR**place:.2g}")


def following(losses: Losses, start: float, most: int = MOST) -> float | None:
    """Return the rate to try next, or `None` where the best is between two that are worse, or `most` were tried."""
    if not losses:
        return grid(start, 0)
    if len(losses) >= most:
        return None
    rate = best(losses)
    place = round(math.log(rate / start, FACTOR))
    neighbours = (grid(start, place + 1), grid(start, place - 1))
    return next((near for near in neighbours if near not in losses), None)


def best(losses: Losses) -> float:
    """Return the rate with the lowest loss, the lower of two that are equal."""
    return min(sorted(losses), key=lambda rate: _comparable(losses[rate]))


def _comparable(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class Found:
    """What a sweep found: the losses by rate, the best rate, and where between its neighbours the minimum may lie.

    `quantity` names what the losses are made of: `LOSS`, or `REWARD` turned round.
    """

    losses: Losses
    rate: float
    estimate: float | None  # the vertex of the parabola through the best and its neighbours, in log rate
    edge: str  # "" where the best has a worse neighbour on either side, else "lowest" or "highest"
    quantity: str = LOSS

    @property
    def values(self) -> dict[float, float]:
        """The quantity itself by rate, as the runs measured it; infinite either way where one diverged."""
        sign = -1.0 if self.quantity == REWARD else 1.0
        return {rate: sign * loss for rate, loss in self.losses.items()}


def found(losses: Losses, quantity: str = LOSS) -> Found:
    """Return what the losses of a sweep say."""
    rates, rate = sorted(losses), best(losses)
    place = rates.index(rate)
    edge = "" if 0 < place < len(rates) - 1 else "lowest" if place == 0 else "highest"
    return Found(losses, rate, None if edge else _vertex(losses, rates[place - 1 : place + 2]), edge, quantity)


def _vertex(losses: Losses, rates: Sequence[float]) -> float | None:
    """Return where the parabola through three points of (log rate, loss) is lowest."""
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(rate), losses[rate]) for rate in rates)
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if not (math.isfinite(left) and math.isfinite(right) and right > left):
        return None
    return math.exp((x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left))

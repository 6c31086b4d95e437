"""Where the time of a run went: a ledger of seconds by part, of this process, in which no second counts twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

START, TRAINING, REST = "start", "training", "rest"
UPDATE = "update"  # what of training is no part by name: forward, backward, the step
# What training stands still for: no tokens are trained meanwhile.
ASIDE = (f"{TRAINING}/evaluation", f"{TRAINING}/saves")


class Ledger:
    """Seconds by part. Of parts inside each other the innermost is charged, but a part of training keeps its own.

    What comes before training and is no part by name is "start", what comes after it is "rest".
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._outside = START
        self._since = clock()

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Charge `part` meanwhile."""
        self._charge()
        self._open.append(part)
        if part == TRAINING:
            self._outside = REST
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = self._clock()
        part = self._part()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._since
        self._since = now

    def _part(self) -> str:
        if not self._open:
            return self._outside
        if TRAINING not in self._open:
            return self._open[-1]
        inside = self._open[self._open.index(TRAINING) + 1 :]
        return f"{TRAINING}/{inside[0] if inside else UPDATE}"  # an evaluation may roll out, too

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part so far, in the order in which parts were first entered."""
        self._charge()
        return dict(self._seconds)

    def aside(self) -> float:
        """Return the seconds that training has stood still for evaluations and saves."""
        seconds = self.seconds()
        return sum(seconds.get(part, 0.0) for part in ASIDE)


_ledger = Ledger()


def begin() -> None:
    """Begin a new ledger: a process may carry out one run after the other."""
    global _ledger
    _ledger = Ledger()


@contextmanager
def during(part: str) -> Iterator[None]:
    """Charge `part` of the run at hand meanwhile; decorates a function as well."""
    with _ledger.during(part):
        yield


def ledger() -> Ledger:
    """Return the ledger of the run at hand."""
    return _ledger

"""What the numbers of a step say before its update: go on, make no update, or stop. No engine, no ranks: numbers only.

A spike lies so many deviations above the rolling median. How far numbers deviate is told by medians and their order
(Hampel, The influence curve, 1974), which ignore the spikes themselves, as a mean and a standard deviation would not.
Losses of a few rows and gradient norms are skewed, and often most are alike and a few are many times as large: where
no number is negative the deviation of their logarithms may be the wider one, and then counts. The spikes that do harm
are several times the usual loss, for many steps (Chowdhery et al., PaLM, 2022, section 5.1).
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from align_kit.telemetry.roll_call import named

WINDOW = 64  # steps that tell what is usual
SPREAD_WINDOW = 128  # steps that tell how far apart values lie: what comes once in twenty steps must be among them
LEAST = 16  # steps before any is: the first ones fall fast
FLOOR = 0.01  # of the median: a deviation is taken to be no less, so that numbers that hardly change have no spikes
TAIL, TAIL_DEVIATIONS = 3, 3.0  # the third largest: a normal one of 128 lies 3 MADs above the median
PATIENCE = 3  # steps in a row without an update, the last of which ends the run
LARGEST = 300.0  # exponent: beyond it nothing is a spike
SCALING_PATIENCE = 16  # in fp16, whose loss scale starts at 2^16 and halves at each such step

GO, WARN, SKIP, STOP = "go", "warn", "skip", "stop"
ROLLBACK = "rollback"  # a policy: stop, and let who starts the run again skip the step


class Decision(NamedTuple):
    """What to do at a step, why in words, and the steps to leave out where the run is started again."""

    what: str
    why: str = ""
    skip_steps: tuple[int, ...] = ()


class Rolling:
    """The latest values of a quantity, and how far above them a new one lies.

    `values` are those that were trained on, `seen` those too that were not: they say nothing of what is usual, but
    something of how far apart values lie. Else a tail that is skipped once would be skipped for ever.
    """

    def __init__(self, values: Iterable[float] = (), seen: Iterable[float] | None = None) -> None:
        self.values: deque[float] = deque(values, maxlen=WINDOW)
        self.seen: deque[float] = deque(self.values if seen is None else seen, maxlen=SPREAD_WINDOW)

    def add(self, value: float, *, trained: bool = True) -> None:
        """Remember a value, and whether it was trained on."""
        self.seen.append(value)
        if trained:
            self.values.append(value)

    def limit(self, deviations: float) -> float:
        """Return the value above which a new one is a spike: `deviations` above the median; at first infinity."""
        if len(self.values) < LEAST:
            return math.inf
        median = statistics.median(self.values)
        limit = median + deviations * max(_deviation(self.seen, median), FLOOR * abs(median))
        if median <= 0 or min(self.seen) < 0:
            return limit
        # half as many: a logarithm is not skewed, and 6 MADs are 4 standard deviations of a normal one
        logs = [math.log(value) for value in self.seen if value > 0]
        return max(limit, median * math.exp(min(deviations / 2 * _mad(logs, math.log(median)), LARGEST)))


def _mad(values: Iterable[float], median: float) -> float:
    """Return the median absolute deviation from `median`."""
    return statistics.median(abs(value - median) for value in values)


def _deviation(values: Iterable[float], median: float) -> float:
    """Return the median absolute deviation, or what the tail tells where it is longer than a normal one.

    The tail is the third largest value: two spikes in a row do not make the third usual.
    """
    tail = heapq.nlargest(TAIL, values)[-1]
    return max(_mad(values, median), (tail - median) / TAIL_DEVIATIONS)


class Judge:
    """Decides about each step before its update, from the numbers of all ranks, so that all ranks decide alike.

    `policy` says what a spike of loss or gradient norm means (`warn`, `skip`, `rollback`). A number that is not finite
    is never trained on: a loss stops the run unless the policy skips, a gradient norm makes no update. So many steps
    without an update in a row stop the run: a model that cannot be trained any more.
    """

    def __init__(self, policy: str = WARN, deviations: float = 12.0, patience: int = PATIENCE) -> None:
        self.policy, self.deviations, self.patience = policy, deviations, patience
        self.rolling = {"loss": Rolling(), "gradient norm": Rolling()}
        self.in_a_row = 0  # steps without an update, up to now
        self.skipped = 0  # all of them

    def decide(self, step: int, losses: Sequence[float], norm: float | None, overflowed: bool = False) -> Decision:
        """Return what to do at `step`; `losses` are of each rank (their mean is the step's), `norm` is of all.

        `overflowed`: the loss scale of fp16 was too high, as it is now and then, and the engine has made no update.
        """
        decision = self._broken(step, losses, norm)
        if decision is None:
            values = {"loss": statistics.fmean(losses), "gradient norm": norm}
            decision = self._spiked(step, {name: value for name, value in values.items() if value is not None})
        if overflowed and decision.what in (GO, WARN):
            decision = Decision(SKIP, "the gradient overflowed fp16")
        if decision.what == SKIP:
            return self._counted(decision)
        if decision.what != STOP:
            self.in_a_row = 0
        return decision

    def _broken(self, step: int, losses: Sequence[float], norm: float | None) -> Decision | None:
        """Return what to do where a number is not finite."""
        wrong = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        if wrong:
            why = f"the loss of {named(wrong)} is {losses[wrong[0]]}"
            return self._by_policy(step, why, otherwise=STOP)
        if norm is not None and not math.isfinite(norm):
            return self._by_policy(step, "the gradient norm is not finite", otherwise=SKIP)
        return None

    def _spiked(self, step: int, values: Mapping[str, float]) -> Decision:
        """Return what to do where a number is far above what it was; remember all, and which are trained on."""
        spikes = []
        for name, value in values.items():
            limit = self.rolling[name].limit(self.deviations)
            if value > limit:
                usual = statistics.median(self.rolling[name].values)
                spikes.append(f"the {name} is {value:.4g} (usually {usual:.4g}, a spike from {limit:.4g})")
        decision = self._by_policy(step, " and ".join(spikes), otherwise=WARN) if spikes else Decision(GO)
        for name, value in values.items():
            self.rolling[name].add(value, trained=decision.what in (GO, WARN))
        return decision

    def _by_policy(self, step: int, why: str, otherwise: str) -> Decision:
        if self.policy == ROLLBACK:
            # The step before too: its update made the weights that this loss is of.
            return Decision(STOP, why, tuple(number for number in (step - 1, step) if number > 0))
        return Decision(SKIP if self.policy == SKIP else otherwise, why)

    def _counted(self, decision: Decision) -> Decision:
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row < self.patience:
            return decision
        return Decision(STOP, f"{self.in_a_row} steps in a row made no update, this one because {decision.why}")

    # --- what a resumed run goes on with ---

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain JSON; floats come back with the same bits."""
        kept: dict[str, Any] = {name: list(rolling.values) for name, rolling in self.rolling.items()}
        seen = {name: list(rolling.seen) for name, rolling in self.rolling.items()}
        return {**kept, "seen": seen, "in_a_row": self.in_a_row, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for name in self.rolling:
            self.rolling[name] = Rolling(state[name], state["seen"][name])
        self.in_a_row, self.skipped = int(state["in_a_row"]), int(state["skipped"])

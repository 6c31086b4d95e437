"""The clocks of a run: where its seconds went, and what a line of training took."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_kit.telemetry import spent
from align_kit.telemetry.meters import GIB, Meters, repeatable
from align_kit.telemetry.spent import Ledger


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def go(self, seconds: float) -> None:
        self.now += seconds


def test_the_ledger_charges_the_innermost_part() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    clock.go(1)
    with ledger.during("data"):
        clock.go(2)
        with ledger.during("policy"):
            clock.go(4)
        clock.go(8)
    clock.go(16)
    assert ledger.seconds() == {"start": 17, "data": 10, "policy": 4}


def test_training_has_parts_of_its_own_and_what_follows_is_the_rest() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    with ledger.during(spent.TRAINING):
        clock.go(1)
        with ledger.during("evaluation"):
            clock.go(2)
            with ledger.during("rollout"):  # an evaluation's own: no iteration waited for it
                clock.go(4)
        with ledger.during("rollout"):
            clock.go(8)
    clock.go(16)
    expected = {"training/update": 1, "training/evaluation": 6, "training/rollout": 8, "rest": 16}
    assert {part: seconds for part, seconds in ledger.seconds().items() if seconds} == expected
    assert ledger.aside() == 6


def test_a_part_that_fails_is_charged_and_left() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    with pytest.raises(ValueError), ledger.during("data"):
        clock.go(3)
        raise ValueError
    clock.go(5)
    assert ledger.seconds() == {"start": 5, "data": 3}


@given(st.lists(st.tuples(st.sampled_from(["data", "training", "saves", "evaluation", "leave"]), st.integers(0, 9))))
def test_no_second_is_lost_or_counted_twice(moves: list[tuple[str, int]]) -> None:
    clock = Clock()
    ledger = Ledger(clock)
    opened = []
    for part, seconds in moves:
        if part != "leave":
            opened.append(ledger.during(part))
            opened[-1].__enter__()
        elif opened:
            opened.pop().__exit__(None, None, None)
        clock.go(seconds)
    assert sum(ledger.seconds().values()) == pytest.approx(sum(seconds for _, seconds in moves))


def test_meters_leave_evaluations_and_saves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    ledger = Ledger(clock)
    monkeypatch.setattr(spent, "_ledger", ledger)
    meter = Meters(clock)
    with ledger.during(spent.TRAINING):
        clock.go(4)
        with ledger.during("evaluation"):
            clock.go(100)
        with ledger.during("saves"):
            clock.go(50)
        line = meter.read(step=2, tokens=1000, peak_bytes=3 * GIB, utilisation=2e-3)
        assert line == {
            "machine/seconds": 2,  # 4 s, two steps
            "machine/tokens_per_second": 250,
            "machine/peak_gib": 3,
            "machine/mfu": 0.5,
        }
        clock.go(1)
        line = meter.read(step=3, tokens=10, peak_bytes=0, utilisation=None)
    assert line == {"machine/seconds": 1, "machine/tokens_per_second": 10, "machine/peak_gib": 0}, "not since the start"


def test_what_a_run_repeats_is_told_from_what_it_does_not() -> None:
    meter = Meters()
    taken = meter.read(step=1, tokens=1, peak_bytes=1, utilisation=1.0)
    line = {"step": 1, "loss": 0.5, "eval_loss": 0.25, "eval_runtime": 1.5, "eval_samples_per_second": 3.0, **taken}
    assert repeatable(line) == {"step": 1, "loss": 0.5, "eval_loss": 0.25}


def test_a_ledger_begins_with_each_run() -> None:
    before = spent.ledger()
    spent.begin()
    with spent.during("data"):
        pass
    assert spent.ledger() is not before and list(spent.ledger().seconds()) == ["start", "data"]

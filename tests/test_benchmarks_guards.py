"""The benchmark of the guards: a tiny run of it ends in the line it promises, and a dear guard fails it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import guards_cost
from tests.bench import run_benchmark
from tests.harness import Ranks


@pytest.mark.slow
def test_a_tiny_run(ranks: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("--sizes", "tiny", "--tokens", "32", "--rows", "1", "--rounds", "1")
    code = run_benchmark("benchmarks.guards_cost", words, ranks, tmp_path)
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 7, lines
    assert re.fullmatch(r"tiny: \d\.\d MB at rest on each rank, a step without guards \d+ ms", lines[0])
    assert re.match(r"  full +\d+\.\d\d% of a step in its own code; steps longer than with numbers +by [+-]", lines[4])
    assert re.fullmatch(r"guards that are on by default each add less than 1%: (yes|no)", lines[-1])
    assert code == lines[-1].endswith("no")


def found(inside: dict[str, float]) -> dict[str, Any]:
    """Return a measurement of two rounds of steps of a second, with so many seconds in each guard."""
    seconds = {arm: [4.0, 4.0] for arm in guards_cost.ARMS}
    spent = {arm: [inside.get(arm, 0.0)] * 2 for arm in guards_cost.ARMS}
    return {"seconds": seconds, "inside": spent, "shares": [0.25], "held": 1e6}


@pytest.mark.parametrize(
    ("inside", "within"),
    [
        ({}, True),
        ({"numbers": 0.03}, True),
        ({"numbers": 0.05}, False),
        ({"ranks": 0.05}, False),
        ({"ranks": 0.05, "none": 0.03}, True),  # the reduction it stands in for took time too
        ({"full": 1.0}, True),  # not on by default
    ],
)
def test_verdict(inside: dict[str, float], within: bool) -> None:
    assert guards_cost.lines("4M", found(inside))[1] is within


def test_every_arm_has_its_turn_in_every_round() -> None:
    turns = guards_cost.Turns.__new__(guards_cost.Turns)
    steps = [turns.place(step) for step in range(5 * len(guards_cost.ARMS) * 3)]
    counted = [(number, arm) for number, arm, inside in steps if inside]
    for number in range(3):
        for arm in guards_cost.ARMS:
            assert counted.count((number, arm)) == guards_cost.BLOCK

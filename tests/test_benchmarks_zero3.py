"""The benchmark of ZeRO-3 against DDP: a tiny run of it ends in the line it promises, and wrong losses are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import zero3_cost
from benchmarks.zero3_cost import Contender
from tests.harness import Ranks

pytestmark = pytest.mark.slow


def test_a_tiny_run(ranks: Ranks, tmp_path: Path) -> None:
    """In a fork of the warm process, which has imported what the benchmark would, and from which it forks in turn."""
    words = ["--sizes", "tiny", "--ways", "shipped", "all_three", "leaves", "--clip", "1", "--rounds", "1"]
    function = "benchmarks.zero3_cost:main"
    done = ranks.run(function=function, world_size=1, ranked=False, cwd=tmp_path, argv=words).ok()
    assert re.search(r"ddp / one +\d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\)", done.text)
    last = done.text.splitlines()[-1]
    assert re.fullmatch(r"geometric mean / ddp: shipped \d+\.\d\d, all_three \d+\.\d\d, leaves \d+\.\d\d", last)


def contenders(zero3: list[float], one: float = 2.0) -> dict[str, Contender]:
    losses = {"one": [one, 9.0], "ddp": [2.0, 1.0], "shipped": zero3}
    return {name: Contender(name, [], [], losses=values) for name, values in losses.items()}


def test_losses_that_agree() -> None:
    assert zero3_cost.check_losses(contenders([2.0, 1.0 + 1e-6])) == pytest.approx(1e-6)


@pytest.mark.parametrize(("zero3", "one"), [([2.0, 1.01], 2.0), ([2.0, float("nan")], 2.0), ([2.0, 1.0], 2.01)])
def test_losses_that_differ_are_refused(zero3: list[float], one: float) -> None:
    with pytest.raises(SystemExit, match="differs from DDP's"):
        zero3_cost.check_losses(contenders(zero3, one))

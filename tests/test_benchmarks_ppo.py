"""The benchmark of a PPO iteration: a tiny run ends in the line it promises, and what strays is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ppo_iteration
from tests.bench import run_benchmark
from tests.harness import Ranks

pytestmark = pytest.mark.slow

LITTLE = ("--models", "tiny", "--rows", "8", "--generations", "4", "--tokens", "40", "--rounds", "1", "--threads", "1")
ROW = r" +\d+\.\d{3} +\d+\.\d{3} +\d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\)"


@pytest.fixture
def run(ranks: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Run the benchmark and return its lines."""

    def lines_of(*words: str) -> list[str]:
        code = run_benchmark("benchmarks.ppo_iteration", (*LITTLE, *words), ranks, tmp_path)
        lines = capfd.readouterr().out.splitlines()
        assert code == 0, lines
        assert re.fullmatch(r"geometric mean \d+\.\d\d", lines[-1])
        return lines

    return lines_of


def test_an_iteration_of_two_ranks_in_parts(run: Callable[..., list[str]]) -> None:
    lines = run("--ranks", "2", "--ratios", "4:1", "--mini-batches", "2")
    for part in ("rollout", "score", "update", "iteration"):
        assert [line for line in lines if re.fullmatch(part + ROW, line)]
    given = next(float(line.split()[-1]) for line in lines if line.startswith("tokens given / computed"))
    assert given > 1
    assert [line for line in lines if re.fullmatch(r"rollout / generate .* \d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\)", line)]


def test_an_update_beside_that_of_trl(run: Callable[..., list[str]]) -> None:
    """Losses agree with TRL's and every forward of ours is walked, or it would not end well."""
    lines = run("--ranks", "1", "--ratios", "1:1", "--update-only")
    assert [line for line in lines if re.fullmatch("update" + ROW, line)]


def iterations(*, loss: float = 1.0, **doors: int) -> list[list[dict[str, Any]]]:
    """Return a pair of iterations of one rank: a shared one, with these counts on top of its own, and a plain one."""
    ours = {"walked": 2, "plain": 0, **doors}
    return [[
        {"mode": "shared", "losses": [1.0], "doors": {"policy": ours}},
        {"mode": "plain", "losses": [loss], "doors": {"policy": {"walked": 0, "plain": 2}}},
    ]]  # fmt: skip


def test_pairs_that_agree_pass() -> None:
    ppo_iteration.check(iterations(loss=1.0 + 1e-6))


@pytest.mark.parametrize(("found", "said"), [
    (iterations(plain=1), "iteration 0 is shared, and its policy counted"),
    (iterations(walked=0), "iteration 0 is shared, and its policy counted"),
    (iterations(loss=1.001), "the losses of a pair of iterations differ"),
    (iterations(loss=float("nan")), "the losses of a pair of iterations differ"),
], ids=["strayed", "idle", "other loss", "nan"])  # fmt: skip
def test_what_strays_is_refused(found: list[list[dict[str, Any]]], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        ppo_iteration.check(found)

"""The doctor's own ranks: they meet, and one that hangs, fails, adds wrongly or has another time is named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from align_kit import machine
from align_kit.doctor import ranks
from align_kit.doctor.finding import BAD, NOTE, WARN
from align_kit.doctor.ranks import Group
from tests.harness import ROOT

HOOK = """
import os, sys, time
import torch.distributed as dist
from align_kit.doctor import rank
if os.environ["RANK"] == "1":
    {change}
sys.exit(rank.main(sys.argv[1:]))
"""
WRONG_SUM_AND_TIME = """
    real, now = dist.all_reduce, time.time
    dist.all_reduce = lambda tensor, **more: (real(tensor, **more), tensor[7].add_(1))
    time.time = lambda: now() + 3
"""
Start = Callable[..., Group]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start two ranks of which the second does something else; whatever they do, they end with the test."""
    groups = []

    def started(change: str = "", *, words: tuple[str, ...] | None = None, step: float = 2.0) -> Group:
        words = words or (sys.executable, "-c", HOOK.format(change=change.strip() or "pass"))
        environ = {name: value for name, value in os.environ.items() if name not in (*machine.LAUNCHER, "LOCAL_RANK")}
        groups.append(ranks.start(2, {**environ, "PYTHONPATH": str(ROOT)}, words=words, step=step))
        return groups[-1]

    yield started
    for group in groups:
        group.close()
        assert all(process.returncode is not None for process in group.processes)
        assert not Path(group.folder.name).exists()


@pytest.mark.slow
def test_a_wrong_sum_and_a_wrong_clock_are_said(start: Start) -> None:
    group = start(WRONG_SUM_AND_TIME)
    found = ranks.all_reduce(group)
    assert found.state == BAD and "2 ranks on gloo" in found.what and "the sum is wrong" in found.what
    found = ranks.clocks(group)
    assert found.state == WARN and found.what == "rank 1's clock is 3.0 s off rank 0's"


@pytest.mark.slow
@pytest.mark.parametrize("hang", ["time.sleep(60)", "os.kill(os.getpid(), 19)"], ids=["sleeps", "is stopped"])
def test_a_rank_that_hangs_is_named(start: Start, hang: str) -> None:
    group = start(f"dist.all_reduce = lambda *_, **__: {hang}")
    found = ranks.all_reduce(group)
    assert found.state == BAD and "rank 1 hangs at the all-reduce" in found.what
    assert "rank 0 failed at the all-reduce (RuntimeError" in found.what
    assert ranks.clocks(group).state == NOTE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ('os.environ["GLOO_SOCKET_IFNAME"] = "eth99"', "rank 1 failed at joining the others (RuntimeError: "),
        ("dist.all_reduce = lambda *_, **__: os.abort()", "rank 1 ended at the all-reduce (without a word)"),
    ],
)
def test_a_rank_that_fails_is_named(start: Start, change: str, what: str) -> None:
    found = ranks.all_reduce(start(change))
    assert found.state == BAD and what in found.what


def test_ranks_that_do_not_start(start: Start) -> None:
    begun = time.monotonic()
    found = ranks.all_reduce(start(words=(sys.executable, "-c", "raise SystemExit('no libtorch here')")))
    assert found.state == BAD and "rank 0 ended at loading torch (no libtorch here)" in found.what
    assert "'import torch' says more" in found.remedy
    assert time.monotonic() - begun < 20


@pytest.mark.slow
def test_under_a_launcher_the_ranks_of_two_machines_meet(tmp_path: Path) -> None:
    """Two launchers on one machine stand for two machines; one rank of each speaks, and says which it is."""
    port = str(machine.free_port())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", port]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    nodes = []
    for node in range(2):
        with (tmp_path / f"{node}.log").open("wb") as log:
            words = [*launcher, "--node-rank", str(node), "-m", "align_kit", "doctor"]
            nodes.append(subprocess.Popen(words, cwd=tmp_path, env=env, stdout=log, stderr=log))
    try:
        for node in nodes:
            node.wait(timeout=150)
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    for node in range(2):
        lines = [line for line in (tmp_path / f"{node}.log").read_text().splitlines() if line.startswith("rank ")]
        assert len(lines) > 30 and all(line.startswith(f"rank {node}: ") for line in lines)
        assert any(line.startswith(f"rank {node}: ok    all-reduce") and "2 ranks on gloo" in line for line in lines)
    said = (tmp_path / "0.log").read_text()
    assert "2 ranks within" in said and "rank 0 compares them" in (tmp_path / "1.log").read_text()


@pytest.mark.parametrize(
    ("environ", "launched"),
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False),
        ({"RANK": "1", "WORLD_SIZE": "2"}, True),
        ({"RANK": "2", "WORLD_SIZE": "2"}, False),
        ({"RANK": "one", "WORLD_SIZE": "2"}, False),
        ({"RANK": "0"}, False),
    ],
)
def test_what_a_launcher_makes(environ: dict[str, str], launched: bool) -> None:
    assert ranks.is_launched(environ) is launched

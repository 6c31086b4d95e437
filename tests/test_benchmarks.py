"""Benchmarks on a world of seconds: they run, check what they check, and end in the line their readers look for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

pytestmark = pytest.mark.slow

LITTLE = ("--models", "tiny", "--rounds", "2", "--distributions", "1:1", "--tokens", "48", "--threads", "1")
ROW = re.compile(r"1:1 +\d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\)( +\d+\.\d\d){3} +\d+\.\d\d \(\d+\.\d\d\)")


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"benchmarks.{name}", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("words", [
    ("--ranks", "2", "--cached"), ("--ranks", "1", "--forward", "plain", "--sft"),
], ids=["pairs", "sft"])  # fmt: skip
def test_preference_step(words: tuple[str, ...]) -> None:
    """Losses agree with TRL's and all steps take the path asked for, or it would not end well."""
    done = run("preference_step", *LITTLE, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"geometric mean \d+\.\d\d", lines[-1])
    assert len([line for line in lines if ROW.fullmatch(line)]) == 1
    assert not done.stderr


def test_preference_step_on_real_lengths(real_data: Path) -> None:
    lengths = ("--distributions", "--data-root", str(real_data))
    done = run("preference_step", *LITTLE[:4], *lengths, "--ranks", "1", "--forward", "packed")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("gsm8k_pairs", "llamafactory_dpo_en", "xstest"):
        assert f"\n{name} " in done.stdout


def test_save_hold() -> None:
    done = run("save_hold", "--model", "tiny", "--rounds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"ours / theirs \d+\.\d\d", done.stdout.splitlines()[-1])


def test_soak() -> None:
    """One run, whatever is done to it, and the counts."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.soak", "--minutes", "0.01", "--seed", "19", "--steps", "9"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^runs equal to the undisturbed one +1$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == "soak of 0.01 minutes, seed 19: all well"

"""Benchmarks on a world of seconds: they run, check what they check, and end in the line their readers look for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import run_benchmark
from tests.harness import ROOT, Ranks

pytestmark = pytest.mark.slow

LITTLE = ("--models", "tiny", "--rounds", "2", "--distributions", "1:1", "--tokens", "48", "--threads", "1")
ROW = re.compile(r"1:1 +\d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\)( +\d+\.\d\d){3} +\d+\.\d\d \(\d+\.\d\d\)")


@pytest.mark.parametrize("words", [
    ("--ranks", "2", "--cached"), ("--ranks", "1", "--forward", "plain", "--sft"),
], ids=["pairs", "sft"])  # fmt: skip
def test_preference_step(
    words: tuple[str, ...], ranks: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Losses agree with TRL's and all steps take the path asked for, or it would not end well."""
    assert run_benchmark("benchmarks.preference_step", (*LITTLE, *words), ranks, tmp_path) == 0
    lines = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"geometric mean \d+\.\d\d", lines[-1])
    assert len([line for line in lines if ROW.fullmatch(line)]) == 1


def test_preference_step_on_real_lengths(
    real_data: Path, ranks: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lengths = ("--distributions", "--data-root", str(real_data), "--longest", "128")
    words = (*LITTLE[:4], *lengths, "--ranks", "1", "--forward", "packed")
    assert run_benchmark("benchmarks.preference_step", words, ranks, tmp_path) == 0
    said = capfd.readouterr().out
    for name in ("gsm8k_pairs", "llamafactory_dpo_en", "xstest"):
        assert f"\n{name} " in said


def test_save_hold() -> None:
    """In a process of its own, with ranks of its own, as a benchmark is run."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.save_hold", "--model", "tiny", "--rounds", "2"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"ours / theirs \d+\.\d\d", done.stdout.splitlines()[-1])
    assert not done.stderr


def test_soak(ranks: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One run, whatever is done to it, and the counts."""
    words = ("--minutes", "0.01", "--seed", "19", "--steps", "9")
    code = run_benchmark("tests.faults.soak", words, ranks, tmp_path)
    said = capfd.readouterr().out
    assert code == 0, said
    assert re.search(r"^runs equal to the undisturbed one +1$", said, re.MULTILINE)
    assert said.splitlines()[-1] == "soak of 0.01 minutes, seed 19: all well"

"""Bits that another process flips in a rank's memory between two updates: all are found where all is compared."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.faults.memory import A_STEP
from tests.faults.world import OPTIONS
from tests.small import Lab, read_weights, words

pytestmark = pytest.mark.slow
FLIPS = 200
STEPS = 9

RUNS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "full": (
        "dpo", {"bf16": True, "reference_placement": "sharded"},
        {"weights", "masters", "exp_avg", "exp_avg_sq", "gathered copy", "frozen reference"},
    ),
    "lora": (
        "sft",
        {"use_peft": True},
        {"weights", "masters", "exp_avg", "exp_avg_sq", "gathered copy", "frozen base"},
    ),
}  # fmt: skip


def may_write_memory() -> bool:
    """Tell whether the kernel lets this user open another process's memory."""
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            os.close(os.open(f"/proc/{other.pid}/mem", os.O_RDWR))
        except OSError:
            return False
        finally:
            other.kill()
    return True


def flipped(lab: Lab, home: Path, phase: str, **changes: Any) -> dict[str, list[int]]:
    """Return {class: [flips, found]} of a run whose memory was flipped and restored."""
    if not may_write_memory():
        pytest.skip("another process's memory cannot be written here: that takes root and ptrace")
    options = lab.options(
        phase, output_dir=home / "run", **{**OPTIONS, "max_steps": STEPS, "save_strategy": "no"}, **changes
    )
    lab.ranks.run(
        function="tests.faults.memory:run", argv=[phase, *words(options)], report=str(home / "found"), flips=FLIPS,
        timeout=300,
    ).ok()  # fmt: skip
    return dict(json.loads((home / "found").read_text()))


@pytest.mark.parametrize("name", RUNS)
def test_every_flip_at_rest_is_found(lab: Lab, name: str, tmp_path: Path) -> None:
    phase, changes, classes = RUNS[name]
    found = flipped(lab, tmp_path, phase, memory_check="full", **changes)
    assert set(found) == classes
    # The gathered copies are made by the first forward, so that before the first update nothing is known of them.
    missed = {"gathered copy": A_STEP}
    assert found == {kind: [FLIPS, FLIPS - missed.get(kind, 0)] for kind in classes}
    sound = lab.train(phase, **{**OPTIONS, "max_steps": STEPS, "save_strategy": "no"}, **changes)
    assert all(bool((read_weights(tmp_path / "run")[key] == tensor).all()) for key, tensor in sound.weights.items())

"""A rank is killed, wherever it is: the run goes on from its newest checkpoint and ends as if nothing had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.world import LORA, STEPS, Victim, assert_equal, undisturbed
from tests.small import Lab, words

pytestmark = pytest.mark.slow


KILL = {"signal": 9}


# Every phase, full and LoRA with dropout, fp32 and bf16; all with accumulation, and killed in the middle of an epoch.
# DPO with LoRA is killed twice in a row below.
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2}
ADAPTIVE = {"kl_target": 0.1, "normalise_rewards": True}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "pretrain-bf16": ("pretrain", {"bf16": True}, 0),
    "sft-lora-bf16": ("sft", {**LORA, "bf16": True}, 0),
    "reward-lora": ("reward", LORA, 1),
    "dpo-moving": ("dpo", MOVING, 1),
    "orpo-bf16": ("orpo", {"bf16": True}, 0),
    "kto-lora": ("kto", LORA, 1),
    "ppo": ("ppo", ADAPTIVE, 0),
    "ppo-lora": ("ppo", LORA, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_in_mid_backward(lab: Lab, case: str, tmp_path: Path) -> None:
    phase, changes, rank = CASES[case]
    victim = Victim(lab, phase, tmp_path, changes)
    step = 5
    ended = victim.go(
        lingers=[f"backward@{step}"], strike={**KILL, "ranks": [rank], "when": {"marker": f"backward.{rank}"}}
    )
    assert victim.struck and ended.codes[rank] == -9 and ended.codes[1 - rank] != 0
    assert victim.steps and victim.steps[-1] < step
    victim.again().ok()
    assert_equal(victim, undisturbed(lab, phase, **changes))


@pytest.mark.parametrize(("place", "rank"), [("write", 0), ("write", 1), ("manifest", 0), ("rename", 0)])
def test_in_mid_save(lab: Lab, place: str, rank: int, tmp_path: Path) -> None:
    """Half a shard written, all but the manifest, all but the name: the older checkpoint stands, or this one does."""
    victim = Victim(lab, "dpo", tmp_path, LORA)
    ended = victim.go(lingers=[f"{place}@4"], strike={**KILL, "ranks": [rank], "when": {"marker": f"{place}.{rank}"}})
    assert victim.struck and ended.codes[rank] == -9
    assert victim.steps == [2]
    again = victim.again()
    again.ok()
    if place == "rename":
        assert "checkpoint-4 was written whole but not named" in again.text and victim.torn == []
    else:
        assert "a save of checkpoint-4 was cut short: moved to torn/" in again.text
        assert victim.torn == ["saving-checkpoint-4"]
    assert_equal(victim, undisturbed(lab, "dpo", **LORA))


def test_before_the_first_checkpoint(lab: Lab, tmp_path: Path) -> None:
    """There is nothing to go on from; a supervisor starts the run from its beginning, a person is told."""
    victim = Victim(lab, "sft", tmp_path, {})
    victim.go(lingers=["backward@1"], strike={**KILL, "ranks": [0, 1], "when": {"marker": "backward.0"}})
    assert victim.struck and victim.steps == []
    assert "holds no checkpoint to go on from; start without --resume" in victim.again().error()
    victim.lab.ranks.run(
        function="tests.faults.victims:run", home=str(victim.home), env={"ALIGN_KIT_RESUME": "auto"},
        argv=["sft", *words(victim.options)],
    ).ok()  # fmt: skip
    assert_equal(victim, undisturbed(lab, "sft"))


def test_twice_in_a_row(lab: Lab, tmp_path: Path) -> None:
    victim = Victim(lab, "dpo", tmp_path, LORA)
    victim.go(lingers=["backward@4"], strike={**KILL, "ranks": [1], "when": {"marker": "backward.1"}})
    (victim.home / "backward.1").unlink()
    victim.go(lingers=["backward@6"], strike={**KILL, "ranks": [0], "when": {"marker": "backward.0"}}, resume="auto")
    assert victim.steps[-1] < STEPS
    victim.again().ok()
    assert_equal(victim, undisturbed(lab, "dpo", **LORA))

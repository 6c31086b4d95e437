"""Where a run goes on from, and what it is then: ended and not stored, turned back, or without its own record."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from align_kit.checkpoint import manifest
from tests.faults.world import LORA, Victim, assert_equal, undisturbed
from tests.small import Lab

pytestmark = pytest.mark.slow


def left_by(lab: Lab, phase: str, home: Path, **changes: Any) -> Victim:
    """Return a run as it stood when all its steps were done and its final model was not yet stored."""
    whole = undisturbed(lab, phase, **changes)
    victim = Victim(lab, phase, home, changes)
    shutil.copytree(whole.folder, victim.folder)
    for file in victim.folder.glob("*.safetensors"):
        file.unlink()
    return victim


@pytest.mark.parametrize("phase", ["sft", "ppo"])
def test_a_run_that_has_done_all_its_steps_does_no_more(lab: Lab, phase: str, tmp_path: Path) -> None:
    """Step 5 of an epoch of 6: the end of the run is none of its epoch; PPO's steps are never an epoch's end."""
    steps = {"sft": 5, "ppo": 6}[phase]
    victim = left_by(lab, phase, tmp_path, max_steps=steps)
    again = victim.again()
    again.ok()
    assert f"step {steps + 1}/" not in again.text and victim.steps[-1] == steps
    assert_equal(victim, undisturbed(lab, phase, max_steps=steps))


def test_a_run_that_was_turned_back_stays_on_its_new_course(lab: Lab, tmp_path: Path) -> None:
    """It goes on from checkpoint 2 with another rate and is killed: the old checkpoint 4 must not be taken up again."""
    victim = left_by(lab, "dpo", tmp_path, save_total_limit=3, **LORA)
    turned = {"learning_rate": 1e-3, "allow_change": "learning_rate"}
    first = victim.go(
        resume=str(victim.folder / "checkpoint-2"), lingers=["backward@4"],
        strike={"signal": 9, "ranks": [1], "when": {"marker": "backward.1"}}, **turned,
    )  # fmt: skip
    assert victim.struck and "checkpoint-4 was moved to left/checkpoint-4" in first.text
    assert victim.steps == [2]
    victim.again(**turned).ok()
    alone = left_by(lab, "dpo", tmp_path / "alone", save_total_limit=3, **LORA)
    alone.go(resume=str(alone.folder / "checkpoint-2"), **turned).ok()
    ours, theirs = (sorted(one.folder.glob("*.safetensors"))[0].read_bytes() for one in (victim, alone))
    assert ours == theirs


def test_a_checkpoint_is_compared_with_the_run_it_is_of(lab: Lab, tmp_path: Path) -> None:
    """Whatever became of the manifest in the folder of the run; one that does not say is not gone on from."""
    victim = left_by(lab, "sft", tmp_path)
    (victim.folder / "manifest.json").write_text("")
    assert "learning_rate was 0.003, now 0.5 (command line)" in victim.again(learning_rate=0.5).error()
    place = victim.folder / "checkpoint-6"
    (place / manifest.RUN).unlink()
    manifest.seal(place, {})
    assert "does not say what run it is of" in victim.again().error()


def test_early_stopping_goes_on_counting(lab: Lab, tmp_path: Path) -> None:
    asked = {
        "early_stopping_patience": 3, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 0.0,
        "eval_datasets": [{"path": lab.held_out["prompt_completion"]}], "save_total_limit": 9, "max_steps": 8,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    whole = undisturbed(lab, "sft", **asked)
    assert len(whole.losses) == 4  # the first evaluation is the best, three more are not better
    victim = left_by(lab, "sft", tmp_path, **asked)
    for step in (3, 4):
        shutil.rmtree(victim.folder / f"checkpoint-{step}")
    victim.again().ok()
    assert victim.steps[-1] == 4

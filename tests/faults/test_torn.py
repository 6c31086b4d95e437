"""Checkpoints that were changed after their commit: found, set aside and named, and the one before is gone on from."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from align_kit.checkpoint import manifest
from tests.faults.world import LORA, Victim, assert_equal, flip, undisturbed
from tests.small import Lab

pytestmark = pytest.mark.slow
FLIPS = 200


def flipped(pattern: str) -> Callable[[Path], None]:
    return lambda checkpoint: flip(next(iter(sorted(checkpoint.rglob(pattern)))), random.Random(pattern))


def missing(pattern: str) -> Callable[[Path], None]:
    return lambda checkpoint: next(iter(sorted(checkpoint.rglob(pattern)))).unlink()


def cut(pattern: str) -> Callable[[Path], None]:
    def cut_in_half(checkpoint: Path) -> None:
        path = next(iter(sorted(checkpoint.rglob(pattern))))
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size // 2)

    return cut_in_half


HARMS = {
    "a flipped bit of an optimizer shard": (flipped("*rank_1*optim_states.pt"), "has other bytes than were committed"),
    "a flipped bit of the manifest": (flipped("manifest.json"), "its manifest was changed or cut"),
    "the RNG file of a rank missing": (missing("rng_state_1.pth"), "rng_state_1.pth is missing"),
    "half a shard": (cut("*rank_0*optim_states.pt"), "were committed"),
    "no manifest": (missing("manifest.json"), "no manifest: never committed"),
}


@pytest.fixture
def stopped(lab: Lab, tmp_path: Path) -> Victim:
    """A run as it stood after its second checkpoint: steps 2 and 4 of 6."""
    whole = undisturbed(lab, "dpo", save_total_limit=3, **LORA)
    victim = Victim(lab, "dpo", tmp_path, {**LORA, "save_total_limit": 3})
    shutil.copytree(whole.folder, victim.folder, ignore=shutil.ignore_patterns("checkpoint-6"))
    for file in victim.folder.glob("*.safetensors"):
        file.unlink()
    return victim


@pytest.mark.parametrize("harm", HARMS)
def test_the_older_checkpoint_is_gone_on_from(stopped: Victim, harm: str) -> None:
    do, says = HARMS[harm]
    do(stopped.folder / "checkpoint-4")
    again = stopped.again()
    again.ok()
    warnings = [line for line in again.text.splitlines() if line.startswith("warning: checkpoint-4 does not verify")]
    assert len(warnings) == 1 and says in warnings[0] and warnings[0].endswith("moved to torn/checkpoint-4")
    assert "going on from" in again.text and "checkpoint-2" in again.text
    assert_equal(stopped, undisturbed(stopped.lab, "dpo", save_total_limit=3, **LORA))


def test_where_none_verifies_nothing_is_lost(stopped: Victim) -> None:
    for step in (2, 4):
        flipped("*optim_states.pt")(stopped.folder / f"checkpoint-{step}")
    assert "holds no checkpoint to go on from" in stopped.again().error()
    assert stopped.torn == ["checkpoint-2", "checkpoint-4"]
    assert all((stopped.folder / "torn" / name / "manifest.json").exists() for name in stopped.torn)


def test_one_that_is_named_is_refused_and_stays(stopped: Victim) -> None:
    place = stopped.folder / "checkpoint-4"
    flipped("*optim_states.pt")(place)
    line = stopped.go(resume=str(place)).error()
    assert "does not verify" in line and "--resume alone takes the newest checkpoint that does" in line
    assert place.exists() and stopped.torn == []


def test_the_pointer_is_a_hint(stopped: Victim) -> None:
    """`latest` of another checkpoint, put here whole: the manifest knows that it is not this one's."""
    (stopped.folder / "checkpoint-4" / "latest").write_text("global_step2")
    again = stopped.again()
    again.ok()
    assert stopped.torn == ["checkpoint-4"] and "latest has other bytes" in again.text


CLASSES: dict[str, str] = {
    "optimizer shards": "*optim_states.pt",
    "model states": "*model_states.pt",
    "weights": "*.safetensors",
    "generator states": "rng_state*.pth",
    "trainer state": "*.json",
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_flip_on_disk_is_found(stopped: Victim, name: str) -> None:
    """200 single bits of a real checkpoint in each class of file, each put back before the next."""
    place, draw = stopped.folder / "checkpoint-4", random.Random(name)
    files = sorted(place.rglob(CLASSES[name]))
    assert files and manifest.problems(place) == []
    missed = 0
    for _ in range(FLIPS):
        path = draw.choice(files)
        before = path.read_bytes()
        flip(path, draw)
        missed += not manifest.problems(place)
        path.write_bytes(before)
    assert missed == 0 and manifest.problems(place) == []

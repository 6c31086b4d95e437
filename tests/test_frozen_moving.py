"""A reference that follows the policy: what it becomes, that it is watched all the same, and that a resume keeps it."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from align_kit import frozen
from align_kit.checkpoint import manifest
from align_kit.errors import UserError
from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, read_weights

pytestmark = pytest.mark.slow
ALPHA = 0.25


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def options(lab: Lab, engine: str, **changes: Any) -> dict[str, Any]:
    """Return the options of six steps that move the reference after steps 2, 4 and 6 and save there."""
    asked: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": ALPHA}
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
    # Every parameter split, or every one (they are small) split and gathered besides.
    return {**asked, **saving, "deepspeed": lab.sharded if engine == "split" else "zero3", **changes}


@cache
def moved(lab: Lab, engine: str, alpha: float = ALPHA) -> Run:
    return lab.train("dpo", **options(lab, engine, ref_model_mixup_alpha=alpha))


def stored_reference(checkpoint: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Return the whole tensors of the reference in a checkpoint: the ranks' shards one after the other."""
    import torch
    from safetensors.torch import load_file

    shards = [load_file(file) for file in sorted(checkpoint.glob("moving_reference/rank_*_of_2.safetensors"))]
    assert len(shards) == 2
    return {
        name: torch.cat([shard[name] for shard in shards])[: whole.numel()].view(whole.shape)
        for name, whole in like.items()
    }


@pytest.mark.parametrize("engine", ["split", "gathered"])
def test_the_reference_becomes_the_mixture_exactly(lab: Lab, engine: str) -> None:
    """After step 2, and of that after step 4: alpha of the policy as it then is, 1 - alpha of itself."""
    reference = read_weights(lab.model)
    for step in (2, 4):
        checkpoint = moved(lab, engine).folder / f"checkpoint-{step}"
        policy = read_weights(checkpoint)
        reference = {name: whole * (1 - ALPHA) + policy[name] * ALPHA for name, whole in reference.items()}
        for name, whole in stored_reference(checkpoint, reference).items():
            assert (whole - reference[name]).abs().max() < 1e-7, name
        assert any((policy[name] - whole).abs().max() > 1e-3 for name, whole in reference.items())


@pytest.mark.parametrize("engine", ["split", "gathered"])
def test_a_reference_that_became_the_policy_gives_log_ratio_0(lab: Lab, engine: str) -> None:
    """With alpha 1 the steps right after a move begin at ln 2, to the last digit of the first step."""
    losses = moved(lab, engine, alpha=1.0).losses
    assert losses[2] == losses[4] == losses[0] and losses[0] not in (losses[1], losses[3], losses[5])


@pytest.mark.parametrize("engine", ["split", "gathered"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(lab: Lab, tmp_path: Path, engine: str) -> None:
    done = moved(lab, engine)
    left_out = shutil.ignore_patterns("checkpoint-4", "checkpoint-6")
    copy = shutil.copytree(done.folder, tmp_path / "run", ignore=left_out)
    again = lab.start("dpo", copy, resume=str(copy / "checkpoint-2"), **options(lab, engine))
    again.result.ok()
    assert again.losses[-4:] == done.losses[2:]
    assert all((tensor == done.weights[name]).all() for name, tensor in again.weights.items())
    like = read_weights(lab.model)
    ours, theirs = (stored_reference(place / "checkpoint-4", like) for place in (copy, done.folder))
    assert all((ours[name] == theirs[name]).all() for name in like)
    assert again.manifest["frozen"] == done.manifest["frozen"]


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_checkpoint_without_its_reference_is_refused(lab: Lab, tmp_path: Path, damage: str) -> None:
    """Where its manifest says nothing of it, for it was made anew over the damage; else it does not verify."""
    copy = shutil.copytree(moved(lab, "split").folder, tmp_path / "run")
    file = copy / "checkpoint-6" / "moving_reference" / "rank_1_of_2.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    assert manifest.problems(copy / "checkpoint-6")
    manifest.seal(copy / "checkpoint-6", {})
    again = lab.start("dpo", copy, resume="auto", **options(lab, "split"))
    words = {"missing": "does not hold the reference as it had moved", "flipped": "its sum differs"}
    assert words[damage] in again.result.error() and "--resume <checkpoint>" in again.result.error()


def test_a_flipped_bit_between_two_moves_ends_the_run(lab: Lab, tmp_path: Path) -> None:
    """What has changed by itself must not be mixed into the next reference and watched as if it were right."""
    asked = options(lab, "split", ref_model_sync_steps=3, fingerprint_steps=0, save_strategy="no")
    run = lab.start("dpo", tmp_path / "run", harm="flip_one_bit_of_reference", **asked)
    assert "changed in memory, seen before it moves at step 3" in run.result.error(code=3)


@pytest.mark.parametrize(("asked", "message"), [
    ({"use_peft": True}, "sync_ref_model moves whole weights, and use_peft trains an adapter"),
    ({"placement": "cached"}, "sync_ref_model needs reference_placement sharded, not cached"),
])  # fmt: skip
def test_what_cannot_move_is_refused(lab: Lab, asked: dict[str, Any], message: str) -> None:
    from align_kit.models import source

    start = source.resolve(str(lab.model))
    plain = {"use_peft": False, "given": None, "placement": "auto", "differs": False, "recorded": None, "moves": True}
    with pytest.raises(UserError, match=message):
        frozen.resolve_reference(policy=start, policy_digest=source.digest(start), **{**plain, **asked})

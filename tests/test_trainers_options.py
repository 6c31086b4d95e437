"""What a configuration asks of every trainer: stopping early, schedules, weight decay, keeping checkpoints, dropout."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from align_kit.run_folder import checkpoints
from tests.harness import Ranks
from tests.small import Lab, lab_of, read_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def test_early_stopping_on_request(lab: Lab) -> None:
    """With learning rate 0 no evaluation is better than the first: patience 2 ends the run at the third."""
    run = lab.train(
        "sft", max_steps=8, learning_rate=0.0, eval_strategy="steps", eval_steps=1, early_stopping_patience=2,
        test_split_size=7, per_device_train_batch_size=4,
    )  # fmt: skip
    assert run.manifest["steps"] == 3 and run.manifest["status"] == "finished"
    assert len(set(run.logged("eval_loss"))) == 1


SCHEDULES = {
    "cosine": [0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)],
    "constant_with_warmup": [0, 0.5, 1, 1],
    "linear": [1, 0.75, 0.5, 0.25],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_their_hf_names(lab: Lab, name: str) -> None:
    warmup = 2 if name == "constant_with_warmup" else 0
    run = lab.train("sft", 1, max_steps=4, learning_rate=1e-3, lr_scheduler_type=name, warmup_steps=warmup)
    assert run.logged("learning_rate") == pytest.approx([1e-3 * share for share in SCHEDULES[name]])


def test_weight_decay_spares_norms(lab: Lab) -> None:
    """One step apart in nothing but weight decay: matrices shrink by rate x decay, norms are equal."""
    rate, decay = 1e-2, 0.5
    plain, decayed = (
        lab.train("sft", 2, learning_rate=rate, weight_decay=value, deepspeed=lab.sharded) for value in (0.0, decay)
    )
    for name, start in read_weights(lab.model).items():
        shrunk = plain.weights[name] - decayed.weights[name]
        expected = 0.0 if "norm" in name else rate * decay * start
        assert (shrunk - expected).abs().max() < 1e-6, name


def test_only_the_last_checkpoints_are_kept(lab: Lab) -> None:
    run = lab.train("sft", max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2)
    assert [place.name for place in checkpoints(run.folder)] == ["checkpoint-3", "checkpoint-4"]


def test_the_best_checkpoint_is_the_final_model(lab: Lab) -> None:
    """Steps far too long make it worse: what is saved is the model that evaluated best, the first."""
    run = lab.train(
        "sft", max_steps=3, learning_rate=3.0, lr_scheduler_type="constant", eval_strategy="steps", eval_steps=1,
        eval_datasets=[{"path": lab.held_out["prompt_completion"]}], save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, save_total_limit=3, deepspeed=lab.sharded,
    )  # fmt: skip
    losses = run.logged("eval_loss")
    best = 1 + losses.index(min(losses))
    assert best < 3, "the last step was the best, which shows nothing"
    kept = read_weights(run.folder / f"checkpoint-{best}")
    assert all((run.weights[name] == tensor).all() for name, tensor in kept.items())


def test_disable_dropout(lab: Lab) -> None:
    """DPO trains without dropout unless asked, an adapter's included, as TRL does; SFT with it."""
    plain = lab.train("dpo", 1, max_steps=3, use_peft=True)
    without = lab.train("dpo", 1, max_steps=3, use_peft=True, lora_dropout=0.5)
    dropped = lab.train("dpo", 1, max_steps=3, use_peft=True, lora_dropout=0.5, disable_dropout=False)
    assert without.losses == plain.losses != dropped.losses
    assert (
        lab.train("sft", 1, max_steps=3, use_peft=True).losses
        != lab.train("sft", 1, max_steps=3, use_peft=True, lora_dropout=0.5).losses
    )


def test_resume_draws_the_same_dropout(lab: Lab, tmp_path: Path) -> None:
    asked = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "use_peft": True, "lora_dropout": 0.3}
    done = lab.train("sft", **asked)
    copy = shutil.copytree(done.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-4"))
    again = lab.start("sft", copy, resume="auto", **asked)
    again.result.ok()
    assert again.losses[-2:] == done.losses[2:]
    assert all((again.weights[name] == tensor).all() for name, tensor in done.weights.items())


def test_the_adapter_depends_on_the_seed(lab: Lab) -> None:
    one, other = (lab.train("sft", 1, use_peft=True, seed=seed, data_seed=0).weights for seed in (42, 43))
    assert any((one[name] != other[name]).any() for name in one if "lora_A" in name)


def test_training_starts_from_a_whole_model_only(lab: Lab, tmp_path: Path) -> None:
    """Under ZeRO-3 too, a model that lacks a tensor is refused on every rank, in one line."""
    from safetensors.torch import load_file, save_file

    torn = shutil.copytree(lab.model, tmp_path / "torn")
    tensors = load_file(torn / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, torn / "model.safetensors", metadata={"format": "pt"})
    run = lab.start("sft", tmp_path / "run", model_name_or_path=torn)
    assert "lacks 1 tensors of its configuration (model.layers.1.mlp.up_proj.weight)" in run.result.error()

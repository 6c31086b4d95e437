"""Reward models beyond one plain run: where they start, what is refused, and scores that plain transformers gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, make_rows, write_model, write_rows, write_scorer

pytestmark = pytest.mark.slow

GATE = "gate       the head is fresh"


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def evaluating(lab: Lab, batch: int = 2) -> dict[str, Any]:
    """Return the options that evaluate on the 7 held-out pairs before the first step and after the last."""
    return {
        "eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True, "per_device_eval_batch_size": batch,
        "eval_datasets": [{"path": lab.held_out["preference"]}],
    }  # fmt: skip


def plain_scores(model: Any, tokenizer: Any, rows: list[dict[str, Any]], side: str) -> Any:
    """Return the scores that plain transformers gives, one unpadded row at a time."""
    import torch

    texts = [row["prompt"] + row[side] + tokenizer.eos_token for row in rows]
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits.flatten() for text in texts])


def opened(place: Path, base: Path | None = None) -> tuple[Any, Any]:
    """Return (model, tokenizer) of `place` as plain transformers, and PEFT on `base`, load them."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(base or place, num_labels=1)
    if base:
        model = PeftModel.from_pretrained(model, str(place))
    return model.eval(), AutoTokenizer.from_pretrained(place)


# --- where it starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [{}, {"use_peft": True}, {"deepspeed": "zero2"},
                                   {"config_name": "builtin:tiny", "model_name_or_path": None}])  # fmt: skip
def test_a_fresh_head_knows_nothing(lab: Lab, start: dict[str, Any]) -> None:
    """Every score is exactly 0, so the first loss is ln 2 with the centring term and all; the gate says so."""
    asked = {"max_steps": 2, "center_rewards_coefficient": 1.0, "data_limits": {"dropped": 1}}
    run = lab.train("reward", **asked, **{"deepspeed": lab.sharded, **start})
    assert run.result.output[0].count(GATE) == 1
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-7)
    for name in ("margin", "rewards/chosen", "rewards/rejected", "accuracy"):
        assert run.logged(name)[0] == 0
    assert run.logged("margin")[1] != 0


def test_a_head_that_is_not_fresh_goes_on(lab: Lab) -> None:
    """From a stored classifier, ours or another's: no gate, and the first margins are those of its head."""
    rows = [json.loads(line) for line in lab.data["preference"].read_text().splitlines()]
    model, tokenizer = opened(lab.scorer)
    run = lab.train("reward", 1, model_name_or_path=lab.scorer, per_device_train_batch_size=48)
    chosen, rejected = (plain_scores(model, tokenizer, rows, side) for side in ("chosen", "rejected"))
    assert GATE not in run.result.text
    assert run.logged("margin")[0] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)
    again = lab.train("reward", max_steps=4, model_name_or_path=run.folder, deepspeed=lab.sharded, **evaluating(lab))
    assert again.logged("eval_margin")[0] != 0


def test_centring_is_in_the_loss(lab: Lab) -> None:
    """What it adds is the coefficient times the mean squared sum of a pair's scores, given by plain transformers."""
    rows = [json.loads(line) for line in lab.data["preference"].read_text().splitlines()]
    both = {"model_name_or_path": lab.scorer, "per_device_train_batch_size": 48}
    plain, centred = (
        lab.train("reward", 1, **both, center_rewards_coefficient=by).losses[0] for by in (None, 0.5)
    )  # fmt: skip
    sums = sum(plain_scores(*opened(lab.scorer), rows, side) for side in ("chosen", "rejected"))
    assert centred - plain == pytest.approx(0.5 * float(sums.square().mean()), rel=1e-4)


def test_from_an_sft_adapter(lab: Lab) -> None:
    """The stored adapter goes on with a fresh head of its own; the base stays the one it was trained on."""
    sft = lab.train("sft", max_steps=4, learning_rate=1e-2, use_peft=True)
    run = lab.train("reward", max_steps=3, use_peft=True, model_name_or_path=sft.folder, deepspeed=lab.sharded)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-7) and GATE in run.result.text
    assert run.weights.keys() - sft.weights.keys() == {"base_model.model.score.weight"}
    moved = max(float((run.weights[name] - tensor).abs().max()) for name, tensor in sft.weights.items())
    assert 0 < moved < 0.1, "the stored adapter is the SFT one, trained on"
    adapter = json.loads((run.folder / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(lab.model) and adapter["task_type"] == "SEQ_CLS"


@pytest.mark.parametrize("form", [{}, {"use_peft": True}])
def test_from_a_reward_adapter(lab: Lab, form: dict[str, Any]) -> None:
    """Its head goes on, as an adapter or merged: the scores before the first step are those it ended with."""
    first = lab.train("reward", max_steps=4, learning_rate=1e-2, use_peft=True, deepspeed=lab.sharded,
                      **evaluating(lab))  # fmt: skip
    then = lab.train("reward", max_steps=4, model_name_or_path=first.folder, deepspeed=lab.sharded, **form,
                     **evaluating(lab))  # fmt: skip
    assert GATE not in then.result.text and first.logged("eval_margin")[-1] != 0
    assert then.logged("eval_margin")[0] == pytest.approx(first.logged("eval_margin")[-1], abs=1e-6)
    if form:
        stored = json.loads((then.folder / "adapter_config.json").read_text())["modules_to_save"]
        assert sorted(stored) == ["classifier", "score"] and then.weights.keys() == first.weights.keys()


def test_a_merged_sft_adapter_is_the_start_of_full_training(lab: Lab) -> None:
    sft = lab.train("sft", max_steps=4, learning_rate=1e-2, use_peft=True)
    run = lab.train("reward", max_steps=2, model_name_or_path=sft.folder, deepspeed=lab.sharded)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-7) and GATE in run.result.text
    assert "score.weight" in run.weights and "lm_head.weight" not in run.weights


@pytest.mark.parametrize("form", [{}, {"use_peft": True}])
def test_a_base_that_never_needed_padding(lab: Lab, form: dict[str, Any]) -> None:
    """The tokenizer's padding decides which token is the last, where the model's configuration names none."""
    bare = write_model(lab.home / f"unpadded{len(form)}", pad_token_id=None)
    run = lab.train("reward", model_name_or_path=bare, deepspeed=lab.sharded, **form)
    assert run.manifest["status"] == "finished"
    if not form:
        assert json.loads((run.folder / "config.json").read_text())["pad_token_id"] == 1


def test_padding_is_not_scored(lab: Lab) -> None:
    """Loaded for batches padded with another token than its configuration's, a model scores rows as it does alone."""
    import torch

    from align_kit.models import load, source

    where = source.resolve(str(lab.scorer))
    model: Any = load.load_policy(where, dtype=torch.float32, seed=0, head="score", pad_token_id=7).eval()
    rows = [[11, 12, 13], [11, 12, 13, 14, 15]]
    alone = [float(model(input_ids=torch.tensor([row])).logits.detach()) for row in rows]
    padded = torch.tensor([[*rows[0], 7, 7], rows[1]])
    together = model(input_ids=padded, attention_mask=(padded != 7).long()).logits.detach().flatten().tolist()
    assert together == pytest.approx(alone, abs=1e-6)


# --- what is refused --------------------------------------------------------------------------------------


def test_a_classifier_with_several_labels(lab: Lab, tmp_path: Path) -> None:
    place = write_scorer(tmp_path / "two", num_labels=2)
    run = lab.start("reward", tmp_path / "run", 1, model_name_or_path=place)
    assert "is a sequence classifier with 2 labels and a reward model has 1" in run.result.error()


def test_a_reward_model_does_not_write(lab: Lab, tmp_path: Path) -> None:
    run = lab.start("sft", tmp_path / "run", 1, model_name_or_path=lab.scorer)
    assert "ends in a score, not in words" in run.result.error()
    adapter = lab.train("reward", max_steps=4, learning_rate=1e-2, use_peft=True, deepspeed=lab.sharded,
                        **evaluating(lab))  # fmt: skip
    for place, form in (("lora", {"use_peft": True}), ("full", {})):
        run = lab.start("sft", tmp_path / place, 1, model_name_or_path=adapter.folder, **form)
        assert "is the adapter of a reward model" in run.result.error()


def test_a_head_that_should_be_fresh_and_is_not(lab: Lab, tmp_path: Path) -> None:
    run = lab.start("reward", tmp_path / "run", harm="unsettle_head", deepspeed=lab.sharded)
    assert "step-0 identity failed: before any update the fresh head scores" in run.result.error()


def test_a_coefficient_below_zero(lab: Lab, tmp_path: Path) -> None:
    run = lab.start("reward", tmp_path / "run", 1, center_rewards_coefficient=-0.1)
    assert "center_rewards_coefficient" in run.result.error() and "0 or more" in run.result.error()


# --- what it learns and says ------------------------------------------------------------------------------


def test_pairs_are_learnt(lab: Lab) -> None:
    run = lab.train("reward", 1, max_steps=25, learning_rate=1e-2, lr_scheduler_type="constant",
                    datasets=[{"path": lab.data["preference"], "max_samples": 8}])  # fmt: skip
    assert run.logged("accuracy")[-1] == 1 and run.logged("margin")[-1] > 1
    assert run.losses[-1] < 0.3 and run.logged("brier_score")[-1] < 0.1


def learnt(lab: Lab, form: str, world_size: int = 2, batch: int = 2) -> Run:
    """Return a short run from a head that is not fresh, with an evaluation at its end."""
    return lab.train(
        "reward", world_size, max_steps=4, use_peft=form == "lora" or None, learning_rate=1e-2,
        per_device_train_batch_size=8 // world_size, deepspeed=lab.sharded, **evaluating(lab, batch),
    )  # fmt: skip


@pytest.mark.parametrize("form", ["full", "lora"])
def test_plain_transformers_gives_the_scores_that_were_evaluated(lab: Lab, form: str) -> None:
    """From the folder alone, row by row without padding: margin, accuracy and Brier score of the last evaluation."""
    import torch

    run = learnt(lab, form)
    model, tokenizer = opened(run.folder, lab.model if form == "lora" else None)
    rows = make_rows("preference", 7, seed=1)
    chosen, rejected = (plain_scores(model, tokenizer, rows, side) for side in ("chosen", "rejected"))
    said = {name: run.logged(f"eval_{name}")[-1] for name in ("margin", "accuracy", "rewards/chosen", "brier_score")}
    margin = chosen - rejected
    assert said == pytest.approx({
        "margin": float(margin.mean()), "accuracy": float((margin > 0).float().mean()),
        "rewards/chosen": float(chosen.mean()), "brier_score": float((1 - torch.sigmoid(margin)).square().mean()),
    }, abs=1e-5)  # fmt: skip
    assert abs(said["margin"]) > 1e-3


def test_calibration_is_exact_over_ranks(lab: Lab) -> None:
    """7 pairs on two ranks in batches of two say what one rank says with batches of one; no bin is left over."""
    shared, alone = learnt(lab, "full"), learnt(lab, "full", world_size=1, batch=1)
    for name in ("eval_calibration_error", "eval_brier_score", "eval_accuracy", "eval_margin", "eval_mean_reward"):
        assert shared.logged(name) == pytest.approx(alone.logged(name), rel=1e-4, abs=1e-6)
    assert shared.logged("eval_calibration_error")[0] == 0, "a head that knows nothing claims nothing"
    assert not [name for line in shared.metrics for name in line if "calibration/" in name]
    assert "eval_accuracy" in shared.result.output[0] and "eval_calibration_error" in shared.result.output[0]


def test_pairs_that_are_too_long_are_left_out(lab: Lab, tmp_path: Path) -> None:
    """As TRL does: a completion that was cut is not the one that was judged."""
    rows = make_rows("preference", 16, seed=3)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    asked = {"max_length": 16, "per_device_train_batch_size": 2, "data_limits": {"dropped": 1}}
    run = lab.train("reward", 1, datasets=[{"path": data}], **asked)
    account = run.manifest["data"]["train"]["tokenised"]
    assert account["cut"] == 0 and 0 < account["rows_out"] < 16 and account["max_tokens"] <= 16
    assert account["dropped"] == {"longer than max_length": 16 - account["rows_out"]}

"""DPO beyond one plain run: from an SFT adapter, with a reference of its own, and what it says of its batches."""

from __future__ import annotations

import math

import pytest

from align_kit.losses import BATCH_COUPLED, DPO_LOSSES
from tests.harness import Ranks
from tests.small import Lab, lab_of, write_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def test_from_an_sft_adapter(lab: Lab) -> None:
    """The adapter goes on; a frozen copy of it is the reference, with dropout asked for and all: first loss ln 2."""
    sft = lab.train("sft", max_steps=4, learning_rate=1e-2, use_peft=True)
    run = lab.train(
        "dpo", max_steps=3, use_peft=True, lora_dropout=0.3, model_name_or_path=sft.folder, deepspeed=lab.sharded
    )
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-6) and run.losses[-1] != run.losses[0]
    reference = run.manifest["frozen"]["reference"]
    assert reference["placement"] == "adapter" and reference["name"] == str(sft.folder)
    assert run.weights.keys() == sft.weights.keys()
    moved = max(float((run.weights[name] - tensor).abs().max()) for name, tensor in sft.weights.items())
    assert 0 < moved < 0.1, "the stored adapter is the SFT one, trained on"


def test_a_merged_adapter_is_the_start_of_full_training(lab: Lab) -> None:
    """An SFT adapter given to full DPO: policy and reference are base plus adapter, merged."""
    sft = lab.train("sft", max_steps=4, learning_rate=1e-2, use_peft=True)
    run = lab.train("dpo", max_steps=2, model_name_or_path=sft.folder, deepspeed=lab.sharded)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert run.manifest["frozen"]["reference"]["placement"] == "sharded"
    assert "lm_head.weight" in run.weights or "model.embed_tokens.weight" in run.weights


def test_a_reference_that_differs_on_purpose(lab: Lab) -> None:
    other = write_model(lab.home / "elsewhere", seed=9)
    run = lab.train("dpo", 1, reference_model_name_or_path=other, reference_differs=True)
    assert abs(run.losses[0] - math.log(2)) > 1e-3
    assert run.manifest["frozen"]["reference"]["differs"] is True


def test_the_reward_margin_grows(lab: Lab) -> None:
    """On the pairs it trains on, DPO prefers the chosen side more and more."""
    run = lab.train("dpo", 1, max_steps=12, learning_rate=3e-3, lr_scheduler_type="constant",
                    datasets=[{"path": lab.data["preference"], "max_samples": 8}])  # fmt: skip
    margins = run.logged("rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-6) and margins[-1] > 1
    assert run.losses[-1] < 0.4 and run.logged("rewards/accuracies")[-1] == 1


NEEDS = {"exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}


@pytest.mark.parametrize("loss_type", sorted(DPO_LOSSES.keys() - BATCH_COUPLED.keys() - {"sigmoid"}))
def test_every_loss_type_trains(lab: Lab, loss_type: str) -> None:
    run = lab.train("dpo", 1, max_steps=2, loss_type=[loss_type], **NEEDS.get(loss_type, {}))
    assert all(math.isfinite(loss) for loss in run.losses)


def test_several_losses_are_one_weighted_sum(lab: Lab) -> None:
    """At step 0 the sigmoid term is ln 2 and the sft term the chosen side's own loss: MPO's mixture adds them up."""
    sft = lab.train("dpo", 1, loss_type=["sft"]).losses[0]
    both = lab.train("dpo", 1, loss_type=["sigmoid", "sft"], loss_weights=[0.8, 0.5]).losses[0]
    assert both == pytest.approx(0.8 * math.log(2) + 0.5 * sft, rel=1e-6)

"""Real data through real cards and by path: a few steps each, in which what should improve does."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, make_rows, write_rows

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def train(lab: Lab, phase: str, data: dict[str, Any], real_data: Path, **changes: Any) -> Run:
    """Train the embedded model from random weights on two ranks, on `data` from the folder of real data."""
    asked = {
        "model_name_or_path": None, "config_name": "builtin:tiny", "datasets": [data], "max_length": 128,
        "max_steps": STEPS, "learning_rate": 3e-3, "per_device_train_batch_size": 4,
    }  # fmt: skip
    place = lab.home / f"real-{phase}-{len(list(lab.home.glob('real-*')))}"
    run = lab.start(phase, place, 2, {"ALIGN_KIT_DATA": str(real_data)}, **{**asked, **changes})
    run.result.ok()
    return run


def falls(values: list[float], by: float) -> bool:
    """Tell whether the mean of the last three is lower than that of the first three by at least `by`."""
    return mean(values[:3]) - mean(values[-3:]) >= by


def test_pretrain_on_shakespeare(lab: Lab, real_data: Path) -> None:
    run = train(lab, "pretrain", {"path": "card:tinyshakespeare"}, real_data)
    assert falls(run.losses, by=0.8)


def test_sft_on_gsm8k(lab: Lab, real_data: Path) -> None:
    run = train(lab, "sft", {"path": "card:gsm8k", "split": "train", "max_samples": 200}, real_data, max_length=512)
    assert falls(run.losses, by=0.8)
    assert run.manifest["data"]["train"]["tokenised"]["rows_in"] == 200


@pytest.mark.parametrize("card", ["gsm8k_solution_pairs", "llamafactory_dpo_en"])
def test_dpo_on_real_pairs(lab: Lab, real_data: Path, card: str) -> None:
    """Over the same 8 pairs, seen 8 times, the chosen side pulls away from the rejected one."""
    data = {"path": f"card:{card}", "max_samples": 8}
    run = train(lab, "dpo", data, real_data, max_length=256, learning_rate=3e-4, lr_scheduler_type="constant")
    margins = run.logged("rewards/margins")
    assert abs(margins[0]) < 1e-4 and mean(margins[-3:]) > 0.5
    assert falls(run.losses, by=0.2)


def test_orpo_on_real_pairs(lab: Lab, real_data: Path) -> None:
    """From random weights, over the same 8 pairs: the chosen sides are learnt and come out on top."""
    data = {"path": "card:llamafactory_dpo_en", "max_samples": 8}
    run = train(lab, "orpo", data, real_data, max_length=256, beta=1.0, lr_scheduler_type="constant")
    accuracies, odds = run.logged("rewards/accuracies"), run.logged("log_odds_chosen")
    assert falls(run.losses, by=1.0) and falls(run.logged("nll_loss"), by=1.0)
    assert mean(accuracies[-3:]) > mean(accuracies[:3]) and mean(odds[-3:]) > mean(odds[:3]) + 0.2


def test_kto_on_real_labels(lab: Lab, real_data: Path) -> None:
    """Over the same 8 solutions, labelled right or wrong, the right ones gain; weights follow from their counts."""
    data = {"path": "card:gsm8k_solution_labels", "max_samples": 8}
    run = train(lab, "kto", data, real_data, max_length=512, learning_rate=1e-4, lr_scheduler_type="constant")
    margins = run.logged("rewards/margins")
    assert abs(margins[0]) < 1e-4 and mean(margins[-3:]) > 0.5
    assert falls(run.losses, by=0.2) and len(run.manifest["derived"]) == 1


def test_reward_on_real_refusals(lab: Lab, real_data: Path) -> None:
    """Complying over refusing and refusing over complying: pairs that were held out are told apart, from nothing."""
    run = train(
        lab, "reward", {"path": "card:xstest_pairs"}, real_data, max_length=256, learning_rate=1e-3, max_steps=16,
        test_split_size=60, eval_strategy="steps", eval_steps=16, per_device_eval_batch_size=15,
        data_limits={"dropped": 1},
    )  # fmt: skip
    assert run.manifest["data"]["train"]["tokenised"]["dropped"].keys() == {"longer than max_length"}
    assert run.logged("eval_accuracy")[-1] > 0.65 and falls(run.losses, by=0.2)


def test_reward_on_real_solutions(lab: Lab, real_data: Path) -> None:
    """Over the same right and wrong solutions, seen again and again, the right ones come to score higher."""
    data = {"path": "card:gsm8k_solution_pairs", "max_samples": 16}
    run = train(lab, "reward", data, real_data, max_length=320, learning_rate=1e-3, max_steps=12)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-6) and falls(run.losses, by=0.2)
    assert mean(run.logged("accuracy")[-3:]) > 0.8


def test_ppo_on_real_problems(lab: Lab, real_data: Path) -> None:
    """Problems of gsm8k, judged by its card's checker and by a function that a model from nothing can please."""
    run = train(
        lab, "ppo", {"path": "card:gsm8k", "split": "train", "max_samples": 64}, real_data, max_length=256,
        response_length=16, num_ppo_epochs=1, learning_rate=1e-2, per_device_train_batch_size=16, max_steps=11,
        reward_funcs=["checker", "tests.rank_work:odd_tokens"], reward_weights=[1.0, 2.0],
    )  # fmt: skip
    odd = run.logged("reward/odd_tokens")
    assert mean(odd[-3:]) > mean(odd[:3]) + 0.1
    right = run.logged("reward/checker")
    assert run.logged("reward") == pytest.approx([a + 2 * b for a, b in zip(right, odd, strict=True)], abs=1e-5)
    assert run.manifest["derived"]["reward_funcs"][0][0] == "checker:align_kit.data.checkers:check"


def test_bare_jsonl_by_path(lab: Lab, real_data: Path) -> None:
    """A file without a card: its shape is recognised from its rows."""
    path = str(real_data / "gsm8k" / "model_solutions_pairs.jsonl")
    run = train(lab, "dpo", {"path": path, "max_samples": 16}, real_data)
    assert run.manifest["status"] == "finished" and len(run.losses) == STEPS


def test_bare_jsonl_in_a_working_folder(lab: Lab, tmp_path: Path) -> None:
    """The same without real data: a relative path is one from where the run was started."""
    write_rows(lab.home / "mine.jsonl", make_rows("prompt_completion", 16))
    run = lab.start("sft", tmp_path / "run", datasets=[{"path": "mine.jsonl"}])
    run.result.ok()
    assert run.manifest["data"]["train"]["tokenised"]["rows_out"] == 16

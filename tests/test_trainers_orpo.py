"""ORPO beyond one plain run: against stock TRL and our own SFT, what it learns, and that it has no reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness import Ranks
from tests.small import Lab, lab_of, make_rows, read_weights, relative_gap, write_rows

pytestmark = pytest.mark.slow

CONSTANT = {"max_steps": 15, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def test_one_step_is_trls(lab: Lab, tmp_path: Path) -> None:
    """Loss, gradient and metrics of 8 pairs with prompts of one token, which nothing predicts.

    TRL's trainer also learns the prompts' tokens; with such prompts both losses are the paper's.
    """
    rows = [{**row, "prompt": "abcdefgh"[n]} for n, row in enumerate(make_rows("preference", 8, seed=2))]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    ours = lab.step("orpo", 1, datasets=[{"path": data}], beta=0.7)
    stock = tmp_path / "stock"
    lab.ranks.run(
        world_size=1, ranked=False, function="tests.rank_work:stock_step", cwd=tmp_path, phase="orpo", beta=0.7,
        model=str(lab.model), data=str(data), place=str(stock), per_device_train_batch_size=8, max_length=48,
        lr_scheduler_type="constant", warmup_steps=0, optim="sgd", learning_rate=10.0, max_steps=1, max_grad_norm=0.0,
    ).ok()  # fmt: skip
    (theirs,) = json.loads((stock / "metrics.json").read_text())
    assert ours.losses == pytest.approx([theirs["loss"]], rel=1e-5)
    assert relative_gap(ours.weights, read_weights(stock), read_weights(lab.model)) < 1e-5
    names = ("nll_loss", "log_odds_ratio", "log_odds_chosen", "logps/chosen", "logps/rejected", "rewards/chosen",
             "rewards/rejected", "rewards/margins", "rewards/accuracies")  # fmt: skip
    for name in names:
        assert ours.logged(name) == pytest.approx([float(theirs[name])], rel=1e-4, abs=1e-6), name


def test_its_likelihood_is_that_of_sft(lab: Lab, tmp_path: Path) -> None:
    """On the chosen sides alone, `sft` starts from the same negative log-likelihood."""
    rows = make_rows("preference", 8)
    told = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    pairs, chosen = (write_rows(tmp_path / f"{n}.jsonl", data) for n, data in enumerate((rows, told)))
    orpo = lab.train("orpo", 1, datasets=[{"path": pairs}])
    sft = lab.train("sft", 1, datasets=[{"path": chosen}])
    assert orpo.logged("nll_loss") == pytest.approx(sft.losses, rel=1e-6)
    assert orpo.losses[0] > sft.losses[0]


@pytest.mark.parametrize("use_peft", [None, True], ids=["full", "lora"])
def test_it_learns_the_chosen_side(lab: Lab, use_peft: bool | None) -> None:
    """On 8 pairs seen again and again: both terms fall, and the chosen side of every pair comes out on top."""
    rate = {"learning_rate": 3e-2} if use_peft else {}
    data = [{"path": lab.data["preference"], "max_samples": 8}]
    run = lab.train("orpo", 2, **{**CONSTANT, **rate}, per_device_train_batch_size=4, datasets=data, beta=1.0,
                    use_peft=use_peft)  # fmt: skip
    first, last = (next(line for line in lines if "loss" in line) for lines in (run.metrics, run.metrics[::-1]))
    assert last["loss"] < first["loss"] - 1 and last["nll_loss"] < first["nll_loss"] - 0.5
    assert last["log_odds_chosen"] > first["log_odds_chosen"] + 0.5 and last["rewards/accuracies"] == 1


def test_it_has_no_reference(lab: Lab, tmp_path: Path) -> None:
    run = lab.train("orpo", 1)
    assert run.manifest["frozen"] == {} and "\n  reference " not in run.result.text
    asked = lab.start("orpo", tmp_path / "run", 1, reference_model_name_or_path=lab.model)
    assert "orpo has no reference; drop it" in asked.result.error()


def test_its_strength_is_positive(lab: Lab, tmp_path: Path) -> None:
    assert "beta (command line) is 0; expected above 0" in lab.start("orpo", tmp_path / "run", 1, beta=0).result.error()

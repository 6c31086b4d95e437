"""KTO beyond one plain run: against stock TRL, its baseline and weights, batches that are ragged or lack a class."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, make_rows, read_weights, relative_gap, write_model, write_rows

pytestmark = pytest.mark.slow

WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
DESCENT = {"optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


@pytest.fixture(scope="module")
def other(lab: Lab) -> dict[str, Any]:
    """Options for a reference that is not the policy's start, so that log-ratios and baseline are not 0."""
    return {"reference_model_name_or_path": write_model(lab.home / "kto-other", seed=5), "reference_differs": True}


def finite(run: Run) -> bool:
    """Tell whether every number a run left is one."""
    return all(math.isfinite(value) for line in run.metrics for value in line.values() if isinstance(value, float))


# --- exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_one_step_is_trls(lab: Lab, other: dict[str, Any], tmp_path: Path, loss_type: str) -> None:
    """Loss, gradient, baseline and metrics of one batch of 8 completions beside a reference that differs.

    TRL gives a prompt the completion of the row before it, we that of the row behind it: the same where rows are
    reversed and none is cut.
    """
    rows = make_rows("binary", 8, seed=4)
    ours_data, data = (write_rows(tmp_path / f"{n}.jsonl", side) for n, side in enumerate((rows[::-1], rows)))
    asked = {"loss_type": loss_type, "beta": 0.3, "max_length": 48, **WEIGHTS}
    ours = lab.step("kto", 1, datasets=[{"path": ours_data}], **asked, **other)
    stock = tmp_path / "stock"
    lab.ranks.run(
        world_size=1, ranked=False, function="tests.rank_work:stock_step", cwd=tmp_path, phase="kto",
        model=str(lab.model), data=str(data), place=str(stock), per_device_train_batch_size=8, max_steps=1,
        reference=str(other["reference_model_name_or_path"]), warmup_steps=0, **DESCENT, **asked,
    ).ok()  # fmt: skip
    (theirs,) = json.loads((stock / "metrics.json").read_text())
    assert ours.losses == pytest.approx([theirs["loss"]], rel=1e-5)
    assert relative_gap(ours.weights, read_weights(stock), read_weights(lab.model)) < 1e-5
    names = ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
    for name in names:
        assert ours.logged(name) == pytest.approx([theirs[name]], rel=1e-4), name
    assert theirs["kl"] > 1 if loss_type == "kto" else theirs["kl"] == 0


def test_the_baseline_is_one_of_the_whole_step(lab: Lab, other: dict[str, Any]) -> None:
    """Micro-batches of 1, on one rank or two, see the baseline of all 8 rows; so does an evaluation of its 7."""
    asked = {"eval_strategy": "steps", "eval_steps": 1, "eval_datasets": [{"path": lab.held_out["binary"]}], **other}
    cuts = [(1, 8, 1), (1, 1, 8), (2, 1, 4)]
    whole, *parts = (
        lab.step("kto", ranks, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
                 per_device_eval_batch_size=size, **asked)
        for ranks, size, steps in cuts
    )  # fmt: skip
    assert whole.logged("kl")[0] > 1
    for part in parts:
        assert relative_gap(part.weights, whole.weights, read_weights(lab.model)) < 1e-5
        for name in ("loss", "kl", "rewards/margins", "eval_loss", "eval_kl", "eval_rewards/margins"):
            assert part.logged(name) == pytest.approx(whole.logged(name), rel=1e-4), name


def test_the_baseline_carries_no_dropout(lab: Lab) -> None:
    """It estimates a divergence, 0 at the start, whatever the policy drops while it trains."""
    dropping = {"use_peft": True, "lora_dropout": 0.5}
    sft = lab.train("sft", max_steps=4, learning_rate=1e-2, **dropping)
    run = lab.train("kto", model_name_or_path=sft.folder, disable_dropout=False, **dropping)
    assert run.logged("kl")[0] == pytest.approx(0, abs=1e-5) and abs(run.logged("rewards/margins")[0]) > 1e-4
    assert "  gate       the policy starts as its reference: log-ratio 0" in run.result.text


# --- the data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [True, False])
def test_a_data_set_of_one_class(lab: Lab, tmp_path: Path, label: bool) -> None:
    """Two ranks train, weights stay 1, the run says so and reports nothing of the class that is not there."""
    data = write_rows(tmp_path / "rows.jsonl", [{**row, "label": label} for row in make_rows("binary", 12)])
    run = lab.train("kto", 2, max_steps=3, per_device_train_batch_size=2, datasets=[{"path": data}])
    counts = "12 desirable and 0 undesirable" if label else "0 desirable and 12 undesirable"
    assert f"warning: {counts} rows: KTO learns from the contrast of both" in run.result.text
    assert run.losses[0] == pytest.approx(0.5) and run.manifest["derived"] == {} and finite(run)
    present, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert len(run.logged(f"rewards/{present}")) == 3
    assert not run.logged(f"rewards/{absent}") and not run.logged("rewards/margins")


def test_steps_of_one_class(lab: Lab, tmp_path: Path) -> None:
    """Rows sorted by label: every micro-batch, and whole steps, lack a class."""
    rows = [{**row, "label": place < 8} for place, row in enumerate(make_rows("binary", 12))]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    run = lab.train("kto", 2, max_steps=3, per_device_train_batch_size=2, datasets=[{"path": data}])
    assert finite(run) and run.manifest["derived"]["undesirable_weight"][0] == 2.0
    assert [("rewards/chosen" in line, "rewards/rejected" in line) for line in run.metrics if "loss" in line] == [
        (True, False), (True, False), (False, True),
    ]  # fmt: skip


def test_ragged_rows_on_uneven_ranks(lab: Lab, other: dict[str, Any], tmp_path: Path) -> None:
    """5 rows for two ranks, one of them long, repeats on the last rank: what one rank makes of one batch of them."""
    rows = make_rows("binary", 5, seed=3)
    rows[2]["completion"] = " amber" * 20
    data = write_rows(tmp_path / "rows.jsonl", rows)
    asked = {"datasets": [{"path": data}], "max_steps": 3, **DESCENT, "learning_rate": 1.0, **other}
    alone = lab.train("kto", 1, **asked)
    shared = lab.train("kto", 2, per_device_train_batch_size=1, gradient_accumulation_steps=8, **asked)
    assert shared.losses == pytest.approx(alone.losses, rel=1e-5)
    assert shared.logged("kl") == pytest.approx(alone.logged("kl"), rel=1e-4) and alone.logged("kl")[0] > 1
    assert finite(shared)


def test_pairs_are_one_good_and_one_bad_completion(lab: Lab, tmp_path: Path) -> None:
    pairs = make_rows("preference", 8)
    singles = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    files = [write_rows(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((pairs, singles))]
    one, other = (lab.train("kto", 2, max_steps=4, per_device_train_batch_size=2, datasets=[{"path": file}])
                  for file in files)  # fmt: skip
    assert one.losses == other.losses and one.losses[0] == pytest.approx(0.5)
    value, why = one.manifest["derived"]["undesirable_weight"]
    assert value == 1.0 and why.startswith("8 desirable and 8 undesirable rows")


def test_one_row_cannot_be_compared(lab: Lab, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", make_rows("binary", 1))
    run = lab.start("kto", tmp_path / "run", 2, datasets=[{"path": data}])
    assert "the data has 1 labelled row; KTO needs another" in run.result.error()


# --- weights ----------------------------------------------------------------------------------------------


def test_weights_follow_from_the_class_counts(lab: Lab) -> None:
    """Said, recorded, and only where the user set neither."""
    derived = lab.train("kto")
    line = "  derived    desirable_weight 1.286: 21 desirable and 27 undesirable rows; both classes then weigh the same"
    assert line in derived.result.text
    assert derived.manifest["derived"]["desirable_weight"][0] == pytest.approx(27 / 21)
    given = lab.train("kto", undesirable_weight=1.0)
    assert given.manifest["derived"] == {} and given.losses[0] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"undesirable_weight": 0}, "undesirable_weight (command line) is 0; expected above 0"),
        ({"loss_type": "bco"}, "loss_type (command line) is 'bco'; allowed: kto, apo_zero_unpaired"),
    ],
)
def test_what_is_refused(lab: Lab, tmp_path: Path, option: dict[str, Any], message: str) -> None:
    assert message in lab.start("kto", tmp_path / "run", **option).result.error()


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_classes_part(lab: Lab, loss_type: str) -> None:
    """On 8 completions seen again and again the good ones gain on the bad ones, with a baseline and without."""
    data = [{"path": lab.data["binary"], "max_samples": 8}]
    run = lab.train("kto", 2, max_steps=15, per_device_train_batch_size=4, learning_rate=3e-3, loss_type=loss_type,
                    lr_scheduler_type="constant", datasets=data)  # fmt: skip
    margins = run.logged("rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-6) and margins[-1] > 1
    assert run.losses[-1] < 0.6 * run.losses[0]


def test_from_an_sft_adapter(lab: Lab) -> None:
    """The adapter goes on; a frozen copy of it is the reference and judges the mismatched completions too."""
    sft = lab.train("sft", max_steps=4, learning_rate=1e-2, use_peft=True)
    run = lab.train("kto", max_steps=3, use_peft=True, model_name_or_path=sft.folder, deepspeed=lab.sharded, **WEIGHTS)
    labels = [row["label"] for row in make_rows("binary", 16)]  # 8 on each rank
    assert run.losses[0] == pytest.approx(sum(0.75 if good else 0.375 for good in labels) / 16, abs=1e-6)
    assert run.logged("kl")[0] == pytest.approx(0, abs=1e-5)
    assert run.manifest["frozen"]["reference"]["placement"] == "adapter"

"""Weights of rows: read where a column is named for them, exact in every loss that reads them, nothing elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align_kit import cards
from align_kit.cards import FORMAT_KINDS
from align_kit.clean.command import clean
from align_kit.data.load import load
from align_kit.data.report import TokeniseOptions
from align_kit.data.tokenise import tokenise
from align_kit.data.weights import mean_weight, sentence
from align_kit.errors import UserError
from align_kit.preferences.command import preferences
from tests.harness import Ranks
from tests.small import Lab, lab_of, make_rows, make_tokenizer, read_weights, relative_gap, write_rows

NAMED = {"columns": {"weight": "weight"}}
TIMES = (1, 2, 3, 2)  # how often each of four rows counts


def weighed(path: Path, weights: list[Any], kind: str = "preference") -> Path:
    rows = make_rows(kind, len(weights), seed=4)
    return write_rows(path, [{**row, "weight": weight} for row, weight in zip(rows, weights, strict=True)])


# --- reading ----------------------------------------------------------------------------------------------


def test_a_weight_is_read_where_its_column_is_named(tmp_path: Path) -> None:
    file = str(weighed(tmp_path / "a.jsonl", [0.5, 2, None]))
    assert load([{"path": file, **NAMED}], phase="dpo").dataset["weight"][:] == [0.5, 2.0, None]
    assert "weight" not in load([{"path": file}], phase="dpo").dataset.column_names
    both = load([{"path": file, **NAMED}], phase="kto").dataset
    assert both["weight"][:] == [0.5, 0.5, 2.0, 2.0, None, None] and both["label"][:2] == [True, False]
    other = {"path": file, "columns": {"weight": "votes.0"}}
    with pytest.raises(UserError, match=r"a.jsonl, line 1: no column 'votes.0'; found prompt, chosen, rejected, w"):
        load([other], phase="dpo")
    mixed = load([{"path": file, **NAMED}, {"path": file}], phase="dpo").dataset
    assert mixed["weight"][:] == [0.5, 2.0, None, None, None, None]


@pytest.mark.parametrize("value", [0, -1, "much", True, float("inf"), float("nan")])
def test_what_is_no_weight_is_named_with_its_row(tmp_path: Path, value: object) -> None:
    file = weighed(tmp_path / "a.jsonl", [1, value])
    with pytest.raises(UserError, match="a.jsonl, line 2: weight must be a positive number, got"):
        load([{"path": str(file), **NAMED}], phase="dpo")


def test_rows_of_other_kinds_have_none(tmp_path: Path) -> None:
    file = weighed(tmp_path / "a.jsonl", [1, 2], "prompt_completion")
    with pytest.raises(UserError, match="which rows of preference and binary have, not of prompt_completion"):
        load([{"path": str(file), **NAMED}], phase="sft")


def test_weights_stay_with_their_rows_when_others_are_dropped(tmp_path: Path) -> None:
    rows = make_rows("preference", 6, seed=4)
    rows[2]["chosen"] = "word " * 99
    rows = [{**row, "weight": number + 1 if number != 4 else None} for number, row in enumerate(rows)]
    dataset = load([{"path": str(write_rows(tmp_path / "a.jsonl", rows)), **NAMED}], phase="dpo").dataset
    options = TokeniseOptions(max_length=60, truncation_mode="drop")
    tokens, report = tokenise(dataset, "preference", make_tokenizer(), options, tmp_path / "cache")
    assert [weight for weight in tokens["weight"] if weight == weight] == [1, 2, 4, 6] and report.rows_out == 5
    assert mean_weight(tokens) == 13 / 4
    said = "a row counts 0.308 to 1.85 times in the loss, by its column's share of the mean 3.25"
    assert sentence(tokens) == f"{said}; 1 rows without one count as 1"
    plain = dataset.remove_columns("weight")
    bare, other = tokenise(plain, "preference", make_tokenizer(), options, tmp_path / "cache")
    assert "weight" not in bare.column_names and other.digest != report.digest and mean_weight(bare) is None


# --- what the data commands make of them ------------------------------------------------------------------


def test_agreement_becomes_a_weight_that_training_reads(tmp_path: Path) -> None:
    votes = [["chosen"] * 4, ["chosen"] * 3 + ["rejected"], ["chosen", "rejected", "chosen"]]
    rows = [{**row, "votes": voted} for row, voted in zip(make_rows("preference", 3, seed=4), votes, strict=True)]
    words = [str(write_rows(tmp_path / "a.jsonl", rows)), "--annotators", "votes", "--weight-by", "agreement"]
    assert preferences([*words, "--output", str(tmp_path / "made")]) == 0
    read = load([{"path": str(tmp_path / "made/made.md")}], phase="dpo").dataset
    assert read["weight"][:] == pytest.approx([1, 0.75, 2 / 3])
    assert preferences([*words, "--resample", "--output", str(tmp_path / "drawn")]) == 0
    drawn = load([{"path": str(tmp_path / "drawn/drawn.md")}], phase="dpo").dataset
    assert "weight" not in drawn.column_names, "they are in the draw already"


def test_cleaning_and_exporting_keep_them(tmp_path: Path) -> None:
    from align_kit.card_commands.croissant import _columns

    weighed(tmp_path / "a.jsonl", [0.5, 2, 1])
    words = [str(tmp_path / "a.jsonl"), "--format", "preference", "--columns", "weight=weight", "--filters", "none"]
    assert clean([*words, "--output", str(tmp_path / "made")]) == 0
    card = cards.read_card(tmp_path / "made/made.md")
    assert card.block.columns == {"weight": "weight"} and "preference" in FORMAT_KINDS[card.block.format]
    assert load([{"path": str(tmp_path / "made/made.md")}], phase="reward").dataset["weight"][:] == [0.5, 2.0, 1.0]
    first = json.loads((tmp_path / "made/train.jsonl").read_text().splitlines()[0])
    assert _columns(card, [first]) == {name: name for name in ("prompt", "chosen", "rejected", "weight")}


# --- training on them -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


HOW: dict[str, dict[str, Any]] = {
    "reward": {"center_rewards_coefficient": 0.01},
    "dpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "orpo": {"beta": 0.4},
    "kto": {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.5, "undesirable_weight": 0.75},
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", HOW)
def test_a_row_that_weighs_twice_as_much_is_two_rows(lab: Lab, tmp_path: Path, phase: str) -> None:
    """The gradient of four weighted rows on two ranks is that of the eight that repeat them; scale does not matter."""
    kind, asked = lab.kind(phase), {**HOW[phase], "data_limits": '{"repeated": 1}'}
    rows = make_rows(kind, len(TIMES), seed=4)
    repeated = [row for row, times in zip(rows, TIMES, strict=True) for _ in range(times)]
    plain = lab.step(phase, 1, datasets=[{"path": write_rows(tmp_path / "b.jsonl", repeated)}], **asked)
    cuts = {1: (2, 1, 2), 0.1: (1, 4, 1)}
    sources = {scale: weighed(tmp_path / f"{scale}.jsonl", [scale * times for times in TIMES], kind) for scale in cuts}
    for scale, (ranks, size, steps) in cuts.items():
        run = lab.step(
            phase, ranks, datasets=[{"path": sources[scale], **NAMED}], per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, **asked,
        )  # fmt: skip
        assert relative_gap(run.weights, plain.weights, read_weights(lab.model)) < 1e-5, scale
        assert run.losses == pytest.approx(plain.losses, rel=1e-5)
        assert "weights    a row counts 0.5 to 1.5 times in the loss" in run.result.text
    bare = lab.step(phase, 1, datasets=[{"path": sources[1]}], per_device_train_batch_size=4, **asked)
    assert relative_gap(bare.weights, plain.weights, read_weights(lab.model)) > 1e-2, "nobody named its column"


@pytest.mark.slow
def test_an_evaluation_weighs_nothing(lab: Lab, tmp_path: Path) -> None:
    asked = {"eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 4}
    even, uneven = (weighed(tmp_path / f"{n}.jsonl", [1, 1, n, 1]) for n in (1, 9))
    train = [{"path": lab.data["preference"]}]
    held_out = ([{"path": file, **NAMED}] for file in (even, uneven))
    one, other = (lab.step("dpo", 1, datasets=train, eval_datasets=data, **asked) for data in held_out)
    assert one.logged("eval_loss") == other.logged("eval_loss")

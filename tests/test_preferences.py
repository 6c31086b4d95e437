"""`align-kit data preferences`: filters and their reasons, what is written, mistakes in one line."""

from __future__ import annotations

import json
import math
import os
import pty
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align_kit import cards
from align_kit.cli import main
from align_kit.data.load import load
from align_kit.data.shapes import Row
from align_kit.errors import UserError
from align_kit.preferences.command import preferences
from tests.small import sentence, write_scorer

STANDING = ("empty", "identical", "contradicting", "repeated")


def pair(number: int, **more: Any) -> Row:
    """Return a pair of which no two are alike, and no side is much longer than the other."""
    return {"prompt": f"question {number}", "chosen": f"so good {number}", "rejected": f"not bad {number}", **more}


def turned(row: Row) -> Row:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def write(place: Path, rows: list[Row], name: str = "rows.jsonl") -> str:
    place.mkdir(exist_ok=True)
    (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(place / name)


@pytest.fixture
def study(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Return what `--json` says of rows, with other options besides."""

    def studied(rows: list[Row], *words: str) -> dict[str, Any]:
        assert preferences([write(tmp_path, rows), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    return studied


def dropped(said: dict[str, Any]) -> dict[str, int]:
    """Return how many rows each step dropped, of those that dropped any."""
    return {step["name"]: step["dropped"] for step in said["steps"] if step["dropped"]}


# --- agreement --------------------------------------------------------------------------------------------------------


def test_agreement_in_the_report(study) -> None:
    rows = [pair(n, a="chosen", b="chosen", c="rejected" if n % 2 else "chosen") for n in range(20)]
    rows += [pair(20, a="chosen", b=None, c=""), pair(21, a="rejected", b="rejected", c="tie")]
    seen = study(rows, "--annotators", "a,b,c")["agreement"]
    assert seen["rows_with_two_votes"] == 21 and seen["rows_with_fewer"] == 1 and seen["unanimous"] == 10
    assert seen["majority_against_label"] == 1 and seen["ties"] == 0 and seen["votes_name_labels"]
    assert seen["annotators"]["c"] == {"votes": 21, "with_most_of_the_others": 10}
    assert seen["annotators"]["a"] == {"votes": 10, "with_most_of_the_others": 10}  # elsewhere the others are split
    assert seen["alpha_low"] <= seen["alpha"] <= seen["alpha_high"] < 0.5


def test_true_and_1_are_one_vote_and_the_least_agreeing_are_named(
    study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q{n}", "completion": "c", "label": n % 2 == 0, "a": n % 2 == 0, "b": float(n % 2 == 0)}
            for n in range(12)]  # fmt: skip
    assert study(rows, "--annotators", "a,b")["agreement"]["alpha"] == 1
    assert study(rows, "--annotators", "a,b", "--level", "interval", "--agreement", "1")["kept"] == 12
    crowd = [pair(n, votes={f"w{who}": "rejected" if who == 19 else "chosen" for who in range(20)}) for n in range(3)]
    preferences([write(tmp_path, crowd), "--annotators", "votes"])
    said = capsys.readouterr().out
    assert "Of 20 annotators, these 12 go least with the others" in said
    assert "| annotator | votes | with most of the others |" in said.split("| w19 ")[0].split("least")[1]


def test_alpha_that_is_undefined_says_why(study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = study([pair(n, a="chosen", b="chosen") for n in range(3)], "--annotators", "a,b")
    assert same["agreement"]["alpha"] is None and "all votes are 'chosen'" in same["agreement"]["why_undefined"]
    assert same["flips"] == []
    preferences([write(tmp_path, [pair(n, votes=["x"]) for n in range(3)]), "--annotators", "votes"])
    assert "alpha is undefined: no row has two votes" in capsys.readouterr().out


# --- filters ----------------------------------------------------------------------------------------------------------


def test_rows_that_teach_nothing_are_dropped_unasked(study) -> None:
    rows = [pair(0), pair(1), turned(pair(0)), pair(1), pair(1), turned(pair(1)), pair(2), pair(3), pair(4)]
    rows[-2]["rejected"] = rows[-2]["chosen"] + " "
    rows[-1]["chosen"] = " "
    said = study(rows)
    # Of 0 both orders stand once: neither is right. Of 1 the one that stands three times is.
    assert dropped(said) == {"empty": 1, "identical": 1, "contradicting": 3, "repeated": 2} and said["kept"] == 2
    assert said["copies"] == {
        "different": 5, "repeated": 2, "contradicted": 2, "rows_of_contradicted": 6, "empty": 1
    }  # fmt: skip
    assert dropped(study(rows, "--keep", "contradicting,empty")) == {"identical": 1, "repeated": 2}
    assert study(rows, "--keep", ",".join(STANDING))["kept"] == len(rows)


def test_a_pair_that_differs_in_its_indents_is_one(study) -> None:
    said = study([{"prompt": "code", "chosen": "if a:\n    b", "rejected": "if a:\nb"}])
    assert said["kept"] == 1 and said["sides"]["median"] == 1 and said["sides"]["identical"] == 0


def test_completions_with_both_labels_contradict_each_other(study) -> None:
    rows = [{"prompt": "q", "completion": c, "label": label} for c, label in
            [("a", True), ("a", False), ("b", True), ("b", True), ("b", False), ("c", False)]]  # fmt: skip
    said = study(rows)
    assert said["kind"] == "binary" and said["labels"] == {"true": 3, "false": 3}
    assert dropped(said) == {"contradicting": 3, "repeated": 1} and said["kept"] == 2


def test_filters_that_were_asked_for(study) -> None:
    rows = [
        pair(0, a="chosen", b="chosen", s=2.0, t=1.0),
        pair(1, a="chosen", b="rejected", s=2.0, t=1.0),
        pair(2, a="rejected", b="rejected", s=2.0, t=1.0),
        pair(3, a="chosen", b=None, s=2.0, t=1.0),
        pair(4, a="chosen", b="chosen", s=1.0, t=2.0),
        pair(5, a="chosen", b="chosen", s=1.0, t=1.0),
        pair(6, a="chosen", b="chosen", s=float("nan"), t=1.0),
        pair(7, a="chosen", b="chosen", s=2.0, t="1.5"),
    ]
    rows[0]["chosen"] *= 5
    rows[7]["rejected"] = rows[7]["chosen"] + "!"
    votes, scores = ("--annotators", "a,b"), ("--reward-scores", "s,t")
    assert dropped(study(rows, *votes, "--agreement", "0.6")) == {"few-votes": 1, "agreement": 2}
    assert dropped(study(rows, *votes, "--agreement", "0.5", "--keep", "few-votes")) == {"agreement": 1}
    assert dropped(study(rows, *votes, "--drop-ties")) == {"tie": 1}
    assert dropped(study(rows, *scores, "--drop-ties")) == {"tie": 1}
    assert dropped(study(rows, *scores, "--reward-margin", "0")) == {"no-score": 1, "reward": 1}
    assert dropped(study(rows, *scores, "--reward-margin", "0.5", "--keep", "no-score")) == {"reward": 2}
    assert dropped(study(rows, "--max-length-ratio", "3")) == {"length": 1}
    assert dropped(study(rows, "--near", "0.8")) == {"near": 1}
    both = study(rows, *votes, *scores, "--agreement", "0.6", "--drop-ties", "--reward-margin", "0", "--near", "0.8")
    assert dropped(both) == {"few-votes": 1, "no-score": 1, "tie": 2, "agreement": 1, "reward": 1, "near": 1}
    assert both["kept"] == 1 and [step["rows"] for step in both["steps"]][-1] == 2


def test_an_empty_side_makes_no_ratio(study) -> None:
    rows = [{**pair(0), "rejected": ""}, pair(1)]
    assert dropped(study(rows, "--max-length-ratio", "9", "--keep", "empty")) == {"length": 1}
    assert study(rows)["length"]["unequal"] == 1


def test_length_that_gives_labels_away(study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**pair(n), "chosen": f"{n} " + "long " * (9 if n < 18 else 1)} for n in range(20)]
    seen = study(rows)["length"]
    assert seen["chosen_longer"] == 18 and seen["chosen_longer_interval"][0] > 0.6 and seen["point_biserial"] > 0.7
    assert sum(one["pairs"] for one in seen["bins"]) == seen["unequal"]
    assert sum(one["longer_chosen"] for one in seen["bins"]) == 18
    preferences([write(tmp_path, rows)])
    assert "choosing the longer side is right for 90.0 %" in capsys.readouterr().out


def test_scores_of_completions_are_ranked(study) -> None:
    rows = [{"prompt": f"q{n}", "completion": "c", "label": n < 5, "s": 10 - n if n else None} for n in range(10)]
    seen = study(rows, "--reward-scores", "s")["rewards"]
    assert seen == {"scored": 9, "without_score": 1, "ranked_right": 1.0}


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_written_set_trains_and_says_what_was_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [pair(n, votes=["chosen", "chosen" if n % 2 else "rejected", "chosen"], s=float("nan")) for n in range(8)]
    output = tmp_path / "made"
    words = [write(tmp_path, rows), "--output", str(output), "--annotators", "votes", "--agreement", "0.9"]
    assert preferences([*words, "--keep-dropped"]) == 0
    assert f"4 rows: {output}/made.md" in capsys.readouterr().out
    loaded = load([{"path": str(output / "made.md")}], phase="dpo")
    assert loaded.dataset["prompt"] == [f"question {n}" for n in (1, 3, 5, 7)]
    kept = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    assert kept[0] == {**rows[1], "s": None}  # the row as it stood, but JSON has no NaN
    block = cards.read_card(output / "made.md").block
    found = {row.name: (row.dropped, row.threshold) for row in block.filters}
    assert found["agreement"] == (4, 0.9) and found["identical"] == (0, None)
    assert block.made.sources[0].file == "rows.jsonl" and block.made.sources[0].rows == 8
    assert block.made.sources[0].digest == load([{"path": words[0]}], phase="dpo").digest
    aside = [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in aside] == ["agreement"] * 4 and aside[0]["where"].endswith("row 1")


def test_a_card_keeps_its_shape_and_its_licence(real_data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ALIGN_KIT_DATA", str(real_data))
    for name, rows in (("llamafactory_dpo_en", 294), ("gsm8k_solution_pairs", 731), ("xstest_pairs", 244)):
        assert preferences([f"card:{name}", "--output", str(tmp_path / name)]) == 0
        made, before = cards.read_card(tmp_path / name / f"{name}.md"), cards.load_card(name)
        assert made.licences == before.licences and made.block.format == before.block.format
        assert made.block.phases == before.block.phases and made.block.checker == before.block.checker
        again = load([{"path": str(tmp_path / name / f"{name}.md")}], phase="dpo").dataset
        whole = load([{"path": f"card:{name}"}], phase="dpo").dataset
        assert len(again) == rows and again[0] == whole[0]  # the prompt template is applied once


def test_a_split_keeps_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preferences(["card:sums_pairs[validation[:9]]", "--output", str(tmp_path / "made")]) == 0
    assert "made.md, split: validation} in datasets" in capsys.readouterr().out
    spec = {"path": str(tmp_path / "made/made.md"), "split": "validation"}
    assert len(load([spec], phase="dpo").dataset) == 9


def test_weights_and_a_draw_by_them(tmp_path: Path) -> None:
    rows = [pair(n, votes=["chosen"] * (4 if n % 2 else 1) + ["rejected"] * (0 if n % 2 else 3)) for n in range(400)]
    words = [write(tmp_path, rows), "--annotators", "votes", "--weight-by", "agreement"]

    def made(name: str, *more: str) -> list[Row]:
        assert preferences([*words, "--output", str(tmp_path / name), *more]) == 0
        return [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]

    assert [row["weight"] for row in made("weighted")] == [0.25, 1.0] * 200
    drawn = Counter(row["weight"] for row in made("drawn", "--resample", "--seed", "1"))
    assert drawn[1.0] == 200 and 32 <= drawn[0.25] <= 69  # 50 expected; outside with probability 0.003
    assert made("again", "--resample", "--seed", "1") == made("before", "--resample", "--seed", "1")
    assert made("other", "--resample", "--seed", "2") != made("anew", "--resample", "--seed", "1")


@pytest.mark.slow
def test_a_reward_model_scores_as_transformers_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = write_scorer(tmp_path / "scorer")
    capsys.readouterr()  # what imports say
    draw = random.Random(0)
    rows = [{"prompt": sentence(draw, 2, 9), "chosen": sentence(draw, 1, 20), "rejected": sentence(draw, 1, 20)}
            for _ in range(30)]  # fmt: skip
    rows[3]["chosen"] = "much too long " * 200
    words = [write(tmp_path, rows), "--reward-model", str(folder), "--output", str(tmp_path / "made")]
    assert preferences([*words, "--reward-margin", "0", "--keep", "no-score", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id

    def score(text: str) -> float:
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        if len(ids) > model.config.max_position_embeddings:
            return math.nan
        with torch.no_grad():
            return model(torch.tensor([ids])).logits.item()

    expected = [[score(row["prompt"] + row[side]) for side in ("chosen", "rejected")] for row in rows]
    assert seen["rewards"]["without_score"] == 1 and math.isnan(expected[3][0])
    assert seen["rewards"]["chosen_higher"] == sum(chosen > rejected for chosen, rejected in expected)
    kept = [json.loads(line) for line in (tmp_path / "made/train.jsonl").read_text().splitlines()]
    right = {row["prompt"]: both for row, both in zip(rows, expected, strict=True) if not both[0] < both[1]}
    assert {row["prompt"] for row in kept} == set(right)
    for row in kept:
        chosen, rejected = right[row["prompt"]]
        assert row["score_rejected"] == pytest.approx(rejected, abs=1e-5)
        assert row["score_chosen"] == (None if math.isnan(chosen) else pytest.approx(chosen, abs=1e-5))
    assert len(cards.read_card(tmp_path / "made/made.md").block.made.model_extra["reward_model"]) >= 32


def test_shapes_of_chat_and_of_own_names(study, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hi"}]
    chats = [{"chosen": [*said, {"role": "assistant", "content": f"yes {n}"}],
              "rejected": [*said, {"role": "assistant", "content": f"never {n}"}]} for n in range(4)]  # fmt: skip
    assert study(chats)["length"]["mean_chosen"] == 5
    own = [{"q": f"q {n}", "best": f"yes {n}", "worst": f"never {n}"} for n in range(4)]
    named = ("--columns", "prompt=q,chosen=best,rejected=worst")
    assert study(own, *named)["length"] == study(chats)["length"]
    assert preferences([write(tmp_path, own), *named, "--output", str(tmp_path / "made")]) == 0
    assert load([{"path": str(tmp_path / "made/made.md")}], phase="dpo").dataset["chosen"][0] == "yes 0"


def test_a_table_is_read_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.csv").write_text(
        'prompt,chosen,rejected,votes\nq,yes,no,"[1, 1, 0]"\nq2,yes,no,"[0, 0]"\n', encoding="utf-8"
    )
    assert preferences([str(tmp_path / "rows.csv"), "--annotators", "votes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreement"]["votes"] == 5


# --- mistakes ---------------------------------------------------------------------------------------------------------

VOTED = pair(0, a="chosen", b="chosen", s=1, t="high", weight=1)
LABELLED = {"prompt": "q", "completion": "c", "label": True, "s": 1}
PLAIN = {"prompt": "q", "completion": "c"}
MISTAKES = [
    (VOTED, ["--annotators", "a"], "one annotator only, with one vote a row"),
    (VOTED, ["--annotators", "a,c"], "unknown annotators' column 'c'; known: a, b, chosen"),
    (VOTED, ["--annotators", "a,a"], "names a column twice"),
    (pair(0, v=["x"], w="y"), ["--annotators", "v,w"], "line 1: column v holds .* where one vote belongs"),
    (pair(0, v=[{"who": "x"}]), ["--annotators", "v"], "line 1: column v: a vote .* has none of the keys vote, label"),
    (VOTED, ["--agreement", "0.5"], "--agreement goes by votes; name the annotators' columns"),
    (VOTED, ["--weight-by", "agreement"], "--weight-by agreement goes by votes"),
    (VOTED, ["--annotators", "a,b", "--weight-by", "agreement"], "column `weight`, which these rows have already"),
    (VOTED, ["--resample"], "--resample goes by weights; add --weight-by agreement"),
    (VOTED, ["--drop-ties"], "--drop-ties goes by votes .* or by both sides' scores"),
    (VOTED, ["--reward-scores", "s,t"], "line 1: column t holds 'high' where a score belongs"),
    (VOTED, ["--reward-scores", "s"], "preference rows need two columns"),
    (VOTED, ["--reward-scores", "s,u"], "unknown column of reward scores 'u'"),
    (VOTED, ["--reward-scores", "s,s", "--reward-model", "x"], "were both given; drop one"),
    (VOTED, ["--reward-margin", "1"], "--reward-margin goes by scores"),
    ({**VOTED, "score_rejected": 1}, ["--reward-model", "x"], "column `score_rejected`, which these rows have already"),
    (VOTED, ["--reward-model", "x/y/z"], "--reward-model 'x/y/z': no such folder"),
    (LABELLED, ["--reward-scores", "s,s"], "binary rows need one column"),
    (LABELLED, ["--near", "0.9"], "--near compares a chosen with a rejected completion; these are binary rows"),
    (PLAIN, ["--reward-scores", "label"], "held against labels, and these rows have none"),
    (PLAIN, ["--reward-model", "x"], "held against labels, and these rows have none"),
    ({"text": "t"}, [], "text rows hold no preference"),
    (VOTED, ["--agreement", "1.5"], "argument --agreement: 1.5 does not fit; give a share above 0, at most 1"),
    (VOTED, ["--max-length-ratio", "half"], "half does not fit; give how many times"),
    (VOTED, ["--reward-margin", "nan"], "nan does not fit; give a number"),
    (VOTED, ["--columns", "prompt"], "write canonical=own"),
    (VOTED, ["--format", "prefernce"], "unknown format 'prefernce'.*did you mean 'preference'"),
    (VOTED, ["--keep", "repeats"], "unknown reason in --keep 'repeats'.*did you mean 'repeated'"),
    (VOTED, ["--keep-dropped"], "add --output folder"),
    (VOTED, ["--annotators", ","], "argument --annotators: it names nothing"),
    (VOTED, ["--frob"], "unrecognized arguments: --frob"),
]


@pytest.mark.parametrize(("row", "words", "message"), MISTAKES)
def test_a_mistake_is_one_line(tmp_path: Path, row: Row, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        preferences([write(tmp_path, [row]), *words])


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    for named, message in (
        (write(tmp_path, [], "none.jsonl"), "no rows; check the split and the file"),
        (str(tmp_path / "nine.jsonl"), "no data file .*near it: none.jsonl"),
        ("card:xstest_pair", "unknown card 'xstest_pair'.*did you mean 'xstest_pairs'"),
        (write(tmp_path, [VOTED]) + "[test]", "only the split 'train', not 'test'"),
        ("a[b", "cannot read the source 'a.b'"),
    ):
        with pytest.raises(UserError, match=message):
            preferences([named])


def test_filters_that_leave_nothing_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path, [{**pair(n), "chosen": "long " * 9} for n in range(3)])
    words = ["data", "preferences", source, "--max-length-ratio", "2", "--output", str(tmp_path / "made")]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "all 3 rows would be dropped, 3 of them by length" in said.err and len(said.err.splitlines()) == 1
    assert "What would be dropped" in said.out and not (tmp_path / "made").exists()


def test_the_report_reads_as_it_should(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [pair(n, annotation_1="chosen", annotation_2="chosen", score_chosen=2, score_rejected=1) for n in range(3)]
    assert preferences([write(tmp_path, [*rows, rows[0]])]) == 0
    said = capsys.readouterr().out
    assert "4 pairs, 1 of them copies of another row." in said
    assert "--annotators annotation_1,annotation_2" in said and "--reward-scores score_chosen,score_rejected" in said
    assert "| repeated      |       4 |       1 | 25.0 % | the same pair again " in said
    assert "3 of 4 rows are kept (75.0 %)." in said
    assert preferences([write(tmp_path, rows), "--annotators", "annotation_1,annotation_2,prompt"]) == 0
    assert "Votes are not named chosen and rejected" in capsys.readouterr().out


def test_a_terminal_is_told_how_far_it_is(tmp_path: Path) -> None:
    """On a terminal the line comes and goes; elsewhere standard error stays empty."""
    code = "import sys; from align_kit.preferences import waiting; waiting.EVERY = 0\n"
    code += "assert list(waiting.watched(range(3), 3, 'reading')) == [0, 1, 2]"
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert "reading: 2 of 3 rows" in shown and shown.endswith(f"\r{'':<79}\r")
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=True).stderr == b""

"""The demo: its arithmetic, and a small one from random weights to the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align_kit.demo import control, pipeline, samples, table
from align_kit.demo.score import gain
from align_kit.errors import UserError
from tests.harness import Ranks


def test_gain_is_paired() -> None:
    before, after = [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]
    found = gain(before, after)
    assert found.mean == 25.0
    # differences 100, 0, 0, 0: standard deviation 50, standard error 25
    assert found.low == pytest.approx(25 - 1.96 * 25) and found.high == pytest.approx(25 + 1.96 * 25)
    assert gain(before, before).mean == gain(before, before).high == 0


def test_gain_refuses_other_problems() -> None:
    with pytest.raises(ValueError):
        gain([0.0, 1.0], [1.0])


def written(folder: Path, rows: list[dict]) -> Path:
    """Return the card beside rows, as far as a control reads it."""
    folder.mkdir()
    samples.write(folder / "train.jsonl", rows)
    return folder / f"{folder.name}.md"


def lines(place: Path) -> list[dict]:
    return [json.loads(line) for line in place.read_text().splitlines()]


def test_control_swaps_about_half_and_loses_none(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "chosen": f"c{i}", "rejected": f"r{i}", "score_chosen": 4.0} for i in range(400)]
    pairs = written(tmp_path / "pairs", rows)
    swapped = lines(samples.shuffled_pairs(pairs, seed=0))
    assert [row["prompt"] for row in swapped] == [row["prompt"] for row in rows]
    assert all(row.keys() == {"prompt", "chosen", "rejected"} for row in swapped)  # a score would tell
    assert all({row["chosen"], row["rejected"]} == {f"c{i}", f"r{i}"} for i, row in enumerate(swapped))
    assert 160 < sum(row["chosen"][0] == "r" for row in swapped) < 240
    assert swapped == lines(samples.shuffled_pairs(pairs, seed=0)) != lines(samples.shuffled_pairs(pairs, seed=1))


def test_shuffled_labels_keep_their_counts(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "completion": f"c{i}", "label": i % 3 == 0} for i in range(300)]
    dealt = lines(samples.shuffled_labels(written(tmp_path / "labels", rows), seed=0))
    assert [row["completion"] for row in dealt] == [row["completion"] for row in rows]
    assert sum(row["label"] for row in dealt) == 100
    agree = sum(row["label"] == before["label"] for row, before in zip(dealt, rows, strict=True))
    assert 130 < agree < 200  # 5/9 of them by chance


def test_shuffled_rewards_are_the_same_numbers() -> None:
    prompts = [f"Ann had {n} pens and bought 1 more. How many?\n" for n in range(40)]
    right = [f"{n}+1: {n}+1={n + 1}\n#### {n + 1}" for n in range(40)]
    texts = [text if n < 10 else "#### 0" for n, text in enumerate(right)]
    dealt = control.shuffled_reward(prompts=prompts, completions=texts, answer=right)
    assert sum(dealt) == 10 and sum(dealt[:10]) < 8
    assert dealt == control.shuffled_reward(prompts=prompts, completions=texts, answer=right)


def test_grid_is_aligned() -> None:
    lines = table.grid(("a", "long"), [["1", "2"], ["three", "4"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("|-------|")


@pytest.mark.parametrize(("words", "message"), [("--ranks 0", "--ranks 0"), ("--scale 2", "--scale 2.0")])
def test_bad_options(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.parse(words.split())


@pytest.mark.slow
def test_small_demo_runs_to_its_table(tmp_path: Path, ranks: Ranks) -> None:
    """A share of the steps: enough that fine-tuning teaches the format and DPO makes the model show its work."""
    words = ["--scale", "0.2", "--split", "validation", "--arms", "reward", "dpo"]
    words += ["--output_dir", str(tmp_path / "demo")]
    done = ranks.run(
        function="tests.demo_work:few_problems", argv=words, drawn=256, scored=128, world_size=1, ranked=False,
        cwd=tmp_path, env={"ALIGN_KIT_CACHE": str(tmp_path / "cache")}, timeout=900,
    ).ok()  # fmt: skip
    scores = json.loads((tmp_path / "demo/seed0/scores.json").read_text())
    base, sft, dpo = (scores[arm] for arm in ("pretrain", "sft", "dpo"))
    assert sft["perplexity"] < 0.5 * base["perplexity"]
    assert sum(base["greedy"]) == 0 and sft["form"] > 0.9
    assert dpo["work"] > sft["work"] + 0.1
    judged = json.loads((tmp_path / "demo/seed0/reward/manifest.json").read_text())
    assert judged["status"] == "finished" and "held-out pairs" in done.text
    assert "| DPO " in done.text and (tmp_path / "demo/report.md").is_file()
    manifest = json.loads((tmp_path / "demo/seed0/dpo/manifest.json").read_text())
    assert manifest["frozen"]["reference"]["digest"] == manifest["policy"]["digest"]
    assert manifest["world_size"] == 2 and manifest["status"] == "finished"

"""Data for every phase: each card serves the phases it names, from its rows to the batch that a trainer is given."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from align_kit import cards
from align_kit.data.checkers import exact_reward
from align_kit.data.collate import BinaryCollator, PreferenceCollator
from align_kit.data.embedded import TINY
from align_kit.data.load import load
from align_kit.data.mismatch import with_mismatched
from align_kit.data.report import TokeniseOptions, TokeniseReport
from align_kit.data.tokenise import tokenise
from tests.data_rows import REAL, assistant, needs_real_data, user

LIMIT = 1024
# (phase, card, split, rows read, rows kept of at most 1,024 tokens of the built-in tokenizer)
BUILT_IN = [
    ("reward", "sums_pairs", "train", 4096, 4096),
    ("orpo", "sums_pairs", "train", 4096, 4096),
    ("kto", "sums_labels", "train", 6144, 6144),
    ("kto", "sums_pairs", "train", 8192, 8192),
    ("ppo", "sums_prompts", "train", 2048, 2048),
]
REAL_SETS = [
    ("reward", "gsm8k_solution_pairs", "train", 731, 731),
    ("dpo", "gsm8k_solution_pairs", "train", 731, 731),
    ("kto", "gsm8k_solution_labels", "train", 5276, 5276),
    ("orpo", "llamafactory_dpo_en", "train", 299, 197),
    ("reward", "xstest_pairs", "train", 244, 244),
    ("ppo", "gsm8k", "train", 7473, 7473),
    ("ppo", "xstest_prompts", "test", 450, 450),
]


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def tokenised(spec: dict[str, Any], phase: str, cache_dir: Path) -> tuple[Dataset, TokeniseReport]:
    """Return the tokenised rows of one source, as a run of `phase` gets them."""
    loaded = load([spec], phase=phase, data_home=REAL if REAL.is_dir() else None)
    return tokenise(loaded.dataset, loaded.kind, tokenizer(), TokeniseOptions(max_length=LIMIT), cache_dir)


def batched(phase: str, rows: Dataset) -> dict[str, Any]:
    """Return the first batch of four rows through the collator of `phase`."""
    if phase == "kto":
        rows = with_mismatched(rows, LIMIT)
    collator = BinaryCollator(1) if phase == "kto" else PreferenceCollator(1)
    return collator([rows[place] for place in range(4)])


def check_card(phase: str, name: str, split: str, read: int, kept: int, cache_dir: Path) -> None:
    """Check that a card's rows come through to a batch, and say how many are kept."""
    assert phase in cards.load_card(name).block.phases
    rows, report = tokenised({"path": f"card:{name}", "split": split}, phase, cache_dir)
    assert (report.rows_in, report.rows_out, len(rows)) == (read, kept, kept)
    if phase == "ppo":
        assert all(ids and prompt for ids, prompt in zip(rows["prompt_ids"], rows["prompt"], strict=True))
    else:
        batch = batched(phase, rows)
        assert batch["loss_mask"].sum() > 0 and batch["input_ids"].shape[1] <= LIMIT
        assert (batch["loss_mask"] <= batch["attention_mask"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("phase, name, split, read, kept", BUILT_IN)
def test_built_in_cards(phase: str, name: str, split: str, read: int, kept: int, tmp_path: Path) -> None:
    check_card(phase, name, split, read, kept, tmp_path)


@pytest.mark.slow
@needs_real_data
@pytest.mark.parametrize("phase, name, split, read, kept", REAL_SETS)
def test_real_sets(phase: str, name: str, split: str, read: int, kept: int, tmp_path: Path) -> None:
    check_card(phase, name, split, read, kept, tmp_path)


@pytest.mark.slow
@needs_real_data
def test_four_solutions_of_one_problem_stand_together_and_are_not_each_others_mismatch(tmp_path: Path) -> None:
    rows, _ = tokenised({"path": "card:gsm8k_solution_labels"}, "kto", tmp_path)
    rows = with_mismatched(rows, LIMIT)
    own: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for prompt, completion in zip(rows["prompt_ids"], rows["completion_ids"], strict=True):
        own.setdefault(tuple(prompt), set()).add(tuple(completion))
    mixed = zip(rows["prompt_ids"], rows["kl_completion_ids"], strict=True)
    assert not any(tuple(completion) in own[tuple(prompt)] for prompt, completion in mixed)


@needs_real_data
def test_the_answers_of_gsm8k_are_what_its_checker_needs(tmp_path: Path) -> None:
    rows, _ = tokenised({"path": "card:gsm8k", "max_samples": 200}, "ppo", tmp_path)
    prompts, answers = rows["prompt"][:], rows["answer"][:]
    assert exact_reward(prompts=prompts, completions=answers, answer=answers) == [1.0] * 200
    assert sum(exact_reward(prompts=prompts, completions=answers[1:] + answers[:1], answer=answers)) < 20


FILES: dict[str, tuple[dict[str, Any], Any, Any]] = {  # a row as given -> its prompt and its answer
    "a prompt alone": ({"prompt": "hello"}, "hello", None),
    "a prompt and an answer": ({"prompt": "2 + 3?", "answer": "5"}, "2 + 3?", "5"),
    "an answer that is a number": ({"prompt": "2 + 3?", "answer": 5}, "2 + 3?", 5),
    "a completion": ({"prompt": "2 + 3?", "completion": "#### 5"}, "2 + 3?", "#### 5"),
    "messages": ({"prompt": [user("2 + 3?")], "answer": "5"}, [user("2 + 3?")], "5"),
    "messages and a completion": (
        {"prompt": [user("2 + 3?")], "completion": [assistant("#### 5")]}, [user("2 + 3?")], "#### 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_prompts_from_a_plain_file(name: str, tmp_path: Path) -> None:
    row, prompt, answer = FILES[name]
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    rows, _ = tokenised({"path": str(tmp_path / "mine.jsonl")}, "ppo", tmp_path)
    assert (rows[0]["prompt"], rows[0]["answer"]) == (prompt, answer)
    said = tokenizer().decode(rows[0]["prompt_ids"])
    assert said == prompt if isinstance(prompt, str) else said.endswith("<|im_start|>assistant\n")

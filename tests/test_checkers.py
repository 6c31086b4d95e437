"""The checker: its rules as a table, and real gsm8k as its judge."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from align_kit.data.checkers import answer_of, check, distinct, exact_reward, number_of
from align_kit.errors import UserError

GSM8K = Path(os.environ.get("ALIGN_KIT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason=f"real gsm8k is not at {GSM8K}; set ALIGN_KIT_DATA")

WORKED = "92-78: 12-8=4, 9-1-7=1\n#### 14"


@pytest.mark.parametrize(
    ("completion", "exact", "shows_work", "format_ok"),
    [
        (WORKED, True, True, True),
        (WORKED + "  \n", True, True, True),
        ("#### 14", True, False, True),
        ("#### 15", False, False, True),
        ("92-78: 12-8=4, 9-1-7=2\n#### 24", False, True, True),
        ("14", False, False, False),
        ("It is 14.", False, False, False),
        ("", False, False, False),
        ("#### 99\n#### 14", True, False, False),  # the last one counts, and two are untidy
        ("#### 14\n#### 99", False, False, False),
        ("#### 14 = 14", False, False, False),
        ("#### 14\nso 92-78=14", True, False, False),  # work after the answer is none
        ("She has 92 - 78 = $<<92-78=14>>14 left.\n#### $14.00", True, True, True),
        ("12-8=4\nA: 14", True, True, False),
        ("12-8=4\nA: 10+4", False, True, False),
        ("Half of 28.\n#### 28/2", False, False, False),
        ("#### 14 inks", False, False, False),
        ("#### -14", False, False, True),
        ("#### fourteen", False, False, False),
    ],
)
def test_verdict(completion: str, exact: bool, shows_work: bool, format_ok: bool) -> None:
    verdict = check("", completion, WORKED)
    assert (verdict.exact, verdict.shows_work, verdict.format_ok) == (exact, shows_work, format_ok)
    assert verdict.length == len(completion.strip())


def test_prompt_is_not_work() -> None:
    prompt = "If x=3, what is x?\n"
    assert not check(prompt, prompt + "#### 3", "3").shows_work


@pytest.mark.parametrize(
    ("text", "number"),
    [("a\n#### 1,234", "1234"), ("#### $5.50", "5.5"), ("A: 26", "26"), ("18", "18"), ("#### -3", "-3"), ("0", "0"),
     ("#### 1000000", "1000000"), ("#### 0.25", "0.25"), ("#### 50%", "50")],
)  # fmt: skip
def test_answer_of(text: str, number: str) -> None:
    assert answer_of(text) == number


@pytest.mark.parametrize("text", ["", "no number", "#### none", "A: 1/5", "12 of 3"])
def test_answer_of_a_text_without_one(text: str) -> None:
    with pytest.raises(UserError, match="has no number; write it as"):
        answer_of(text)


def test_exact_reward_is_the_checker_as_trl_calls_it() -> None:
    said = [WORKED, "#### 15", "so\nA: 14", [{"role": "assistant", "content": "#### 14"}]]
    prompts = ["92 and 78?\n"] * 3 + [[{"role": "user", "content": "92 and 78?"}]]
    scores = exact_reward(prompts=prompts, completions=said, answer=[WORKED, WORKED, "14", 14], level=["easy"] * 4)
    assert scores == [1.0, 0.0, 1.0, 1.0] and all(isinstance(score, float) for score in scores)


def test_exact_reward_reads_the_completion_alone() -> None:
    prompt = "Go on:\n#### 14\n"
    assert exact_reward([prompt], [prompt + "I do not know."], ["14"]) == [0.0]


def test_exact_reward_wants_an_answer_for_each() -> None:
    with pytest.raises(UserError, match="no answer for the prompt 'b'; give every row an 'answer' column"):
        exact_reward(["a", "b"], ["#### 1", "#### 2"], ["1", None])
    with pytest.raises(UserError, match="has no number"):
        exact_reward(["a"], ["#### 1"], ["one"])


def test_the_number_of_a_completion() -> None:
    assert [number_of(text) for text in (WORKED, "#### 1,234.50", "14", "no")] == ["14", "1234.5", None, None]


def test_distinct() -> None:
    assert distinct(["a", "a ", "b", "c"]) == 0.75
    assert distinct([]) == 0.0


def _read(name: str) -> list[dict]:
    return [json.loads(line) for line in (GSM8K / name).read_text().splitlines()]


@needs_gsm8k
@pytest.mark.parametrize(("name", "without_work"), [("train.jsonl", 2), ("test.jsonl", 0)])
def test_every_gsm8k_solution_verifies(name: str, without_work: int) -> None:
    verdicts = [check(row["question"], row["answer"], row["answer"]) for row in _read(name)]
    assert all(verdict.exact and verdict.format_ok for verdict in verdicts)
    # Two of 7,473 solutions are told in words or lists alone.
    assert sum(not verdict.shows_work for verdict in verdicts) == without_work


@needs_gsm8k
def test_agrees_with_every_label_of_gsm8k_model_solutions() -> None:
    answers = {row["question"]: row["answer"] for row in _read("test.jsonl")}
    rows = _read("model_solutions_kto.jsonl")
    found = [check(row["prompt"], row["completion"], answers[row["prompt"]]).exact for row in rows]
    assert found == [row["label"] for row in rows]
    assert 1000 < sum(found) < 4000  # both kinds are there

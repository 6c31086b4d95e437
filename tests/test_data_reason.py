"""Chains of thought: apart from the answer in the data, with it in what is trained, and never lost between the two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_kit import cards
from align_kit.card_commands.croissant import croissant
from align_kit.clean.command import clean, stats
from align_kit.clean.mixing import mix_command
from align_kit.data.load import load
from align_kit.data.made import MadeSet, write_made
from align_kit.data.reason import DEFAULT_TEMPLATE, ReasonTemplate, Trace
from align_kit.errors import UserError
from align_kit.preferences.command import preferences
from tests.data_rows import assistant, user
from tests.reason_work import CHATS, PAIRS, PLAIN, SOLUTION, TRACES, Row, answer_of, said
from tests.small import write_rows

MADE = {"command": ["align-kit", "sample"], "seed": 1}
TRACE = {"prompt": "2 + 2?\n", "reasoning": "two and two", "answer": "4"}
PAIR = {
    "prompt": "2 + 2?\n",
    "chosen_reasoning": "two and two", "chosen": "4",
    "rejected_reasoning": "2, then 2", "rejected": "22",
}  # fmt: skip


def rows_of(tmp_path: Path, *rows: Row, phase: str = "sft", **spec: Any) -> list[Row]:
    """Return the canonical rows of a file of `rows`, read as an entry of `datasets` asks."""
    file = write_rows(tmp_path / "rows.jsonl", rows)
    return load([{"path": str(file), **spec}], phase=phase).dataset.to_list()


# --- the template ---------------------------------------------------------------------------------------------------

TEMPLATES = (
    DEFAULT_TEMPLATE, SOLUTION, "{reasoning}\n</think>\n\n{answer}", "[THINK]{reasoning}[/THINK]{answer}",
    "{reasoning} so \\boxed{{answer}}", "aa{reasoning}aa{answer}a", "{reasoning}\n{answer}",
)  # fmt: skip
PIECES = ("<think>", "</think>", "\n", "#### ", "a", "[/THINK]", "\\boxed{", "}", " so ", "4", "é")
texts = st.lists(st.sampled_from(PIECES), max_size=9).map("".join)
templates = st.sampled_from(TEMPLATES).map(ReasonTemplate)


@given(templates, texts)
def test_what_is_parted_joins_to_what_it_was(template: ReasonTemplate, text: str) -> None:
    trace = template.part(text)
    assert trace is None or template.join(trace) == text


@given(templates, texts, texts)
def test_what_is_joined_parts_to_what_it_was(template: ReasonTemplate, reasoning: str, answer: str) -> None:
    """It has the shape of its template; only marks within a trace move the place where it parts."""
    trace = Trace(reasoning, answer)
    parted = template.part(template.join(trace))
    assert parted is not None and template.join(parted) == template.join(trace)
    assert template.holds(trace) == (parted == trace)
    if not any(piece in reasoning + answer for piece in ("a", "\n", *filter(None, marks(template)))):
        assert parted == trace


def marks(template: ReasonTemplate) -> tuple[str, ...]:
    """Return the texts around reasoning and answer, without blanks at their edges."""
    return template.opening.strip(), template.mark.strip(), template.ending.strip()


@pytest.mark.parametrize("text, completion, trace", [
    (DEFAULT_TEMPLATE, "<think>\nso\n</think>\n\n4", Trace("so", "4")),
    (DEFAULT_TEMPLATE, "<think>\n\n</think>\n\n4", Trace("", "4")),
    (DEFAULT_TEMPLATE, "<think>\na\n</think>\n\nb\n</think>\n\nc", Trace("a", "b\n</think>\n\nc")),
    (DEFAULT_TEMPLATE, "so\n</think>\n\n4", None),
    (DEFAULT_TEMPLATE, "<think>\nso it is 4", None),
    (DEFAULT_TEMPLATE, "<think>\n</think>\n\n4", None),  # the end of one mark is no beginning of the other
    ("{reasoning}\n</think>\n\n{answer}", "a\n</think>\n\nb\n</think>\n\nc", Trace("a", "b\n</think>\n\nc")),
    (SOLUTION, "1+1=2\n#### 2\n2+2=4\n#### 4", Trace("1+1=2\n#### 2\n2+2=4", "4")),
    (SOLUTION, "#### 4", None),
    ("{reasoning} \\boxed{{answer}}", "so \\boxed{4}", Trace("so", "4")),
    ("{reasoning} \\boxed{{answer}}", "so \\boxed{4}.", None),
])  # fmt: skip
def test_the_first_closing_mark_and_the_last_of_others_part(text: str, completion: str, trace: Trace | None) -> None:
    assert ReasonTemplate(text).part(completion) == trace


BAD = [
    ("{answer}", "must hold {reasoning} once, not 0 times"),
    ("{reasoning}", "must hold {answer} once, not 0 times"),
    ("{reasoning} {answer} {answer}", "must hold {answer} once, not 2 times"),
    ("{answer}\n{reasoning}", "must have {reasoning} before {answer}"),
    ("<think>{reasoning}{answer}", "must have a mark between {reasoning} and {answer}"),
]


@pytest.mark.parametrize("text, told", BAD)
def test_a_template_that_cannot_tell_them_apart_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UserError) as here:
        ReasonTemplate(text)
    with pytest.raises(UserError) as in_a_spec:
        rows_of(tmp_path, TRACE, reason_template=text)
    with pytest.raises(UserError) as in_a_card:
        cards.parse_card(card_text(reason_template=text), Path("c.md"))
    for error in (here, in_a_spec, in_a_card):
        assert told in str(error.value) and "\n" not in str(error.value)
    assert "field align_kit.reason_template" in str(in_a_card.value)


def card_text(**changes: Any) -> str:
    """Return a card of the built-in problems, with `changes` in its block."""
    block = {
        "schema_version": 1, "phases": ["sft"], "source": {"kind": "builtin", "path": "sums_prompts"},
        "format": "reason", "columns": {"completion": "answer"}, "splits": {"train": "train"}, "verified": True,
        "reason_template": SOLUTION,
    }  # fmt: skip
    front = {"license": "mit", "pretty_name": "C", "align_kit": {**block, **changes}}
    return f"---\n{json.dumps(front)}\n---\n"


# --- reading --------------------------------------------------------------------------------------------------------


def test_traces_and_pairs_are_recognised_by_their_columns(tmp_path: Path) -> None:
    assert rows_of(tmp_path, TRACE) == [{"prompt": "2 + 2?\n", "completion": "<think>\ntwo and two\n</think>\n\n4"}]
    assert rows_of(tmp_path, PAIR, phase="dpo") == [{
        "prompt": "2 + 2?\n",
        "chosen": "<think>\ntwo and two\n</think>\n\n4",
        "rejected": "<think>\n2, then 2\n</think>\n\n22",
    }]  # fmt: skip


def test_columns_that_mean_something_else_go_on_to(tmp_path: Path) -> None:
    asked = {"question": "2 + 2?", "answer": "4"}
    assert rows_of(tmp_path, asked) == [{"prompt": "2 + 2?", "completion": "4"}]
    assert rows_of(tmp_path, {**TRACE, "completion": "four"}) == [{"prompt": "2 + 2?\n", "completion": "four"}]
    plain = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert rows_of(tmp_path, plain, phase="dpo") == [plain]


def test_columns_and_template_are_named_in_an_entry(tmp_path: Path) -> None:
    row = {"q": "2 + 2?", "cot": "two and two", "final": "4"}
    named = {"prompt": "q", "reasoning": "cot", "answer": "final"}
    asked = {"format": "reason", "columns": named, "reason_template": SOLUTION, "prompt_template": "{prompt}\n"}
    assert rows_of(tmp_path, row, **asked) == [{"prompt": "2 + 2?\n", "completion": "two and two\n#### 4"}]


def test_a_whole_solution_is_parted_and_joined_to_itself(tmp_path: Path) -> None:
    row = {"question": "2 + 2?", "answer": "two and two\n#### 4"}
    asked = {"format": "reason", "columns": {"prompt": "question", "completion": "answer"}, "reason_template": SOLUTION}
    assert rows_of(tmp_path, row, **asked) == [{"prompt": "2 + 2?", "completion": "two and two\n#### 4"}]
    assert rows_of(tmp_path, row, **asked, prompt_template="chat") == [{
        "prompt": [user("2 + 2?")],
        "completion": [{**assistant("4"), "reasoning_content": "two and two"}],
        "reason_template": SOLUTION,
    }]  # fmt: skip


def test_a_card_of_whole_solutions_can_be_read_as_traces(real_data: Path) -> None:
    spec = {"path": "card:gsm8k", "split": "test"}
    whole = load([spec], phase="sft", data_home=real_data)
    parted = load([{**spec, "format": "reason", "reason_template": SOLUTION}], phase="sft", data_home=real_data)
    assert parted.digest == whole.digest and len(parted.dataset) == 1319


def test_who_checks_answers_gets_the_answer_alone(tmp_path: Path) -> None:
    assert rows_of(tmp_path, TRACE, phase="ppo") == [{"prompt": "2 + 2?\n", "answer": "4"}]
    chat = {"phase": "ppo", "prompt_template": "chat"}
    assert rows_of(tmp_path, TRACE, **chat) == [{"prompt": [user("2 + 2?\n")], "answer": "4"}]


def test_pairs_of_traces_are_labelled_rows_too(tmp_path: Path) -> None:
    labelled = rows_of(tmp_path, PAIR, phase="kto")
    assert [row["label"] for row in labelled] == [True, False]
    assert labelled[0]["completion"] == "<think>\ntwo and two\n</think>\n\n4"


THINK = repr(DEFAULT_TEMPLATE)
FAULTS = [
    ({**TRACE, "reasoning": None}, "line 2: reasoning must be a string, got None"),
    ({"prompt": "p", "answer": "4"}, "line 2: no column 'reasoning'; found prompt, answer"),
    ({**TRACE, "reasoning": 7}, "line 2: reasoning must be a string, got 7"),
    ({"prompt": "p", "completion": "so 4"}, f"line 2: completion does not have the shape of reason_template {THINK}"),
    ({**TRACE, "reasoning": "so\n</think>\n\n5"}, f"line 2: a mark of reason_template {THINK} stands in reasoning"),
    ({"prompt": "p", "completion": [assistant("a"), assistant("b")]}, "line 2: completion must be a text or one"),
    ({"prompt": "p", "completion": [{**assistant("4"), "thinking": "so\n</think>\n\n5"}]}, "line 2: a mark of"),
    (PAIR, "line 2: a preference row in a prompt_completion file"),
]


@pytest.mark.parametrize("row, told", FAULTS)
def test_a_row_that_is_no_trace_is_named(tmp_path: Path, row: Row, told: str) -> None:
    with pytest.raises(UserError) as error:
        rows_of(tmp_path, TRACE, row, format="reason")
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_pair_with_one_side_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 2: rejected must be a string, got None"):
        rows_of(tmp_path, PAIR, {**PAIR, "rejected": None}, phase="dpo")


def test_a_template_without_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reason_template is for format: reason, but .* read as prompt_completion"):
        rows_of(tmp_path, {"prompt": "p", "completion": "c"}, reason_template=SOLUTION)
    with pytest.raises(UserError, match="reason_template belongs to format 'reason', not to 'prompt_completion'"):
        cards.parse_card(card_text(format="prompt_completion"), Path("c.md"))
    with pytest.raises(UserError, match="phase 'kto' cannot use format 'text'"):
        cards.parse_card(card_text(phases=["kto"], format="text", reason_template=None), Path("c.md"))


# --- sets that are made, cleaned, mixed and described ---------------------------------------------------------------

TEMPLATE_CASES = [None, SOLUTION]


def made_set(phase: str = "sft", **given: Any) -> MadeSet:
    """Return what is known of a set of traces, with `given` beside."""
    known: dict[str, Any] = {"name": "set", "pretty_name": "Set", "licences": ("mit",), "made": MADE, **given}
    return MadeSet(phases=(phase,), format="reason", **known)


@pytest.mark.parametrize("phase, rows", [("sft", TRACES), ("sft", CHATS), ("dpo", PAIRS)])
@pytest.mark.parametrize("template", TEMPLATE_CASES)
def test_a_made_set_is_read_back(tmp_path: Path, phase: str, rows: list[Row], template: str | None) -> None:
    card = write_made(tmp_path / "set", made_set(phase, reason_template=template), {"train": rows})
    assert [json.loads(line) for line in (tmp_path / "set" / "train.jsonl").read_text().splitlines()] == rows
    asked = {"format": "reason", "reason_template": template}
    assert load([{"path": str(card)}], phase=phase).dataset.to_list() == rows_of(tmp_path, *rows, phase=phase, **asked)


def test_characters_are_those_of_chain_and_answer(tmp_path: Path) -> None:
    card = write_made(tmp_path / "set", made_set(), {"train": CHATS})
    said = sum(len(row["prompt"][0]["content"] + row["reasoning"] + row["answer"]) for row in CHATS)
    assert cards.read_card(card).block.stats["characters"] == {"train": said}


def test_a_row_that_does_not_part_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train, row 2: completion does not have the shape"):
        write_made(tmp_path / "set", made_set(), {"train": [TRACES[0], {"prompt": "p", "completion": "4"}]})
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("rows", [TRACES, CHATS])
def test_cleaned_traces_stay_traces(tmp_path: Path, rows: list[Row]) -> None:
    """What is masked or dropped is the same; chain and answer are still apart, by the same template."""
    rows = [*rows, rows[0], {**rows[1], "reasoning": "write to joe@example.org, then 7", "answer": "7"}]
    card = write_made(tmp_path / "set", made_set(reason_template=SOLUTION), {"train": rows})
    assert clean([str(card), "--output", str(tmp_path / "clean"), "--workers", "1"]) == 0
    block = cards.read_card(tmp_path / "clean" / "clean.md").block
    assert (block.format, block.reason_template) == ("reason", SOLUTION)
    assert block.stats["rows"] == {"train": 9} and block.pii == {"email": 1}
    again = load([{"path": str(tmp_path / "clean" / "clean.md")}], phase="sft").dataset.to_list()
    assert again[:8] == load([{"path": str(card)}], phase="sft").dataset.to_list()[:8]
    assert "write to <email>, then 7" in json.dumps(again[8])


def test_parts_kept_beside_the_whole_are_not_read_as_another_trace(tmp_path: Path) -> None:
    """The chain is there twice, in its text and in a column that was asked for; it is trained once."""
    file = write_rows(tmp_path / "rows.jsonl", PAIRS)
    words = ["--keep-columns", "chosen_reasoning,rejected_reasoning", "--output", str(tmp_path / "clean")]
    assert clean([str(file), *words, "--workers", "1"]) == 0
    again = load([{"path": str(tmp_path / "clean" / "clean.md")}], phase="dpo").dataset.to_list()
    assert again == rows_of(tmp_path, *PAIRS, phase="dpo")


def test_answers_reached_by_different_chains_are_no_twins(tmp_path: Path) -> None:
    """The rules see chain and answer: 8 rows with one prompt and one answer stay 8."""
    rows = [{**row, "prompt": [user("?")], "answer": "4", "reasoning": f"{said(2 * n)} {said(3 * n)}"}
            for n, row in enumerate(TRACES)]  # fmt: skip
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert clean([str(file), "--output", str(tmp_path / "clean"), "--workers", "1"]) == 0
    assert cards.read_card(tmp_path / "clean" / "clean.md").block.stats["rows"] == {"train": 8}


def test_figures_are_those_of_chain_and_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = []
    for rows in (TRACES, CHATS):
        assert stats([str(write_rows(tmp_path / "rows.jsonl", rows)), "--json", "--workers", "1"]) == 0
        lengths.append(json.loads(capsys.readouterr().out)["lengths"]["completion"]["characters"]["0.5"])
    joined, apart = lengths
    marks = len(ReasonTemplate().join(Trace("", "")))
    assert joined - marks == apart - len("\n") > len(TRACES[0]["reasoning"])


def test_mixed_traces_stay_traces_where_one_template_joins_them_all(tmp_path: Path) -> None:
    sets = [
        write_made(tmp_path / name, made_set(reason_template=template), {"train": rows})
        for name, template, rows in (("a", SOLUTION, CHATS), ("b", SOLUTION, TRACES), ("c", None, CHATS))
    ]
    for pair, kept in ((sets[:2], ("reason", SOLUTION)), (sets[1:], ("prompt_completion", None))):
        out = tmp_path / f"mixed-{kept[0]}"
        assert mix_command([*map(str, pair), "--output", str(out)]) == 0
        block = cards.read_card(out / f"{out.name}.md").block
        assert (block.format, block.reason_template) == kept
        assert len(load([{"path": str(out / f"{out.name}.md")}], phase="sft").dataset) == 16


def test_a_row_keeps_the_template_of_the_set_that_it_comes_from(tmp_path: Path) -> None:
    """In a mixture of chats that are joined by different marks, each row is still joined by its own."""
    sets = [write_made(tmp_path / str(place), made_set(reason_template=template), {"train": CHATS})
            for place, template in enumerate(TEMPLATE_CASES)]  # fmt: skip
    assert mix_command([*map(str, sets), "--output", str(tmp_path / "mixed")]) == 0
    rows = load([{"path": str(tmp_path / "mixed" / "mixed.md")}], phase="sft").dataset.to_list()
    shown = [answer_of(PLAIN, row["completion"][0], reason_template=row["reason_template"]) for row in rows]
    assert sum("\n#### " in text for text in shown) == sum("</think>" in text for text in shown) == len(CHATS)


@pytest.mark.parametrize("prompt_template", [None, "chat"])
def test_pairs_of_traces_are_studied_and_written(tmp_path: Path, prompt_template: str | None) -> None:
    other_way = {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}  # to the same answer
    same = {**other_way, "rejected_reasoning": PAIRS[0]["chosen_reasoning"]}
    rows = [*PAIRS, other_way, same]
    given = {"reason_template": SOLUTION, "prompt_template": prompt_template}
    card = write_made(tmp_path / "set", made_set("dpo", **given), {"train": rows})
    assert preferences([str(card), "--output", str(tmp_path / "kept")]) == 0
    block = cards.read_card(tmp_path / "kept" / "kept.md").block
    assert (block.format, block.reason_template, block.stats["rows"]) == ("reason", SOLUTION, {"train": 9})
    kept = load([{"path": str(tmp_path / "kept" / "kept.md")}], phase="dpo").dataset.to_list()
    assert kept == load([{"path": str(card)}], phase="dpo").dataset.to_list()[:9]


def test_a_card_of_traces_is_described_by_its_columns(tmp_path: Path) -> None:
    card = write_made(tmp_path / "set", made_set("dpo"), {"train": PAIRS})
    (records,) = croissant(cards.load_card(card), None)["recordSet"]
    assert [field["name"] for field in records["field"]] == list(PAIRS[0])

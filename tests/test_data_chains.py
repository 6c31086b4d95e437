"""Chains of thought in conversations: shown by the chat template, or in what is said, and trained either way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align_kit.data import embedded
from align_kit.data.chains import chain_of
from align_kit.data.collate import LanguageCollator
from align_kit.data.embedded import TINY
from align_kit.data.health import inspect, judged
from align_kit.data.load import load
from align_kit.data.reason import NAMES, ReasonTemplate, Trace
from align_kit.data.report import TokeniseOptions, TokeniseReport
from align_kit.data.tokenise import tokenise
from align_kit.errors import UserError
from tests.data_rows import assistant, chat_tokenizer, trl_template, user
from tests.harness import Ranks
from tests.reason_work import PAIRS, PLAIN, SOLUTION, Row, answer_of, renderer, tell_trained, thought, trained
from tests.small import lab_of, write_rows

# --- chat templates -------------------------------------------------------------------------------------------------

def reading(name: str, *, when: str = "true") -> str:
    """Return a chat template that shows the chain of thought it finds under `name`, `when` it does."""
    shown = f"{{% if m.get('{name}') and ({when}) %}}[{{{{ m['{name}'] }}}}]{{% endif %}}"
    return PLAIN.replace("{{ m.content }}", f"{shown}{{{{ m.content }}}}")


@pytest.mark.parametrize("ours", NAMES)
def test_a_template_that_ignores_the_chain_gets_it_in_the_content(ours: str) -> None:
    message = thought("4", "two and two", ours)
    assert answer_of(PLAIN, message) == "<think>\ntwo and two\n</think>\n\n4"
    assert answer_of(PLAIN, message, reason_template=SOLUTION) == "two and two\n#### 4"
    assert answer_of(PLAIN, thought("4", "", ours)) == answer_of(PLAIN, assistant("4")) == "4"


@pytest.mark.parametrize("theirs", NAMES)
@pytest.mark.parametrize("ours", NAMES)
def test_a_template_that_reads_it_gets_it_by_the_name_it_reads(ours: str, theirs: str) -> None:
    assert answer_of(reading(theirs), thought("4", "two and two", ours)) == "[two and two]4"
    assert answer_of(reading(theirs), thought("4", "two", ours), reason_template=SOLUTION) == "[two]4"


def test_a_template_may_show_it_by_a_variable_of_the_row() -> None:
    template = reading("reasoning_content", when="enable_thinking is defined and enable_thinking")
    messages = [user("hi"), thought("4", "two")]
    render = renderer(template).rendered  # one for all rows
    on, off = (render(messages, {"chat_template_kwargs": {"enable_thinking": value}}) for value in (True, False))
    assert "[two]4" in on and "<think>\ntwo\n</think>\n\n4" in off


@pytest.mark.parametrize("asked", ["hi", "<|im_end|>"])  # with a mark in it, the row is encoded another way
def test_the_template_of_the_rows_source_joins_them_in_what_is_trained(asked: str) -> None:
    row = {"prompt": [user(asked)], "completion": [thought("4", "two and two")], "reason_template": SOLUTION}
    (split,) = renderer(PLAIN).completions([row], ["completion"])
    assert chat_tokenizer(PLAIN).decode(split.completions[0]) == "two and two\n#### 4<|im_end|>\n"


def test_only_what_the_assistant_thinks_is_a_chain() -> None:
    asked = {**user("hi"), "reasoning_content": "noise"}
    assert "noise" not in renderer(PLAIN).rendered([asked, assistant("4")], {})
    assert chain_of(asked) is chain_of(assistant("4")) is None


def test_content_of_several_parts_gets_the_chain_as_one_before_them() -> None:
    each = "{% for part in m.content %}{{ part.text }}{% endfor %}"
    whole = "{{ m.content }}"
    template = PLAIN.replace(whole, f"{{% if m.content is string %}}{whole}{{% else %}}{each}{{% endif %}}")
    parts = [{"type": "text", "text": "four"}, {"type": "text", "text": "!"}]
    message = {"role": "assistant", "content": parts, "reasoning_content": "two and two"}
    assert answer_of(template, message) == "<think>\ntwo and two\n</think>\n\nfour!"
    boxed = answer_of(template, message, reason_template="{reasoning} [{answer}]")
    assert boxed == "two and two [four!]"


def test_marks_spelt_in_a_chain_are_text_there_too() -> None:
    """A chain of thought cannot write the marks of a conversation, joined to the content or not."""
    for template in (PLAIN, reading("reasoning_content")):
        (split,) = renderer(template).completions(
            [{"prompt": [user("hi")], "completion": [thought("4", "so <|im_end|> it is")]}], ["completion"]
        )
        tokenizer = chat_tokenizer(template)
        assert split.completions[0].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
        assert "so <|im_end|> it is" in tokenizer.decode(split.completions[0])


@pytest.mark.parametrize("name", ["qwen3_training", "glm4moe_training", "gptoss_training", "qwen2_5_training", "phi3"])
def test_real_templates_keep_chain_and_answer(name: str) -> None:
    row = {"messages": [user("2 + 2?"), thought("It is 4.", "two and two")]}
    text = renderer(trl_template(name)).rendered(row["messages"], row)
    assert text.index("two and two") < text.index("It is 4.")


JOINED = "<think>\ntwo and two\n</think>\n\n4"
MARKED = (TINY / "chat_template.jinja").read_text()  # with {% generation %}


@pytest.mark.parametrize("template, trained_text", [
    (PLAIN, JOINED),
    (MARKED, JOINED),
    (trl_template("qwen3_training"), JOINED),
    (reading("thinking"), "[two and two]4"),
])
@pytest.mark.parametrize("asked", ["hi", "<|im_end|>"])  # with a mark in it, the row is encoded another way
def test_chain_and_answer_are_within_the_assistants_mask(template: str, trained_text: str, asked: str) -> None:
    row = {"messages": [user(asked), thought("4", "two and two")]}
    ((ids, mask),) = renderer(template).assistant_masks([row])
    trained_ids = [token for token, kept in zip(ids, mask, strict=True) if kept]
    assert chat_tokenizer(template).decode(trained_ids).rstrip() == f"{trained_text}<|im_end|>"


# --- a template that drops it ---------------------------------------------------------------------------------------

CLOSED = "{{ (m.content or '').split('</think>')[-1] }}"  # what templates do that forget earlier chains


def judged_lines(template: str, kind: str, rows: list[Row]) -> list[str]:
    report = TokeniseReport(kind=kind, rows_in=len(rows))
    inspect(rows, kind, renderer(template), report, {})
    return judged(report, {}, "data")


def test_a_template_that_drops_the_chain_is_refused() -> None:
    """It is given as part of the content, and cut out of that; or shown when tried, and not in the data."""
    rows = [{"prompt": [user(f"{n}?")], "completion": [thought("4", f"{n} and so on")]} for n in range(3)]
    cutting = PLAIN.replace("{{ m.content }}", CLOSED)
    fickle = reading("reasoning_content", when="'so on' not in m.reasoning_content")
    for template in (cutting, fickle, trl_template("deepseek_r1_distill")):
        with pytest.raises(UserError, match=r"3 of 3 rows \(100.0%\) lose what their last message says in the chat"):
            judged_lines(template, "prompt_completion", rows)
    assert judged_lines(reading("reasoning_content"), "prompt_completion", rows) == []
    assert judged_lines(PLAIN, "prompt_completion", rows) == []


def test_chains_of_earlier_turns_that_are_forgotten_are_told() -> None:
    last = reading("reasoning_content", when="loop.last")
    rows = [{"messages": [user("a?"), thought("1", f"first {n}"), user("b?"), thought("2", f"second {n}")]}
            for n in range(3)]  # fmt: skip
    (line,) = judged_lines(last, "messages", rows)
    assert "3 of 3 rows (100.0%) lose a turn's chain of thought in the chat template" in line
    assert judged_lines(reading("reasoning_content"), "messages", rows) == []
    asked = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    assert judged_lines(last, "prompt_completion", asked) == [], "what is not trained may be forgotten"


# --- what is trained ------------------------------------------------------------------------------------------------


def batch_of(spec: Row, cache: Path) -> Any:
    """Return rows 0 to 63 of a source as SFT gets them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    loaded = load([spec], phase="sft")
    rows, _ = tokenise(loaded.dataset, loaded.kind, tokenizer, TokeniseOptions(max_length=128), cache)
    assert len(rows) == len(loaded.dataset)
    return LanguageCollator(tokenizer.pad_token_id)([rows[place] for place in range(64)])


def test_traces_give_the_batches_of_their_joined_strings(tmp_path: Path) -> None:
    solutions = embedded.rows("sums_prompts", "validation")
    template = ReasonTemplate(SOLUTION)
    columns = [{"prompt": row["prompt"], **template.part(row["answer"])._asdict()} for row in solutions]
    joined = [{"prompt": row["prompt"], "completion": row["answer"]} for row in solutions]
    plain = batch_of({"path": str(write_rows(tmp_path / "joined.jsonl", joined))}, tmp_path / "a")
    asked = {"path": str(write_rows(tmp_path / "columns.jsonl", columns)), "reason_template": SOLUTION}
    for place, spec in enumerate(({"path": "card:sums_reason", "split": "validation"}, asked)):
        batch = batch_of(spec, tmp_path / f"b{place}")  # another folder: nothing is taken from what was made before
        assert batch.keys() == plain.keys() and all((batch[name] == plain[name]).all() for name in plain)


def trained_on_two_ranks(ranks: Ranks, phase: str, output: Path, entry: Row) -> list[str]:
    """Return what 8 rows of an entry give the model to predict in one step, sorted and without the end."""
    chat = entry["prompt_template"] == "chat"
    run = lab_of(ranks).start(
        phase, output, max_length=256, per_device_train_batch_size=4, datasets=[{**entry, "max_samples": 8}],
        harm=f"tests.reason_work:{tell_trained.__name__}",
    )  # fmt: skip
    run.result.ok()
    assert run.manifest["data"]["train"]["sources"][0]["format"] == "reason"
    told = [text for printed in run.result.output for text in trained(printed)]
    end = "<|im_end|>\n" if chat else "<|endoftext|>"
    assert all(text.endswith(end) for text in told)
    return sorted(text.removesuffix(end) for text in told)


@pytest.mark.slow
@pytest.mark.parametrize("prompt_template", [None, "chat"])
def test_sft_trains_chain_and_answer(ranks: Ranks, tmp_path: Path, prompt_template: str | None) -> None:
    entry = {"path": "card:sums_reason", "prompt_template": prompt_template}
    told = trained_on_two_ranks(ranks, "sft", tmp_path / "out", entry)
    assert told == sorted(row["answer"] for row in embedded.rows("sums_prompts", "train")[:8])


@pytest.mark.slow
@pytest.mark.parametrize("prompt_template", [None, "chat"])
def test_dpo_trains_chains_and_answers_of_both_sides(
    ranks: Ranks, tmp_path: Path, prompt_template: str | None
) -> None:
    entry = {"path": str(write_rows(tmp_path / "rows.jsonl", PAIRS)), "prompt_template": prompt_template}
    told = trained_on_two_ranks(ranks, "dpo", tmp_path / "out", entry)
    join = ReasonTemplate().join
    sides = ("chosen", "rejected")
    assert told == sorted(join(Trace(row[f"{side}_reasoning"], row[side])) for row in PAIRS for side in sides)

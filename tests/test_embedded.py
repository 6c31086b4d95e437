"""The embedded data and the tiny model: true, split by numbers, the same on every machine, and loadable as they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_kit.data.checkers import check
from align_kit.data.embedded import SPLITS, TINY, docs, facts, names, rows, sums, tiny_model
from align_kit.errors import UserError

COLUMNS = {
    "cpython_docs": {"text"},
    "cpython_docs_sample": {"text"},
    "sums_text": {"text"},
    "sums_sft": {"prompt", "completion"},
    "sums_pairs": {"prompt", "chosen", "rejected"},
    "sums_labels": {"prompt", "completion", "label"},
    "sums_prompts": {"prompt", "answer"},
}
SUMS = [name for name in COLUMNS if name.startswith("sums")]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def _numbers(texts: Iterable[str]) -> set[tuple[int, ...]]:
    """Return the unordered pairs that stand in problems and in exercises."""
    found = set()
    for line in (line for text in texts for line in text.splitlines()):
        asked = re.findall(r"\d+", line) if line.endswith("?") else []
        worked = re.findall(r"^(\d+)[-+](\d+):", line)
        found |= {tuple(sorted(map(int, pair))) for pair in [*worked, *([asked] if asked else [])]}
    return found


@pytest.mark.parametrize("name", COLUMNS)
def test_rows_have_their_columns(name: str) -> None:
    for split in SPLITS:
        found = rows(name, split)
        assert {frozenset(row) for row in found} == {frozenset(COLUMNS[name])}
        assert all(value.strip() for row in found for value in row.values() if not isinstance(value, bool))
        assert found == rows(name, split)


def test_names_and_their_mistakes() -> None:
    assert names() == sorted(COLUMNS)
    with pytest.raises(UserError, match="did you mean 'sums_sft'"):
        rows("sum_sft", "train")
    with pytest.raises(UserError, match="known: test, train, validation"):
        rows("sums_sft", "dev")
    with pytest.raises(UserError, match="unknown built-in data set 'x'"):
        facts("x")


# A change of these digests is a change of the data: raise SUMS_VERSION with it.
@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("cpython_docs_sample", "f04563d3d7a9ccb0"),
        ("sums_text", "c4792924aec0c1d3"),
        ("sums_sft", "6ea6d2f63237e01d"),
        ("sums_pairs", "e95f77777502ba3a"),
        ("sums_labels", "88beb4b9d0492e32"),
        ("sums_prompts", "b3f64ed75b19a8ac"),
    ],
)
def test_digests_are_stored(name: str, digest: str) -> None:
    assert facts(name)["digest"].startswith(digest)


@pytest.mark.parametrize("name", SUMS)
def test_held_out_numbers_are_unseen_in_training(name: str) -> None:
    seen = {split: _numbers(str(v) for row in rows(name, split) for v in row.values()) for split in SPLITS}
    assert all(sums.split_of(*pair) == split for split, pairs in seen.items() for pair in pairs)
    assert all(len(pairs) > 100 for pairs in seen.values())
    assert not seen["train"] & (seen["validation"] | seen["test"])


@given(st.integers(1, 99), st.integers(1, 99), st.sampled_from("+-"))
def test_work_is_right_in_every_step(a: int, b: int, operator: str) -> None:
    a, b = max(a, b), min(a, b)
    head, steps = sums.work(a, operator, b).split(": ")
    assert head == f"{a}{operator}{b}"
    results = []
    for step in steps.split(", "):
        left, result = step.split("=")
        assert eval(left) == int(result)  # digits and signs of our own making
        results.append(int(result))
    digits = [result % 10 for result in results[:-1]] + [results[-1]]
    assert sum(digit * 10**place for place, digit in enumerate(digits)) == (a + b if operator == "+" else a - b)


def test_sft_is_mixed_on_purpose() -> None:
    problems = {row["prompt"]: row["completion"] for row in rows("sums_sft", "train")}
    verdicts = {p: check(p, c, str(_answer(p))) for p, c in problems.items()}
    hurried = {p: v for p, v in verdicts.items() if not v.shows_work}
    assert len(hurried) / len(verdicts) == pytest.approx(0.5, abs=0.02)
    assert all(v.exact for p, v in verdicts.items() if p not in hurried)
    assert sum(not v.exact for v in hurried.values()) / len(hurried) == pytest.approx(sums.WRONG_SHARE, abs=0.02)
    assert all(v.format_ok for v in verdicts.values())
    kinds = Counter("careless" if re.search("red|more .* has", p) else "careful" for p in hurried)
    assert kinds["careless"] > kinds["careful"]


def test_pairs_prefer_the_worked_right_answer() -> None:
    kinds = Counter()
    for row in rows("sums_pairs", "train")[:1000]:
        right = str(_answer(row["prompt"]))
        chosen, rejected = (check(row["prompt"], row[key], right) for key in ("chosen", "rejected"))
        assert chosen.rank == 4 > rejected.rank
        kinds[rejected.shows_work, rejected.exact] += 1
    assert set(kinds) == {(True, False), (False, True), (False, False)}


def test_labels_are_the_rule_and_unbalanced() -> None:
    found = rows("sums_labels", "train")
    bad = Counter()
    for row in found:
        verdict = check(row["prompt"], row["completion"], str(_answer(row["prompt"])))
        assert row["label"] == (verdict.rank == 4)
        if not row["label"]:
            bad[verdict.shows_work, verdict.exact] += 1
    assert set(bad) == {(True, False), (False, True), (False, False)}
    assert bad.total() / len(found) == pytest.approx(1 - sums.GOOD_SHARE, abs=0.02)


def test_prompts_carry_a_verified_answer() -> None:
    for split in SPLITS:
        for row in rows("sums_prompts", split):
            assert row["prompt"].endswith("?" + sums.SEPARATOR)
            assert check(row["prompt"], row["answer"], str(_answer(row["prompt"]))).rank == 4


def test_pretraining_text_does_not_hold_the_task() -> None:
    texts = [row["text"] for row in rows("sums_text", "train")]
    assert not any("####" in text for text in texts)
    assert not any("?" in text and "=" in text for text in texts)
    assert sum("?" in text for text in texts) == len(texts) / 4


def test_seeds_give_other_problems() -> None:
    first, second = (sums.prompts("train", 50, seed=seed) for seed in (1, 2))
    assert first == sums.prompts("train", 50, seed=1)
    assert first != second


def _answer(prompt: str) -> int:
    a, b = map(int, re.findall(r"\d+", prompt))
    added = re.search("got|found|red", prompt)
    return a + b if added else a - b


def test_docs_are_read_from_the_running_library() -> None:
    known = facts("cpython_docs")
    texts = [row["text"] for split in SPLITS for row in rows("cpython_docs", split)]
    assert len(texts) == len(set(texts)) == len(docs.library())
    assert known["digest"] == docs.digest(docs.library())
    if "stripped" not in known["source"]:
        assert any(text.startswith("json.dumps(obj, ") for text in texts)
        assert any(document.name == "topic:assignment" for document in docs.library())


def test_docs_of_one_name_stay_together() -> None:
    assert docs.split_of("a.B.close") == docs.split_of("c.close")
    shares = Counter(docs.split_of(document.name) for document in docs.library())
    assert shares["train"] / shares.total() == pytest.approx(0.9, abs=0.03)
    assert min(shares["validation"], shares["test"]) > 20


def test_stripped_library_falls_back_to_the_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "ok.py").write_text(f'"""{"A module that says what it does. " * 2}"""')
    monkeypatch.setattr(docs.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    docs.library.cache_clear()
    try:
        assert [document.name for document in docs.docstrings(tmp_path)] == ["ok"]
        assert docs.library() is docs.sample()
        assert "stripped" in facts("cpython_docs")["source"]
        assert rows("cpython_docs", "train") == rows("cpython_docs_sample", "train")
    finally:
        docs.library.cache_clear()


@pytest.mark.slow
def test_sample_is_small_and_can_be_made_again(tmp_path: Path) -> None:
    assert docs.SAMPLE.stat().st_size < 100_000
    assert sum(len(document.text) for document in docs.sample()) == pytest.approx(300_000, rel=0.02)
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in docs.SAMPLE.with_name("LICENSE.sample.txt").read_text()
    assert docs.write_sample(tmp_path / "sample.xz", characters=20_000) == (tmp_path / "sample.xz").stat().st_size > 0


def test_tiny_folder_is_what_its_maker_writes(tmp_path: Path) -> None:
    tiny_model.write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in TINY.iterdir()
    }
    assert all(path.stat().st_size < 100_000 for path in TINY.iterdir())


def test_tiny_model_loads_in_plain_transformers(tokenizer) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(TINY)
    assert 700_000 <= AutoModelForCausalLM.from_config(config).num_parameters() <= 1_000_000
    assert config.vocab_size == len(tokenizer) == tiny_model.VOCABULARY
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    turn_end = tokenizer.convert_tokens_to_ids(tiny_model.TURN_END)
    assert GenerationConfig.from_pretrained(TINY).eos_token_id == [tokenizer.eos_token_id, turn_end]


def test_digits_and_newlines_are_tokens_of_their_own(tokenizer) -> None:
    assert tokenizer.tokenize("98-73\n\n#### 2501") == [*"98-73", "Ċ", "Ċ", "####", "Ġ", *"2501"]
    with_digit = [token for token in tokenizer.get_vocab() if re.search(r"\d|Ċ", token) and len(token) > 1]
    assert with_digit == []


@given(text=st.text(max_size=200))
def test_tokenizer_keeps_every_text(tokenizer, text: str) -> None:
    text = text.encode(errors="ignore").decode()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_prompt_and_completion_meet_cleanly(tokenizer) -> None:
    for row in rows("sums_sft", "train")[:500]:
        prompt, completion = (tokenizer(row[key]).input_ids for key in ("prompt", "completion"))
        assert tokenizer(row["prompt"] + row["completion"]).input_ids == prompt + completion
        assert len(prompt) + len(completion) < 64


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "add"}}]])
def test_chat_template_marks_what_the_assistant_says(tokenizer, tools: list | None) -> None:
    text = tokenizer.apply_chat_template(TALK, tools=tools, tokenize=False)
    assert text.startswith("<|im_start|>system\nBe brief.")
    assert all(turn["content"] in text for turn in TALK)
    assert text.count(tiny_model.TURN_START) == text.count(tiny_model.TURN_END) == len(TALK)
    assert ("<tools>" in text) == bool(tools)
    both = tokenizer.apply_chat_template(TALK, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    trained = [token for token, marked in zip(both["input_ids"], both["assistant_masks"], strict=True) if marked]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    assert tokenizer.decode(trained) == f"{call}<|im_end|>It is 3.<|im_end|>"


def test_chat_template_grows_by_prefix(tokenizer) -> None:
    texts = [tokenizer.apply_chat_template(TALK[:n], tokenize=False) for n in range(1, len(TALK) + 1)]
    assert all(longer.startswith(shorter) for shorter, longer in zip(texts, texts[1:], strict=False))
    opened = tokenizer.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    assert texts[2].startswith(opened)

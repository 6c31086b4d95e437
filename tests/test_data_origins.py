"""Whose each tokenised row is: kept through drops and packing, held out rows and caches, and logged in training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align_kit import registry
from align_kit.data import prepare, store
from align_kit.data import tokenise as module
from align_kit.data.collate import LanguageCollator, SourcedCollator
from align_kit.data.load import to_dataset
from align_kit.data.origins import COLUMN, Origins, Spans
from align_kit.data.report import TokeniseOptions
from align_kit.data.tokenise import tokenise
from tests.data_rows import chat_tokenizer
from tests.harness import Ranks
from tests.small import lab_of, make_rows, write_rows

WORDS = chat_tokenizer(None)


def tokenised(rows: list[dict], kind: str, numbers: list[int], cache: Path, **options: object):
    given = TokeniseOptions(**options)
    return tokenise(to_dataset(kind, rows), kind, WORDS, given, cache, Origins(tuple(numbers), 3))


def test_a_row_keeps_its_source_when_others_are_dropped(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * (50 if number % 3 == 0 else 5), "completion": str(number)} for number in range(12)]
    numbers = [number % 2 for number in range(12)]
    made, report = tokenised(rows, "prompt_completion", numbers, tmp_path, max_length=20)
    assert report.dropped == {"prompt fills max_length": 4}
    assert made[COLUMN][:] == [[1 - number % 2, number % 2, 0] for number in range(12) if number % 3]


@pytest.mark.parametrize("kind, dropped", [("preference", 4), ("binary", 4), ("prompt", 4), ("text", 3)])
def test_every_kind_keeps_count(tmp_path: Path, monkeypatch, kind: str, dropped: int) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 5)
    rows = make_rows(kind, 12)
    for number in range(0, 12, 4 if kind == "text" else 3):
        rows[number] |= {"text": " "} if kind == "text" else {"prompt": "p" * 500}
    numbers = [number % 3 for number in range(12)]
    made, report = tokenised(rows, kind, numbers, tmp_path, max_length=200)
    kept = [number for number in range(12) if number % (4 if kind == "text" else 3)]
    assert sum(report.dropped.values()) == dropped
    assert [parts.index(1) for parts in made[COLUMN]] == [numbers[number] for number in kept]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=1, max_size=20), st.integers(1, 16))
@settings(max_examples=60)
def test_packed_rows_count_the_tokens_of_each_source(documents: list[tuple[int, int]], length: int) -> None:
    spans = Spans()
    stream = [source for source, tokens in documents for _ in range(tokens)]
    for source, tokens in documents:
        spans.add({"input_ids": [0] * tokens, COLUMN: [int(source == place) for place in range(3)]})
    full = len(stream) // length
    rows = [stream[start * length : (start + 1) * length] for start in range(full)]
    found = spans.columns(full, length).get(COLUMN, [])
    assert found == [[row.count(source) for source in range(3)] for row in rows]


def test_packed_text_says_how_much_of_it_is_whose(tmp_path: Path) -> None:
    rows = [{"text": word * 20} for word in ("a", "b", "c", " ")] * 3
    made, _ = tokenised(rows, "text", [0, 1, 2, 0] * 3, tmp_path, max_length=16, packing=True)
    whose = {WORDS.convert_tokens_to_ids(word): place for place, word in enumerate("abc")}
    for row in made:
        seen = Counter(whose[token] for token in row["input_ids"] if token in whose)
        ends = 16 - sum(seen.values())
        assert sum(row[COLUMN]) == 16
        assert sum(abs(row[COLUMN][place] - seen[place]) for place in range(3)) == ends


def test_the_content_of_rows_does_not_depend_on_whose_they_are(tmp_path: Path) -> None:
    rows = make_rows("prompt_completion", 4)
    first, one = tokenised(rows, "prompt_completion", [0, 0, 1, 1], tmp_path)
    other, two = tokenised(rows, "prompt_completion", [0, 1, 1, 1], tmp_path)
    assert one.digest == two.digest and one.place != two.place and not two.cached
    assert first["input_ids"][:] == other["input_ids"][:] and first[COLUMN][:] != other[COLUMN][:]


def test_rows_that_are_held_out_take_their_source_along(tmp_path: Path) -> None:
    paths = [write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": name}] * 20) for name in "ab"]
    specs = [{"path": str(path)} for path in paths]
    asked = prepare.Wanted("sft", specs, [], 0.25, True, 0, TokeniseOptions(), tmp_path, limits={"repeated": 1.0})
    made = prepare.prepare(asked, WORDS)
    a = WORDS("a")["input_ids"]
    assert all((row[COLUMN] == [1, 0]) == (row["input_ids"][: len(a)] == a) for row in made.train.rows)
    assert {tuple(parts) for parts in made.train.rows[COLUMN]} == {(1, 0), (0, 1)}
    assert COLUMN not in made.eval.rows.column_names
    again = prepare.reopen(made.accounts(), tmp_path)
    assert again.train.rows[COLUMN][:] == made.train.rows[COLUMN][:]


def test_a_batch_knows_its_sources() -> None:
    row = {"input_ids": [5, 6], "loss_mask": [1, 1]}
    collate = SourcedCollator(LanguageCollator(0))
    assert collate([{**row, COLUMN: [0, 1]}, {**row, COLUMN: [1, 0]}])[COLUMN].tolist() == [[0, 1], [1, 0]]
    assert COLUMN not in collate([row])


@pytest.mark.slow
@pytest.mark.parametrize("phase", [recipe.name for recipe in registry.RECIPES])
def test_a_run_logs_the_share_of_each_source(ranks: Ranks, phase: str) -> None:
    """Two ranks, one epoch: what the lines say adds up to what each source has of the data."""
    lab, recipe = lab_of(ranks), registry.get(phase)
    kind = lab.kind(phase)
    few = {} if recipe.packed else {"max_samples": 12}
    datasets = [{"path": lab.data[kind], **few}, {"path": lab.held_out[kind], "max_samples": 4, "epochs": 1}]
    more = {"per_device_train_batch_size": 4, "max_steps": -1} | ({"num_ppo_epochs": 1} if recipe.repeats else {})
    run = lab.train(phase, 2, datasets=datasets, num_train_epochs=1, **more)
    account = run.manifest["data"]["train"]["tokenised"]
    stored = store.read(Path(ranks.env["ALIGN_KIT_CACHE"]) / account["place"])
    assert stored is not None
    whole = torch.tensor(stored[0][COLUMN]).sum(0)
    a_step = 4 if recipe.repeats else 8  # prompts, or rows
    taken = [min(a_step, account["rows_out"] - start) for start in range(0, account["rows_out"], a_step)]
    for source, wanted in zip(datasets, (whole / whole.sum()).tolist(), strict=True):
        logged = run.logged(f"source/{source['path']}")
        assert len(logged) == len(taken)
        found = sum(share * rows for share, rows in zip(logged, taken, strict=True)) / sum(taken)
        assert found == pytest.approx(wanted)
    assert 0 < int(whole[1]) < int(whole[0])

"""Mismatched completions: the rule, by hand and against a plain loop, whatever the order of prompts and the limit."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st

from align_kit.data.mismatch import with_mismatched
from align_kit.errors import UserError

FEATURES = Features(
    {"prompt_ids": List(Value("int32")), "completion_ids": List(Value("int32")), "label": Value("bool")}
)


def dataset(prompts: list[list[int]], completions: list[list[int]]) -> Dataset:
    """Return tokenised binary rows."""
    columns: dict[str, Any] = {"prompt_ids": prompts, "completion_ids": completions, "label": [True] * len(prompts)}
    return Dataset.from_dict(columns, features=FEATURES)


def naive(prompts: list[list[int]], completions: list[list[int]], limit: int | None) -> list[list[int]]:
    """Return the partners' completions by looking at one row after another."""
    found, count = [], len(prompts)
    for row, prompt in enumerate(prompts):
        others = [(row + step) % count for step in range(1, count)]
        other = next((place for place in others if prompts[place] != prompt), others[0])
        found.append(completions[other][: None if limit is None else limit - len(prompt)])
    return found


def test_by_hand() -> None:
    prompts = [[1], [1], [2, 2], [1], [1, 1], [1]]
    rows = with_mismatched(dataset(prompts, [[10], [11], [12, 12, 12], [13], [14, 14, 14], [15]]), max_length=3)
    # row 5 is followed by rows 0 and 1 of its own prompt; row 2 has room for one token, row 3 for two
    assert rows["kl_completion_ids"][:] == [[12, 12], [12, 12], [13], [14, 14], [15], [12, 12]]
    assert rows["completion_ids"][2] == [12, 12, 12] and rows.column_names[:3] == list(FEATURES)
    assert rows.features["kl_completion_ids"] == List(Value("int32"))


ROWS = st.lists(
    st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=2), st.lists(st.integers(3, 9), min_size=1, max_size=6)),
    min_size=2,
    max_size=12,
)


@given(ROWS, st.sampled_from([None, 3, 5]))
def test_the_rule_whatever_the_rows(rows: list[tuple[list[int], list[int]]], limit: int | None) -> None:
    prompts, completions = [list(side) for side in zip(*rows, strict=True)]
    made = with_mismatched(dataset(prompts, completions), limit)["kl_completion_ids"][:]
    assert made == naive(prompts, completions, limit)
    assert all(made) and (limit is None or all(len(p) + len(c) <= limit for p, c in zip(prompts, made, strict=True)))


def test_selected_rows_are_taken_in_their_order() -> None:
    """What a split leaves is a selection of a larger file."""
    whole = dataset([[n] for n in range(9)], [[10 + n] for n in range(9)])
    assert with_mismatched(whole.select([7, 2, 5]), None)["kl_completion_ids"][:] == [[12], [15], [17]]


def test_one_prompt_for_all() -> None:
    made = with_mismatched(dataset([[1]] * 3, [[10], [11], [12]]), None)
    assert made["kl_completion_ids"][:] == [[11], [12], [10]]


def test_one_row_has_no_other() -> None:
    with pytest.raises(UserError, match="the data has 1 labelled row.*give 2 or more"):
        with_mismatched(dataset([[1]], [[2]]), None)


def test_many_neighbours_of_one_prompt() -> None:
    """No row looks further than its neighbour: scanning for another prompt would take 5e9 comparisons here."""
    count = 100_000
    made = with_mismatched(dataset([[1]] * (count - 1) + [[2]], [[3]] * (count - 1) + [[4]]), 8)["kl_completion_ids"]
    assert made[:] == [[4]] * (count - 1) + [[3]]

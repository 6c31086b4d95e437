"""The packed row says what its batch says: nothing lost, nothing invented, and every token sees its own prefix only."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from align_kit.forward import layout
from align_kit.forward.layout import MIN_SHARED, Pack, pack_rows
from tests.families import BATCHES, EOS, PAD, batch_of, words

Rows = list[tuple[list[int], list[int]]]
# Three words only, so that rows begin alike by accident in every way there is.
ids = st.lists(st.integers(4, 6), max_size=9)
prompts = st.lists(ids, min_size=1, max_size=3)


@st.composite
def some_rows(draw: st.DrawFn) -> Rows:
    """Return 1 to 16 rows, some under a template, some of one prompt, some cut short from the right."""
    template, own = draw(ids), draw(prompts)
    rows = draw(st.lists(st.tuples(st.sampled_from(own), ids), min_size=1, max_size=16))
    placed = [([*template, *prompt], completion) for prompt, completion in rows]
    length = draw(st.integers(1, 40))
    return [(prompt[:length], completion[: max(0, length - len(prompt))]) for prompt, completion in placed]


def paths(pack: Pack) -> dict[int, list[int]]:
    """Return for each place of the row the places it may look at, in the order of their positions, itself last."""
    seen: dict[int, list[int]] = {}
    for segment in pack.segments.items:
        before = list(range(segment.head, segment.head + segment.prefix))
        for place in range(segment.start, segment.start + segment.length):
            seen[place] = [*before, *range(segment.start, place + 1)]
    return seen


def predictions(batch: Mapping[str, Tensor]) -> dict[tuple[int, int], tuple[list[int], int]]:
    """Return what the definition says is predicted: (sequence, column) -> the tokens up to there, and the next."""
    found = {}
    for row in range(len(batch["input_ids"])):
        tokens = batch["input_ids"][row].tolist()
        for column in range(len(tokens) - 1):
            if batch["loss_mask"][row, column + 1] and batch["attention_mask"][row, column + 1]:
                found[row, column] = (tokens[: column + 1], tokens[column + 1])
    return found


def assert_says(pack: Pack, batch: Mapping[str, Tensor]) -> None:
    """Assert that a pack predicts what its batch does, from the same tokens at the same positions."""
    seen, row_N = paths(pack), pack.ids_1N[0].tolist()
    said = {}
    for row, column, at, target in zip(
        pack.rows_P.tolist(), pack.columns_P.tolist(), pack.at_P.tolist(), pack.targets_P.tolist(), strict=True
    ):
        said[row, column] = ([row_N[place] for place in seen[at]], target)
        assert [int(pack.positions_1N[0, place]) for place in seen[at]] == list(range(column + 1))
    assert said == predictions(batch)
    assert len(said) == len(pack.at_P)


@given(some_rows(), st.booleans(), st.booleans(), st.integers(0, 5))
@example([([], [])], True, False, 1)
@example([([5], [5])] * 16, True, False, 0)
def test_a_pack_says_what_its_batch_says(rows: Rows, share: bool, whole: bool, wider: int) -> None:
    batch = batch_of(rows, wider=wider)
    if batch["input_ids"].shape[1] == 0:
        return
    pack = pack_rows(batch, share=share, whole=whole)
    assert_says(pack, batch)
    given_tokens = sum(len(prompt) + len(completion) for prompt, completion in rows)
    assert pack.given == given_tokens
    assert pack.segments.total == pack.ids_1N.shape[1] <= max(given_tokens, 1)
    assert pack.ids_1N.shape == pack.positions_1N.shape
    assert sorted(paths(pack)) == list(range(pack.segments.total)), "segments do not tile the row"
    if not share:
        assert all(segment.prefix == 0 for segment in pack.segments.items)


@given(some_rows())
def test_whole_packs_hold_every_token(rows: Rows) -> None:
    """Every token of every sequence stands in the row, and counts as often as the batch has it."""
    batch = batch_of(rows, wider=1)
    pack = pack_rows(batch, whole=True)
    assert pack.place_BT is not None and pack.last_B is not None
    seen, row_N = paths(pack), pack.ids_1N[0].tolist()
    counts = [0] * pack.segments.total
    for number, (prompt, completion) in enumerate(rows):
        tokens = [*prompt, *completion]
        for column in range(len(tokens)):
            place = int(pack.place_BT[number, column])
            assert [row_N[at] for at in seen[place]] == tokens[: column + 1]
            counts[place] += 1
        assert (pack.place_BT[number, len(tokens) :] == -1).all() or not pack.given
        if tokens:
            assert int(pack.last_B[number]) == pack.place_BT[number, len(tokens) - 1]
    if pack.given:
        assert pack.weights_N.tolist() == counts


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("share", [True, False])
def test_named_batches(name: str, share: bool) -> None:
    batch = batch_of(BATCHES[name], wider=2)
    assert_says(pack_rows(batch, share=share), batch)


# --- how much is saved ----------------------------------------------------------------------------------------


def computed(rows: Rows, **how: Any) -> int:
    return pack_rows(batch_of(rows), **how).segments.total


@pytest.mark.parametrize("count", range(1, 17))
def test_completions_of_a_prompt_share_it(count: int) -> None:
    """P + the sum of (C - 1): the last token of a completion predicts nothing. Completions begin differently."""
    prompt = words(11, 1)
    rows = [(prompt, [4 + place, *words(place % 4, 20 + place)]) for place in range(count)]
    assert computed(rows) == 11 + sum(len(completion) - 1 for _, completion in rows)
    assert computed(rows, share=False) == sum(10 + len(completion) for _, completion in rows)


def test_prompts_under_a_template_are_shared_too() -> None:
    """Every row begins alike, as a chat template or a system prompt has it; each prompt still is computed once."""
    template, own = words(6, 1), [words(20, 2), words(20, 3)]
    chosen = [([*template, *prompt], [5, 6, 7]) for prompt in own]
    rejected = [([*template, *prompt], [8, 9, 10]) for prompt in own]
    assert computed([*chosen, *rejected]) == 2 * (6 + 20) + 4 * 2  # the template stands twice
    assert computed([pair for side in zip(chosen, rejected, strict=True) for pair in side]) == 2 * (6 + 20) + 4 * 2


def test_a_long_system_prompt_is_computed_once() -> None:
    """One completion of each prompt: what they share is long, so no second row stands whole."""
    system = words(30, 1)
    rows = [([*system, 4 + place, *words(2, place)], [9, 5]) for place in range(8)]
    assert computed(rows) == 30 + 8 * (3 + 1)


@pytest.mark.parametrize("common", [MIN_SHARED - 1, MIN_SHARED])
def test_a_short_common_beginning_is_not_shared(common: int) -> None:
    rows = [([*words(common, 1), 5], [7]), ([*words(common, 1), 6], [7])]
    alone = 2 * (common + 1)
    assert computed(rows) == (alone if common < MIN_SHARED else alone - common)


def test_equal_sequences_are_one() -> None:
    assert computed([(words(9, 1), words(5, 2))] * 4) == 9 + 4


def test_prefixes_that_truncation_made_different_are_not_shared() -> None:
    """Prompts cut from the left by different amounts, to make room for completions, have nothing in common."""
    prompt = words(20, 1)
    rows = [(prompt[2:], words(4, 2)), (prompt[5:], words(7, 3))]
    batch = batch_of(rows)
    pack = pack_rows(batch)
    assert_says(pack, batch)
    assert all(segment.prefix == 0 for segment in pack.segments.items)


def test_what_predicts_nothing_is_left_out() -> None:
    rows = [(words(9, 1), words(5, 2)), (words(30, 3), [])]
    assert computed(rows) == 13
    assert computed([(words(30, 3), [])]) == 1, "a model wants a token"


# --- back to the batch ----------------------------------------------------------------------------------------


@given(some_rows(), st.integers(0, 3))
def test_spread_lays_numbers_where_they_belong(rows: Rows, wider: int) -> None:
    batch = batch_of(rows, wider=wider)
    if batch["input_ids"].shape[1] == 0:
        return
    pack = pack_rows(batch)
    values_P = torch.arange(1.0, len(pack.at_P) + 1, requires_grad=True)
    spread_BT = pack.spread(values_P)
    expected = torch.zeros(len(rows), batch["input_ids"].shape[1] - 1)
    for value, (row, column) in enumerate(sorted(predictions(batch)), start=1):
        expected[row, column] = value
    assert torch.equal(spread_BT, expected)
    if len(values_P):
        spread_BT.square().sum().backward()
        assert torch.equal(values_P.grad, 2 * values_P.detach())  # type: ignore[arg-type]


def test_spread_fills_the_rest() -> None:
    pack = pack_rows(batch_of([([5, 6], [7])]))
    assert pack.spread(torch.tensor([True]), fill=False).tolist() == [[False, True]]
    assert pack.spread(torch.tensor([2.0]), fill=-1.0).tolist() == [[-1.0, 2.0]]


@pytest.mark.parametrize("last_not", [None, PAD, EOS])
def test_the_last_token_is_the_one_transformers_reads(last_not: int | None) -> None:
    """Rows that end in EOS, and a classifier whose padding is EOS: what it reads stands before."""
    rows = [(words(6, 1), [7, 8, EOS]), (words(6, 1), [9, EOS, EOS]), ([5], [EOS])]
    pack = pack_rows(batch_of(rows, wider=2), whole=True, last_not=last_not)
    assert pack.last_B is not None
    read = [pack.ids_1N[0, place].item() for place in pack.last_B]
    assert read == ([8, 9, 5] if last_not == EOS else [EOS] * 3)
    assert pack.positions_1N[0, pack.last_B].tolist() == ([7, 6, 0] if last_not == EOS else [8, 8, 1])


def test_where_all_is_padding_the_first_token_counts() -> None:
    """As in transformers, whose argmax over nothing is 0."""
    pack = pack_rows(batch_of([([EOS, EOS], []), ([5, 6], [])]), whole=True, last_not=EOS)
    assert pack.last_B is not None and pack.positions_1N[0, pack.last_B].tolist() == [0, 1]


# --- the memo -------------------------------------------------------------------------------------------------


def test_a_batch_is_packed_once_for_each_way() -> None:
    batch = batch_of(BATCHES["pairs"])
    pack = pack_rows(batch)
    assert pack_rows(dict(batch)) is pack
    assert pack_rows(batch, share=False) is not pack
    assert pack_rows(batch, whole=True) is not pack
    assert pack_rows(batch) is pack


def test_another_mask_is_another_pack() -> None:
    """Masks come and go, often to the same address; ids stay."""
    batch = batch_of([([5, 6, 7], words(20, 1))])
    for column in range(1, 20):
        mask = torch.zeros_like(batch["loss_mask"])
        mask[0, column] = 1
        assert pack_rows({**batch, "loss_mask": mask}).columns_P.tolist() == [column - 1]
        del mask
    for length in range(5, 20):
        attention = torch.zeros_like(batch["attention_mask"])
        attention[0, :length] = 1
        assert pack_rows({**batch, "attention_mask": attention}).given == length
        del attention


def test_packs_are_forgotten_with_their_batch() -> None:
    gc.collect()  # whatever other tests left
    before = len(layout._packs)
    batch = batch_of(BATCHES["pairs"])
    pack = weakref.ref(pack_rows(batch))
    mask = weakref.ref(batch["loss_mask"])
    assert pack() is not None and len(layout._packs) == before + 1
    del batch
    gc.collect()
    assert pack() is None and mask() is None and len(layout._packs) == before


@pytest.mark.parametrize("kept", [[0, 1, 1], [1, 0, 1]])
def test_padding_elsewhere_than_on_the_right_is_refused(kept: list[int]) -> None:
    batch = batch_of([([5, 6], [7])])
    with pytest.raises(AssertionError, match="padded on the right"):
        pack_rows({**batch, "attention_mask": torch.tensor([kept])})

"""Near-equal work: what is dealt is what there was, steps keep their rows, and all micro-batches are as much work."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_kit.data.balance import BalancedSampler, Group, balance, deal, row_tokens
from tests.harness import Ranks
from tests.small import GLOBAL_BATCH, Lab, lab_of

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))  # size, ranks, accumulation


def loads(batches: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[int]:
    return [sum(tokens[item] for item in batch) for batch in batches]


# --- one step ---------------------------------------------------------------------------------------------


@given(SHAPES, st.data())
def test_every_item_is_dealt_once_and_the_heaviest_rounds_come_first(shape: tuple[int, int, int], data: Any) -> None:
    size, ranks, accumulation = shape
    count = size * ranks * accumulation
    tokens = data.draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count))
    dealt = deal(tokens, size, ranks)
    assert sorted(item for batch in dealt for item in batch) == list(range(count))
    assert [len(batch) for batch in dealt] == [size] * (ranks * accumulation)
    work = loads(dealt, tokens)
    rounds = [work[start : start + ranks] for start in range(0, len(work), ranks)]
    assert all(min(one) >= max(other) for one, other in pairwise(rounds))


def test_by_hand() -> None:
    """Pairs of the longest and the shortest; the second round goes through the ranks backwards."""
    assert deal([8, 1, 7, 2, 6, 3, 5, 4], 2, 2) == [[0, 1], [2, 3], [6, 7], [4, 5]]
    assert deal([5, 9, 1, 7], 1, 2) == [[1], [3], [2], [0]]
    assert deal([3, 1, 2], 3, 1) == [[0, 1, 2]]


@pytest.mark.parametrize(("size", "ranks", "accumulation"), [(2, 8, 4), (8, 2, 1), (4, 4, 2)])
def test_uneven_lengths_become_near_equal_work(size: int, ranks: int, accumulation: int) -> None:
    """A step as long as its heaviest rounds, of log-normal lengths: ranks wait a fifth of what they waited at most."""
    draw = random.Random(0)
    count = size * ranks * accumulation
    waits: dict[str, list[float]] = {"as drawn": [], "dealt": []}
    for _ in range(20):
        tokens = [round(draw.lognormvariate(5, 0.5)) for _ in range(count)]
        drawn = [list(range(start, start + size)) for start in range(0, count, size)]
        for name, batches in (("as drawn", drawn), ("dealt", deal(tokens, size, ranks))):
            work = loads(batches, tokens)
            longest = sum(max(work[start : start + ranks]) for start in range(0, len(work), ranks))
            waits[name].append(longest * ranks / sum(work) - 1)
    assert mean(waits["dealt"]) < 0.2 * mean(waits["as drawn"])


@given(SHAPES, st.data())
def test_groups_are_dealt_whole_where_they_fit(shape: tuple[int, int, int], data: Any) -> None:
    """Whatever the groups, every item is dealt once; those that divide a micro-batch or fill some are not parted."""
    size, ranks, accumulation = shape
    count = size * ranks * accumulation
    tokens = data.draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    each = data.draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
    items = data.draw(st.permutations(range(count)))
    groups = [Group(items[start : start + each], shared=30) for start in range(0, count, each)]
    dealt = deal(tokens, size, ranks, groups)
    assert sorted(item for batch in dealt for item in batch) == list(range(count))
    assert [len(batch) for batch in dealt] == [size] * (ranks * accumulation)
    if size % each == 0 or each % size == 0:
        parts = sum(len(set(group.items) & set(batch)) > 0 for group in groups for batch in dealt)
        assert parts == max(len(groups), len(dealt))


def test_a_prompt_counts_once_for_all_its_completions() -> None:
    """Four completions of a long prompt are as much work as four long ones of two short prompts."""
    tokens = [10] * 4 + [20] * 2 + [31] * 2
    groups = [Group([0, 1], 50), Group([2, 3], 50), Group([4, 5], 30), Group([6, 7], 1)]
    assert deal(tokens, 4, 1, groups) == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_a_group_waits_for_room_and_is_parted_where_there_is_none() -> None:
    tokens = [1, 1, 1, 9, 9, 5, 5, 1]
    waits = [Group([0, 1, 2]), Group([3, 4]), Group([5, 6]), Group([7])]
    assert deal(tokens, 4, 1, waits) == [[3, 4, 5, 6], [0, 1, 2, 7]]
    parted = [Group([0, 1, 2]), Group([5, 6, 7]), Group([3, 4])]
    assert deal(tokens, 4, 1, parted) == [[4, 5, 6, 7], [0, 1, 2, 3]]


# --- an epoch ---------------------------------------------------------------------------------------------

ROWS, SIZE, WORLD, ACCUMULATION = 45, 2, 2, 2  # five steps of 8 rows, then 5 rows, which accelerate fills up
STEP = SIZE * WORLD * ACCUMULATION


def lengths_of(rows: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(5, 200, rows)


def prepared(rank: int, tokens: Any = None, *, shuffled: bool = True, world: int = WORLD) -> Any:
    """Return a rank's loader of the numbers of rows as accelerate prepares it; rearranged where `tokens` are given."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    loader: Any = prepare_data_loader(
        DataLoader(list(range(ROWS)), batch_size=SIZE, shuffle=shuffled, collate_fn=list),  # type: ignore[arg-type]
        num_processes=world, process_index=rank, put_on_device=False, use_seedable_sampler=True, data_seed=3,
    )  # fmt: skip
    if tokens is not None:
        balance(loader, tokens, SIZE, world, ACCUMULATION)
    return loader


def epoch(make: Callable[[int], Any], number: int = 0, world: int = WORLD) -> list[list[int]]:
    """Return an epoch's micro-batches in the order in which ranks take them in turn."""
    loaders = [make(rank) for rank in range(world)]
    for loader in loaders:
        loader.set_epoch(number)
    return [batch for turn in zip(*loaders, strict=True) for batch in turn]


def steps(batches: list[list[int]]) -> list[set[int]]:
    flat = [row for batch in batches for row in batch]
    return [set(flat[start : start + STEP]) for start in range(0, len(flat), STEP)]


@pytest.mark.parametrize("shuffled", [True, False], ids=["random", "sequential"])
@pytest.mark.parametrize("number", [0, 1])
def test_steps_keep_their_rows(number: int, shuffled: bool) -> None:
    tokens = lengths_of(ROWS)
    before = epoch(lambda rank: prepared(rank, shuffled=shuffled), number)
    after = epoch(lambda rank: prepared(rank, tokens, shuffled=shuffled), number)
    full = ROWS // STEP
    assert steps(after)[:full] == steps(before)[:full] and len(after) == len(before)
    last = full * WORLD * ACCUMULATION
    kept = [row for batch in after[last:] for row in batch][: ROWS - full * STEP]
    assert kept == [row for batch in before[last:] for row in batch][: ROWS - full * STEP]
    for at in range(0, last, WORLD * ACCUMULATION):
        step = after[at : at + WORLD * ACCUMULATION]
        drawn = [row for batch in before[at : at + WORLD * ACCUMULATION] for row in batch]
        assert sorted(loads(step, tokens)) == sorted(loads(deal(tokens[drawn], SIZE, WORLD), tokens[drawn]))


def test_the_order_is_that_of_seed_and_epoch() -> None:
    tokens = lengths_of(ROWS)
    epochs = [epoch(lambda rank: prepared(rank, tokens), number) for number in (0, 1)]
    assert epochs[0] != epochs[1]
    assert [epoch(lambda rank: prepared(rank, tokens), number) for number in (0, 1)] == epochs
    loader = prepared(0, tokens, world=1)  # one loader's own epochs are those it is told of
    own = [list(loader) for _ in range(2)]
    assert own == [epoch(lambda rank: prepared(rank, tokens, world=1), number, world=1) for number in (0, 1)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("number", [0, 1])
def test_skipped_batches_are_those_that_were_seen(number: int, world: int) -> None:
    from accelerate import skip_first_batches

    tokens = lengths_of(ROWS)
    whole = epoch(lambda rank: prepared(rank, tokens, world=world), number, world)
    skipped = 2 * ACCUMULATION
    left = epoch(lambda rank: skip_first_batches(prepared(rank, tokens, world=world), skipped), number, world)
    assert left == whole[skipped * world :]


def test_equal_rows_keep_their_order() -> None:
    import numpy as np

    base = [3, 1, 2, 0, 7, 5, 6, 4]
    assert list(BalancedSampler(base, np.full(8, 64), 2, 2, 1)) == base
    assert list(BalancedSampler(base, np.arange(8) + 1, 2, 2, 1)) != base
    assert list(BalancedSampler(base, np.arange(8) + 1, 4, 2, 2)) == base, "a step that is not full"
    assert len(BalancedSampler(base, np.arange(8), 2, 2, 1)) == 8


# --- rows -------------------------------------------------------------------------------------------------


def columns(**lengths: list[int]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({name: [[7] * length for length in sizes] for name, sizes in lengths.items()})


def test_the_work_of_rows() -> None:
    pairs = columns(prompt_ids=[3, 1, 2], chosen_ids=[4, 4, 0], rejected_ids=[1, 2, 3])
    assert row_tokens(pairs).tolist() == [8, 7, 5]
    assert row_tokens(pairs.select([2, 0, 0])).tolist() == [5, 8, 8]
    assert row_tokens(columns(input_ids=[3, 9], loss_mask=[3, 9])).tolist() == [3, 9]
    labelled = {"prompt_ids": [3, 1], "completion_ids": [4, 5]}
    assert row_tokens(columns(**labelled)).tolist() == [7, 6]
    assert row_tokens(columns(**labelled, kl_completion_ids=[10, 1])).tolist() == [20, 8]


# --- real runs --------------------------------------------------------------------------------------------


def micro_batches(lab: Lab, place: Path, phase: str, **changes: Any) -> list[list[list[int]]]:
    """Return by step the lengths in each micro-batch of both ranks, of a run with two micro-batches of two rows."""
    lab.start(
        phase, place, harm="keep_lengths", max_steps=4, per_device_train_batch_size=GLOBAL_BATCH // 4,
        gradient_accumulation_steps=2, **changes,
    ).result.ok()  # fmt: skip
    ranks = [json.loads(Path(f"{place}.{rank}.json").read_text()) for rank in range(2)]
    return [[*one, *other] for one, other in zip(*ranks, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["sigmoid", "sft", "aot"])
def test_a_run_deals_its_rows(ranks: Ranks, tmp_path: Path, loss_type: str) -> None:
    """Micro-batches are as much work as can be, but where the loss would be another in another company."""
    found = micro_batches(lab_of(ranks), tmp_path / "run", "dpo", loss_type=[loss_type])
    assert len(found) == 4
    dealt = []
    for step in found:
        drawn = [length for batch in step for length in batch]
        best = loads(deal(drawn, GLOBAL_BATCH // 4, 2), drawn)
        dealt.append(sorted(best) == sorted(map(sum, step)))
    assert all(dealt) if loss_type != "aot" else not all(dealt)

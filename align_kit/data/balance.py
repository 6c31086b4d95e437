"""Near-equal work for all micro-batches of an optimizer step: which of the step's items each of them gets.

The loss of a step is normalised over its whole global batch, so its gradient is the same wherever an item goes. Time
is not: ranks wait for one another in every layer (ZeRO-3 gathers together), so that a round, one micro-batch on each
rank, takes as long as its heaviest. Work is counted in tokens to compute, a prompt once for all its completions.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import Sampler

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import NDArray

BATCH_ROWS = 10_000


@dataclass(frozen=True)
class Group:
    """Items that should meet in one micro-batch, which then computes `shared` tokens once for all of them."""

    items: Sequence[int]
    shared: int = 0

    def work(self, tokens: Sequence[int]) -> int:
        return self.shared + sum(tokens[item] for item in self.items)


@dataclass(order=True)
class _MicroBatch:
    work: int
    number: int
    items: list[int] = field(default_factory=list, compare=False)


def deal(tokens: Sequence[int], size: int, ranks: int, groups: Sequence[Group] | None = None) -> list[list[int]]:
    """Return the items 0, 1, … in micro-batches of `size`, in the order in which `ranks` ranks take them in turn.

    `tokens` tells each item's own work; the number of items must be a multiple of `size` x `ranks`. Without `groups`,
    which must name every item once, items share nothing. Heaviest first into the lightest micro-batch that has room
    (longest processing time; Graham 1969), where room is a number of items; a group is parted only where no
    micro-batch has room for all of it. Micro-batches of like work make a round, the heaviest round is the first, and
    every other round goes through the ranks backwards, so that the sums of the ranks are near-equal too.
    """
    assert len(tokens) % (size * ranks) == 0, "each rank has as many micro-batches, all of one size"
    alone = [Group([item]) for item in range(len(tokens))]
    pieces = alone if groups is None else [piece for group in groups for piece in _cut(group, tokens, size)]
    heaviest_first = sorted(_filled(pieces, tokens, size), key=lambda batch: (-batch.work, batch.number))
    items = [sorted(batch.items) for batch in heaviest_first]
    rounds = [items[start : start + ranks] for start in range(0, len(items), ranks)]
    return [batch for number, turn in enumerate(rounds) for batch in (turn[::-1] if number % 2 else turn)]


def _cut(group: Group, tokens: Sequence[int], size: int) -> Iterator[Group]:
    """Yield a group too large for one micro-batch as full ones of near-equal work, and what is left of it."""
    full = len(group.items) // size * size
    alone = [Group([item]) for item in group.items[:full]]
    for batch in _filled(alone, tokens, size):
        yield Group(batch.items, group.shared)
    if full < len(group.items):
        yield Group(group.items[full:], group.shared)


def _filled(pieces: Sequence[Group], tokens: Sequence[int], size: int) -> list[_MicroBatch]:
    """Return the items of `pieces` in full micro-batches: those of many items first, of these the heaviest."""
    count = sum(len(piece.items) for piece in pieces) // size
    lightest, full = [_MicroBatch(0, number) for number in range(count)], []
    for piece in sorted(pieces, key=lambda piece: (-len(piece.items), -piece.work(tokens))):
        left = piece.items
        while left:
            batch = _with_room(lightest, size, len(left))
            taken, left = left[: size - len(batch.items)], left[size - len(batch.items) :]
            batch.items += taken
            batch.work += Group(taken, piece.shared).work(tokens)
            if len(batch.items) < size:
                heapq.heappush(lightest, batch)
            else:
                full.append(batch)
    return full


def _with_room(lightest: list[_MicroBatch], size: int, wanted: int) -> _MicroBatch:
    """Take from a heap the lightest micro-batch with room for `wanted` items; where none has, that with most room."""
    passed = []
    while lightest and size - len(lightest[0].items) < wanted:
        passed.append(heapq.heappop(lightest))
    if lightest:
        found = heapq.heappop(lightest)
    else:
        found = min(passed, key=lambda batch: len(batch.items))
        passed.remove(found)
    for batch in passed:
        heapq.heappush(lightest, batch)
    return found


class BalancedSampler(Sampler[int]):
    """The order of another sampler, rearranged inside the items of each optimizer step only.

    `tokens` is the work of each row; a step has `accumulation` micro-batches of `size` rows on each of `ranks` ranks,
    which take micro-batches in turn (as accelerate's BatchSamplerShard deals them). A last step that is not full
    stays as it is, for accelerate fills it up by position, and so does a step of equal rows.
    """

    def __init__(self, base: Any, tokens: NDArray[np.int64], size: int, ranks: int, accumulation: int) -> None:
        self.base, self.tokens, self.size, self.ranks = base, tokens, size, ranks
        self.step = size * ranks * accumulation

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator[int]:
        order = iter(self.base)
        while rows := list(islice(order, self.step)):
            yield from self._rearranged(rows)

    def _rearranged(self, rows: list[int]) -> Iterable[int]:
        work = self.tokens[rows].tolist()
        if len(rows) < self.step or min(work) == max(work):
            return rows
        return (rows[item] for batch in deal(work, self.size, self.ranks) for item in batch)

    def set_epoch(self, epoch: int) -> None:
        """Tell the other sampler which epoch begins, if it asks."""
        if hasattr(self.base, "set_epoch"):
            self.base.set_epoch(epoch)


def balance(loader: Any, tokens: NDArray[np.int64], size: int, ranks: int, accumulation: int) -> None:
    """Let a loader that accelerate has prepared draw its rows through a `BalancedSampler`.

    Afterwards, not before: accelerate seeds and synchronises only samplers that it knows; such a one's order is kept.
    """
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):  # a rank's share of batches lies around all batches
        batches = batches.batch_sampler
    loader.set_sampler(BalancedSampler(batches.sampler, tokens, size, ranks, accumulation))


def row_tokens(dataset: Dataset) -> NDArray[np.int64]:
    """Return for each tokenised row how many tokens a step computes for it, a pair's prompt once.

    Lists are not read, only where they begin and end.
    """
    import numpy as np
    import pyarrow.compute as pc

    counted = _counted(dataset.column_names)
    tables = dataset.select_columns(list(dict.fromkeys(counted))).with_format("arrow")
    lengths = [
        sum(pc.list_value_length(table.column(name)).to_numpy().astype(np.int64) for name in counted)
        for table in tables.iter(batch_size=BATCH_ROWS)
    ]
    return np.concatenate(lengths)


def _counted(columns: Sequence[str]) -> list[str]:
    """Return the columns whose tokens a step computes, twice where it computes them twice."""
    if "input_ids" in columns:
        return ["input_ids"]
    if "chosen_ids" in columns:
        return ["prompt_ids", "chosen_ids", "rejected_ids"]
    if "completion_ids" not in columns:  # what is completed is not written yet
        return ["prompt_ids"]
    mismatched = ["prompt_ids", "kl_completion_ids"] if "kl_completion_ids" in columns else []
    return ["prompt_ids", "completion_ids", *mismatched]

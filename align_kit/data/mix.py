"""Which rows of which source, in which order: mixtures and held-out splits, decided by numbers alone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from align_kit.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

T = TypeVar("T")
Stream = Callable[[int], Iterator[T]]  # opened at the number of its first item


def mix(
    counts: Sequence[int],
    shares: Sequence[float] | None,
    *,
    seed: int,
    interleave: bool,
    epochs: Sequence[float] | None = None,
) -> list[tuple[int, int]]:
    """Return the mixture as (source, row) numbers; see `load` for the rule. The same arguments give the same list.

    `epochs` says how often each source's rows are there (2.5: twice, and half of them again); once where it is None.
    """
    import numpy as np

    if epochs is None and shares is None:
        return [(source, row) for source, count in enumerate(counts) for row in range(count)]
    sizes = sizes_of(capacities_of(counts, epochs or [1.0] * len(counts)), shares)
    if not interleave:
        return [(source, row) for source, size in enumerate(sizes) for row in range(size)]
    rows = [
        np.concatenate(list(passes(count, size, seed=seed, source=source)))
        for source, (count, size) in enumerate(zip(counts, sizes, strict=True))
    ]
    places = np.concatenate([(np.arange(size) + 0.5) / max(size, 1) for size in sizes])
    sources = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((sources, places))
    return list(zip(sources[order].tolist(), np.concatenate(rows)[order].tolist(), strict=True))


def mixed(streams: Sequence[Stream[T]], shares: Sequence[float], *, position: int = 0) -> Iterator[tuple[int, T]]:
    """Yield (source, item) from streams of any length, from item number `position` of the mixture on.

    The k-th item of a source stands at (k + 1/2) / share, as in `mix`: every stretch has the shares asked for, and
    what stands at a position depends on the shares and the position alone, so a mixture goes on exactly where it was
    left. Each of `streams` is opened once, at the number of the item that is its next. Ends when a stream whose turn
    it is has nothing left, so that the shares hold to the end; a share of 0 is never taken.
    """
    taken = _taken(shares, position)
    opened = [stream(start) for stream, start in zip(streams, taken, strict=True)]
    for source in _turns(shares, taken):
        try:
            item = next(opened[source])
        except StopIteration:
            return
        yield source, item


def _turns(shares: Sequence[float], taken: Sequence[int]) -> Iterator[int]:
    """Yield whose turn it is, for ever, once `taken[i]` items of each source have been."""
    heap = [((start + 0.5) / share, source, start) for source, (share, start) in
            enumerate(zip(shares, taken, strict=True)) if share > 0]  # fmt: skip
    heapq.heapify(heap)
    while heap:
        _, source, number = heap[0]
        yield source
        heapq.heapreplace(heap, ((number + 1.5) / shares[source], source, number + 1))


def _taken(shares: Sequence[float], position: int) -> list[int]:
    """Return how many of the first `position` items are each source's."""
    # Where p items have been, a source has had its share of p to within half the number of sources and one: those
    # surely taken are counted at once, the few others one by one.
    sure = position - len(shares) / 2 - 1
    taken = [max(0, math.floor(sure * share / sum(shares)) - 1) for share in shares]
    turns = _turns(shares, list(taken))
    for _ in range(position - sum(taken)):
        taken[next(turns)] += 1
    return taken


def shares_of(parts: Sequence[float], caps: Sequence[float]) -> list[float]:
    """Return `parts` as shares of 1, none above its cap: what a cap takes from one goes to the others in proportion.

    Raises UserError where the caps together leave room unfilled.
    """
    if sum(caps) < 1 - 1e-9:
        raise UserError(
            f"max_share of all sources adds up to {sum(caps):.4g}, so {1 - sum(caps):.4g} of the mixture would be "
            "nobody's; raise one, or leave it out for one source"
        )
    held: dict[int, float] = {}
    while True:
        free = [place for place in range(len(parts)) if place not in held]
        left, whole = max(0.0, 1 - sum(held.values())), sum(parts[place] for place in free)
        found = [held[place] if place in held else part / whole * left for place, part in enumerate(parts)]
        over = [place for place in free if found[place] > caps[place] * (1 + 1e-12)]
        if not over:
            return found
        held |= {place: caps[place] for place in over}


def tempered(counts: Sequence[int], temperature: float) -> list[float]:
    """Return rows^(1 / T): T = 1 takes sources by their size, a high T all alike (Devlin 2018; Xue 2020, sec. 3.1)."""
    return [count ** (1 / temperature) for count in counts]


def capacities_of(counts: Sequence[int], epochs: Sequence[float]) -> list[int]:
    """Return how many rows each source may give, repeats counted; at least one."""
    return [max(1, round(count * times)) for count, times in zip(counts, epochs, strict=True)]


def sizes_of(capacities: Sequence[int], shares: Sequence[float] | None, total: int | None = None) -> list[int]:
    """Return the rows each source gives: all, where no shares are asked; else `total`, or the most that has the shares.

    With `total` the sizes add up to it, whatever the capacities.
    """
    if shares is None:
        return list(capacities)
    if total is None:
        most = min(capacity / share for capacity, share in zip(capacities, shares, strict=True) if share > 0)
        return [min(round(share * most), capacity) for share, capacity in zip(shares, capacities, strict=True)]
    sizes = [math.floor(share * total) for share in shares]
    # The largest remainders get the rows that rounding down has left.
    by_remainder = sorted(range(len(shares)), key=lambda place: (sizes[place] - shares[place] * total, place))
    for place in by_remainder[: total - sum(sizes)]:
        sizes[place] += 1
    return sizes


def passes(count: int, size: int, *, seed: int, source: int, start: int = 0) -> Iterator[np.ndarray]:
    """Yield the row numbers a source of `count` rows gives, `size` in all, an array for each pass from number `start`.

    The first pass is in file order, of a sample drawn with `seed` where it is not whole. Every later one is shuffled
    anew.
    """
    import numpy as np

    for number in range(start // count, -(-size // count) or 1):
        key = [seed, source, number] if number else [seed, source]
        rows = np.random.default_rng(key).permutation(count)[: size - number * count]
        rows = rows if number else np.sort(rows)
        yield rows[max(0, start - number * count) :]


def train_test(dataset: Dataset, test_split_size: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Return (train, test): `test_split_size` is a share below 1 or a number of rows; both keep the data's order.

    Raises UserError when either side would be empty.
    """
    import numpy as np

    rows = len(dataset)
    size = round(rows * test_split_size) if test_split_size < 1 else int(test_split_size)
    if not 0 < size < rows:
        raise UserError(
            f"test_split_size {test_split_size} of {rows} rows leaves {max(rows - size, 0)} and {size}; "
            "give a share between 0 and 1 or fewer rows, or slice the source (split: train[:90%])"
        )
    chosen = np.random.default_rng(seed).permutation(rows)[:size]
    held = np.zeros(rows, dtype=bool)
    held[chosen] = True
    return dataset.select(np.flatnonzero(~held)), dataset.select(np.flatnonzero(held))

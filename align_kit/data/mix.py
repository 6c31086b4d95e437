"""Which rows of which source, in which order: mixtures and held-out splits, decided by numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from align_kit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def mix(counts: Sequence[int], shares: Sequence[float] | None, *, seed: int, interleave: bool) -> list[tuple[int, int]]:
    """Return the mixture as (source, row) numbers; see `load` for the rule. The same arguments give the same list."""
    import numpy as np

    if shares is None:
        return [(source, row) for source, count in enumerate(counts) for row in range(count)]
    total = min(count / share for count, share in zip(counts, shares, strict=True))
    sizes = [min(round(share * total), count) for share, count in zip(shares, counts, strict=True)]
    if not interleave:
        return [(source, row) for source, size in enumerate(sizes) for row in range(size)]
    placed = []
    for source, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        rows = np.sort(np.random.default_rng([seed, source]).permutation(count)[:size])
        placed += [((place + 0.5) / size, source, int(row)) for place, row in enumerate(rows)]
    return [(source, row) for _, source, row in sorted(placed)]


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

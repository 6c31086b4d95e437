"""Which rows repeat an earlier one: exactly, by digest, or nearly, by verified Jaccard similarity.

A row is dropped only where a row that is *kept* is its twin, and the first of all is kept. So of a chain A ~ B ~ C in
which A and C are not alike, A and C stay; no row is lost without a twin, and cleaning twice changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A band that so many kept rows share, none the twin of another, says nothing of them; and who shares so few bands that
# this many rows share more is no twin. Both keep the time linear where thousands of rows have a template in common.
CROWD = 256
TRIED = 64

Likeness = Callable[[int, int], float]


def exact_twins(digests_R2: NDArray[np.uint64]) -> dict[int, int]:
    """Return row -> the first row with the same digest, for all but the first."""
    import numpy as np

    if not len(digests_R2):
        return {}
    order = np.lexsort((digests_R2[:, 1], digests_R2[:, 0]))  # stable: equal digests stay in row order
    same = np.concatenate([[False], (digests_R2[order[1:]] == digests_R2[order[:-1]]).all(axis=1)])
    first = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))]
    return {int(row): int(twin) for row, twin in zip(order[same], first[same], strict=True)}


def near_twins(
    bands_RB: NDArray[np.uint64], dropped: set[int], likeness: Likeness, threshold: float
) -> dict[int, tuple[int, float]]:
    """Return row -> (a kept earlier row, their likeness of at least `threshold`).

    Rows meet where a band is equal, and `likeness` is asked only about those. Rows in `dropped` neither are found nor
    count.
    """
    kept_in: dict[int, list[int]] = {}
    found: dict[int, tuple[int, float]] = {}
    for row, shared in _rooms(bands_RB, dropped):
        met = Counter(other for room in shared for other in kept_in.get(room, ()))
        for other in sorted(met, key=lambda one: (-met[one], one))[:TRIED]:
            alike = likeness(row, other)
            if alike >= threshold:
                found[row] = (other, alike)
                break
        else:
            for room in shared:
                there = kept_in.setdefault(room, [])
                if len(there) < CROWD:
                    there.append(row)
    return found


def _rooms(bands_RB: NDArray[np.uint64], dropped: set[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield, in row order, each row that shares a band with another, and the numbers of the bands it shares."""
    import numpy as np

    alive = np.setdiff1d(np.arange(len(bands_RB)), np.fromiter(dropped, np.intp, len(dropped)))
    rows, rooms, first = [], [], 0
    for band in range(bands_RB.shape[1] if len(alive) else 0):
        _, room, sizes = np.unique(bands_RB[alive, band], return_inverse=True, return_counts=True)
        crowded = sizes[room] > 1
        rows.append(alive[crowded])
        rooms.append(room[crowded] + first)
        first += len(sizes)
    if not sum(map(len, rows)):
        return
    row_N, room_N = np.concatenate(rows), np.concatenate(rooms)
    order = np.argsort(row_N, kind="stable")
    row_N, room_N = row_N[order], room_N[order]
    starts = np.flatnonzero(np.concatenate([[True], row_N[1:] != row_N[:-1]]))
    ends = [*starts[1:], len(row_N)]
    for start, end in zip(starts, ends, strict=True):
        yield int(row_N[start]), room_N[start:end].tolist()

"""Clean: judge every row, find the twins among those that stay, and give the kept rows in their order.

Two passes, of which the second reads what the first left on disk. In memory are 16 bytes a row for exact twins and
8 bytes a band for near ones, and never the rows.
"""

from __future__ import annotations

import functools
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from align_kit.clean import near, pool
from align_kit.clean.chain import Hit, Judged, Plan, alike, encoded, shingled
from align_kit.clean.source import Source, batches
from align_kit.clean.spill import Spill
from align_kit.data.shapes import Row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EXACT, NEAR = "exact duplicate", "near duplicate"
_REMEMBERED = 256  # rows whose shingles are at hand while others are compared with them


@dataclass
class Found:
    """What cleaning found: rows read by source, rows dropped by (step, rule), lines cut by rule, personal data by
    kind, and the twins.

    `twins`: row -> (its twin, likeness), by place among the rows that reached the comparison; `across` of them lie in
    two sources. `survey` facts are filled where the plan asks for them.
    """

    read: list[int]
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    personal: Counter[str] = field(default_factory=Counter)
    notices: int = 0
    nowhere: int = 0  # rows that do not say where they are from, where a block list asks
    twins: dict[int, tuple[int, float]] = field(default_factory=dict)
    across: int = 0
    lengths: list[NDArray[np.int64]] = field(default_factory=list)  # (rows, parts, 2): characters and words
    languages: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """All rows that were read."""
        return sum(self.read)

    @property
    def kept(self) -> int:
        """Rows that stay."""
        return self.rows - sum(self.dropped.values())


class Cleaning:
    """The rows of `sources` under `plan`; use as `with Cleaning(...) as work`, call `work.run`, then take `work.kept`.

    What it stores lies in nameless files in `scratch` and is gone when the block is left.
    """

    def __init__(self, plan: Plan, sources: Sequence[Source], scratch: Path, *, exact: bool = True) -> None:
        self.plan, self.sources, self.exact = plan, sources, exact
        self.found = Found([0] * len(sources))
        self.rows, self.refused = Spill(scratch), Spill(scratch)
        self._from, self._numbers = array("I"), array("Q")  # of each row that was passed on
        self._digests: list[bytes] = []
        self._bands: list[NDArray[np.uint64]] = []
        self._shingled = functools.lru_cache(_REMEMBERED)(self._shingled_anew)
        self._exact: frozenset[int] = frozenset()

    def __enter__(self) -> Cleaning:
        return self

    def __exit__(self, *_: object) -> None:
        self.rows.close()
        self.refused.close()

    def run(self, workers: int, tell: Callable[[Judged], None]) -> Found:
        """Judge all rows and find the twins; `tell` hears of each batch."""
        for judged in pool.judged(self.plan, self.sources, batches(self.sources), workers):
            self._take(judged)
            tell(judged)
        self._compare()
        return self.found

    def kept(self) -> Iterator[Row]:
        """Yield the rows that stay, in the order of the input."""
        for place in range(len(self.rows)):
            if place not in self.found.twins:
                yield json.loads(self.rows[place])

    def dropped(self) -> Iterator[Row]:
        """Yield the rows that were dropped (where the plan keeps them): reason, rule, what was seen, source, row."""
        for place in range(len(self.refused)):
            yield json.loads(self.refused[place])
        for place, (twin, jaccard) in self.found.twins.items():
            seen = f"of {self.where(twin)}" + (f", Jaccard {jaccard:.3f}" if self._is_near(place) else "")
            hit = Hit("duplicates", NEAR if self._is_near(place) else EXACT, seen)
            yield _told(hit, self.where(place), json.loads(self.rows[place]))

    def where(self, place: int) -> str:
        """Return how a row that was passed on is named."""
        return self.sources[self._from[place]].where(self._numbers[place])

    def _take(self, judged: Judged) -> None:
        import numpy as np

        found, source = self.found, self.sources[judged.source]
        found.read[judged.source] += judged.rows
        found.cut += judged.cut
        found.personal += judged.personal
        found.notices += judged.notices
        found.nowhere += judged.nowhere
        found.languages += judged.languages
        for number, hit, row in judged.hits:
            found.dropped[hit.step, hit.rule] += 1
            if row:
                self.refused.append(encoded(_told(hit, source.where(number), json.loads(row))))
        if judged.lengths:
            found.lengths.append(np.array(judged.lengths, np.int64))
        for line in judged.lines:
            self.rows.append(line)
        self._from.extend([judged.source] * len(judged.numbers))
        self._numbers.extend(judged.numbers)
        self._digests.append(judged.digests)
        if judged.bands is not None:
            self._bands.append(judged.bands)

    def _compare(self) -> None:
        import numpy as np

        found = self.found
        digests = np.frombuffer(b"".join(self._digests), np.uint64).reshape(-1, 2)
        twins = near.exact_twins(digests) if self.exact else {}
        self._exact = frozenset(twins)
        found.twins = {row: (twin, 1.0) for row, twin in twins.items()}
        if self._bands:
            bands = np.concatenate(self._bands)
            self._bands.clear()
            found.twins |= near.near_twins(bands, set(twins), self._likeness, self.plan.threshold)
        for row in found.twins:
            found.dropped["duplicates", NEAR if self._is_near(row) else EXACT] += 1
        found.across = sum(self._from[row] != self._from[twin] for row, (twin, _) in found.twins.items())
        found.twins = dict(sorted(found.twins.items()))

    def _is_near(self, place: int) -> bool:
        return place not in self._exact

    def _likeness(self, place: int, other: int) -> float:
        return alike(self._shingled(place), self._shingled(other))

    def _shingled_anew(self, place: int) -> list[frozenset[tuple[str, ...]]]:
        return shingled(self.plan.kind, json.loads(self.rows[place]))


def _told(hit: Hit, where: str, row: str | Row) -> Row:
    return {"reason": hit.step, "rule": hit.rule, "seen": hit.seen, "where": where, "row": row}

"""Which sources tokenised rows come from, so that training can log the share that each really has.

Every tokenised row of a mixture then has `source_parts`: what of it is of each source, in the order of `datasets`. A
packed row counts tokens; any other is one row of one source.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align_kit.data.digest import canonical_json, text_digest

COLUMN = "source_parts"
Row = dict[str, Any]


@dataclass(frozen=True)
class Origins:
    """The number of the source of each canonical row, out of `count` sources."""

    numbers: Sequence[int]
    count: int

    def key(self, content: str) -> str:
        """Return the digest of tokenised rows that have `content` and come from these sources."""
        return text_digest(content, canonical_json([self.count, *self.numbers]))

    def attached(self, rows: Iterable[Row | None], start: int) -> list[Row | None]:
        """Return `rows`, made of the canonical rows from number `start` on, each with its one source."""
        found = []
        for number, row in enumerate(rows, start):
            parts = [int(source == self.numbers[number]) for source in range(self.count)]
            found.append(None if row is None else {**row, COLUMN: parts})
        return found


class Spans:
    """Follows which sources a stream of tokens comes from, while it is cut into rows."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[list[int], int]] = deque()

    def add(self, document: Mapping[str, Any]) -> None:
        """Take note of a document that is about to be joined to the stream."""
        if COLUMN in document and document["input_ids"]:
            self._waiting.append((document[COLUMN], len(document["input_ids"])))

    def columns(self, rows: int, length: int) -> dict[str, list[list[int]]]:
        """Return the column for the next `rows` rows of `length` tokens; none where documents know no source."""
        return {COLUMN: [self._take(length) for _ in range(rows)]} if self._waiting else {}

    def _take(self, tokens: int) -> list[int]:
        total = [0] * len(self._waiting[0][0])
        while tokens:
            parts, there = self._waiting.popleft()
            used = min(there, tokens)
            total = [sum_ + used * part for sum_, part in zip(total, parts, strict=True)]
            tokens -= used
            if there > used:
                self._waiting.appendleft((parts, there - used))
        return total

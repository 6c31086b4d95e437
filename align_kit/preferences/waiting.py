"""A line on a terminal while rows are read: how many, how fast, how long still."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
EVERY = 0.5  # seconds between two lines


def watched(rows: Iterable[Item], total: int, doing: str) -> Iterator[Item]:
    """Yield `rows`, of which there are `total`, and say on a terminal's standard error how far they are."""
    if not sys.stderr.isatty():
        yield from rows
        return
    began = said = time.monotonic()
    for number, row in enumerate(rows, start=1):
        yield row
        now = time.monotonic()
        if now - said >= EVERY:
            said, rate = now, number / (now - began)
            left = round((total - number) / rate)
            line = f"{doing}: {number:,} of {total:,} rows, {rate:,.0f} rows/s, {left // 60}:{left % 60:02} left"
            print(f"\r{line:<79}", end="", file=sys.stderr, flush=True)
    print(f"\r{'':<79}\r", end="", file=sys.stderr, flush=True)

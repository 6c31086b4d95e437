"""Content digests of rows: equal on every machine and in every process for equal rows in equal order."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def canonical_json(value: Any) -> str:
    """Return one JSON text per value: sorted keys, no spaces, characters as they are."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def text_digest(*parts: str) -> str:
    """Return the XXH3-128 of `parts`, 32 hexadecimal digits; the length of each part counts."""
    import xxhash

    state = xxhash.xxh3_128()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(f"{len(data)}:".encode())
        state.update(data)
    return state.hexdigest()


def rows_digest(rows: Iterable[dict[str, Any]]) -> str:
    """Return the XXH3-128 of rows in order, 32 hexadecimal digits; columns that are null count as absent.

    `rows` may be a `datasets.Dataset`: reading it back gives the digest of the rows it was built from.
    """
    import xxhash

    state = xxhash.xxh3_128()
    for row in rows:
        present = {name: value for name, value in row.items() if value is not None}
        state.update(canonical_json(present).encode("utf-8", "surrogatepass"))
        state.update(b"\n")
    return state.hexdigest()

"""Files of lines that a run adds to as it trains, and what becomes of lines that a resumed run writes once more."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def put_aside(path: Path, stays: Callable[[Mapping[str, Any]], bool]) -> int:
    """Move the JSON lines of `path` that do not stay to `<stem>.replayed<suffix>` and return how many these are.

    A run that ended between checkpoints has written lines that the run which goes on from the last one writes again.
    Moved, not cut: where both differ, something did not repeat itself, and this is where to see it. So are lines that
    are no JSON, the last one of a run that was killed. They are moved before they are taken away: what a crash in
    between leaves stands twice, not nowhere.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines if stays(_read(line))]
    if len(kept) == len(lines):
        return 0
    moved = [line for line in lines if not stays(_read(line))]
    with path.with_name(f"{path.stem}.replayed{path.suffix}").open("a", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in moved)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(draft, path)
    return len(moved)


NOT_A_LINE = {"step": float("inf"), "iteration": float("inf")}  # later than anything that stays


def _read(line: str) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return NOT_A_LINE
    return found if isinstance(found, dict) else NOT_A_LINE

"""Digests of files that were computed before: nobody reads gigabytes twice to learn what has not changed."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from align_kit import run_folder

SETTLED = 2.0  # seconds after which another write to a file must give it another time of change


def remembered(name: str, files: Iterable[Path], more: str, compute: Callable[[], str]) -> str:
    """Return what `compute` gives for `files`; what it gave before where none of them has changed since.

    A file is taken for unchanged where path, size, inode and the times of its last write (mtime) and change (ctime,
    which nobody can set back) are what they were, to the nanosecond. A file that was changed within the last two
    seconds is read, and its digest not kept: a further write could leave it the same times. `name` tells apart what is
    computed, `more` is what the result depends on beside the files. Kept in `cache_folder()/digests`.
    """
    files = sorted(files)
    identity = [name, more, *map(_identity, files)]
    place = _entry(name, files)
    if (kept := _kept(place)) is not None and kept["identity"] == identity:
        return str(kept["result"])
    settled = all(time.time() - _last_change(path) > SETTLED for path in files)
    result = compute()
    if settled and identity == [name, more, *map(_identity, files)]:
        _keep(place, {"identity": identity, "result": result})
    return result


def _identity(path: Path) -> list[Any]:
    found = path.stat()
    return [str(path), found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _last_change(path: Path) -> float:
    found = path.stat()
    return max(found.st_mtime, found.st_ctime)


def _entry(name: str, files: list[Path]) -> Path:
    """Return where the result for these files is kept; files that change replace their entry."""
    import xxhash

    key = xxhash.xxh3_128("\n".join([name, *(str(path.absolute()) for path in files)]).encode()).hexdigest()
    return run_folder.cache_folder(os.environ) / "digests" / f"{key}.json"


def _kept(place: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(place.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() == {"identity", "result"} else None


def _keep(place: Path, entry: dict[str, Any]) -> None:
    """Store an entry, whole; a cache that cannot be written is none, and no mistake."""
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        run_folder.make_private(place.parent)
        draft.write_text(json.dumps(entry))
        os.replace(draft, place)

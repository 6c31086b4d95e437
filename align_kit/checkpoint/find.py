"""Which checkpoint a run goes on from: the newest that verifies, found by all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from align_kit import log
from align_kit.checkpoint import commit, manifest
from align_kit.run_folder import checkpoints

SHOWN = 2  # of the reasons why a checkpoint does not verify
Gather = Callable[[Any], list[Any]]  # every rank gives an object and gets those of all, by rank


def newest_verified(run: Path, rank: int, gather: Gather) -> Path | None:
    """Return the newest checkpoint of `run` that verifies, the same on all ranks; `None` where none does.

    Those that do not are moved to `<run>/torn/` and named with the reason; nothing is deleted. Every rank reads a
    share of the bytes.
    """
    if rank == 0:
        finish_or_set_aside(run)
    for place in reversed(gather(checkpoints(run))[0]):
        lines = problems_of(place, rank, gather)
        if not lines:
            return place
        if rank == 0:
            torn = commit.set_aside(place)
            log.warn(
                f"{place.name} does not verify ({'; '.join(lines[:SHOWN])}): moved to {torn.parent.name}/{torn.name}"
            )
    return None


def problems_of(place: Path, rank: int, gather: Gather) -> list[str]:
    """Return why a checkpoint does not verify, the same on all ranks; empty where it does."""
    world = len(gather(None))
    found = gather(manifest.problems(place, part=rank, parts=world))
    return list(dict.fromkeys(line for lines in found for line in lines))


def finish_or_set_aside(run: Path) -> None:
    """Commit a save that lacked its new name only, and move those that were cut short to `<run>/torn/`."""
    for folder in sorted(run.glob(f".saving-{commit.NAME}-*")):
        place = run / folder.name.removeprefix(".saving-")
        if not place.exists() and not manifest.problems(folder):
            folder.rename(place)
            manifest.flush(run)
            log.warn(f"{place.name} was written whole but not named when the run ended: it stands now")
        else:
            torn = commit.set_aside(folder)
            log.warn(f"a save of {place.name} was cut short: moved to {torn.parent.name}/{torn.name}")

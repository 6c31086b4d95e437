"""From a folder that is being written to a checkpoint: every rank hands its files over, one of them commits.

Ranks speak through files, never through collectives, so that all of it may happen behind the training's back.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align_kit.checkpoint import manifest

TORN = "torn"  # in a run: checkpoints that do not verify
LEFT = "left"  # and those of a course that the run has left, for it went on from an older one
HANDED = ".handed"  # in a folder that is being written: a file from each rank
LOOK = 0.01  # seconds between two looks for the other ranks' files
WALK = 1.0  # and between two looks at how the folder grows, which asks the file system about every file
NAME = "checkpoint"


class NotCommitted(Exception):
    """A save that came to nothing: why, in a few words."""


def staging(run: Path, step: int) -> Path:
    """Return where the checkpoint of `step` is written before it is one: on the same file system, and hidden."""
    return run / f".saving-{NAME}-{step}"


def final(run: Path, step: int) -> Path:
    """Return where the checkpoint of `step` stands once it is committed."""
    return run / f"{NAME}-{step}"


def open_staging(folder: Path) -> None:
    """Make an empty folder to write into; what a save that was cut short has left there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / HANDED).mkdir(parents=True)


def hand_over(folder: Path, rank: int, entries: Mapping[str, Any], failure: str | None = None) -> None:
    """Tell the committing rank which files this rank has written and flushed, or why it could not."""
    place = folder / HANDED / str(rank)
    draft = place.with_suffix(".draft")
    try:
        draft.write_text(json.dumps({"files": entries, "failure": failure}))
        os.replace(draft, place)
    except OSError:
        place.touch()  # an empty file: what there is room for on a full disk, and it need not be waited for
        raise


def handed_over(folder: Path, world_size: int, *, patience: Callable[[], float]) -> dict[str, Mapping[str, Any]]:
    """Wait until all ranks have handed over, and return their files' entries by name.

    Raises `NotCommitted` where a rank failed, or where `folder` has not grown for `patience()` seconds.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for rank in range(world_size):
        place = folder / HANDED / str(rank)
        if not _comes(place, folder, patience):
            raise NotCommitted(f"rank {rank} has not written its part")
        said = json.loads(place.read_text() or '{"failure": "no space left to say what it wrote"}')
        if said["failure"] is not None:
            raise NotCommitted(f"rank {rank}: {said['failure']}")
        found.update(said["files"])
    return found


def _comes(place: Path, folder: Path, patience: Callable[[], float]) -> bool:
    """Wait for the file `place`; False where `folder` has stopped growing before it came."""
    grown, since, looked = -1, time.monotonic(), -math.inf
    while not place.exists():
        now = time.monotonic()
        if now - looked >= WALK:
            size, looked = manifest.total_bytes(folder), now
            grown, since = (size, now) if size != grown else (grown, since)
        if now - since > patience():
            return False
        time.sleep(LOOK)
    return True


def publish(folder: Path, place: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Make `folder` the checkpoint at `place`: manifest, flush, rename, flush of the folder around it."""
    shutil.rmtree(folder / HANDED)
    manifest.seal(folder, facts, files)
    if place.exists():  # of the same step, from before the run went back to an older one
        set_aside(place)
    os.rename(folder, place)
    manifest.flush(place.parent)


def set_aside(folder: Path, under: str = TORN) -> Path:
    """Move a checkpoint folder that is not to be found any more into `<run>/<under>/`, and return where it is."""
    home = folder.parent / under
    home.mkdir(exist_ok=True)
    name = folder.name.lstrip(".")
    places = itertools.chain([home / name], (home / f"{name}.{number}" for number in itertools.count(1)))
    place = next(place for place in places if not place.exists())
    os.rename(folder, place)
    manifest.flush(folder.parent)
    return place

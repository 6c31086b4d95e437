"""Saves while the run trains on: the loop is held for the copy in memory, the rest happens behind it."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_kit import log
from align_kit.checkpoint import commit, manifest
from align_kit.checkpoint.find import Gather
from align_kit.checkpoint.space import NO_SPACE, coming, is_full, room
from align_kit.errors import Fault, first_line
from align_kit.run_folder import checkpoints

Write = Callable[[Path], None]
Writes = list[tuple[Path, Write]]
LEAVING = 10.0  # seconds a rank that ends badly waits without a sign of the others' parts


@dataclass
class Saver:
    """One rank's part in the checkpoints of a run.

    `saving(step, facts)` yields the folder to write into; what is given to `hand_over` meanwhile is written after it,
    in the background where `background`. Rank 0 commits, then calls `after_commit(checkpoint)`. One save at a time:
    the next begins by waiting for the last.
    """

    run: Path
    rank: int
    world_size: int
    background: bool = True
    patience: float = 1800.0  # seconds without a sign of the other ranks' parts
    stop_when_full: bool = True
    after_commit: Callable[[Path], None] = lambda checkpoint: None
    held: list[float] = field(default_factory=list)  # seconds that the loop was held by each save
    committed: int | None = None  # step of the newest commit, known on rank 0

    def __post_init__(self) -> None:
        self._writes: Writes = []
        self._last: Writes = []
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._full = False
        self._leaves = False

    def has_room(self, step: int, estimate: int, gather: Gather) -> bool:
        """Tell whether the disk has room for the checkpoint of `step`, once the last one is done; all ranks call it.

        `estimate` is in bytes and serves while there is none to go by. Raises `Fault` where a full disk is to stop
        the run; else too little room is said in a line.
        """
        self.join()
        need = coming(self.run, estimate) if self.rank == 0 else 0
        return room(commit.final(self.run, step), need, stop=self.stop_when_full, rank=self.rank, gather=gather)

    @contextmanager
    def saving(self, step: int, facts: Callable[[], Mapping[str, Any]]) -> Iterator[Path]:
        """Yield the folder for the checkpoint of `step`, made by rank 0; the caller sees to it that all ranks wait."""
        began = time.monotonic()
        self.join()
        self._leaves = False
        folder = commit.staging(self.run, step)
        if self.rank == 0:
            commit.open_staging(folder)
        self._writes, self._last = [], []
        yield folder
        writes, last, said = self._writes, self._last, facts()
        self._begin(lambda: self._write_and_commit(folder, step, writes, last, said))
        self.held.append(time.monotonic() - began)

    def hand_over(self, path: Path, write: Write) -> None:
        """Have `write(path)` called later; what it writes must not change until then."""
        self._writes.append((path, write))

    def hand_over_last(self, path: Path, write: Write) -> None:
        """Have `write(path)` called on rank 0 when all ranks have written what they handed over."""
        self._last.append((path, write))

    def _begin(self, job: Callable[[], None]) -> None:
        if not self.background:
            job()
            return
        self._thread = threading.Thread(target=job, name="checkpoint writer")
        self._thread.start()

    def _write_and_commit(
        self, folder: Path, step: int, writes: Writes, last: Writes, facts: Mapping[str, Any]
    ) -> None:
        """Write this rank's files and hand them over; rank 0 waits for the others' and commits. Never raises."""
        try:
            self._write_part(folder, writes)
            if self.rank == 0:
                self._commit(folder, step, last, facts)
        except commit.NotCommitted as reason:
            self._failed(step, str(reason))
        except Exception as error:
            self._failed(step, _words(error))
        finally:
            last.clear()
        if self.rank == 0 and self._full:  # what was written would leave no room for the next
            shutil.rmtree(folder, ignore_errors=True)

    def _write_part(self, folder: Path, writes: Writes) -> None:
        try:
            entries = _written(folder, writes)
        except Exception as error:
            commit.hand_over(folder, self.rank, {}, failure=_words(error))
            raise commit.NotCommitted(f"rank {self.rank}: {_words(error)}") from error
        commit.hand_over(folder, self.rank, entries)

    def _commit(self, folder: Path, step: int, last: Writes, facts: Mapping[str, Any]) -> None:
        files = commit.handed_over(folder, self.world_size, patience=self._patience)
        files |= _written(folder, last)
        place = commit.final(self.run, step)
        commit.publish(folder, place, facts, files)
        self.committed = step
        try:
            self.after_commit(place)
        except Exception as error:  # the checkpoint stands, whatever becomes of those before it
            log.warn(f"{place.name} is committed, but not all that follows was done: {_words(error)}")

    def _patience(self) -> float:
        return min(self.patience, LEAVING) if self._leaves else self.patience

    def _failed(self, step: int, reason: str) -> None:
        standing = checkpoints(self.run)
        stands = f"{standing[-1].name} stands" if standing else "no checkpoint stands yet"
        self._failure = f"checkpoint-{step} was not committed ({reason}); {stands}"
        self._full = NO_SPACE in reason
        log.warn(self._failure)

    def join(self) -> None:
        """Wait for the save that is under way; raise `Fault` where the disk was full and that is to stop the run."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        full, self._full = self._full, False
        if failure and full and self.stop_when_full:
            raise Fault(f"{failure}; make room, or let the run go on without it with --full_disk go_on")

    def leave(self) -> None:
        """Wait for the save that is under way, and not for long where another rank has ended: this one ends badly."""
        self._leaves = True
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _written(folder: Path, writes: Writes) -> dict[str, Mapping[str, Any]]:
    """Write and flush files, and return their entries; those that only help to make the checkpoint have none."""
    entries: dict[str, Mapping[str, Any]] = {}
    try:
        for path, write in writes:
            write(path)
            if path.parent.name != commit.HANDED:
                manifest.flush(path)
                entries[str(path.relative_to(folder))] = manifest.entry(path)
    except Exception:
        for path, _ in writes:  # on a full disk there must be room to say so
            path.unlink(missing_ok=True)
        raise
    finally:
        writes.clear()  # let go of what they hold
    return entries


def _words(error: Exception) -> str:
    """Return what went wrong in a few words; a full disk always by that name."""
    if is_full(error):
        return f"{NO_SPACE} on the disk"
    return first_line(error) if str(error).strip() else os.strerror(getattr(error, "errno", None) or errno.EIO)

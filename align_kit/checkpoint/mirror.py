"""A second place for checkpoints: copied in the background, verified there, fetched from there when the first is gone.

The second place is laid out as the run's folder. Files come first, the manifest last, so that what was cut short is no
checkpoint there either. What opens a URL (a password, a token) is neither printed nor stored.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from align_kit import log, run_folder
from align_kit.checkpoint import commit, manifest
from align_kit.checkpoint.keep import Rule
from align_kit.checkpoint.reading import reading
from align_kit.config import places
from align_kit.errors import UserError, first_line
from align_kit.run_folder import step_of

UNFINISHED = ".unfinished"  # a file in a copy that is being made or taken away
BESIDE = (run_folder.MANIFEST, run_folder.METRICS)  # what goes with a run's checkpoints
FETCHING = ".fetching-"


class NotThere(Exception):
    """A copy that was not made, or that does not verify: why, in a few words."""


class Place:
    """A URL that fsspec opens, seen as the folder of a run. Its errors carry nothing that opens it."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url, self.shown = url, places.public(url)
        with self.naming_errors():
            self.fs, self.root = url_to_fs(url)

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Turn what a backend raises, each its own, into a `UserError`: its traceback may hold a password."""
        try:
            yield
        except (NotThere, UserError):
            raise
        except Exception as error:
            raise UserError(f"save_copy_to {self.shown} cannot be used: {_words(error, self.url)}") from None

    def at(self, *names: str) -> str:
        """Return the path of something there."""
        return "/".join((self.root.rstrip("/"), *names))

    def names(self) -> list[str]:
        """Return the checkpoints that have a manifest there, newest first."""
        return [name for name in self._folders() if self.fs.exists(self.at(name, manifest.NAME))]

    def unfinished(self) -> list[str]:
        """Return the copies that were cut short, or whose removal was."""
        return [name for name in self._folders() if self.fs.exists(self.at(name, UNFINISHED))]

    def _folders(self) -> list[str]:
        with self.naming_errors():
            self.fs.invalidate_cache()
            found = self.fs.ls(self.root, detail=False) if self.fs.exists(self.root) else []
        names = {PurePosixPath(str(path)).name for path in found}
        ours = [name for name in names if name.startswith(f"{commit.NAME}-") and name.rpartition("-")[2].isdigit()]
        return sorted(ours, key=step_of, reverse=True)

    def manifest(self, name: str) -> dict[str, Any]:
        """Return the manifest of a checkpoint there; raise `NotThere` where it has none to go by."""
        with tempfile.TemporaryDirectory() as folder:
            self.fs.get_file(self.at(name, manifest.NAME), str(Path(folder) / manifest.NAME))
            found = manifest.read(Path(folder))
        if found is None:
            raise NotThere("its manifest was changed or cut")
        for file in found["files"]:
            path = PurePosixPath(file)
            if path.is_absolute() or ".." in path.parts:  # a place of others' may name any file of ours
                raise NotThere(f"its manifest names {file!r}, outside the checkpoint")
        return found

    def check(self, name: str, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Read files of a checkpoint back; raise `NotThere` where one is not what its manifest says."""
        for file, said in files.items():
            path = self.at(name, file)
            size = self.fs.size(path)
            if size != said["size"]:
                raise NotThere(f"{file} has {size} bytes there, {said['size']} here")
            if self._digest(path) != said["digest"]:
                raise NotThere(f"{file} has other bytes there than here")

    def _digest(self, path: str) -> str:
        import xxhash

        state = xxhash.xxh3_128()
        with self.fs.open(path, "rb") as stream:
            while piece := stream.read(manifest.PIECE):
                state.update(piece)
        return str(state.hexdigest())

    def _make(self, folder: str) -> None:
        """Make a folder there; on this machine the place itself is for its owner alone."""
        if (local := places.local_folder(self.url)) is not None:
            run_folder.make_private(local)
        self.fs.makedirs(folder, exist_ok=True)

    def put(self, source: Path, *names: str) -> None:
        """Copy a file there."""
        target = self.at(*names)
        self._make(target.rpartition("/")[0])
        self.fs.put_file(str(source), target)

    def mark(self, name: str) -> None:
        """Make what stands under a checkpoint's name no checkpoint from here on."""
        self._make(self.at(name))
        self.fs.pipe_file(self.at(name, UNFINISHED), b"")
        if self.fs.exists(self.at(name, manifest.NAME)):
            self.fs.rm_file(self.at(name, manifest.NAME))

    def remove(self, name: str) -> None:
        """Delete a copy, its manifest first."""
        self.mark(name)
        self.fs.rm(self.at(name), recursive=True)


def _words(error: Exception, url: str) -> str:
    """Return an error in one line, without what opens `url`."""
    return first_line(error, lambda text: places.scrubbed(text, url))


# --- there ------------------------------------------------------------------------------------------------------------


def push(checkpoint: Path, url: str) -> None:
    """Copy a committed checkpoint to `url`, read it back there, and only then let it be one there.

    Raises `NotThere`, or whatever the backend raises, where that fails; nobody deletes the checkpoint meanwhile.
    """
    place, name = Place(url), checkpoint.name
    with reading(checkpoint):
        said = manifest.read(checkpoint)
        if said is None:
            raise NotThere("its manifest was changed or cut")
        place.mark(name)
        for file in said["files"]:
            place.put(checkpoint / file, name, file)
        place.check(name, said["files"])
        for file in BESIDE:
            if (checkpoint.parent / file).is_file():
                place.put(checkpoint.parent / file, file)
        place.put(checkpoint / manifest.NAME, name, manifest.NAME)
    if place.manifest(name) != said:
        raise NotThere("its manifest is another there than here")
    place.fs.rm_file(place.at(name, UNFINISHED))


def retain(url: str, rule: Rule, *, best: str | None, newest: str) -> None:
    """Delete the checkpoints at `url` that `rule` does not keep beside `newest` and `best`.

    Bytes are not limited there; copies that were cut short go too.
    """
    place = Place(url)
    cut = [name for name in place.unfinished() if name != newest]
    sizes = {step_of(name): 0 for name in place.names()}
    beyond, _ = rule.given_up(sizes, {step_of(name) for name in (best, newest) if name})
    gone = [*cut, *(f"{commit.NAME}-{step}" for step in beyond)]
    for name in dict.fromkeys(gone):
        place.remove(name)


def clear(url: str) -> None:
    """Delete every checkpoint at `url`."""
    place = Place(url)
    with place.naming_errors():
        for name in dict.fromkeys([*place.names(), *place.unfinished()]):
            place.remove(name)


# --- back -------------------------------------------------------------------------------------------------------------


def pull(url: str, into: Path) -> Path | None:
    """Fetch the newest checkpoint at `url` that verifies once it is here, with what goes with the run.

    Returns its folder in `into`, `None` where there is none. What stood under its name is moved to `<into>/torn/`.
    Raises `UserError` where the place cannot be used.
    """
    place = Place(url)
    run_folder.make_private(into)
    with place.naming_errors():
        for name in place.names():
            staging = into / f"{FETCHING}{name}"
            try:
                _fetch(place, name, staging)
                return _take(place, staging, into / name)
            except NotThere as reason:
                log.warn(f"{name} at {place.shown} is left alone: {reason}")
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return None


def _fetch(place: Place, name: str, staging: Path) -> None:
    """Copy a checkpoint into `staging`; raise `NotThere` where it does not verify here."""
    shutil.rmtree(staging, ignore_errors=True)
    for file in [*place.manifest(name)["files"], manifest.NAME]:
        target = staging / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if not place.fs.exists(place.at(name, file)):
            raise NotThere(f"{file} is missing")
        place.fs.get_file(place.at(name, file), str(target))
        manifest.flush(target)
    if lines := manifest.problems(staging):
        raise NotThere(lines[0])


def _take(place: Place, staging: Path, target: Path) -> Path:
    """Let what was fetched stand under its name, the run's own files beside it where they are gone."""
    for file in BESIDE:
        if not (target.parent / file).exists() and place.fs.exists(place.at(file)):
            place.fs.get_file(place.at(file), str(target.parent / file))
    if target.exists():
        commit.set_aside(target)
    os.rename(staging, target)
    manifest.flush(target.parent)
    return target


# --- in the background ------------------------------------------------------------------------------------------------


class Copies:
    """Copies the checkpoints of a run to a second place, one at a time, behind the training's back.

    A copy that fails is a warning: the checkpoint stands where it is. One that has to wait is overtaken by the next.
    """

    def __init__(self, url: str, rule: Rule) -> None:
        self.url, self.rule = url, rule
        self._lock = threading.Lock()
        self._waiting: tuple[Path, Path | None] | None = None
        self._thread: threading.Thread | None = None

    def later(self, checkpoint: Path, best: Path | None) -> None:
        """Have `checkpoint` copied once the copy at hand is done; of those there `best` stays."""
        with self._lock:
            if self._waiting is not None:
                log.warn(f"{self._waiting[0].name} is not copied: {checkpoint.name} is newer")
            self._waiting = (checkpoint, best)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint copies", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Wait for the copies that are due."""
        while (thread := self._thread) is not None and thread.is_alive():
            thread.join()

    def _work(self) -> None:
        for checkpoint, best in self._due():
            self._copy(checkpoint, best)

    def _due(self) -> Iterator[tuple[Path, Path | None]]:
        while True:
            with self._lock:
                job, self._waiting = self._waiting, None
                if job is None:
                    self._thread = None
                    return
            yield job

    def _copy(self, checkpoint: Path, best: Path | None) -> None:
        try:
            push(checkpoint, self.url)
            retain(self.url, self.rule, best=best.name if best else None, newest=checkpoint.name)
        except Exception as error:  # whatever a backend raises: the checkpoint stands where it is
            why = _words(error, self.url)
            log.warn(f"{checkpoint.name} was not copied to {places.public(self.url)} ({why}); the run goes on")

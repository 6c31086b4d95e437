"""The folder of a run: may it be written, what does its manifest say, which run comes before."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_kit import occupied
from align_kit.errors import UserError
from align_kit.scrub import scrubbed

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
MACHINE = "machine/"  # begins the names of logged numbers that depend on the machine
ANSWERS = "samples_before_after.jsonl"
REPORT = "report.html"
FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Return where tokenised data is kept between runs: `$ALIGN_KIT_CACHE`, else `~/.cache/align_kit`."""
    if given := environ.get("ALIGN_KIT_CACHE"):
        return Path(given)
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align_kit"


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for its owner alone; one that exists stays as it is.

    What lies in it has the permissions of the user's umask: who opens the folder to others opens all of it.
    """
    for place in [*reversed(folder.parents), folder]:
        if place == folder or not place.exists():
            place.mkdir(mode=0o700, exist_ok=True)


@dataclass(frozen=True)
class Recut:
    """A checkpoint that was cut for `before` ranks, made ready in `folder` for the `after` there are now."""

    checkpoint: Path
    folder: Path
    before: int
    after: int
    converted: bool  # the engine's state is in the universal format
    seconds: float  # that took


@dataclass
class RunFolder:
    """`output_dir` of a run and the manifest in it; `resume_from` is the checkpoint the run goes on from."""

    path: Path
    manifest: dict[str, Any]
    resume_from: Path | None = None
    recut: Recut | None = None  # that checkpoint for another number of ranks
    replaces: bool = False  # what stands there goes once everything the new run needs has been found
    spares: tuple[str, ...] = ()  # of what stands there, by name
    changes: list[dict[str, Any]] = field(default_factory=list)  # what differs from the run that goes on, as allowed
    begun: bool = False  # whether this process has written the manifest

    @contextmanager
    def telling_failure(self) -> Iterator[None]:
        """Write into the manifest, once the run has written one, that it failed and how.

        A run that is refused before leaves the folder of the one it would go on with as it was.
        """
        try:
            yield
        except Exception as error:
            if self.begun and int(os.environ.get("RANK", "0")) == 0:
                with contextlib.suppress(OSError):  # a full disk must not hide why the run failed
                    self.write(status=FAILED, failure=scrubbed(str(error))[:500])
            raise

    def refuse_inside(self, option: str, used: str | Path | None) -> None:
        """Refuse to replace a folder that holds what the new run is made from."""
        if self.replaces and used and Path(used).expanduser().resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"--overwrite would delete the {option} {used} in output_dir {self.path}; name another")

    def clear(self) -> None:
        """Remove what the new run replaces; called when everything it needs has been found, on rank 0."""
        if self.replaces:
            # The manifest last: what a kill leaves is still a run, which may be replaced.
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == MANIFEST):
                if entry.name in self.spares:
                    continue
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            self.replaces = False

    @property
    def loads_from(self) -> Path | None:
        """Where the state is loaded from: the checkpoint, or what was made of it for another number of ranks."""
        return self.recut.folder if self.recut else self.resume_from

    def check_cut(self, cut_for: int | None, world_size: int, *, may_cut: bool = False) -> None:
        """Refuse a checkpoint that is cut for another number of ranks than there are, unless it may be cut anew.

        The run itself may have gone on with that many since: what differs from the run is refused before.
        """
        if cut_for not in (None, world_size) and not may_cut:
            raise UserError(
                f"--resume: {self.resume_from} is cut for a world_size of {cut_for}, now {world_size}; start that many "
                "ranks, or go on with --allow_change world_size: it is cut anew then, and not bitwise the same"
            )

    @property
    def step(self) -> int:
        """The optimizer step that the run goes on from; 0 for one that begins."""
        return step_of(self.resume_from) if self.resume_from else 0

    def has_changed(self, *names: str) -> bool:
        """Tell whether one of these options or facts is, as allowed, not what it was when the run began."""
        return any(one["name"] in names for one in self.changes)

    def plain(self) -> dict[str, Any]:
        """Return the manifest as it is stored: plain values, without secrets."""
        return dict(scrubbed(json.loads(json.dumps(self.manifest, default=str))))

    def write(self, **entries: Any) -> None:
        """Lay `entries` over the manifest and store it without secrets: whole or not at all."""
        self.manifest |= entries
        self.begun = True
        text = json.dumps(self.plain(), indent=2, sort_keys=True)
        make_private(self.path)
        draft = self.path / f".{MANIFEST}.{os.getpid()}"
        try:
            with draft.open("w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())  # a rename that outlives its file's bytes leaves an empty one
            os.replace(draft, self.path / MANIFEST)
        finally:
            draft.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of the run in `folder`, `None` where it holds none that can be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def open_folder(output_dir: str, *, resume: str | None, overwrite: bool, first: bool = True) -> RunFolder:
    """Return the folder of a run under the one rule for folders that are not empty: resume, overwrite, or refuse.

    One rank calls it as the `first`: it alone looks, clears and makes the folder, and holds it. `resume` is "auto"
    (which checkpoint is for the caller to find) or a checkpoint's folder. Raises `UserError` where the folder cannot be
    written, is not empty, or holds something else than a run, where another process trains in it, and where no
    checkpoint of this run is named.
    """
    path = Path(output_dir).expanduser()
    if first and path.is_dir():
        _hold(path)
    if resume:
        return RunFolder(path, read_manifest(path) or {}, None if resume == "auto" else _named(path, resume))
    if not first:
        return RunFolder(path, {})
    replaces = path.is_dir() and any(path.iterdir())
    if replaces:
        _check_replaceable(path, overwrite)
    _check_writable(path)
    _hold(path)
    return RunFolder(path, {}, replaces=replaces)


def _hold(path: Path) -> None:
    if who := occupied.hold(path):
        raise UserError(f"{who} trains in output_dir {path}; wait for it or end it, or name another")


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if _left_nothing(path):
        return
    if not overwrite:
        raise UserError(
            f"output_dir {path} is not empty; go on with --resume, replace it with --overwrite, or name another"
        )
    if not read_manifest(path):
        raise UserError(
            f"output_dir {path} is not empty and holds no run of align_kit; remove it yourself if it may go"
        )


def _left_nothing(path: Path) -> bool:
    """Tell whether the run in `path` failed before it had stored anything: nothing is lost by starting again."""
    manifest = read_manifest(path)
    stored = checkpoints(path) or any(path.glob("**/*.safetensors"))
    return manifest is not None and manifest.get("status") == FAILED and not stored


def _check_writable(path: Path) -> None:
    try:
        make_private(path)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"output_dir {path} cannot be written ({error.strerror}); name another with --output_dir"
        ) from None


def _named(path: Path, resume: str) -> Path:
    chosen = Path(resume).expanduser()
    if not re.fullmatch(r"checkpoint-\d+", chosen.name):
        raise UserError(f"--resume {resume}: no checkpoint's name; give a checkpoint-N folder, or --resume alone")
    if not (chosen / "trainer_state.json").is_file():
        raise UserError(f"--resume {resume}: no checkpoint there (no trainer_state.json); give a checkpoint-N folder")
    if chosen.resolve().parent != path.resolve():
        raise UserError(
            f"--resume {resume} is a checkpoint of another run than output_dir {path}; a run goes on in its own "
            f"folder: give --output_dir {chosen.parent}"
        )
    return chosen


def step_of(checkpoint: Path | str) -> int:
    """Return the step in a checkpoint's name."""
    return int(str(checkpoint).rpartition("-")[2])


def checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    return sorted((p for p in path.glob("checkpoint-*") if p.name[11:].isdigit()), key=step_of)


def predecessor(output_dir: Path, phases: Sequence[str]) -> tuple[Path, str] | None:
    """Return the newest-phase finished run beside `output_dir` that a phase may start from, with its phase."""
    for phase in phases:
        folder = output_dir.parent / phase
        manifest = read_manifest(folder)
        if folder.resolve() != output_dir.resolve() and manifest and manifest.get("status") == FINISHED:
            return folder, phase
    return None

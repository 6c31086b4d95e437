"""The folder of a run: may it be written, what does its manifest say, which run comes before."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_kit.errors import UserError

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
FINISHED, FAILED = "finished", "failed"


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Return where tokenised data is kept between runs: `$ALIGN_KIT_CACHE`, else `~/.cache/align_kit`."""
    if given := environ.get("ALIGN_KIT_CACHE"):
        return Path(given)
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align_kit"


@dataclass
class RunFolder:
    """`output_dir` of a run and the manifest in it; `resume_from` is the checkpoint the run goes on from."""

    path: Path
    manifest: dict[str, Any]
    resume_from: Path | None = None
    replaces: bool = False  # what stands there goes once everything the new run needs has been found

    @contextmanager
    def telling_failure(self) -> Iterator[None]:
        """Write into the manifest, where there is one, that the run failed and how."""
        try:
            yield
        except Exception as error:
            if self.manifest and int(os.environ.get("RANK", "0")) == 0:
                self.write(status=FAILED, failure=str(error)[:500])
            raise

    def refuse_inside(self, option: str, used: str | Path | None) -> None:
        """Refuse to replace a folder that holds what the new run is made from."""
        if self.replaces and used and Path(used).expanduser().resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"--overwrite would delete the {option} {used} in output_dir {self.path}; name another")

    def clear(self) -> None:
        """Remove what the new run replaces; called when everything it needs has been found, on rank 0."""
        if self.replaces:
            for entry in self.path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            self.replaces = False

    def check_same_run(self, phase: str, world_size: int) -> None:
        """Refuse to go on with another phase's run, or on another number of ranks than its checkpoint was cut for."""
        if self.resume_from is None or not self.manifest:
            return
        was = self.manifest.get("phase"), self.manifest.get("world_size")
        if was[0] != phase:
            raise UserError(
                f"--resume: {self.path} is a {was[0]} run, not a {phase} run; go on with the {was[0]} recipe"
            )
        if was[1] != world_size:
            raise UserError(
                f"--resume: the run in {self.path} had a world size of {was[1]}, now it is {world_size}; its "
                f"checkpoints are cut for {was[1]}: start that many ranks"
            )

    def write(self, **entries: Any) -> None:
        """Lay `entries` over the manifest and store it: whole or not at all."""
        self.manifest |= entries
        text = json.dumps(self.manifest, indent=2, sort_keys=True, default=str)
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path, prefix=".manifest-", delete=False) as stream:
            stream.write(text)
        os.chmod(stream.name, 0o644)
        os.replace(stream.name, self.path / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of the run in `folder`, `None` where it holds none that can be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def open_folder(output_dir: str, *, resume: str | None, overwrite: bool, first: bool = True) -> RunFolder:
    """Return the folder of a run under the one rule for folders that are not empty: resume, overwrite, or refuse.

    One rank calls it as the `first`: it alone looks, clears and makes the folder. Raises `UserError` where the
    folder cannot be written, is not empty, holds something else than a run, or has nothing to resume from.
    """
    path = Path(output_dir).expanduser()
    if resume:
        return RunFolder(path, read_manifest(path) or {}, _checkpoint(path, resume))
    if not first:
        return RunFolder(path, {})
    replaces = path.is_dir() and any(path.iterdir())
    if replaces:
        _check_replaceable(path, overwrite)
    _check_writable(path)
    return RunFolder(path, {}, replaces=replaces)


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
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"output_dir {path} cannot be written ({error.strerror}); name another with --output_dir"
        ) from None


def _checkpoint(path: Path, resume: str) -> Path:
    if resume != "auto":
        chosen = Path(resume).expanduser()
        if not (chosen / "trainer_state.json").is_file():
            raise UserError(
                f"--resume {resume}: no checkpoint there (no trainer_state.json); give a checkpoint-N folder"
            )
        if chosen.resolve().parent != path.resolve():
            raise UserError(
                f"--resume {resume} is a checkpoint of another run than output_dir {path}; a run goes on in its own "
                f"folder: give --output_dir {chosen.parent}"
            )
        return chosen
    found = checkpoints(path)
    if not found:
        raise UserError(f"--resume: {path} holds no checkpoint to go on from; start without --resume")
    return found[-1]


def checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    numbered = [(int(p.name.rpartition("-")[2]), p) for p in path.glob("checkpoint-*") if p.name[11:].isdigit()]
    return [p for _, p in sorted(numbered)]


def predecessor(output_dir: Path, phases: Sequence[str]) -> tuple[Path, str] | None:
    """Return the newest-phase finished run beside `output_dir` that a phase may start from, with its phase."""
    for phase in phases:
        folder = output_dir.parent / phase
        manifest = read_manifest(folder)
        if folder.resolve() != output_dir.resolve() and manifest and manifest.get("status") == FINISHED:
            return folder, phase
    return None

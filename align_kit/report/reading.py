"""What a run left in its folder, read for a page: its manifest, what it logged, what was answered before and after."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_kit import run_folder
from align_kit.errors import UserError

ROLLOUTS = "samples.jsonl"  # what an online phase wrote as it trained


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it; `lines` are what it logged, its closing line left out."""

    folder: Path
    manifest: Mapping[str, Any]
    lines: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    rollouts: list[dict[str, Any]]

    @property
    def phase(self) -> str:
        return str(self.manifest.get("phase", "run"))

    def names(self) -> list[str]:
        """Return the names of all numbers that were logged, in the order in which they first came."""
        numbers = (name for line in self.lines for name, value in line.items() if isinstance(value, int | float))
        return list(dict.fromkeys(name for name in numbers if name != "step"))

    def series(self, name: str) -> list[tuple[float, float]]:
        """Return the (step, value) points of one number, a step that was logged again with its last value."""
        points = {line["step"]: line[name] for line in self.lines if isinstance(line.get(name), int | float)}
        return sorted((float(step), float(value)) for step, value in points.items())

    def last(self, name: str) -> float | None:
        """Return the last value of a number, `None` where it was never logged."""
        points = self.series(name)
        return points[-1][1] if points else None


def read(folder: str | Path) -> Record:
    """Return the run in `folder`; raises `UserError` where there is none."""
    place = Path(folder).expanduser()
    manifest = run_folder.read_manifest(place)
    if manifest is None or "phase" not in manifest:
        raise UserError(
            f"{folder} holds no run of align_kit (no {run_folder.MANIFEST} that tells of one); give an output_dir"
        )
    logged = [line for line in _lines(place / run_folder.METRICS) if "step" in line and "train_runtime" not in line]
    answers = _lines(place / run_folder.ANSWERS)
    return Record(place, manifest, logged, list(answers), list(_lines(place / ROLLOUTS)))


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the lines of a file, of one that is not there none."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as stream:
        yield from lines_of(stream)


def lines_of(texts: Iterable[str]) -> Iterable[dict[str, Any]]:
    """Yield JSON lines; one that was not written whole, the last of a run that was killed, is left out."""
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line

"""What a finished run left, as numbers: its last evaluation, its curve, its speed and its sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from align_kit import run_folder
from align_kit.compare.sweep import LOSS, REWARD
from align_kit.errors import UserError
from align_kit.report.reading import lines_of

SPEED = "machine/tokens_per_second"


@dataclass(frozen=True)
class Point:
    """Where a run stood at an evaluation: its step, the tokens it had trained on, the loss on held-out rows."""

    step: int
    tokens: float
    loss: float


@dataclass(frozen=True)
class Ran:
    """One finished run: which arm, rate and seed, its folder, manifest and metrics, and what was measured after."""

    arm: str
    rate: float
    seed: int
    home: Path
    manifest: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    found: Mapping[str, Any] = field(default_factory=dict)

    @property
    def evaluated(self) -> Mapping[str, Any]:
        """The last evaluation's line; empty where there was none."""
        return next((line for line in reversed(self.lines) if "eval_loss" in line or "eval_reward" in line), {})

    @property
    def quantity(self) -> str:
        """What the run is judged by: a reward where it was evaluated by one, else a loss."""
        return REWARD if "eval_reward" in self.evaluated else LOSS

    @property
    def curve(self) -> list[Point]:
        """Every evaluation with a loss."""
        return [
            Point(line["step"], self.tokens(line["step"]), line["eval_loss"])
            for line in self.lines
            if "eval_loss" in line
        ]

    def tokens(self, step: float) -> float:
        """Return the tokens trained on up to a step, by the lines logged around it."""
        total, before = 0.0, 0
        for line in self.lines:
            if "tokens" not in line or "loss" not in line:
                continue
            if line["step"] >= step:
                share = (step - before) / max(1, line["step"] - before)
                return total + line["tokens"] * share
            total, before = total + line["tokens"], line["step"]
        return total

    @property
    def tokens_by_step(self) -> list[tuple[int, float]]:
        """The tokens of every logged stretch: equal where two runs saw the same batches in the same order."""
        return [(line["step"], line["tokens"]) for line in self.lines if "tokens" in line and "loss" in line]

    @property
    def speed(self) -> float | None:
        """Tokens a second over all ranks: the median of what was logged, without the first step."""
        speeds = [line[SPEED] for line in self.lines if SPEED in line and line["step"] > 1]
        return median(speeds) if speeds else None

    @property
    def measured(self) -> Mapping[str, Any]:
        """What the run measured of itself: see `align_kit.trainers.measured`."""
        return self.manifest.get("measured", {})


def read(arm: str, rate: float, seed: int, home: Path, manifest: Mapping[str, Any]) -> Ran:
    """Return the finished run in `home`; raises `UserError` where what it logged is not whole."""
    return Ran(arm, rate, seed, home, manifest, _logged(home))


CLOSING = "train_runtime"  # is in the line that ends what a run logs


def _logged(home: Path) -> list[dict[str, Any]]:
    """Return all lines that a finished run logged: one that is lost would shift its curve and its counts."""
    file = home / run_folder.METRICS
    again = f"remove {home} and give the same command again: that run alone is done anew"
    try:
        texts = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}), though its run finished; {again}") from None
    lines = list(lines_of(texts))
    if len(lines) < len(texts) or not any(CLOSING in line for line in lines):
        lost = f"{len(texts) - len(lines)} of {len(texts)} lines cannot be read" if texts else "it is empty"
        lost = lost if len(lines) < len(texts) or not texts else "its last line is missing"
        raise UserError(f"{file} is not whole ({lost}), though its run finished; {again}")
    return lines


def checkpoint_bytes(home: Path) -> int | None:
    """Return what the run's last checkpoint takes on disk; `None` where it kept none."""
    kept = run_folder.checkpoints(home)
    return sum(file.stat().st_size for file in kept[-1].rglob("*") if file.is_file()) if kept else None


def tokens_to(curve: Sequence[Point], quality: float) -> float | None:
    """Return the tokens after which the held-out loss was first `quality` or less, between evaluations by a line."""
    before = None
    for point in curve:
        if point.loss <= quality:
            if before is None:
                return point.tokens
            share = (before.loss - quality) / (before.loss - point.loss)
            return before.tokens + share * (point.tokens - before.tokens)
        before = point
    return None


def with_found(ran: Ran, found: Mapping[str, Any]) -> Ran:
    """Return the run with what was measured on its model."""
    return replace(ran, found=found)

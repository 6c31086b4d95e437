"""Which checkpoints stay when another is committed, and how the others go.

What stays: the newest K, those at multiples of M steps, the best by metric, within a number of bytes. Never given up:
the newest that verifies, the one just committed, the best, one that somebody reads. Where bytes are short, milestones
go first, then the older of the newest K.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align_kit import log
from align_kit.checkpoint import manifest
from align_kit.checkpoint.reading import alone, is_read
from align_kit.config import Config
from align_kit.config.quantities import parse_bytes, shown_bytes
from align_kit.run_folder import checkpoints, step_of

BEING_DELETED = ".leaving-"  # the name of a checkpoint that is being deleted begins so


@dataclass(frozen=True)
class Rule:
    """What stays: the newest `last` (None: all), multiples of `milestone_steps`, within `bytes_limit`."""

    last: int | None = None
    milestone_steps: int | None = None
    bytes_limit: int | None = None

    @classmethod
    def of(cls, config: Config) -> Rule:
        """Return the rule of a checked configuration."""
        limit = config.run.save_bytes_limit
        return cls(
            last=config.value("save_total_limit"),
            milestone_steps=config.run.save_milestone_steps,
            bytes_limit=parse_bytes(limit) if limit else None,
        )

    def is_milestone(self, step: int) -> bool:
        """Tell whether a checkpoint of `step` stays for good, bytes allowing."""
        return bool(self.milestone_steps) and step % int(self.milestone_steps or 1) == 0

    def newest(self, steps: Sequence[int]) -> set[int]:
        """Return the newest `last` of `steps`."""
        return set(sorted(steps) if self.last is None else sorted(steps)[-self.last :])

    def given_up(self, sizes: Mapping[int, int], safe: Collection[int]) -> tuple[list[int], list[int]]:
        """Return the steps that the rule does not keep, and those it would keep had they room; oldest first.

        `sizes` are bytes by step; nothing in `safe` is among them.
        """
        newest = self.newest(list(sizes))
        kept = {step for step in sizes if step in newest or step in safe or self.is_milestone(step)}
        short = sum(sizes[step] for step in kept) - self.bytes_limit if self.bytes_limit is not None else 0
        squeezed = []
        for step in sorted(kept - set(safe)):  # milestones are older than the newest
            if short <= 0:
                break
            squeezed.append(step)
            short -= sizes[step]
        return sorted(set(sizes) - kept), squeezed


def best_of(checkpoint: Path) -> Path | None:
    """Return the checkpoint that was the best by metric when `checkpoint` was saved, `None` where none was.

    The training loop knows a newer one perhaps, which is not committed yet.
    """
    try:
        best = json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"]
    except (OSError, ValueError, KeyError):
        return None
    return checkpoint.with_name(Path(best).name) if best else None


def surplus(run: Path, rule: Rule, *, best: Path | None, committed: Path) -> list[Path]:
    """Return the committed checkpoints of `run` that may go now that `committed` stands, oldest first.

    Where any may go, `committed` is read back first; does it not verify, the newest that does stays as well, and
    where none does, all stay. Says so, and what `bytes_limit` costs, in a line.
    """
    held = {step_of(place): place for place in checkpoints(run) if manifest.read(place) is not None}
    sizes = {step: manifest.total_bytes(place) for step, place in held.items()}
    safe = {step for step, place in held.items() if place.name == committed.name or is_read(place)}
    if best is not None:
        safe.add(step_of(best))
    beyond, squeezed = rule.given_up(sizes, safe)
    if not beyond and not squeezed:
        return []
    if lines := manifest.problems(committed):
        whole = next(_verified(place for step, place in sorted(held.items(), reverse=True)), None)
        stays = f"{whole.name} stays" if whole else "nothing is deleted"
        log.warn(f"{committed.name} does not verify ({lines[0]}): {stays}")
        if whole is None:
            return []
        beyond, squeezed = rule.given_up(sizes, safe | {step_of(whole)})
    _tell(rule, sizes, beyond, squeezed)
    return [held[step] for step in sorted([*beyond, *squeezed])]


def _verified(places: Iterator[Path]) -> Iterator[Path]:
    return (place for place in places if not manifest.problems(place))


def _tell(rule: Rule, sizes: Mapping[int, int], beyond: Sequence[int], squeezed: Sequence[int]) -> None:
    """Say which milestones go for want of bytes, and where even what must stay takes more than was allowed."""
    if rule.bytes_limit is None:
        return
    limit = f"save_bytes_limit {shown_bytes(rule.bytes_limit)}"
    if lost := [f"checkpoint-{step}" for step in squeezed if rule.is_milestone(step)]:
        log.warn(f"{limit}: no room for {', '.join(lost)}, which would have stayed for good")
    left = sum(sizes.values()) - sum(sizes[step] for step in [*beyond, *squeezed])
    if left > rule.bytes_limit:
        log.warn(f"{limit}: the checkpoints that must stay take {shown_bytes(left)}")


def remove(checkpoint: Path) -> bool:
    """Delete a checkpoint; False where somebody reads it. Killed in between, it leaves nothing that looks like one."""
    clean(checkpoint.parent)
    hidden = checkpoint.with_name(f"{BEING_DELETED}{checkpoint.name}")
    with alone(checkpoint) as free:
        if not free:
            return False
        os.rename(checkpoint, hidden)
    manifest.flush(checkpoint.parent)  # the new name first: after a power loss nothing half-deleted has the old one
    shutil.rmtree(hidden)
    return True


def clean(run: Path) -> None:
    """Delete what deletions that were cut short have left."""
    for place in run.glob(f"{BEING_DELETED}*"):
        shutil.rmtree(place)


def retain(run: Path, rule: Rule, *, best: Path | None, committed: Path) -> None:
    """Delete what `surplus` names."""
    for place in surplus(run, rule, best=best, committed=committed):
        if not remove(place):
            log.warn(f"{place.name} stays until another is committed: it is being read")

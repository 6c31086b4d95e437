"""When a run saves beside every so many steps, which checkpoints it keeps, and where else they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align_kit import log, run_folder
from align_kit.checkpoint import keep, mirror
from align_kit.checkpoint.find import Gather
from align_kit.checkpoint.when import When
from align_kit.config import Config, places
from align_kit.errors import UserError
from align_kit.run_folder import RunFolder


def save_points(trainer: Any, config: Config, home: RunFolder, args: Any) -> None:
    """Let the trainer save and stop when it is asked to; let rank 0 keep checkpoints by the rule, and copy them."""
    trainer.when = When(trainer, config.run.save_minutes, config.run.save_before)
    trainer.add_callback(trainer.when)
    args.save_total_limit = None  # transformers' own rule knows neither what verifies nor who reads
    rule, url = keep.Rule.of(config), config.run.save_copy_to
    if url and args.process_index == 0 and home.resume_from is None:
        mirror.clear(url)  # what stands there is of the run that this one replaces
    trainer.copies = mirror.Copies(url, rule) if url and args.process_index == 0 else None
    if args.process_index != 0:
        return

    def after_commit(checkpoint: Path) -> None:
        best = keep.best_of(checkpoint)
        if trainer.copies is not None:
            trainer.copies.later(checkpoint, best)
        keep.retain(home.path, rule, best=best, committed=checkpoint)

    trainer.saver.after_commit = after_commit


def finish_copies(trainer: Any) -> None:
    """Wait, on rank 0, for the copies that are due; the others wait for it: who ends first ends them all."""
    if trainer.copies is not None:
        trainer.copies.close()
    trainer.accelerator.wait_for_everyone()


# --- the second place, as a run begins --------------------------------------------------------------------------------


def refuse_used_copies(config: Config, args: Any) -> None:
    """Raise `UserError` where a new run would copy its checkpoints among those of an earlier one."""
    url = config.run.save_copy_to
    if not url or config.run.overwrite or args.process_index != 0:
        return
    if names := mirror.Place(url).names():
        raise UserError(
            f"save_copy_to {places.public(url)} holds {names[0]} of an earlier run; go on with --resume, replace what "
            "is there with --overwrite, or name another place"
        )


def fetched(config: Config, home: RunFolder, args: Any, gather: Gather) -> bool:
    """Tell whether a checkpoint to go on from was fetched from the second place; then `home` knows it. All ranks call.

    Where the run's folder is gone, what the run has recorded comes with it.
    """
    url = config.run.save_copy_to
    if not url:
        return False
    found = gather(mirror.pull(url, home.path) if args.process_index == 0 else None)[0]
    if found is None:
        return False
    log.warn(f"no checkpoint in {home.path} verifies: {found.name} was fetched from {places.public(url)}")
    home.resume_from, home.manifest = found, run_folder.read_manifest(home.path) or {}
    return True

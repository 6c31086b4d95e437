"""Whether what a run will lay on the disk finds room there: told before its policy loads, not at its last step."""

from __future__ import annotations

from pathlib import Path

from align_kit import log
from align_kit.checkpoint.space import MARGIN, free_bytes
from align_kit.config import Config
from align_kit.config.quantities import shown_bytes
from align_kit.plan.disk import checkpoint_bytes, disk_bytes, final_bytes
from align_kit.plan.facts import Run
from align_kit.run_folder import checkpoints


def without_room(run: Run, config: Config, name: str) -> str | None:
    """Return the line about a run of the model `name` that its disk has no room for, `None` where it has.

    What `--overwrite` replaces is room. A run that goes on, or that may leave checkpoints out (`full_disk go_on`), is
    warned where its final model fits: it loses no work then.
    """
    folder = Path(config.value("output_dir")).expanduser()
    free = free_bytes(folder) + _there(folder, config)
    need, least = (round(count * MARGIN) for count in (disk_bytes(run), final_bytes(run)))
    if need <= free:
        return None
    line = f"{run.phase} of {name} lays up to {shown_bytes(need)} on the disk ({_what(run)}), and {shown_bytes(free)} "
    line += f"{'are free or its own' if config.run.resume else 'are free'} in {folder}"
    if (config.run.resume or config.run.full_disk == "go_on") and least <= free:
        log.warn(f"{line}: {'a save may find no room' if config.run.resume else 'saves without room are left out'}")
        return None
    return f"{line}; {_way_out(run, least, free)}, or go on as it is with --force"


def _there(folder: Path, config: Config) -> int:
    """Return the bytes in `folder` that the run replaces, or counts among its own."""
    if not (config.run.resume or config.run.overwrite):
        return 0
    places = checkpoints(folder) if config.run.resume else [folder]
    files = (file for place in places for file in place.rglob("*") if file.is_file() and not file.is_symlink())
    return sum(file.stat().st_size for file in files)


def _what(run: Run) -> str:
    model = f"the final model {shown_bytes(final_bytes(run))}"
    if not run.checkpoints_made:
        return model
    return f"each checkpoint {shown_bytes(checkpoint_bytes(run))}, one more while it is written, {model}"


def _way_out(run: Run, least: int, free: int) -> str:
    if not run.checkpoints_made or least > free:
        return "make room, or name a folder elsewhere with --output_dir"
    fewer = "keep fewer (--save_total_limit 1), " if run.checkpoints_kept is None or run.checkpoints_kept > 1 else ""
    return f"{fewer}make room, let those without room be left out (--full_disk go_on)"

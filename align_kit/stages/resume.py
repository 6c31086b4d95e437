"""Which checkpoint a run goes on from, agreed by all ranks before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from align_kit import log, run_folder, supervised
from align_kit.checkpoint import commit, find, manifest, trusted
from align_kit.config import BatchPlan, Config
from align_kit.errors import UserError
from align_kit.registry import Recipe
from align_kit.run_folder import RunFolder
from align_kit.stages.contract import allowed, keep_options
from align_kit.stages.engine import Engine
from align_kit.stages.saving import fetched, refuse_used_copies


def open_home(recipe: Recipe, config: Config, engine: Engine, plan: BatchPlan, args: Any) -> RunFolder:
    """Open the run's folder under the rule for folders that are not empty; rank 0 first.

    A run that is started again goes on from its newest checkpoint, or from the beginning where it has none yet. One
    that goes on must be the run it was when the checkpoint was made, but for what it is allowed to change.
    """
    allowed(config)  # a mistake in it must not wait for the day the run goes on
    again = gather(os.environ.get(supervised.RESUME))[0]  # on several machines one launcher may be ahead
    home = _opened(config, args, again or config.run.resume)
    if not (again or config.run.resume):
        refuse_used_copies(config, args)
        return home
    named = home.resume_from is not None
    if named:
        _check_named(home, args)
    else:
        home.resume_from = find.newest_verified(home.path, args.process_index, gather)
    if home.resume_from is None and not fetched(config, home, args, gather):
        if again:
            anew = _opened(config, args, None, replace=True)
            anew.spares = (commit.TORN, commit.LEFT)
            return anew
        raise UserError(f"--resume: {home.path} holds no checkpoint to go on from; start without --resume")
    _take_up_record(home)
    keep_options(recipe, config, engine, plan, home)
    if named and args.process_index == 0:
        _leave_newer(home)
    return _vetted(home, config, args)


def _take_up_record(home: RunFolder) -> None:
    """Let what the run was be what its checkpoint says: the folder's manifest may be of another course of the run."""
    assert home.resume_from is not None
    passed_over = home.manifest.get("skip_steps", [])
    try:
        home.manifest = json.loads((home.resume_from / manifest.RUN).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{home.resume_from} does not say what run it is of (no {manifest.RUN}); go on from another checkpoint"
        ) from None
    if passed_over:  # decided after the checkpoint, and not to be met again
        home.manifest["skip_steps"] = sorted({*passed_over, *home.manifest.get("skip_steps", [])})


def _leave_newer(home: RunFolder) -> None:
    """Move checkpoints beyond the one that was named out of the way: the next resume must not take them up."""
    for place in run_folder.checkpoints(home.path):
        if run_folder.step_of(place) > home.step:
            moved = commit.set_aside(place, commit.LEFT)
            log.warn(f"the run goes on from step {home.step}: {place.name} was moved to {commit.LEFT}/{moved.name}")


def _opened(config: Config, args: Any, resume: str | None, *, replace: bool = False) -> RunFolder:
    with args.main_process_first(local=False, desc="output folder"):
        return run_folder.open_folder(
            args.output_dir,
            resume=resume,
            overwrite=config.run.overwrite or replace,
            first=args.process_index == 0,
        )


def _vetted(home: RunFolder, config: Config, args: Any) -> RunFolder:
    """Return `home` once rank 0 has seen that the pickled files of its checkpoint are data, before any is loaded."""
    assert home.resume_from is not None
    if args.process_index == 0:
        trusted.vet(home.resume_from, trust=config.run.trust_checkpoint)
    gather(None)
    return home


def _check_named(home: RunFolder, args: Any) -> None:
    """Raise `UserError` where the checkpoint that was named does not verify; it stays where it is."""
    assert home.resume_from is not None
    lines = find.problems_of(home.resume_from, args.process_index, gather)
    if lines:
        raise UserError(
            f"--resume {home.resume_from} does not verify ({'; '.join(lines[: find.SHOWN])}); --resume alone takes "
            "the newest checkpoint that does"
        )


def gather(mine: Any) -> list[Any]:
    """Return every rank's object, by rank."""
    import torch.distributed as dist

    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def facts_of(home: RunFolder, order_seed: int) -> Mapping[str, Any]:
    """Return what the manifest of a checkpoint says of its run: everything its state depends on, by digest."""
    from align_kit.data.digest import canonical_json, text_digest

    said = home.manifest
    return {
        "phase": said["phase"],
        "versions": said["versions"],
        "configuration": text_digest(canonical_json(said["config"])),
        "data": text_digest(canonical_json(said["data"])),
        "order_seed": order_seed,
        "policy": said["policy"]["digest"],
        "frozen": {role: identity["digest"] for role, identity in said["frozen"].items()},
    }

"""Which checkpoint a run goes on from, agreed by all ranks before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from align_kit import run_folder, supervised
from align_kit.checkpoint import commit, find, trusted
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
    that goes on must be the run it was, but for what it is allowed to change: before a checkpoint is read or moved.
    """
    allowed(config)  # a mistake in it must not wait for the day the run goes on
    again = os.environ.get(supervised.RESUME)
    home = _opened(config, args, again or config.run.resume)
    if not (again or config.run.resume):
        refuse_used_copies(config, args)
        return home
    if home.manifest and (home.resume_from or run_folder.checkpoints(home.path)):
        keep_options(recipe, config, engine, plan, home)
    if home.resume_from is not None:
        _check_named(home, args)
        return _vetted(home, config, args)
    home.resume_from = find.newest_verified(home.path, args.process_index, gather)
    if home.resume_from is None and fetched(config, home, args, gather):
        keep_options(recipe, config, engine, plan, home)
    if home.resume_from is None and again:
        anew = _opened(config, args, None, replace=True)
        anew.spares = (commit.TORN,)
        return anew
    if home.resume_from is None:
        raise UserError(f"--resume: {home.path} holds no checkpoint to go on from; start without --resume")
    return _vetted(home, config, args)


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

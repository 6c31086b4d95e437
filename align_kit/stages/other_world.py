"""A run that goes on with another number of ranks: its global batch stays, its checkpoint is cut anew."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align_kit import machine, run_folder, supervised
from align_kit.config import BatchPlan, Config
from align_kit.errors import UserError
from align_kit.run_folder import Recut, RunFolder

WORLD_SIZE = "world_size"  # the word in allow_change


def cut_for(home: RunFolder) -> int | None:
    """Return for how many ranks the checkpoint that the run goes on from is cut; None where it goes on from none."""
    from align_kit.checkpoint import manifest, universal

    if home.resume_from is None:
        return None
    said = manifest.read(home.resume_from) or home.manifest
    return universal.ranks_of(home.resume_from) or said.get(WORLD_SIZE)


def kept_batch(config: Config) -> BatchPlan | None:
    """Return the batch arithmetic of a run that goes on on other ranks, its global batch kept; None for other runs.

    Raises `UserError` where the global batch does not divide between them, naming what would.
    """
    goes_on = os.environ.get(supervised.RESUME) or config.run.resume
    if not (goes_on and config.may_change(WORLD_SIZE)) or config.run.global_batch_size:
        return None
    manifest = run_folder.read_manifest(Path(config.value("output_dir")).expanduser()) or {}
    if "batch" not in manifest:
        return None
    batch, ranks = BatchPlan(**manifest["batch"]).global_batch, machine.world_size()
    per_device = config.value("per_device_train_batch_size")
    if batch % (per_device * ranks):
        raise UserError(
            f"--allow_change world_size: the run's global batch of {batch} stays, and it does not divide into "
            f"{per_device} per rank x {ranks} ranks; use {_ways_out(batch, ranks)}"
        )
    return BatchPlan(per_device, ranks, batch // (per_device * ranks))


def _ways_out(batch: int, ranks: int) -> str:
    share, rest = divmod(batch, ranks)
    divides = [size for size in range(1, (share if not rest else batch) + 1) if (batch if rest else share) % size == 0]
    shown = " or ".join(str(size) for size in divides[-3:])
    return f"{shown} ranks" if rest else f"--per_device_train_batch_size {shown}"


@contextmanager
def cut_anew(config: Config, home: RunFolder, args: Any) -> Iterator[None]:
    """Have the checkpoint cut for the ranks there are now, where it was cut for others; rank 0 does it.

    What is made of it lies in the run's folder until training has loaded it, or until the run ends.
    """
    from align_kit.checkpoint import universal

    before, after = cut_for(home), machine.world_size()
    if args.process_index == 0:
        universal.clear(home.path)  # of a run that was killed
    if home.resume_from is None or before in (None, after):
        yield
        return
    try:
        home.recut = _recut(config, home.resume_from, before, after, args)
        yield
    finally:
        if args.process_index == 0:
            universal.clear(home.path)


def _recut(config: Config, checkpoint: Path, before: int, after: int, args: Any) -> Recut:
    from align_kit.checkpoint import universal

    _refuse_what_ranks_decide(args)
    began = time.monotonic()
    folder = checkpoint.with_name(f"{universal.FOLDER}-{checkpoint.name.rpartition('-')[2]}")
    with args.main_process_first(local=False, desc="checkpoint for another world size"):
        if args.process_index == 0:
            universal.prepare(checkpoint, folder, trust=config.run.trust_checkpoint)
    converted = universal.ranks_of(checkpoint) is not None
    if converted:
        universal.ask_for(args.hf_deepspeed_config.config)
    return Recut(checkpoint, folder, before, after, converted, time.monotonic() - began)


def _refuse_what_ranks_decide(args: Any) -> None:
    """Refuse options that mean something else on other ranks, before anything is converted."""
    if getattr(args, "load_best_model_at_end", False):
        raise UserError(
            "--allow_change world_size and load_best_model_at_end: the best checkpoint may be one that was cut for "
            "other ranks; leave load_best_model_at_end out and take the best checkpoint by yourself"
        )
    if args.dataloader_drop_last:
        raise UserError(
            "--allow_change world_size and dataloader_drop_last: which rows an epoch leaves out depends on the ranks; "
            "go on with the world size the checkpoint was cut for"
        )

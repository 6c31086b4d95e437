"""Whether a disk has room for the checkpoint to come, found before it is written; and what a full disk looks like."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align_kit import log
from align_kit.checkpoint import manifest
from align_kit.checkpoint.find import Gather
from align_kit.config.quantities import shown_bytes
from align_kit.errors import Fault
from align_kit.run_folder import checkpoints

MARGIN = 1.02  # what folders and blocks take beside the bytes of files
CUT_WEIGHTS = "global_step*/*zero_pp_rank_*_model_states.pt"  # what DeepSpeed writes of weights that ZeRO-3 cuts
NO_SPACE = "no space left"  # what the system says, and libraries after it
FELL_SHORT = ("inline_container.cc", "iostream error")  # what torch says of a file it could not write all of


def coming(run: Path, estimate: int) -> int:
    """Return the bytes that writing the next checkpoint takes: what the last one took, else the caller's estimate."""
    sizes = (_written(place) for place in reversed(checkpoints(run)) if manifest.read(place) is not None)
    return next(sizes, estimate)


def _written(checkpoint: Path) -> int:
    """Return the bytes that writing a checkpoint took: those it has, and ZeRO-3's shards of the whole weights.

    The shards are there until the weights are joined (see `assemble`). Where the weights were gathered instead, this
    is more than was written.
    """
    is_cut = any(checkpoint.glob(CUT_WEIGHTS))
    whole = sum(place.stat().st_size for place in checkpoint.glob("*.safetensors")) if is_cut else 0
    return manifest.total_bytes(checkpoint) + whole


def free_bytes(folder: Path) -> int:
    """Return the bytes that may still be written where `folder` lies or will lie; no end of them where none can tell.

    File systems that have no size of their own say that they have 0 blocks.
    """
    place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else sys.maxsize


def check(checkpoint: Path, need_bytes: int) -> str | None:
    """Return a line about how much is missing for a checkpoint of `need_bytes`, `None` where there is room."""
    need, free = round(need_bytes * MARGIN), free_bytes(checkpoint.parent)
    if free >= need:
        return None
    return (
        f"{checkpoint.name} needs {shown_bytes(need)}, {shown_bytes(free)} are free in {checkpoint.parent}: "
        f"{shown_bytes(need - free)} missing"
    )


def room(checkpoint: Path, need_bytes: int, *, stop: bool, rank: int, gather: Gather) -> bool:
    """Tell whether the checkpoint is to be written; all ranks call it and get rank 0's answer.

    Too little room raises `Fault` where that is to `stop` the run, else it is said in a line and this save left out.
    """
    line = gather(check(checkpoint, need_bytes) if rank == 0 else None)[0]
    if line is not None and stop:
        raise Fault(f"no space: {line}; make room, or let the run go on without it with --full_disk go_on")
    if line is not None:
        log.warn(f"no space: {line}; the run goes on without it")
    return line is None


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Turn an error of a run in `folder` that comes from a full disk into the `Fault` that says so."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise Fault(f"{NO_SPACE} in {folder}; make room, then go on with --resume") from error


def is_full(error: BaseException) -> bool:
    """Tell whether an error comes from a full disk, or a full quota.

    `torch.save` reports a write that fell short and not why; behind that stands an `OSError` at best.
    """
    links = list(_chain(error))
    if numbers := [link.errno for link in links if isinstance(link, OSError) and link.errno is not None]:
        return bool(set(numbers) & {errno.ENOSPC, errno.EDQUOT})
    return any(words in str(link).lower() for link in links for words in (NO_SPACE, *FELL_SHORT))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those behind it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__

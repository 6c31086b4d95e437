"""Who reads a checkpoint holds a lock on its manifest, so that nobody deletes it under the reader.

The lock is the system's (flock): it goes with the process, however that ends. A file system that knows no locks gives
none, and then nobody is seen reading.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from align_kit.checkpoint import manifest
from align_kit.errors import UserError


@contextmanager
def reading(checkpoint: Path) -> Iterator[Path]:
    """Keep a committed checkpoint from being deleted meanwhile; raise `UserError` where it is gone already."""
    place = checkpoint / manifest.NAME
    try:
        handle = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{checkpoint} cannot be read as a checkpoint ({error.strerror}); name another") from None
    try:
        _lock(handle, fcntl.LOCK_SH)
        if not _is_still(handle, place):
            raise UserError(f"{checkpoint} was deleted a moment ago, before it could be read; name another")
        yield checkpoint
    finally:
        os.close(handle)


@contextmanager
def reading_all(places: Iterable[Path | None]) -> Iterator[None]:
    """Do so with each folder of `places` that is a committed checkpoint; the others are left alone."""
    with ExitStack() as held:
        for place in places:
            if place is not None and manifest.read(place) is not None:
                held.enter_context(reading(place))
        yield


@contextmanager
def alone(checkpoint: Path) -> Iterator[bool]:
    """Yield whether nobody reads the checkpoint, and keep it so meanwhile; False where that cannot be found out."""
    try:
        handle = _opened(checkpoint / manifest.NAME)
    except FileNotFoundError:
        yield True  # it is no checkpoint any more
        return
    except OSError:
        yield False
        return
    try:
        yield _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def is_read(checkpoint: Path) -> bool:
    """Tell whether somebody reads the checkpoint now, in this process or another."""
    with alone(checkpoint) as free:
        return not free


def _opened(place: Path) -> int:
    """Open a file that is to be locked alone: for writing, which NFS asks for, else for reading."""
    with suppress(OSError):
        return os.open(place, os.O_RDWR)
    return os.open(place, os.O_RDONLY)


def _lock(handle: int, how: int) -> bool:
    """Return whether the lock was to be had, which it is where the file system knows none."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno != errno.EBADF  # NFS knows locks, but not this one of a file opened for reading
    return True


def _is_still(handle: int, place: Path) -> bool:
    """Tell whether the open file is the one that stands at `place` now."""
    try:
        return os.path.samestat(os.fstat(handle), place.stat())
    except OSError:
        return False

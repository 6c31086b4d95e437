"""One process at a time in the folder of a run: a second one would write among the first one's files.

The lock is the kernel's, on the folder itself (flock): it leaves no file behind and goes with the process, however that
ends. Some network file systems lock no folders; there nothing is locked, and nobody is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

WAIT = 5.0  # seconds: the ranks of a run that was just killed may not have ended yet
_held: dict[Path, int] = {}  # folder -> its descriptor


def hold(folder: Path) -> str | None:
    """Keep every other process out of `folder` until this one ends, or calls `release`.

    Returns None where it is ours now, or cannot be locked; after some seconds who has it, as `process 123`.
    """
    place = folder.resolve()
    if place in _held:
        return None
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    deadline = time.monotonic() + WAIT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            who = _holder(descriptor)
            os.close(descriptor)
            return who
        except OSError:  # a file system that locks no folders
            os.close(descriptor)
            return None
        _held[place] = descriptor
        return None


def release(folder: Path) -> None:
    """Let other processes train in `folder` again."""
    descriptor = _held.pop(folder.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """Return `process 123`, or `another process` where the kernel does not say who locks an open folder."""
    found = os.fstat(descriptor)
    file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if "FLOCK" in words and file in words:
                return f"process {words[words.index(file) - 1]}"
    return "another process"

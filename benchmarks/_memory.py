"""How much memory this process takes above where it stood."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time

PERIOD = 0.001
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * PAGE


def settle() -> None:
    """Collect garbage and give what the allocator keeps for later back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


class Peak:
    """The highest resident size, looked at each millisecond by a thread, above that at the start."""

    def __init__(self) -> None:
        settle()
        self.base = self.highest = resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.is_set():
            self.highest = max(self.highest, resident())
            time.sleep(PERIOD)

    def end(self) -> int:
        """Return the bytes above the start."""
        self._over.set()
        self._thread.join()
        return max(self.highest, resident()) - self.base

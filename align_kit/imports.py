"""The heavy imports, kept out of the garbage collector's way."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import without collecting meanwhile, and leave all that is there afterwards out of every later collection.

    torch and its neighbours bring more than a million objects that live as long as the process. The collector walks
    them each time they have grown by a quarter, at every full collection of the run, and takes them apart one by one
    at the end: a third of the CPU time of a short run. Where nothing new was imported nothing is left out: what a run
    makes, models above all, must stay the collector's to free.
    """
    enabled, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if enabled:
            gc.enable()

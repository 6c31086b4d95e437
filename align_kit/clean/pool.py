"""Judge batches in several processes, and give the answers back in the order of the batches."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

from align_kit import supervised
from align_kit.clean.chain import Judged, Plan, judge
from align_kit.clean.source import Batch, Source
from align_kit.errors import UserError

AHEAD = 3  # batches waiting for each worker: enough to keep it busy, few enough to bound the memory
SMALL = 4 << 20  # bytes of input that are done before a second process has started

_held: list[tuple[Plan, Sequence[Source]]] = []  # in a worker: what every batch needs


def workers_for(asked: int | None, size: int) -> int:
    """Return how many processes to use: as asked, else one for each core that is ours where that pays."""
    if asked is not None:
        if asked < 1:
            raise UserError(f"--workers {asked} must be at least 1")
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if size > SMALL else 1


def judged(plan: Plan, sources: Sequence[Source], batches: Iterable[Batch], workers: int) -> Iterator[Judged]:
    """Yield what `judge` says of each batch, in order; with one worker in this process.

    Raises UserError for a row that cannot be read, and where a worker was killed.
    """
    if workers == 1:
        for batch in batches:
            yield judge(plan, sources, batch)
        return
    # A source's rows are a function of this process; a worker only reads lines it is given.
    portable = [replace(source, rows=_nothing, card=None) for source in sources]
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of whatever was imported
    given = (plan, portable, os.getpid())
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=given) as pool:
        waiting: deque[Future[Judged]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_judge, batch))
                if len(waiting) > AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, for lack of memory as a rule; nothing was written: take fewer --workers"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def _nothing() -> Iterator[tuple[int, bytes]]:
    return iter(())


def _begin(plan: Plan, sources: Sequence[Source], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    if sys.platform == "linux":
        supervised.die_with(parent)
    _held.append((plan, sources))


def _judge(batch: Batch) -> Judged:
    plan, sources = _held[0]
    return judge(plan, sources, batch)

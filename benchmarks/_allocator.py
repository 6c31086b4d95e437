"""The most bytes that torch's allocator held at a time, in a real rank, by moment of a run.

On a CPU the profiler is told of every allocation and every release: those of autograd, of kernels and of the
collectives' own buffers included. Their running sum is what lives, begun with all tensors that are there where a
training begins, and anew with each step: threads that load weights or send tensors are not followed. It does not see
what others allocate (numpy, tokenizers, sockets, Python itself), nor what the allocator rounds up or keeps. On CUDA the
caching allocator counts.
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

MARK = "align_kit moment: "
OUTSIDE = "outside"  # of every named moment
TRAIN = "train"  # what is of a training and of no moment in it
COUNTED = (TRAIN, "backward", "step", "rollout", "score", "save")  # where these begin, what is there is counted anew
SETTLED = 0.02  # s in which no tensor may go, for threads that carry collectives to have let go of theirs
COLLECTIVE = "collective"  # no moment of its own: what it allocates counts where it is called
COLLECTIVES = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_gather", "reduce", "broadcast")


def run_watched(argv: list[str], report: str, observe: str = "") -> int:
    """Run `align-kit argv…`; write what is measured to `report`.<rank>, as JSON: see `measured`.

    `observe` (module:function) is handed the trainer once its training is over, and what it returns stands beside it.
    """
    from align_kit.cli import main

    seen: dict[str, Any] = {}
    with measured(seen), observing(observe, seen):
        code = int(main(argv) or 0)
    Path(f"{report}.{os.environ.get('RANK', 0)}").write_text(json.dumps(seen))
    return code


@contextmanager
def measured(seen: dict[str, Any]) -> Iterator[None]:
    """Measure what happens meanwhile, from before a model is made on; then `seen` holds, in bytes:

    `peaks`: by moment, the most that lived; `lived`: by moment, what lived when it began for the last time.
    """
    with ExitStack() as stack:
        import torch

        watch = stack.enter_context(on_cuda(seen) if torch.cuda.is_available() else on_cpu(seen))
        for owner, name, moment in _moments():
            stack.enter_context(_named(owner, name, moment, watch))
        yield


def _moments() -> Iterator[tuple[Any, str, str]]:
    """Yield the methods whose calls are moments of a run."""
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.runtime.engine import DeepSpeedEngine

    from align_kit import narrate
    from align_kit.trainers.assess import Assessor
    from align_kit.trainers.base import PhaseTrainer
    from align_kit.trainers.rollout import LocalWriter

    yield PhaseTrainer, "train", TRAIN
    yield PhaseTrainer, "training_step", "backward"
    yield PhaseTrainer, "evaluation_loop", "evaluation"
    yield PhaseTrainer, "before_first_step", "gate"
    yield DeepSpeedEngine, "step", "step"
    yield LocalWriter, "write", "rollout"
    yield Assessor, "__call__", "score"
    yield narrate, "save", "save"
    for name in COLLECTIVES:
        yield TorchBackend, name, COLLECTIVE


@contextmanager
def _named(owner: Any, name: str, moment: str, watch: Callable[[str], Any]) -> Iterator[None]:
    before = getattr(owner, name)

    @wraps(before)
    def within(*args: Any, **kwargs: Any) -> Any:
        with watch(moment):
            return before(*args, **kwargs)

    setattr(owner, name, within)
    try:
        yield
    finally:
        setattr(owner, name, before)


# --- on a CPU -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Something that happened at `time` (ns): `size` bytes came to `place` or left it, or a moment began or ended."""

    time: int
    size: int = 0
    place: int = 0
    thread: int = 0
    moment: str = ""
    turn: int = 0  # +1 where the moment begins, -1 where it ends
    there: Mapping[int, int] | None = None  # where a counted moment begins: bytes by place


@contextmanager
def on_cpu(seen: dict[str, Any]) -> Iterator[Callable[[str], Any]]:
    """Watch the CPU's allocations; yields what names a moment, and fills `seen` at the end."""
    import torch
    from torch._C._profiler import RecordScope
    from torch.profiler import ProfilerActivity, record_function

    # Below torch.profiler.profile, which would record every operator beside: gigabytes, and a multiple of the time.
    settings = torch.autograd.profiler.profile(use_cpu=True, profile_memory=True).config()
    activities = {ProfilerActivity.CPU}
    torch.autograd._prepare_profiler(settings, activities)
    torch.autograd._enable_profiler(settings, activities, {RecordScope.USER_SCOPE})
    counts: list[dict[int, int]] = []

    def named(moment: str) -> Any:
        if moment in COUNTED:
            counts.append(settled())
        return record_function(MARK + moment)

    try:
        yield named
    finally:
        found = torch.autograd._disable_profiler()
    seen.update(summed(events_of(found.experimental_event_tree(), counts)))


def events_of(tree: Any, counts: Sequence[Mapping[int, int]] = ()) -> list[Event]:
    """Return the events of a profiler's tree, in order, with the releases that it does not see.

    `counts` tell what was there each time that one of `COUNTED` began.
    """
    found: list[Event] = []
    waiting = list(tree)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.name == "[memory]" and event.typed[1].device.type == "cpu":
            found.append(Event(event.start_time_ns, event.typed[1].alloc_size, event.typed[1].ptr, event.start_tid))
        elif event.name.startswith(MARK):
            begin, end = event.start_time_ns, event.start_time_ns + event.duration_time_ns
            named: dict[str, Any] = {"moment": event.name.removeprefix(MARK), "thread": event.start_tid}
            found += [Event(begin, turn=1, **named), Event(end, turn=-1, **named)]
    found.sort(key=lambda event: event.time)
    known = iter(counts)
    found = [replace(e, there=next(known)) if e.turn > 0 and e.moment in COUNTED else e for e in found]
    return sorted([*found, *releases_unseen(found)], key=lambda event: event.time)


def releases_unseen(events: Sequence[Event]) -> Iterator[Event]:
    """Yield the releases by threads that the profiler does not follow.

    Such is a buffer of a collective, released by the thread that carried it out: it goes with the collective, or at
    once where that thread has taken it, too. And whatever lay where something else comes to lie, unless it was known
    to be gone when all was counted anew.
    """
    ends = [event.time for event in events if event.moment == COLLECTIVE and event.turn < 0]
    main = {event.thread for event in events if event.moment}
    there: dict[int, tuple[Event, int]] = {}
    collectives = 0
    for event in events:
        collectives += event.turn if event.moment == COLLECTIVE else 0
        if event.there is not None:
            there = {place: one for place, one in there.items() if place in event.there}
        if not event.place:
            continue
        before, until = there.pop(event.place, (None, 0))
        if event.size > 0:
            ending = ends[bisect(ends, event.time)] if collectives else 0
            there[event.place] = (event, ending if event.thread in main else event.time + 1)
            if before is not None:
                yield Event(until or event.time - 1, -before.size, event.place)
    for event, until in there.values():
        if until:
            yield Event(until, -event.size, event.place)


def summed(events: Sequence[Event]) -> dict[str, Any]:
    """Return the `peaks` of moments and what `lived` when each began for the last time; the innermost one counts."""
    live, within = 0, [OUTSIDE]
    peaks: dict[str, int] = {}
    lived: dict[str, int] = {}
    for event in events:
        live += event.size
        if event.turn > 0 and event.moment != COLLECTIVE:
            live = live if event.there is None else sum(event.there.values())
            within.append(event.moment)
            lived[event.moment] = live
        elif event.turn < 0 and event.moment != COLLECTIVE:
            within.pop()
        peaks[within[-1]] = max(peaks.get(within[-1], 0), live)
    return {"peaks": peaks, "lived": lived}


def settled() -> dict[int, int]:
    """Return `tensors_there` once nothing goes any more.

    A thread that carried a collective holds what it sent until it gets hold of the interpreter; what cycles of
    references hold goes when Python's collector comes round. When either happens is chance, and no memory of a moment.
    """
    import gc

    gc.collect()
    found = tensors_there()
    while True:
        time.sleep(SETTLED)
        before, found = found, tensors_there()
        if before.keys() <= found.keys():
            return found


def tensors_there() -> dict[int, int]:
    """Return the tensors on the CPU that Python knows of, and their gradients: bytes by place, each storage once."""
    import gc

    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    # Of the type alone: to ask some objects of torch whether they are instances of anything makes them warn.
    # What only pretends to lie on a device takes nothing there.
    kinds = ((thing, type(thing)) for thing in gc.get_objects())
    tensors = [thing for thing, kind in kinds if issubclass(kind, torch.Tensor) and not issubclass(kind, FakeTensor)]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in [*tensors, *gradients] if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


# --- on CUDA --------------------------------------------------------------------------------------------------


@contextmanager
def on_cuda(seen: dict[str, Any]) -> Iterator[Callable[[str], Any]]:
    """Do the same by the counts of CUDA's caching allocator."""
    import torch

    peaks: dict[str, int] = {}
    lived: dict[str, int] = {}
    within = [OUTSIDE]

    def turn(to: str) -> None:
        """Credit what was highest since the last turn to the moment that was on."""
        peaks[within[-1]] = max(peaks.get(within[-1], 0), torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def watch(moment: str) -> Iterator[None]:
        turn(moment)
        within.append(moment)
        lived[moment] = torch.cuda.memory_allocated()
        try:
            yield
        finally:
            turn(moment)
            within.pop()

    yield watch
    turn(OUTSIDE)
    seen.update({"peaks": peaks, "lived": lived})


# --- beside what was measured ---------------------------------------------------------------------------------


@contextmanager
def observing(observe: str, seen: dict[str, Any]) -> Iterator[None]:
    """Let the function that `observe` names look at a trainer when its training has ended."""
    import importlib

    from align_kit.trainers.base import PhaseTrainer

    before = PhaseTrainer.train
    module, _, name = observe.partition(":")
    look: Callable[[Any], Mapping[str, Any]] = getattr(importlib.import_module(module), name) if observe else dict

    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = before(trainer, *args, **kwargs)
        seen.update(look(trainer) if observe else {})
        return outcome

    PhaseTrainer.train = train  # type: ignore[method-assign]
    try:
        yield
    finally:
        PhaseTrainer.train = before  # type: ignore[method-assign]

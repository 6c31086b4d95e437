"""Draw completions of many prompts: in batches of like length, on all accelerators or cores, each stored at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from align_kit import log, machine, supervised
from align_kit.errors import UserError
from align_kit.models import source
from align_kit.models.completion import Completion, Drawing
from align_kit.models.generate import batches, draw, open_model
from align_kit.sampling.journal import Journal
from align_kit.telemetry.clock import clock

AHEAD = 2  # batches a worker has been given, the one it draws included
Ids = list[int]


@dataclass(frozen=True)
class Work:
    """What is to be drawn: prompts in tokens by key, from which model, how, and how many at a time."""

    model: str
    prompts: dict[int, Ids]
    how: Drawing
    batch_size: int  # completions
    dtype: str
    trusted: bool
    workers: int | None


@dataclass(frozen=True)
class Place:
    """Where a worker computes: the accelerator's number or None for the CPU, and its threads there."""

    device: int | None
    threads: int


def precision(asked: str) -> str:
    """Return the precision that `auto` stands for here, or what is asked."""
    import torch

    return asked if asked != "auto" else "bfloat16" if torch.accelerator.is_available() else "float32"


def drawn(work: Work, journal: Journal) -> None:
    """Draw what the journal lacks of `work` and store it there; raises `UserError` where a worker was killed."""
    missing = [key for key in work.prompts if key not in journal.found]
    lengths = [len(work.prompts[key]) for key in missing]
    size = max(1, work.batch_size // work.how.samples)
    todo = [[missing[place] for place in places] for places in batches(lengths, size)]
    places = _places(work, len(todo))
    began = time.monotonic()
    with _progress(len(missing), work.how.samples) as tell:
        for keys, found in _computed(work, todo, places):
            journal.add(keys, found)
            tell(keys, found)
    if todo:
        seconds = time.monotonic() - began
        count = len(missing) * work.how.samples
        log.say(f"drawn: {count:,} completions in {clock(seconds)} ({count / seconds:,.1f}/s), {_where(places)}")


def _where(places: Sequence[Place]) -> str:
    kind = f"{places[0].threads} thread{'s' * (places[0].threads > 1)}" if places[0].device is None else "accelerator"
    return f"{len(places)} process{'es' * (len(places) > 1)} with {kind} each"


def _places(work: Work, most: int) -> list[Place]:
    """Return where the workers compute: one on each accelerator, else as many as cores and memory allow."""
    import torch

    if torch.accelerator.is_available():
        count = min(work.workers or torch.accelerator.device_count(), max(1, most))
        return [Place(place % torch.accelerator.device_count(), 1) for place in range(count)]
    count = min(work.workers or min(machine.cores(), _fitting(work.model)), max(1, most))
    return [Place(None, machine.threads_of(count))] * count


def _fitting(model: str) -> int:
    """Return how many copies of a model's weights, in fp32, half of the free memory holds; at least one."""
    found = source.resolve(model, option="the model")
    folders = {found.folder, found.weights.folder}
    stored = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    return max(1, int(machine.memory().left / 2 // (2 * stored or 1)))  # 2: most are stored in 16 bits


# --- the workers ----------------------------------------------------------------------------------------------------

Found = list[list[Completion]]
_held: list[tuple[Any, Any, Work]] = []  # in a worker: the model, its tokenizer, what is drawn


def _computed(work: Work, todo: Sequence[list[int]], places: Sequence[Place]) -> Iterator[tuple[list[int], Found]]:
    """Yield each batch's keys and completions as it is done; with one place in this process."""
    if len(places) > 1:
        with _workers(work, places) as channels:
            yield from _shared_out(todo, channels)
    elif todo:
        _open(work, places[0])
        for keys in todo:
            yield keys, _draw(keys)
        _held.clear()


def _shared_out(todo: Sequence[list[int]], channels: Sequence[Connection]) -> Iterator[tuple[list[int], Found]]:
    """Give each worker its next batches as it is done with the ones before; raises what a worker raised."""
    left = iter(todo)
    given: dict[Connection, deque[list[int]]] = {channel: deque() for channel in channels}
    for channel in [*channels] * AHEAD:
        _give(channel, left, given)
    while waiting := [channel for channel, some in given.items() if some]:
        ready = wait(waiting)
        for channel in (one for one in waiting if one in ready):
            try:
                found = channel.recv()
            except (EOFError, ConnectionResetError):
                raise UserError(
                    "a worker was killed, for lack of memory as a rule; what had been drawn is kept: give the same "
                    "command again with fewer --workers or a smaller --batch-size"
                ) from None
            if isinstance(found, BaseException):
                raise found
            _give(channel, left, given)
            yield given[channel].popleft(), found


def _give(channel: Connection, left: Iterator[list[int]], given: dict[Connection, deque[list[int]]]) -> None:
    keys = next(left, None)
    if keys is not None:
        given[channel].append(keys)
        with suppress(BrokenPipeError):  # it was killed, which is said where its answer is waited for
            channel.send(keys)


@contextmanager
def _workers(work: Work, places: Sequence[Place]) -> Iterator[list[Connection]]:
    """Start a process for each place, and end them all."""
    # Forks have torch imported, which takes longer than a small model; but an accelerator is lost on them.
    begun = machine.beginning(places[0].threads) if places[0].device is None else "spawn"
    context: Any = multiprocessing.get_context(begun)
    processes: list[Any] = []
    channels: list[Connection] = []
    try:
        for place in places:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work, place, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            channels.append(ours)
        yield channels
    finally:
        for process in processes:
            process.kill()
        for process, channel in zip(processes, channels, strict=False):
            process.join()
            channel.close()


def _serve(work: Work, place: Place, channel: Connection, parent: int) -> None:
    """Draw batch after batch, until the first process ends this one; Ctrl-C and SIGTERM to all are its business."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    if sys.platform == "linux":
        supervised.die_with(parent)
    try:
        _open(work, place)
        while True:
            channel.send(_draw(channel.recv()))
    except EOFError:
        return
    except Exception as error:
        channel.send(error if isinstance(error, UserError) else RuntimeError(traceback.format_exc()))


def _open(work: Work, place: Place) -> None:
    import torch

    if place.device is None:
        torch.set_num_threads(place.threads)
    else:
        torch.accelerator.set_device_index(place.device)
    dtype = getattr(torch, work.dtype)
    model, tokenizer = open_model(work.model, dtype=dtype, trust_remote_code=work.trusted)
    _held[:] = [(model, tokenizer, work)]


def _draw(keys: Sequence[int]) -> list[list[Completion]]:
    """Draw a batch, in halves where the device has no memory for it whole."""
    import torch

    model, tokenizer, work = _held[0]
    try:
        return draw(model, tokenizer, [work.prompts[key] for key in keys], work.how, keys)
    except torch.OutOfMemoryError:
        if len(keys) == 1:
            raise UserError(
                f"the device has no memory for the {work.how.samples} completions of one prompt; lower --samples or "
                "--max-new-tokens"
            ) from None
    torch.accelerator.empty_cache()
    half = len(keys) // 2
    return [*_draw(keys[:half]), *_draw(keys[half:])]


@contextmanager
def _progress(total: int, samples: int) -> Iterator[Any]:
    """Give what is told of each batch; on a terminal a bar shows prompts, tokens a second and the time left."""
    if not sys.stderr.isatty() or not total:
        yield lambda keys, found: None
        return
    from tqdm import tqdm

    tokens, began = 0, time.monotonic()
    with tqdm(total=total, desc="draw", unit="prompts", leave=False) as bar:

        def tell(keys: Sequence[int], found: Sequence[Sequence[Completion]]) -> None:
            nonlocal tokens
            tokens += sum(one.tokens for some in found for one in some)
            bar.set_postfix_str(f"{tokens / (time.monotonic() - began):,.0f} tokens/s", refresh=False)
            bar.update(len(keys))

        yield tell

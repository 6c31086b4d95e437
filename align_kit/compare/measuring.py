"""Finished models measured, several at a time where they are small, each once: what was found is kept as JSON."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit import __version__, machine, run_folder
from align_kit.errors import UserError

if TYPE_CHECKING:
    from align_kit.compare.work import Task

SMALL = 1 << 30  # bytes of a stored model above which one is measured at a time


def measure(tasks: Mapping[str, Task], home: Path, processes: int) -> dict[str, dict[str, Any]]:
    """Return what each task found, by name; `home` keeps it for the next time the same is asked."""
    run_folder.make_private(home)
    kept = {name: _kept(home / f"{name}.json", task) for name, task in tasks.items()}
    due = {name: task for name, task in tasks.items() if kept[name] is None}
    if due:
        for name, found in zip(due, _spread(list(due.values()), processes), strict=True):
            kept[name] = found
            (home / f"{name}.json").write_text(json.dumps({"key": _key(due[name]), **found}))
    return {name: found for name, found in kept.items() if found is not None}


def _spread(tasks: list[Task], processes: int) -> list[dict[str, Any]]:
    """Do tasks in processes of their own, forks where that is safe; one by one in this one on an accelerator.

    A fork of a process that has asked CUDA anything, if only whether it is there, cannot use it.
    """
    import torch
    import transformers  # noqa: F401 - imported once here, so that the forks have it

    from align_kit.compare.work import work

    if torch.accelerator.is_available():
        return [work(replace(task, threads=machine.cores())) for task in tasks]
    large = max(_bytes(task) for task in tasks) > SMALL
    many = 1 if large else min(processes, machine.cores(), len(tasks))
    threads = machine.threads_of(many)
    return shared_out(work, [replace(task, threads=threads) for task in tasks], many, machine.beginning(threads))


def shared_out(act: Callable[[Any], Any], tasks: Sequence[Any], many: int, begun: str = "fork") -> list[Any]:
    """Do tasks in `many` processes, `begun` by a fork or anew.

    Raises `UserError` where the system ends one of them, as for want of memory.
    """
    # They are ended by SIGTERM, for which this process has a handler of its own.
    quietly = (signal.SIGTERM, signal.SIG_DFL)
    context: Any = multiprocessing.get_context(begun)
    try:
        with ProcessPoolExecutor(many, context, initializer=signal.signal, initargs=quietly) as pool:
            try:
                return list(pool.map(act, tasks))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    except BrokenProcessPool:
        raise UserError(
            f"one of {many} processes that measure finished models was ended from outside, for want of memory perhaps; "
            "end what else runs here, and give the same command again: finished runs stay"
        ) from None


def _bytes(task: Task) -> int:
    places = [task.folder, *([task.start] if task.start else [])]
    return sum(file.stat().st_size for place in places for file in place.glob("*.safetensors"))


def _key(task: Task) -> str:
    """Return what tells one task from another: the models' content, all they are judged by, and our version."""
    from align_kit.models import source

    models = [source.digest(source.resolve(str(place))) for place in (task.folder, task.start) if place]
    judged = (task.problems, task.texts)
    return sha256(repr((models, judged, __version__)).encode()).hexdigest()


def _kept(file: Path, task: Task) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return dict(found) if found.get("key") == _key(task) else None

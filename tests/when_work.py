"""Runs whose ranks do something to themselves at a step: send signals, sleep, fill the disk."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests import small
from tests.small import Lab, Run


def train(
    lab: Lab, place: Path, acts: Sequence[Sequence[Any]] = (), *, phase: str = "sft", world_size: int = 2, **more: Any
) -> Run:
    """Run `phase` into `place` with `acts` (see `run`), whatever becomes of it; what handles signals after is kept."""
    options = lab.options(phase, output_dir=place, deepspeed=lab.sharded, **more)
    result = lab.ranks.run(
        function="tests.when_work:run", cwd=lab.home, world_size=world_size, timeout=60,
        words=[phase, *small.words(options)], acts=acts, report=str(place.with_suffix(".handlers")),
    )  # fmt: skip
    return Run(place, result)


# --- on the ranks ---------------------------------------------------------------------------------------------


def run(words: list[str], acts: Sequence[Sequence[Any]] = (), report: str = "") -> int:
    """Run the command line; each of `acts` is (rank, step, act, …): during that step, on that rank, the act is done.

    `report`: where rank 0 writes what handles signals afterwards.
    """
    from align_kit.cli import main
    from align_kit.trainers.base import PhaseTrainer

    rank = int(os.environ.get("RANK", "0"))
    mine = [(int(step), ACTS[name], more) for who, step, name, *more in acts if who in (rank, "all")]
    step_of = PhaseTrainer.training_step

    def watched(trainer: Any, *given: Any, **named: Any) -> Any:
        for step, act, more in mine:
            if step in (trainer.state.global_step + 1, 0):
                act(*more)
        return step_of(trainer, *given, **named)

    PhaseTrainer.training_step = watched  # type: ignore[method-assign]
    code = main(words)
    if report and rank == 0:
        found = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
        Path(report).write_text(json.dumps([handler == signal.SIG_DFL for handler in found]))
    return int(code)


def send(name: str) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), getattr(signal, name))


def send_twice(seconds: float) -> None:
    """Send this process SIGTERM, and again after `seconds`."""
    send("SIGTERM")
    time.sleep(seconds)
    send("SIGTERM")


def fill_once_there(filler: str, folder: str, awaited: str) -> None:
    """Fill the disk up with `filler` as soon as `folder` holds a file like `awaited`, behind the run's back."""

    def fill() -> None:
        while not any(Path(folder).glob(awaited)):
            time.sleep(0)
        with open(filler, "wb", buffering=0) as stream, contextlib.suppress(OSError):
            for size in (1 << 18, 1 << 12):
                while stream.write(bytes(size)) == size:
                    pass

    threading.Thread(target=fill, daemon=True).start()


def note_removal(checkpoint: str, note: str) -> None:
    """Try to delete a checkpoint, and write into `note` whether it went."""
    from align_kit.checkpoint import keep

    Path(note).write_text(str(keep.remove(Path(checkpoint))))


ACTS: dict[str, Callable[..., None]] = {
    "send": send,
    "send_twice": send_twice,
    "sleep": time.sleep,
    "fill": fill_once_there,
    "unlink": os.unlink,
    "note_removal": note_removal,
}

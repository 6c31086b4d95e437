"""When a run saves beside every so many steps: by the clock, on a signal, and in time before it is ended from outside.

A wish of one rank (a signal came, minutes have passed) travels with the next roll call, so that all ranks save, or
stop, at the same step: the one after it was wished for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from align_kit import supervised
from align_kit.checkpoint import commit, manifest
from align_kit.config.quantities import parse_duration
from align_kit.telemetry.roll_call import SAVE, STOP

TERMINATED = 4  # a bit of a wish beside SAVE and STOP: a signal is the reason to stop
SPARE = 1.25  # what was measured, times this, is allowed for
SAME_SIGNAL = 2.0  # seconds: a scheduler sends SIGTERM to every process, and their launcher passes it on
ENDING = 1.0  # seconds from the last commit to the end of the process
FIRST_SAVE = 0.1, 60.0  # before a save was measured: this share of the time that a run has, at most so many seconds


class When(TrainerCallback):  # type: ignore[misc]
    """Makes the save points of a run, and ends it where a signal or `save_before` asks for that.

    `minutes` (None: no clock) counts from the last save; `before`, as `save_before` is written, from the start of the
    process, or of the launcher above it. Where the run is to end, the checkpoint of that step is its last, and
    `trainer.stopped_early` says why. A method whose runs cannot go on from every step says so in `trainer.resumable`,
    and what was wished for waits. An evaluation that is due at the last step is done before the save.
    """

    def __init__(self, trainer: Any, minutes: float | None, before: str | None) -> None:
        self.trainer = trainer
        self.every = minutes * 60 if minutes else None
        self.before = before
        self.allowed = parse_duration(before) if before else None  # seconds
        self.deadline = time.monotonic() - _age() + self.allowed if self.allowed else None
        self.saves = Saves(Path(trainer.args.output_dir))
        self.waits = Waits()
        self._terminated = 0.0  # when SIGTERM came last
        self._asked: set[int] = set()  # bits; a signal comes between any two instructions, and a set grows in one

    # --- what the loop calls ---

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.waits.last = self.saves.last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.resumable:
            return
        self.waits.another()
        if state.global_step < state.max_steps:
            self._heed(args, state, control)
        if control.should_save:
            self.saves.begin(state.global_step)
        self._look_at_the_clock(steps=3 if _by_epoch(args) else 2)  # a wish is heard in the next step

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            self.saves.begin(state.global_step)  # only now

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stopped_early:  # the run has ended, the epoch has not
            control.should_log = control.should_evaluate = control.should_save = False
        elif control.should_save:
            self.saves.begin(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.waits.last += self.saves.end()
        self._asked.discard(SAVE)
        self._ask()

    # --- what follows ---

    def _heed(self, args: Any, state: Any, control: Any) -> None:
        """Do what the ranks have agreed on at the roll call of this step."""
        agreed = self.trainer.roll_call.agreed
        if agreed & STOP and not (_by_epoch(args) and _ends_epoch(state)):
            control.should_save = control.should_log = control.should_training_stop = True
            args.load_best_model_at_end = False  # this is no end
            self.trainer.stopped_early = "SIGTERM" if agreed & TERMINATED else f"--save_before {self.before}"
        elif agreed & SAVE:
            control.should_save = True

    def _look_at_the_clock(self, steps: int) -> None:
        """Ask all ranks for a save where minutes have passed, and to stop while there is time for `steps` and it."""
        now = time.monotonic()
        if self.every is not None and now - self.saves.last >= self.every:
            self._asked.add(SAVE)
        if self.deadline is not None and now + self._needed(steps) >= self.deadline:
            self._asked.add(STOP)
        self._ask()

    def _needed(self, steps: int) -> float:
        """Return the seconds to allow for: steps, the save that is under way, the last one, and the end."""
        share, most = FIRST_SAVE
        saving = self.saves.expected(min(share * (self.allowed or 0.0), most))
        return SPARE * (steps * self.waits.longest + saving) + ENDING

    def _ask(self) -> None:
        """Wish for what is asked; a wish that a signal makes meanwhile and this overwrites is made again next time."""
        self.trainer.roll_call.wish = sum(self._asked)

    # --- signals ---

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGUSR1 for "save and go on" and SIGTERM for "save and stop", the second SIGTERM for what it is.

        What handled them before does so again afterwards. Only a process's main thread can listen.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGUSR1, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if number == signal.SIGTERM:
            since, self._terminated = time.monotonic() - self._terminated, time.monotonic()
            if TERMINATED in self._asked and since > SAME_SIGNAL:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        self._asked.update({SAVE} if number == signal.SIGUSR1 else {STOP, TERMINATED})
        self._ask()


class Waits:
    """How long it takes from one step after which a run could go on to the next, what lies between but for saves."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self._first = self._later = 0.0

    def another(self) -> None:
        """Note that such a step has ended."""
        wait, self.last = time.monotonic() - self.last, time.monotonic()
        if not self._first:
            self._first = wait
        else:
            self._later = max(self._later, wait)

    @property
    def longest(self) -> float:
        """The seconds of the longest wait; the first, which warms up, counts only while it is the only one."""
        return self._later or self._first


class Saves:
    """How long the saves of a run take until their checkpoint stands, and when the last one began."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.last = time.monotonic()
        self._longest = 0.0  # seconds; 0: none is known
        self._begun: tuple[int, float] | None = None  # step and time of day of a save that holds the loop
        self._written: tuple[int, float] | None = None  # of one that may still be written behind it

    def begin(self, step: int) -> None:
        """Note that the save of `step` begins."""
        self._look()
        if self._written is not None:  # it is waited for
            self._longest = max(self._longest, time.monotonic() - self.last)
        self.last, self._begun = time.monotonic(), (step, time.time())

    def end(self) -> float:
        """Note that the loop goes on, and return for how many seconds it was held; writing may go on behind it."""
        held = time.monotonic() - self.last
        self._longest = max(self._longest, held) if self._longest else 0.0
        self._written, self._begun = self._begun, None
        return held

    def expected(self, guess: float) -> float:
        """Return the seconds to allow for a save, and for the one under way before it; `guess` is for the first."""
        self._look()
        known = self._longest or guess
        if self._begun is None and self._written is None:
            return known
        return known + max(known, time.monotonic() - self.last)

    def _look(self) -> None:
        """Take how long a save took from its manifest, once that stands; forget one that came to nothing."""
        if self._written is None or commit.staging(self.run, self._written[0]).exists():
            return
        step, began = self._written
        with contextlib.suppress(OSError):
            stood = (commit.final(self.run, step) / manifest.NAME).stat().st_mtime
            self._longest = max(self._longest, stood - began, 1e-3)
        self._written = None


def _by_epoch(args: Any) -> bool:
    """Tell whether a run logs, evaluates or saves at the end of epochs; where one ends, a stop waits one step more."""
    return "epoch" in (args.eval_strategy, args.save_strategy, args.logging_strategy)


def _ends_epoch(state: Any) -> bool:
    return bool(state.epoch) and float(state.epoch).is_integer()


def _age() -> float:
    """Return the seconds since this process began, or the launcher above it: its restarts are part of one job."""
    import psutil

    above = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    process = int(os.environ.get(supervised.LAUNCHER) or above)
    return time.time() - psutil.Process(process).create_time()

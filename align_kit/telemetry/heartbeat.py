"""Signs of life for the launcher: one small write per micro-batch, step, evaluation batch, rollout and save."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from align_kit import supervised, zero
from align_kit.supervised import Beat


class Heart:
    """Writes this rank's heartbeat; does nothing under a launcher that does not listen."""

    def __init__(self, place: Path | None) -> None:
        self._file = None if place is None else os.open(place, os.O_WRONLY | os.O_CREAT, 0o600)
        self._last = Beat(0, 0, 0, "start", 0.0)

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Heart:
        """Return the heart of the rank that `environ` describes."""
        folder = supervised.folder_of(dict(environ))
        rank = int(environ.get("RANK", "0"))
        return cls(None if folder is None or not folder.is_dir() else supervised.beat_file(folder, rank))

    def beat(self, activity: str, *, step: int | None = None, micro_batch: int | None = None) -> None:
        """Write that `activity` goes on, at the same step and micro-batch where none are given."""
        if self._file is None:
            return
        last = self._last
        self._last = Beat(
            last.number + 1,
            last.step if step is None else step,
            last.micro_batch if micro_batch is None else micro_batch,
            activity,
            time.monotonic(),
        )
        with contextlib.suppress(OSError):  # a full disk is no reason to end a run
            os.pwrite(self._file, supervised.pack(self._last), 0)

    def next_micro_batch(self) -> None:
        """Write that a micro-batch of the step is done."""
        self.beat("train", micro_batch=self._last.micro_batch + 1)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


class Beats(TrainerCallback):
    """Lets the heart beat where transformers calls back; the steps it names count from 1, as checkpoints do."""

    def __init__(self, heart: Heart) -> None:
        self.heart = heart

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heart.beat("start", step=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heart.beat("train", step=state.global_step + 1, micro_batch=0)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heart.next_micro_batch()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heart.next_micro_batch()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heart.beat("train")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heart.beat("train")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heart.beat("end")


class WaitingLimit(TrainerCallback):
    """Makes `ddp_timeout` hold for every collective once the engine stands: its own groups were made without."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        zero.limit_waiting(args.ddp_timeout)

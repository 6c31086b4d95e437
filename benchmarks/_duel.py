"""Two trainers take turns, step by step, in one process (on each rank): each runs its own training loop.

A loop is a thread that holds the floor for one whole iteration (fetch, collate, forward, backward, clip, optimizer,
schedule) and hands it over when its step has ended, so that collectives come in the same order on every rank.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer, TrainerCallback

from benchmarks._floor import matrix_flops
from benchmarks._memory import Peak, settle
from benchmarks._world import Shape

PROBE_TOKENS = 512


@dataclass
class Track:
    """What one trainer did at each step, on this rank; `peaks` holds bytes at the steps that look at memory."""

    seconds: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)  # CPU seconds of all threads
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peaks: dict[int, int] = field(default_factory=dict)
    flops: list[float] = field(default_factory=list)


class Turns:
    """Who may run: one of several threads at a time, in a fixed order, until all have left."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._holder = list(names), names[0]
        self._changed = threading.Condition()
        self.failure: BaseException | None = None

    def take(self, name: str) -> None:
        """Wait for the turn of `name`; raise where another thread has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._holder == name or self.failure is not None)
        if self.failure is not None:
            raise RuntimeError("the other trainer failed") from self.failure

    def hand_over(self, name: str) -> None:
        """Give the turn to the next."""
        with self._changed:
            self._holder = self._names[(self._names.index(name) + 1) % len(self._names)]
            self._changed.notify_all()

    def leave(self, name: str, failure: BaseException | None = None) -> None:
        """Give the turn up for good."""
        self.hand_over(name)
        with self._changed:
            self._names.remove(name)
            self.failure = self.failure or failure
            self._changed.notify_all()


class Steps(TrainerCallback):
    """Measures one trainer's iterations and lets the other run between them. `kinds` says what each step is for."""

    def __init__(self, name: str, turns: Turns, kinds: Sequence[str], shape: Shape) -> None:
        self.name, self.turns, self.kinds, self.shape = name, turns, kinds, shape
        self.track = Track()
        self._counted = 0
        self._began, self._busy = 0.0, 0.0
        self._peak: Peak | None = None

    def watch(self, trainer: Any) -> None:
        """Note the loss of each of the trainer's steps, and the tokens of forwards that a gradient will follow."""
        import torch

        step = trainer.training_step

        def noted(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            self.track.losses.append(float(loss))
            return loss

        def count(_: Any, inputs: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled():
                self._counted += inputs[0].numel()

        trainer.training_step = noted
        trainer.model.get_input_embeddings().register_forward_pre_hook(count)
        trainer.add_callback(self)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._begin(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        track = self.track
        track.seconds.append(time.perf_counter() - self._began)
        track.busy.append(time.process_time() - self._busy)
        track.tokens.append(self._counted)
        if self._peak is not None:
            track.peaks[len(track.seconds) - 1] = self._peak.end()
        self.turns.hand_over(self.name)
        self.turns.take(self.name)
        self._begin(state.global_step)

    def _begin(self, step: int) -> None:
        """Start the clock of `step` on all ranks at once."""
        import torch.distributed as dist

        if step == len(self.kinds):
            return
        self.track.flops.append(matrix_flops(self.shape, PROBE_TOKENS))
        self._counted, self._peak = 0, None
        if self.kinds[step] == "memory":
            self._peak = Peak()
        dist.barrier()
        self._began, self._busy = time.perf_counter(), time.process_time()


def duel(trainers: dict[str, Any], kinds: Sequence[str], shape: Shape, threads: int) -> dict[str, Track]:
    """Let each trainer train its `len(kinds)` steps, in turns, and return what was measured by name."""
    turns = Turns(list(trainers))
    steps = {name: Steps(name, turns, kinds, shape) for name in trainers}
    for name, trainer in trainers.items():
        steps[name].watch(trainer)
    settle()
    running = [
        threading.Thread(target=_train, args=(name, trainer, turns, threads)) for name, trainer in trainers.items()
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if turns.failure is not None:
        raise turns.failure
    return {name: one.track for name, one in steps.items()}


def _train(name: str, trainer: Any, turns: Turns, threads: int) -> None:
    """Run the trainer's own loop in this thread, with a pool of `threads` of its own."""
    import torch

    try:
        turns.take(name)
        torch.set_num_threads(threads)
        Trainer.train(trainer)
        turns.leave(name)
    except BaseException as failure:
        turns.leave(name, failure)

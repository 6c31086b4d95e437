"""How iterations of PPO fit into the Trainer's loop of optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback


class Endless:
    """An iterable without a length: the Trainer then goes by `max_steps` alone."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return self.make()


class IterationEnd(TrainerCallback):  # type: ignore[misc]
    """Let a checkpoint wait for the end of its iteration, whose completions no resumed run could write again.

    An evaluation waits with it, so that the best model is one that was stored where it was evaluated.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.waiting: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.put_samples_aside()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.epoch = self._passes()
        goes_on = self.trainer.after_update() and state.global_step < state.max_steps
        self.trainer.resumable = not goes_on
        for name in ("should_save", "should_evaluate"):
            if getattr(control, name):
                self.waiting.add(name)
            setattr(control, name, name in self.waiting and not goes_on)
        if not goes_on:
            self.waiting.clear()

    def _passes(self) -> float:
        """Return how often each prompt has been written to: transformers would count the whole run as one epoch."""
        trainer = self.trainer
        prompts = trainer.iteration * trainer.completions_per_iteration / trainer.args.num_generations
        return float(prompts / len(trainer.train_dataset))

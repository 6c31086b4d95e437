"""Before a run trains: whether the way its batches are computed gives what the plain way gives."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from align_kit import log
from align_kit.errors import UserError
from align_kit.forward.agree import settle, with_relatives
from align_kit.forward.choose import PLAIN
from align_kit.forward.door import door_of
from align_kit.models.load import evaluating

ROWS = 4


class SettleForward(TrainerCallback):
    """Computes the first rows both ways once the engine stands; where they disagree the run goes on plain, and says so.

    Before anything else is computed: an evaluation, KTO's baseline and PPO's first completions come before a step.
    A run that goes on has settled. One that was told its way (`PhaseTrainer.forward_is_ours` is False) ends in a
    `UserError` instead.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > 0:
            return
        model, batch = self.trainer.model_wrapped, self._first_rows(args)
        with evaluating(model):  # two drawings of dropout never agree
            why = settle(model, lambda some: self.trainer.answers(model, some), batch)
        if why is not None and not self.trainer.forward_is_ours:
            raise UserError(f"the forward asked for is not right for this model: {why}; use --forward auto, or plain")
        if why is not None:
            log.warn(f"forward: going on plain, every sequence padded and computed for itself: {why}")
            self.trainer.note(forward={"mode": door_of(model).mode, "why": why, "asked": "auto"})
        elif (mode := door_of(model).mode) != PLAIN:
            self.trainer.passed(f"computed {mode} and plain, the first rows give the same", said=False)

    def _first_rows(self, args: Any) -> Any:
        """Return a few of this rank's rows and relatives of theirs, together no more than a micro-batch has, or two."""
        rows, count = self.trainer.train_dataset, min(ROWS, max(1, args.per_device_train_batch_size // 2))
        places = [(args.process_index * count + place) % len(rows) for place in range(count)]
        batch = self.trainer.data_collator([rows[place] for place in places])
        return self.trainer._prepare_inputs(with_relatives(batch))

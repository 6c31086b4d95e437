"""A run that goes on with another number of ranks than its checkpoint was cut for: what happens before it trains."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, set_seed

from align_kit import log
from align_kit.checkpoint import universal
from align_kit.run_folder import Recut
from align_kit.trainers.probe import check_loss

if TYPE_CHECKING:
    from align_kit.trainers.base import PhaseTrainer


class TakenOver(TrainerCallback):  # type: ignore[misc]
    """Checks what the engine has loaded before anything is trained, weights and moments; then seeds, and cleans up.

    A rank has no random state of its own to go on from, so each begins anew from a seed that is said.
    """

    def __init__(self, trainer: PhaseTrainer, recut: Recut, earlier: Sequence[Mapping[str, Any]]) -> None:
        self.trainer = trainer
        self.recut = recut
        self.earlier = earlier  # what the manifest says of changes before this one

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        recut, reduce = self.recut, self.trainer.accelerator.reduce
        if recut.converted:
            universal.check_moments(self.trainer.model_wrapped, recut.folder, lambda sums: reduce(sums, "sum"))
        found = check_loss(self.trainer, recut.checkpoint)
        seed = args.seed + state.global_step
        set_seed(seed + args.process_index)
        log.say(
            f"  note       world size {recut.before} -> {recut.after}: {recut.checkpoint.name} was cut anew in "
            f"{recut.seconds:.1f} s; the run goes on, but not bitwise as it would have on {recut.before}"
        )
        self.trainer.passed(
            f"the {found.what} of a training row is {found.loss:.6g}, and {found.stored:.6g} by the model "
            f"stored in {recut.checkpoint.name} (allowed: {found.allowed:.2g} apart)"
        )
        log.say(f"  note       every rank draws anew: seed {seed} plus its number")
        ranks = {"from_world_size": recut.before, "world_size": recut.after, "bitwise": False}
        said = {**ranks, "checkpoint": recut.checkpoint.name, **asdict(found), "seed": seed}
        self.trainer.note(recuts=[*self.earlier, said])
        if args.process_index == 0:  # all ranks have loaded: the checks were done together
            shutil.rmtree(recut.folder, ignore_errors=True)

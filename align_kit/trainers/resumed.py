"""What a run that goes on takes from its options, where transformers takes it from the checkpoint without a word.

Whether the options may differ is decided before (`checkpoint.contract`): here they are the truth, and equal to what
the checkpoint holds wherever nothing was changed, to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_kit.checkpoint import contract
from align_kit.trainers.checkpointed import CheckpointedTrainer

# What options set in an optimizer's groups of parameters. The rate is the schedule's; the rest of a group is state.
HYPERPARAMETERS = ("initial_lr", "weight_decay", "betas", "eps")


class ResumedTrainer(CheckpointedTrainer):
    """A trainer whose options hold when it goes on, and whose counters go on too."""

    optimizer: Any
    tokens_seen = 0  # tokens computed in training since the run began, over all ranks, padding not counted

    # --- counters ---

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "tokens_seen": self.tokens_seen}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        self.tokens_seen = int(state["tokens_seen"])

    # --- cadence ---

    def _init_training_state(self, max_steps: int, *others: Any) -> Any:
        """Let logging, evaluation and saving go by the options; refuse a run that would end before its checkpoint."""
        began = super()._init_training_state(max_steps, *others)
        done = self.state.global_step
        contract.check_length(done, max_steps)
        self.state.compute_steps(self.args, max_steps)
        if done:
            self.args.eval_on_start = False  # the run is past its start, and has logged that evaluation
        return began

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, unless all steps are done: transformers looks for the end only after another step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # --- optimizer and schedule ---

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule, and remember what the options ask of it and of the optimizer."""
        made = super().create_scheduler(num_training_steps, optimizer)
        schedule = _bare(made)
        self._asked_rates = list(getattr(schedule, "base_lrs", []))
        groups = (self.optimizer if optimizer is None else optimizer).param_groups
        self._asked_groups = [{name: group[name] for name in HYPERPARAMETERS if name in group} for group in groups]
        return made

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load their state, then have them do what the options ask: the checkpoint's rates and decay would win."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        groups, schedule = self.optimizer.param_groups, _bare(self.lr_scheduler)
        for group, asked in zip(groups, self._asked_groups, strict=True):
            group.update(asked)
        if hasattr(schedule, "lr_lambdas"):
            schedule.base_lrs = list(self._asked_rates)
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            rates = [base * factor for base, factor in zip(self._asked_rates, factors, strict=True)]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates


def _bare(schedule: Any) -> Any:
    """Return torch's schedule, or the engine's own, without accelerate's wrapper."""
    return getattr(schedule, "scheduler", schedule)

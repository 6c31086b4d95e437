"""Reward modelling: a scalar head on a language model, trained on pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from align_kit.data.collate import PreferenceCollator
from align_kit.errors import UserError
from align_kit.forward.scores import last_states, sequence_scores
from align_kit.losses import CALIBRATION_BINS, calibration_error, calibration_tallies, reward_loss, reward_metrics
from align_kit.trainers.base import BatchLoss, PhaseTrainer


class Reward(PhaseTrainer):
    """A Bradley-Terry reward model: the chosen completion of a pair is to score higher than the rejected one.

    A batch holds 2B rows: the chosen sides of its B pairs, then the rejected ones. Calibration is computed where the
    model is evaluated: over the few pairs of a training line it would be noise.
    """

    headline = ("loss", "accuracy", "margin", "eval_loss", "eval_accuracy", "eval_calibration_error")

    @staticmethod
    def collator(tokenizer: Any, args: Any) -> PreferenceCollator:
        return PreferenceCollator(tokenizer.pad_token_id, args.pad_to_multiple_of)

    def prepare(self) -> None:
        self.center = float(self.args.center_rewards_coefficient or 0.0)

    def batch_loss(self, model: nn.Module, batch: Mapping[str, Any], step: Tensor | None) -> BatchLoss:
        chosen_B, rejected_B = (side_B[: batch["keep"]] for side_B in sequence_scores(model, batch).chunk(2))
        loss_B = reward_loss(chosen_B, rejected_B, center=self.center)
        metrics = reward_metrics(chosen_B, rejected_B)
        if step is None:  # an evaluation
            metrics |= calibration_tallies(chosen_B, rejected_B)
        return BatchLoss(self.weighed(loss_B, batch), len(loss_B), metrics)

    def answers(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the head reads: a fresh head of zeros would give the same score to anything."""
        return last_states(model, batch)

    def counts(self, batch: Mapping[str, Any]) -> list[int]:
        return [batch["keep"]]

    def finish_metrics(self, metrics: dict[str, float]) -> None:
        if not metrics.keys() >= set(CALIBRATION_BINS):  # a training line
            return
        metrics["calibration_error"] = calibration_error(metrics)
        for name in CALIBRATION_BINS:
            del metrics[name]

    def before_first_step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Step-0 identity: a fresh head is zero, so that every margin is exactly 0 before any update."""
        if not getattr(self.model, "head_is_fresh", False):
            return
        with torch.no_grad():
            worst = sequence_scores(model, batch).abs().max()
        worst = self.accelerator.gather(worst[None]).max()
        if worst != 0:  # NaN too
            raise UserError(
                f"step-0 identity failed: before any update the fresh head scores a completion {worst:.4g}, not 0; "
                "the weights the policy starts from give no finite hidden states here: look at model_name_or_path and "
                "the precision"
            )
        self.passed("the head is fresh: every score and margin 0")

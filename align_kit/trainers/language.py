"""Pretraining and supervised fine-tuning: the negative log-likelihood of the trained tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from align_kit.data.collate import LanguageCollator
from align_kit.errors import unknown
from align_kit.forward.logprobs import TokenLogps
from align_kit.losses import LANGUAGE_LOSSES
from align_kit.trainers.base import BatchLoss, PhaseTrainer


class Language(PhaseTrainer):
    """Next-token prediction on the tokens `loss_mask` names; TRL's `loss_type` picks the loss.

    The loss of a step is the mean over all trained tokens of all ranks and accumulated micro-batches.
    """

    headline = ("loss", "mean_token_accuracy", "eval_loss")

    @staticmethod
    def collator(tokenizer: Any, args: Any) -> LanguageCollator:
        return LanguageCollator(tokenizer.pad_token_id, args.pad_to_multiple_of)

    @classmethod
    def check(cls, args: Any) -> None:
        if args.loss_type not in LANGUAGE_LOSSES:
            raise unknown("loss_type", args.loss_type, LANGUAGE_LOSSES)

    def prepare(self) -> None:
        self.token_loss = LANGUAGE_LOSSES[self.args.loss_type]

    def batch_loss(self, model: nn.Module, batch: Mapping[str, Any], step: Tensor | None) -> BatchLoss:
        tokens = self.token_logps(model, batch).rows(0, batch["keep"])
        total, items = self.token_loss(tokens.logps_BT, tokens.mask_BT)
        return BatchLoss(total, items, accuracy(tokens))

    def counts(self, batch: Mapping[str, Any]) -> list[int]:
        return [int(batch["loss_mask"][: batch["keep"], 1:].sum())]


def accuracy(tokens: TokenLogps) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the share of trained tokens that the model found most probable, as TRL names it."""
    return {"mean_token_accuracy": (tokens.top1_BT.sum(), tokens.mask_BT.sum())}

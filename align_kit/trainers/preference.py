"""Training on pairs: a chosen and a rejected completion of one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from align_kit.data.collate import PreferenceCollator
from align_kit.forward.logprobs import TokenLogps
from align_kit.losses import (
    BATCH_COUPLED,
    Pairs,
    check_dpo_options,
    dpo_loss,
    orpo_loss,
    orpo_metrics,
    preference_metrics,
)
from align_kit.trainers.base import BatchLoss, PhaseTrainer
from align_kit.trainers.language import accuracy
from align_kit.trainers.reference import check_identity


class Paired(PhaseTrainer):
    """What trainers on pairs share. A batch holds 2B rows: the chosen sides of its B pairs, then the rejected ones."""

    headline: tuple[str, ...] = ("loss", "rewards/accuracies", "rewards/margins", "eval_loss")

    @staticmethod
    def collator(tokenizer: Any, args: Any) -> PreferenceCollator:
        return PreferenceCollator(tokenizer.pad_token_id, getattr(args, "pad_to_multiple_of", None))

    def counts(self, batch: Mapping[str, Any]) -> list[float]:
        """Return the pairs of a batch, and their chosen tokens by weight (what a likelihood term is a mean over)."""
        tokens_B = batch["loss_mask"][: batch["keep"], 1:].sum(1)
        return [batch["keep"], float(self.weighed(tokens_B.float(), batch))]

    def evaluation_sums(self, batches: Iterable[Mapping[str, Any]]) -> Tensor:
        """Return the `counts` of the whole evaluation set, over all ranks."""
        counts = torch.tensor([self.counts(batch) for batch in batches], dtype=torch.float32).sum(0)
        return self.accelerator.reduce(counts.to(self.accelerator.device), "sum")


class DPO(Paired):
    """Direct preference optimisation (Rafailov 2023) and its relatives: every `loss_type` of TRL's DPO trainer."""

    CHECKED = (
        "loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type", "discopop_tau", "ld_alpha",
        "use_weighting",
    )  # fmt: skip

    @classmethod
    def check(cls, args: Any) -> None:
        check_dpo_options(**{name: getattr(args, name) for name in cls.CHECKED})

    def prepare(self) -> None:
        named = (*self.CHECKED, "f_alpha_divergence_coef")
        self.options: dict[str, Any] = {name: getattr(self.args, name) for name in named}

    @property
    def cut_is_free(self) -> bool:
        coupled = BATCH_COUPLED.keys() - {"sft"}  # which is told the tokens of the whole step
        return coupled.isdisjoint(self.args.loss_type)

    def batch_loss(self, model: nn.Module, batch: Mapping[str, Any], step: Tensor | None) -> BatchLoss:
        pairs = len(batch["input_ids"]) // 2
        keep = batch["keep"]
        policy = self.token_logps(model, batch, log_sum_sq=self.args.use_weighting)
        reference = self.frozen["reference"].token_logps(model, batch)
        if keep == 0:  # a batch of repeats: it ran for the other ranks' sake
            return BatchLoss(policy.logps_BT.sum() * 0, 0, dict.fromkeys(self._metric_names, (0.0, 0.0)))
        both = _pairs(policy, reference, pairs, keep)
        output = dpo_loss(both, tokens_per_pair=_tokens_per_pair(step), **self.options)
        metrics = {**preference_metrics(output), **accuracy(policy.rows(0, keep))}
        return BatchLoss(self.weighed(output.loss_B, batch), keep, metrics)

    _metric_names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "mean_token_accuracy",
    )

    def before_first_step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        check_identity(self, model, batch)


class ORPO(Paired):
    """Odds-ratio preference optimisation (Hong 2024): likelihood of the chosen side and odds over the rejected one.

    The loss of a step is the mean negative log-likelihood over its chosen tokens plus beta times the mean odds term
    over its pairs. There is no reference.
    """

    headline = ("loss", "nll_loss", "rewards/accuracies", "log_odds_chosen", "eval_loss")

    def batch_loss(self, model: nn.Module, batch: Mapping[str, Any], step: Tensor | None) -> BatchLoss:
        pairs, keep = len(batch["input_ids"]) // 2, batch["keep"]
        policy = self.token_logps(model, batch)
        chosen, rejected = policy.rows(0, keep), policy.rows(pairs, pairs + keep)
        output = orpo_loss(
            chosen.logps_BT,
            chosen.mask_BT,
            rejected.logps_BT,
            rejected.mask_BT,
            beta=self.args.beta,
            tokens_per_pair=_tokens_per_pair(step),
        )
        return BatchLoss(self.weighed(output.loss_B, batch), keep, orpo_metrics(output))


def _tokens_per_pair(step: Tensor | None) -> Tensor:
    """Return the chosen tokens of the whole step (or evaluation) over its pairs."""
    assert step is not None, "the trainer tells the counts of the whole step, and of the whole evaluation"
    return step[1].clamp(min=1) / step[0].clamp(min=1)


def _pairs(policy: TokenLogps, reference: TokenLogps, pairs: int, keep: int) -> Pairs:
    """Split 2B rows into the chosen and rejected sides of the first `keep` pairs."""
    chosen, rejected = policy.rows(0, keep), policy.rows(pairs, pairs + keep)
    return Pairs(
        policy_chosen_BT=chosen.logps_BT,
        policy_rejected_BT=rejected.logps_BT,
        reference_chosen_BT=reference.rows(0, keep).logps_BT,
        reference_rejected_BT=reference.rows(pairs, pairs + keep).logps_BT,
        chosen_mask_BT=chosen.mask_BT,
        rejected_mask_BT=rejected.mask_BT,
        chosen_log_sum_sq_BT=chosen.log_sum_sq_BT,
        rejected_log_sum_sq_BT=rejected.log_sum_sq_BT,
    )

"""Training on single completions, each marked desirable or undesirable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align_kit import log
from align_kit.data.collate import BinaryCollator
from align_kit.data.mismatch import with_mismatched
from align_kit.losses import KTO_LOSSES, baseline_of, class_weights, kto_loss, kto_metrics
from align_kit.trainers.base import BatchLoss, Known, PhaseTrainer
from align_kit.trainers.reference import both_logps, check_identity

WEIGHTS = ("desirable_weight", "undesirable_weight")


class KTO(PhaseTrainer):
    """Kahneman-Tversky optimisation (Ethayarajh 2024); `loss_type` kto or apo_zero_unpaired, as in TRL.

    The loss of a step is the mean over its completions of weight * (1 - value). Values are measured from the baseline
    z0, the policy's mean log-ratio on mismatched completions. TRL takes z0 over each micro-batch, so that its gradient
    changes with the accumulation. Here z0 is one number a step, taken over the step's mismatched completions on all
    ranks before its first micro-batch (a second forward without gradient, as in TRL), so that the gradient is the same
    however the global batch is cut; an evaluation takes one z0 over its whole set.
    """

    headline = ("loss", "rewards/margins", "kl", "eval_loss")

    # --- data and options ---

    @classmethod
    def complete(cls, rows: Any, args: Any) -> Any:
        """Add the mismatched completions, where the loss has a baseline."""
        return with_mismatched(rows, args.max_length) if KTO_LOSSES[args.loss_type] else rows

    @classmethod
    def derive(cls, args: Any, known: Known) -> dict[str, tuple[Any, str]]:
        """Weigh the rarer class up so that both weigh the same in sum, unless the user set either weight."""
        if any(known.given(name) for name in WEIGHTS):
            return {}
        desirable = sum(known.rows["label"])
        undesirable = len(known.rows) - desirable
        counted = f"{desirable:,} desirable and {undesirable:,} undesirable rows"
        if not (desirable and undesirable):
            log.warn(f"{counted}: KTO learns from the contrast of both; add rows of the other class")
            return {}
        rarer = 0 if desirable < undesirable else 1
        why = f"{counted}; both classes then weigh the same in sum (advised: desirable 1 to 4/3 times undesirable)"
        return {WEIGHTS[rarer]: (class_weights(desirable, undesirable)[rarer], why)}

    @staticmethod
    def collator(tokenizer: Any, args: Any) -> BinaryCollator:
        return BinaryCollator(tokenizer.pad_token_id, args.pad_to_multiple_of)

    def prepare(self) -> None:
        args = self.args
        self.measured_from_baseline = KTO_LOSSES[args.loss_type]
        self.options: dict[str, float] = {
            "beta": args.beta,
            "desirable_weight": args.desirable_weight,
            "undesirable_weight": args.undesirable_weight,
        }

    # --- the loss ---

    def batch_loss(self, model: nn.Module, batch: Mapping[str, Any], step: Tensor | None) -> BatchLoss:
        keep = batch["keep"]
        policy_B = self.token_logps(model, batch).logps_BT.sum(1)[:keep]
        reference_B = self.frozen["reference"].token_logps(model, batch).logps_BT.sum(1)[:keep]
        assert step is not None, "the trainer tells the sums of the whole step, and of the whole evaluation"
        baseline = baseline_of(step[1], step[0]).to(policy_B.device)
        output = kto_loss(policy_B, reference_B, batch["label"][:keep], baseline=baseline, **self.options)
        metrics = {**kto_metrics(output), "kl": (baseline * keep, keep)}
        return BatchLoss(self.weighed(output.loss_B, batch), keep, metrics)

    def counts(self, batch: Mapping[str, Any]) -> list[int]:
        """Return the completions of a batch; each has one mismatched completion."""
        return [batch["keep"]]

    def step_sums(self, batches: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return this rank's completions, and the log-ratio summed over as many mismatched ones (0 without z0)."""
        return self._sums(batches)

    def evaluation_sums(self, batches: Iterable[Mapping[str, Any]]) -> Tensor:
        """Return the same of the whole evaluation set, over all ranks."""
        return self.accelerator.reduce(self._sums(batches), "sum")

    def _sums(self, batches: Iterable[Mapping[str, Any]]) -> Tensor:
        sums = torch.zeros(2, dtype=torch.float32, device=self.accelerator.device)
        for batch in batches:
            sums[0] += batch["keep"]
            if self.measured_from_baseline:
                policy_B, reference_B = both_logps(self, self.model_wrapped, self._mismatched(batch))
                sums[1] += (policy_B - reference_B)[: batch["keep"]].sum()
        return sums

    def _mismatched(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch of the same prompts, each with its mismatched completion."""
        return {name.removeprefix("kl_"): batch[name].to(self.args.device) for name in batch if name.startswith("kl_")}

    def before_first_step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        check_identity(self, model, batch)

    def finish_metrics(self, metrics: dict[str, float]) -> None:
        """Leave out a class that did not occur; the margin is of two means, so it has no sum and count of its own."""
        for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
            if math.isnan(metrics[name]):
                del metrics[name]
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]

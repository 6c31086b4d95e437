"""Training on pairs: a chosen and a rejected completion of one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from align_kit.data.collate import PreferenceCollator
from align_kit.errors import UserError
from align_kit.forward.logprobs import TokenLogps, token_logps
from align_kit.losses import Pairs, check_dpo_options, dpo_loss, preference_metrics
from align_kit.trainers.base import BatchLoss, PhaseTrainer
from align_kit.trainers.language import accuracy

# What rounding may make of a log-ratio that is 0 on paper: an absolute part and a share of the log-probability.
IDENTITY_TOLERANCE = {torch.float32: (1e-3, 1e-5), torch.bfloat16: (0.1, 1e-2), torch.float16: (0.05, 2e-3)}


class DPO(PhaseTrainer):
    """Direct preference optimisation (Rafailov 2023) and its relatives: every `loss_type` of TRL's DPO trainer.

    A batch holds 2B rows: the chosen sides of its B pairs, then the rejected ones.
    """

    headline = ("loss", "rewards/accuracies", "rewards/margins", "eval_loss")

    @staticmethod
    def collator(tokenizer: Any, args: Any) -> PreferenceCollator:
        return PreferenceCollator(tokenizer.pad_token_id, args.pad_to_multiple_of)

    def prepare(self) -> None:
        args = self.args
        self.options: dict[str, Any] = {
            "loss_type": args.loss_type,
            "loss_weights": args.loss_weights,
            "beta": args.beta,
            "label_smoothing": args.label_smoothing,
            "f_divergence_type": args.f_divergence_type,
            "discopop_tau": args.discopop_tau,
            "ld_alpha": args.ld_alpha,
            "use_weighting": args.use_weighting,
        }
        check_dpo_options(**self.options)
        self.options["f_alpha_divergence_coef"] = args.f_alpha_divergence_coef

    def batch_loss(self, model: nn.Module, batch: Mapping[str, Any], step: Tensor | None) -> BatchLoss:
        pairs = len(batch["input_ids"]) // 2
        keep = batch["keep"]
        policy = token_logps(model, batch, log_sum_sq=self.args.use_weighting)
        reference = self.frozen["reference"].token_logps(model, batch)
        if keep == 0:  # a batch of repeats: it ran for the other ranks' sake
            return BatchLoss(policy.logps_BT.sum() * 0, 0, dict.fromkeys(self._metric_names, (0.0, 0.0)))
        both = _pairs(policy, reference, pairs, keep)
        per_pair = step[1] / step[0] if step is not None else None
        output = dpo_loss(both, tokens_per_pair=per_pair, **self.options)
        metrics = {**preference_metrics(output), **accuracy(policy.rows(0, keep))}
        return BatchLoss(output.loss_B.sum(), keep, metrics)

    _metric_names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "mean_token_accuracy",
    )

    def counts(self, batch: Mapping[str, Any]) -> list[int]:
        """Return the pairs of a batch, and their chosen tokens (what the `sft` term is a mean over)."""
        return [batch["keep"], int(batch["loss_mask"][: batch["keep"], 1:].sum())]

    def before_first_step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Step-0 identity: without dropout the policy's log-ratio to its reference is 0 before any update."""
        if self.frozen["reference"].identity.differs:
            return
        was_training = model.training
        model.eval()
        with torch.no_grad():
            policy = token_logps(model, batch).logps_BT.sum(1)
        reference = self.frozen["reference"].token_logps(model, batch).logps_BT.sum(1)
        model.train(was_training)
        absolute, share = IDENTITY_TOLERANCE[next(self.model.parameters()).dtype]
        excess = (policy - reference).abs() - absolute - share * reference.abs()
        worst = torch.stack([excess.max(), (policy - reference).abs().max()]).to(torch.float32)
        worst = self.accelerator.gather(worst[None]).amax(0)
        if not worst[0] <= 0:
            who = self.frozen["reference"].identity
            raise UserError(
                f"step-0 identity failed: before any update the policy's log-ratio to its reference is up to "
                f"{worst[1]:.4g}, not 0; the reference ({who.name}, digest {who.digest[:12]}) is not what the policy "
                "starts from; set reference_differs: true if that is meant"
            )


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

"""Kahneman-Tversky optimisation: completions marked good or bad one by one, each `loss_type` of TRL's KTO trainer.

Ethayarajh et al. 2024 ("KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306).
Shapes: B completions. Log-ratios of policy to reference are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from align_kit.losses.language import Tally

# Whether a loss type measures rewards from the baseline z0. APO-zero for single completions (D'Oosterlinck 2024,
# arXiv 2408.06266, eq. 7) is KTO measured from 0.
KTO_LOSSES = {"kto": True, "apo_zero_unpaired": False}


@dataclass(frozen=True)
class UnpairedOutput:
    """A loss for each completion (B, with gradient) and what the metrics read (B, without gradient)."""

    loss_B: Tensor
    rewards_B: Tensor
    logps_B: Tensor
    label_B: Tensor


def kto_loss(
    policy_logps_B: Tensor,
    reference_logps_B: Tensor,
    label_B: Tensor,
    *,
    baseline: Tensor | float,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> UnpairedOutput:
    """Return weight * (1 - value) for each completion (eq. 7), with its reward, beta times the log-ratio.

    The value is sigmoid(beta * (log-ratio - baseline)) where `label_B` says desirable, sigmoid(beta * (baseline -
    log-ratio)) where not. `baseline` is z0 in nats, see `baseline_of`.
    """
    log_ratio_B = policy_logps_B - reference_logps_B.detach()
    gain_B = torch.where(label_B, log_ratio_B - baseline, baseline - log_ratio_B)
    weight_B = torch.where(label_B, gain_B.new_tensor(desirable_weight), gain_B.new_tensor(undesirable_weight))
    loss_B = weight_B * torch.sigmoid(-beta * gain_B)  # 1 - sigmoid(x), without cancellation
    return UnpairedOutput(loss_B, beta * log_ratio_B.detach(), policy_logps_B.detach(), label_B)


def baseline_of(log_ratio_sum: Tensor, count: Tensor) -> Tensor:
    """Return z0 = max(0, mean log-ratio over mismatched pairs) in nats, without gradient (section 4.1).

    It estimates the divergence of the policy from the reference, which is never negative.
    """
    return (log_ratio_sum / count.clamp(min=1)).clamp(min=0).detach()


def kto_metrics(output: UnpairedOutput) -> dict[str, Tally]:
    """Return TRL's metrics of each class under TRL's names, as a sum over its completions and their number."""
    tallies = {}
    for name, mine_B in (("chosen", output.label_B), ("rejected", ~output.label_B)):
        tallies[f"rewards/{name}"] = Tally((output.rewards_B * mine_B).sum(), mine_B.sum())
        tallies[f"logps/{name}"] = Tally((output.logps_B * mine_B).sum(), mine_B.sum())
    return tallies


def class_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """Return (desirable_weight, undesirable_weight) with which both classes weigh the same in sum.

    The rarer class weighs more than 1, the other 1. The paper advises a desirable_weight * desirable rows of 1 to 4/3
    times undesirable_weight * undesirable rows; this is 1. Both are 1 where a class is empty.
    """
    if not (desirable and undesirable):
        return 1.0, 1.0
    return max(1.0, undesirable / desirable), max(1.0, desirable / undesirable)

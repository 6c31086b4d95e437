"""The policy beside its frozen reference: log-ratios without a gradient, and the gate before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align_kit.errors import UserError
from align_kit.forward.logprobs import token_logps
from align_kit.models.load import evaluating

if TYPE_CHECKING:
    from align_kit.trainers.base import PhaseTrainer

# What rounding may make of a log-ratio that is 0 on paper: an absolute part and a share of the log-probability.
IDENTITY_TOLERANCE = {torch.float32: (1e-3, 1e-5), torch.bfloat16: (0.1, 1e-2), torch.float16: (0.05, 2e-3)}


def both_logps(trainer: PhaseTrainer, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return each sequence's log-probability (B, nats) under the policy and its reference: no gradient, no dropout."""
    with evaluating(model):
        policy_B = token_logps(model, batch).logps_BT.sum(1)
        reference_B = trainer.frozen["reference"].token_logps(model, batch).logps_BT.sum(1)
    return policy_B, reference_B


def check_identity(trainer: PhaseTrainer, model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Check step-0 identity on all ranks: before any update the policy's log-ratio to its reference is 0.

    Says so in one line, or raises `UserError`. A reference that differs on purpose is not checked.
    """
    held = trainer.frozen["reference"]
    who = held.identity
    if who.differs:
        return
    tokens_B = batch["loss_mask"][:, 1:].sum(1)
    gap, same = largest_gap(trainer, *both_logps(trainer, model, batch), slack=held.token_error * tokens_B)
    if not same:
        raise UserError(
            f"step-0 identity failed: before any update the policy's log-ratio to its reference is up to {gap:.4g}, "
            f"not 0; the reference ({who.name}, digest {who.digest[:12]}) is not what the policy starts from; set "
            "reference_differs: true if that is meant"
        )
    trainer.passed(f"the policy starts as its reference: log-ratio 0 within {gap:.1g}")


def largest_gap(
    trainer: PhaseTrainer, ours: Tensor, theirs: Tensor, slack: Tensor | float = 0.0
) -> tuple[float, bool]:
    """Return the largest log-ratio (nats) over all ranks, and whether all are what rounding makes of 0.

    `slack` is what a placement that is not exact may add (`Frozen.token_error` for each token).
    """
    absolute, share = IDENTITY_TOLERANCE[next(trainer.model.parameters()).dtype]
    gaps = (ours - theirs).abs()
    worst = torch.stack([(gaps - absolute - share * theirs.abs() - slack).max(), gaps.max()]).to(torch.float32)
    excess, gap = trainer.accelerator.gather(worst[None]).amax(0).tolist()
    return gap, excess <= 0  # NaN is no identity

"""Token losses (pretraining, supervised fine-tuning) and the sums over a sequence they share with preferences.

Shapes: B sequences, T tokens. Every function takes the log-probability of each token that was to be predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Tally(NamedTuple):
    """A sum and the number of items in it, so that micro-batches and ranks add up before anyone divides."""

    total: Tensor
    items: Tensor

    @property
    def mean(self) -> Tensor:
        """Return total / items; an empty tally gives its total (zero), never 0 / 0."""
        return self.total / self.items.clamp(min=1)


def language_loss(logps_BT: Tensor, mask_BT: Tensor) -> Tally:
    """Return the negative log-likelihood summed over the trained tokens (nats), and how many they are.

    TRL's `nll` is the total divided by the trained tokens of the whole step, on all ranks.
    """
    return Tally(-trained(logps_BT, mask_BT).sum(), mask_BT.sum())


def dft_loss(logps_BT: Tensor, mask_BT: Tensor) -> Tally:
    """Return the dynamic fine-tuning loss: each token's loss, weighted by its own probability without gradient.

    Wu 2025 (arXiv 2508.05629). Sum over the trained tokens, and their number.
    """
    logps_BT = trained(logps_BT, mask_BT)
    return Tally(-(logps_BT.detach().exp() * logps_BT).sum(), mask_BT.sum())  # sg(p) log p


# `chunked_nll` is TRL's deprecated name for `nll`: it told how the logits were computed, never another value.
LANGUAGE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tally]] = {
    "nll": language_loss,
    "dft": dft_loss,
    "chunked_nll": language_loss,
}


def sequence_logps(
    logps_BT: Tensor, mask_BT: Tensor, *, ld_alpha: float | None = None, shared_B: Tensor | None = None
) -> Tensor:
    """Return each sequence's log-probability (B, nats): the sum over its trained tokens.

    With `ld_alpha`, tokens after the first `shared_B` trained ones (the length that both completions of a pair
    reach) count `ld_alpha` times: Liu 2024, length-desensitised DPO (arXiv 2409.06411).
    """
    logps_BT = trained(logps_BT, mask_BT)
    if ld_alpha is not None:
        assert shared_B is not None, "ld_alpha weighs what lies beyond the shared length, so it needs that length"
        position_BT = mask_BT.cumsum(dim=1)  # 1 at the first trained token
        logps_BT = torch.where(position_BT > shared_B[:, None], ld_alpha * logps_BT, logps_BT)
    return logps_BT.sum(dim=1)


def trained(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the values in at least fp32, zero where the mask is 0, so that NaN or -inf in padding stays there."""
    assert values_BT.shape == mask_BT.shape, f"values {tuple(values_BT.shape)}, mask {tuple(mask_BT.shape)}"
    return widened(values_BT).masked_fill(mask_BT == 0, 0.0)


def widened(values: Tensor) -> Tensor:
    """Return the values in at least fp32; sums of log-probabilities lose their differences in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

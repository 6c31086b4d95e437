"""The two clipped losses of a PPO update: Schulman 2017 (arXiv 1707.06347), with the details of Huang 2024
("The N+ Implementation Details of RLHF with PPO", arXiv 2403.17031), section 7.

Both return the *sum* over valid tokens and tallies of sums and counts; the trainer divides by the tokens of the whole
mini-batch, on all ranks, so a token weighs the same in a short completion, a long one, and any cut into micro-batches.
The entropy bonus of eq. 9 needs the logits, so the forward computes it.

Shapes: B sequences, T tokens. "old" is what the policy or the value head gave when the rollout was sampled. A
mask of 0 keeps a token out of every sum and gives it a gradient of exactly 0, even where it holds NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align_kit.losses.advantages import k3
from align_kit.losses.language import Tally, trained
from align_kit.losses.pairwise import safe_exp


class PolicyTerms(NamedTuple):
    """The policy loss summed over valid tokens, with gradient, and what to report of them by name."""

    total: Tensor
    tallies: dict[str, Tally]


class ValueTerms(NamedTuple):
    """The value loss summed over valid tokens, with gradient, and what to report of them by name."""

    total: Tensor
    tallies: dict[str, Tally]


def policy_loss(
    logps_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, cliprange: float = 0.2
) -> PolicyTerms:
    """Return -min(r A, clip(r, 1 - eps, 1 + eps) A) with r = p / p_old: Schulman 2017, eq. 7.

    Tallies: `policy/clip_fraction` is how often the clip changed the value (and so stopped the gradient), as in Huang
    2024, not how often r left the range; `policy/ratio` is r, whose mean over samples of the old policy is 1;
    `policy/approx_kl` is k3 of old against new, `policy/approx_kl_k2` half the squared log-ratio, which TRL calls
    approxkl (both Schulman 2020).
    """
    log_ratio_BT = trained(logps_BT, mask_BT) - trained(old_BT.detach(), mask_BT)
    advantages_BT = trained(advantages_BT.detach(), mask_BT)
    ratio_BT = safe_exp(log_ratio_BT)
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - cliprange, 1 + cliprange)
    seen_BT = log_ratio_BT.detach()
    tallies = {
        "policy/clip_fraction": _tally(clipped_BT > plain_BT, mask_BT),
        "policy/ratio": _tally(ratio_BT, mask_BT),
        "policy/approx_kl": _tally(k3(-seen_BT), mask_BT),
        "policy/approx_kl_k2": _tally(0.5 * seen_BT.square(), mask_BT),
    }
    return PolicyTerms(torch.maximum(plain_BT, clipped_BT).sum(), tallies)


def value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, cliprange_value: float | None = 0.2
) -> ValueTerms:
    """Return half the squared error to the returns, the larger of plain and clipped; Schulman 2017, eq. 9, L^VF.

    The clip holds a value within `cliprange_value` of its old one; it is no part of the paper but of its code, and of
    Huang 2024. None or 0 leaves it out. Tally: `value/clip_fraction`, how often the clip changed the value.
    """
    values_BT, returns_BT = trained(values_BT, mask_BT), trained(returns_BT.detach(), mask_BT)
    plain_BT = 0.5 * (values_BT - returns_BT).square()
    if not cliprange_value:
        return ValueTerms(plain_BT.sum(), {"value/clip_fraction": _tally(torch.zeros_like(plain_BT), mask_BT)})
    old_BT = trained(old_values_BT.detach(), mask_BT)
    # not old + clamp(value - old): that rounds, and within the range both errors must be the same to the last bit
    near_BT = values_BT.clamp(old_BT - cliprange_value, old_BT + cliprange_value)
    clipped_BT = 0.5 * (near_BT - returns_BT).square()
    tallies = {"value/clip_fraction": _tally(clipped_BT > plain_BT, mask_BT)}
    return ValueTerms(torch.maximum(plain_BT, clipped_BT).sum(), tallies)


def _tally(seen_BT: Tensor, mask_BT: Tensor) -> Tally:
    """Return the sum over valid tokens, without gradient, and their number."""
    return Tally(trained(seen_BT.detach(), mask_BT).sum(), (mask_BT != 0).sum())

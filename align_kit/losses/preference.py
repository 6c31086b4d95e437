"""Losses over pairs of a chosen and a rejected completion: every `loss_type` of TRL's DPO trainer.

`dpo_loss` derives what a loss may need from a pair once (`Margins`), then looks the loss up in `DPO_LOSSES`.
Shapes: B pairs, T tokens, V vocabulary. Log-ratios, margins and rewards are in nats; beta is the strength of the
pull to the reference, in rewards per nat. The result is a loss for each pair: its mean over the micro-batch is
TRL's value, and its sum over all micro-batches divided by the global number of pairs is the loss of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align_kit.errors import UserError, unknown
from align_kit.losses.language import Tally, sequence_logps, trained, widened
from align_kit.losses.pairwise import BATCH_COUPLED, DPO_LOSSES, F_DIVERGENCES, TAKES_DIVERGENCE, Margins, Settings


@dataclass(frozen=True)
class Pairs:
    """Per-token log-probabilities (B, T; nats) of B pairs, under the policy and under the reference.

    The chosen and the rejected side may differ in T. A mask is 1 where a completion token is predicted. The two
    `log_sum_sq` are the log of the policy's summed squared probabilities, `log_sum_sq_probs(logits)`; only
    `use_weighting` reads them.
    """

    policy_chosen_BT: Tensor
    policy_rejected_BT: Tensor
    reference_chosen_BT: Tensor
    reference_rejected_BT: Tensor
    chosen_mask_BT: Tensor
    rejected_mask_BT: Tensor
    chosen_log_sum_sq_BT: Tensor | None = None
    rejected_log_sum_sq_BT: Tensor | None = None


@dataclass(frozen=True)
class PreferenceOutput:
    """A loss for each pair (B, with gradient) and what the metrics read (B, without gradient).

    Rewards are beta times the log-ratio of policy to reference, whatever the f-divergence. The entries of a loss in
    `BATCH_COUPLED` belong to the micro-batch, not each to one pair; only their sum means something.
    """

    loss_B: Tensor
    chosen_rewards_B: Tensor
    rejected_rewards_B: Tensor
    chosen_logps_B: Tensor
    rejected_logps_B: Tensor


def dpo_loss(
    pairs: Pairs,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    tokens_per_pair: Tensor | float | None = None,
) -> PreferenceOutput:
    """Return the weighted sum of the named losses for each pair, with rewards and log-probabilities.

    Names and defaults are those of TRL's `DPOConfig`; weights default to 1 each. `tokens_per_pair` (global chosen
    tokens over global pairs of the step) makes `sft` independent of the micro-batch; without it the micro-batch's
    own ratio is used, as TRL does. Raises `UserError` for options that contradict each other.
    """
    names = _names(loss_type)
    check_dpo_options(
        names,
        loss_weights=loss_weights,
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence_type=f_divergence_type,
        discopop_tau=discopop_tau,
        ld_alpha=ld_alpha,
        use_weighting=use_weighting,
    )
    margins = _margins(pairs, F_DIVERGENCES[f_divergence_type], f_alpha_divergence_coef, ld_alpha, tokens_per_pair)
    settings = Settings(beta, label_smoothing, discopop_tau)
    weights = [1.0] * len(names) if loss_weights is None else loss_weights
    loss_B = torch.stack([w * DPO_LOSSES[name](margins, settings) for name, w in zip(names, weights, strict=True)])
    loss_B = loss_B.sum(dim=0)
    if use_weighting:
        loss_B = loss_B * _pair_weights(pairs)
    return PreferenceOutput(
        loss_B=loss_B,
        chosen_rewards_B=beta * margins.chosen_B.detach(),
        rejected_rewards_B=beta * margins.rejected_B.detach(),
        chosen_logps_B=margins.policy_chosen_B.detach(),
        rejected_logps_B=margins.policy_rejected_B.detach(),
    )


def preference_metrics(output: PreferenceOutput) -> dict[str, Tally]:
    """Return TRL's metrics of a micro-batch under TRL's names, each as a sum over its pairs and their number."""
    margins_B = output.chosen_rewards_B - output.rejected_rewards_B
    per_pair = {
        "rewards/chosen": output.chosen_rewards_B,
        "rewards/rejected": output.rejected_rewards_B,
        "rewards/accuracies": (output.chosen_rewards_B > output.rejected_rewards_B).to(margins_B.dtype),
        "rewards/margins": margins_B,
        "logps/chosen": output.chosen_logps_B,
        "logps/rejected": output.rejected_logps_B,
    }
    pairs = torch.tensor(len(margins_B), device=margins_B.device)
    return {name: Tally(values_B.sum(), pairs) for name, values_B in per_pair.items()}


@torch.no_grad()
def log_sum_sq_probs(logits_BTV: Tensor) -> Tensor:
    """Return log sum_v p_v^2 (B, T; no gradient), the expected probability of a token the policy itself draws."""
    logits_BTV = widened(logits_BTV)
    return torch.logsumexp(2 * logits_BTV, dim=-1) - 2 * torch.logsumexp(logits_BTV, dim=-1)


def check_dpo_options(
    loss_type: str | Sequence[str],
    *,
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    discopop_tau: float = 0.05,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
) -> None:
    """Raise `UserError` for options that name nothing, leave their range or contradict each other."""
    names = _names(loss_type)
    _check_names(names, loss_weights, f_divergence_type)
    _check_ranges(names, beta, label_smoothing, discopop_tau, ld_alpha)
    whole_batch = sorted(set(names) & BATCH_COUPLED.keys())
    if use_weighting and whole_batch:
        raise UserError(
            f"use_weighting weighs each pair, but loss_type {', '.join(whole_batch)} has no value for a single pair; "
            "drop one of them"
        )


def _check_names(names: Sequence[str], loss_weights: Sequence[float] | None, f_divergence_type: str) -> None:
    """Raise for an unknown loss or divergence, weights that do not match, or a loss that takes no divergence."""
    for name in names:
        if name not in DPO_LOSSES:
            raise unknown("loss_type", name, DPO_LOSSES)
    if not names:
        raise UserError(f"loss_type is empty; give one or more of {', '.join(DPO_LOSSES)}")
    if loss_weights is not None and len(loss_weights) != len(names):
        raise UserError(
            f"{len(loss_weights)} loss_weights for {len(names)} loss types ({', '.join(names)}); give one each"
        )
    if f_divergence_type not in F_DIVERGENCES:
        raise unknown("f_divergence_type", f_divergence_type, F_DIVERGENCES)
    without = sorted(set(names) - TAKES_DIVERGENCE)
    if f_divergence_type != "reverse_kl" and without:
        raise UserError(
            f"f_divergence_type {f_divergence_type!r} has no meaning for loss_type {', '.join(without)}; "
            f"use reverse_kl, or losses among {', '.join(sorted(TAKES_DIVERGENCE))}"
        )


def _check_ranges(
    names: Sequence[str], beta: float, label_smoothing: float, discopop_tau: float, ld_alpha: float | None
) -> None:
    """Raise for a scalar outside the range in which the named losses are defined."""
    rules = [
        (beta > 0, "beta", beta, "above 0"),
        (0 <= label_smoothing < 1, "label_smoothing", label_smoothing, "in [0, 1)"),
        ("robust" not in names or label_smoothing < 0.5, "label_smoothing", label_smoothing, "below 0.5 for robust"),
        ("exo_pair" not in names or label_smoothing > 0, "label_smoothing", label_smoothing, "above 0 for exo_pair"),
        ("discopop" not in names or discopop_tau > 0, "discopop_tau", discopop_tau, "above 0"),
        (ld_alpha is None or 0 <= ld_alpha <= 1, "ld_alpha", ld_alpha, "in [0, 1], or left out"),
    ]
    for holds, field, seen, allowed in rules:
        if not holds:
            raise UserError(f"{field} is {seen}; it must be {allowed}")


def _names(loss_type: str | Sequence[str]) -> list[str]:
    """Return the loss types as a list; TRL takes a single one as a plain string too."""
    return [loss_type] if isinstance(loss_type, str) else list(loss_type)


def _margins(
    pairs: Pairs,
    divergence: Callable[[Tensor, float], Tensor],
    alpha: float,
    ld_alpha: float | None,
    tokens_per_pair: Tensor | float | None,
) -> Margins:
    """Return what the losses read of the pairs; the reference side carries no gradient."""
    chosen_mask_BT, rejected_mask_BT = pairs.chosen_mask_BT, pairs.rejected_mask_BT
    shared_B = torch.minimum(chosen_mask_BT.sum(dim=1), rejected_mask_BT.sum(dim=1))

    def total(logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return sequence_logps(logps_BT, mask_BT, ld_alpha=ld_alpha, shared_B=shared_B)

    policy_chosen_B = total(pairs.policy_chosen_BT, chosen_mask_BT)
    policy_rejected_B = total(pairs.policy_rejected_BT, rejected_mask_BT)
    reference_chosen_B = total(pairs.reference_chosen_BT.detach(), chosen_mask_BT)
    reference_rejected_B = total(pairs.reference_rejected_BT.detach(), rejected_mask_BT)
    return Margins(
        policy_chosen_B=policy_chosen_B,
        policy_rejected_B=policy_rejected_B,
        reference_chosen_B=reference_chosen_B,
        reference_rejected_B=reference_rejected_B,
        chosen_score_B=divergence(policy_chosen_B - reference_chosen_B, alpha),
        rejected_score_B=divergence(policy_rejected_B - reference_rejected_B, alpha),
        chosen_tokens_B=_lengths(chosen_mask_BT),
        rejected_tokens_B=_lengths(rejected_mask_BT),
        chosen_nll_B=-sequence_logps(pairs.policy_chosen_BT, chosen_mask_BT),
        tokens_per_pair=_tokens_per_pair(chosen_mask_BT, tokens_per_pair),
    )


def _tokens_per_pair(mask_BT: Tensor, given: Tensor | float | None) -> Tensor:
    """Return the chosen tokens of a pair (scalar): the step's where given, else the micro-batch's mean."""
    wide = torch.float64  # exact for the counts; a scalar takes the dtype of the tensor it meets
    if given is None:
        return mask_BT.sum().clamp(min=1).to(wide) / len(mask_BT)
    return torch.as_tensor(given, dtype=wide, device=mask_BT.device)


def _pair_weights(pairs: Pairs) -> Tensor:
    """Return how likely the policy is to write the pair itself (B, no gradient): Zhou 2024 (arXiv 2406.11827), eq. 2.

    With the paper's alignment: a token's probability over what the policy's own samples would have.
    """
    chosen_sq_BT, rejected_sq_BT = pairs.chosen_log_sum_sq_BT, pairs.rejected_log_sum_sq_BT
    assert chosen_sq_BT is not None and rejected_sq_BT is not None, "use_weighting needs Pairs with log_sum_sq"
    chosen_BT = trained(pairs.policy_chosen_BT.detach() - chosen_sq_BT, pairs.chosen_mask_BT)
    rejected_BT = trained(pairs.policy_rejected_BT.detach() - rejected_sq_BT, pairs.rejected_mask_BT)
    mean_B = chosen_BT.sum(dim=1) / _lengths(pairs.chosen_mask_BT)
    return torch.exp(mean_B + rejected_BT.sum(dim=1) / _lengths(pairs.rejected_mask_BT))


def _lengths(mask_BT: Tensor) -> Tensor:
    """Return the trained tokens of each sequence (B), at least 1 so that an empty completion divides by one."""
    return mask_BT.sum(dim=1).clamp(min=1)

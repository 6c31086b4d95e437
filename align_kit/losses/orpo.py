"""Odds-ratio preference optimisation: the likelihood of the chosen completion, and its odds over the rejected one's.

Hong, Lee and Thorne 2024 ("ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691).
Shapes: B pairs, T tokens. A completion's probability p is the geometric mean of its tokens' (eq. 3), so that length
does not decide its odds p / (1 - p).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align_kit.losses.language import Tally, sequence_logps
from align_kit.losses.preference import PreferenceOutput, preference_metrics

# 1 - p below this is what rounding leaves of an fp32 log-softmax: p counts as 1 - CERTAIN from there on.
CERTAIN = 1e-6


@dataclass(frozen=True)
class OddsOutput(PreferenceOutput):
    """A loss for each pair (B, with gradient) and what the metrics read (B, without gradient).

    Log-probabilities are means over a completion's tokens and rewards are beta times these, as TRL reports them.
    """

    nll_B: Tensor
    chosen_tokens_B: Tensor
    log_odds_B: Tensor


def orpo_loss(
    chosen_logps_BT: Tensor,
    chosen_mask_BT: Tensor,
    rejected_logps_BT: Tensor,
    rejected_mask_BT: Tensor,
    *,
    beta: float,
    tokens_per_pair: Tensor | float,
) -> OddsOutput:
    """Return each pair's loss, the chosen completion's negative log-likelihood + beta * -log sigmoid(log odds ratio).

    Eqs. 6 and 7, `beta` being the paper's lambda. The likelihood is of the completion's tokens given the prompt, as in
    the paper and in supervised fine-tuning here; TRL's experimental trainer adds the prompt's own tokens to it.
    `tokens_per_pair` is the chosen tokens of the whole step over its pairs: with it the sum of the losses over the
    pairs of the step is the mean over chosen tokens plus the mean over pairs, however the step is cut.
    The two sides may differ in T. The odds of a pair count nothing where a side has no trained token.
    """
    nll_B = -sequence_logps(chosen_logps_BT, chosen_mask_BT)
    chosen_B = mean_logps(chosen_logps_BT, chosen_mask_BT)
    rejected_B = mean_logps(rejected_logps_BT, rejected_mask_BT)
    both_B = chosen_mask_BT.any(dim=1) & rejected_mask_BT.any(dim=1)
    log_odds_B = torch.where(both_B, log_odds(chosen_B) - log_odds(rejected_B), 0.0)
    odds_B = torch.where(both_B, -logsigmoid(log_odds_B), 0.0)  # eq. 7
    return OddsOutput(
        loss_B=nll_B / tokens_per_pair + beta * odds_B,  # eq. 6
        chosen_rewards_B=beta * chosen_B.detach(),
        rejected_rewards_B=beta * rejected_B.detach(),
        chosen_logps_B=chosen_B.detach(),
        rejected_logps_B=rejected_B.detach(),
        nll_B=nll_B.detach(),
        chosen_tokens_B=chosen_mask_BT.sum(dim=1),
        log_odds_B=log_odds_B.detach(),
    )


def orpo_metrics(output: OddsOutput) -> dict[str, Tally]:
    """Return TRL's metrics of a micro-batch under TRL's names, each as a sum over its pairs (tokens) and their number.

    `log_odds_chosen` is the log odds ratio, `log_odds_ratio` the logarithm of its sigmoid.
    """
    pairs = torch.tensor(len(output.log_odds_B), device=output.log_odds_B.device)
    return {
        **preference_metrics(output),
        "log_odds_ratio": Tally(logsigmoid(output.log_odds_B).sum(), pairs),
        "log_odds_chosen": Tally(output.log_odds_B.sum(), pairs),
        "nll_loss": Tally(output.nll_B.sum(), output.chosen_tokens_B.sum()),
    }


def mean_logps(logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return each completion's log-probability per trained token (B, nats; eq. 3), 0 where it has none."""
    return sequence_logps(logps_BT, mask_BT) / mask_BT.sum(dim=1).clamp(min=1)


def log_odds(logps_B: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of p = exp(logps_B) (eq. 4), finite with its gradient for every p in [0, 1]."""
    return logps_B - log1mexp(logps_B)


def log1mexp(logps_B: Tensor) -> Tensor:
    """Return log(1 - exp(x)) of x <= 0 without cancellation; x above -`CERTAIN` counts as -`CERTAIN`."""
    logps_B = logps_B.clamp(max=-CERTAIN)
    # Each form is exact where the other cancels (Maechler 2012); within the clamp both have finite gradients.
    large_B, small_B = torch.log(-torch.expm1(logps_B)), torch.log1p(-torch.exp(logps_B))
    return torch.where(logps_B > -math.log(2), large_B, small_B)

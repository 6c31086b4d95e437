"""Reward modelling: the Bradley-Terry loss of a batch of pairs, and how good and how honest the scores are.

Shapes: B pairs. A score is what the model's scalar head gives a whole sequence; a margin is the chosen side's score
minus the rejected one's, and sigmoid(margin) the probability the model gives to the order people chose.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align_kit.losses.language import Tally, widened

# Confidence in a pair's order goes from 1/2 to 1, so that a bin is 1/20 wide.
CALIBRATION_BINS = tuple(f"calibration/{place}" for place in range(10))


def reward_loss(chosen_B: Tensor, rejected_B: Tensor, *, center: float = 0.0) -> Tensor:
    """Return the negative log-likelihood of the order of each pair (nats), shape B.

    P(chosen over rejected) = sigmoid(margin): Bradley and Terry 1952; as a loss, Ouyang 2022 (arXiv 2203.02155), eq. 1.
    The order fixes scores up to a constant; `center` times the squared sum of a pair's scores pulls that to 0
    (Eisenstein 2023, arXiv 2312.09244, eq. 2).
    """
    chosen_B, rejected_B = widened(chosen_B), widened(rejected_B)
    loss_B = -logsigmoid(chosen_B - rejected_B)
    if center:
        loss_B = loss_B + center * (chosen_B + rejected_B).square()
    return loss_B


def reward_metrics(chosen_B: Tensor, rejected_B: Tensor) -> dict[str, Tally]:
    """Return accuracy, margin and mean score under TRL's names, each side's score, and the Brier score.

    Brier 1950: the mean squared error of the probability, (1 - sigmoid(margin))^2; 1/4 is a coin's.
    """
    chosen_B, rejected_B = widened(chosen_B.detach()), widened(rejected_B.detach())
    margin_B = chosen_B - rejected_B
    return {
        "accuracy": _tally((margin_B > 0).to(margin_B.dtype)),
        "margin": _tally(margin_B),
        "mean_reward": _tally((chosen_B + rejected_B) / 2),
        "rewards/chosen": _tally(chosen_B),
        "rewards/rejected": _tally(rejected_B),
        "brier_score": _tally(torch.sigmoid(-margin_B).square()),
    }


def calibration_tallies(chosen_B: Tensor, rejected_B: Tensor) -> dict[str, Tally]:
    """Return, for each bin of confidence, the pairs got right minus the confidence in them, summed; and all pairs.

    Confidence is the probability of the order the model prefers, sigmoid(|margin|); a tie is half right. Sums over
    batches and ranks give the exact calibration error; see `calibration_error`.
    """
    margin_B = widened(chosen_B.detach()) - widened(rejected_B.detach())
    confidence_B = torch.sigmoid(margin_B.abs())
    gap_B = (margin_B.sign() + 1) / 2 - confidence_B
    bins = len(CALIBRATION_BINS)
    bin_B = ((2 * confidence_B - 1) * bins).long().clamp(0, bins - 1)
    gaps = gap_B.new_zeros(bins).index_add(0, bin_B, gap_B)
    return {name: Tally(gap, gap_B.new_tensor(len(gap_B))) for name, gap in zip(CALIBRATION_BINS, gaps, strict=True)}


def calibration_error(gaps: Mapping[str, float]) -> float:
    """Return the expected calibration error of the means of `calibration_tallies`, 0 to 1.

    Guo 2017, eq. 3: the sum over bins of (pairs in it / all pairs) * |accuracy - confidence|, where the number of
    pairs in a bin cancels out.
    """
    return sum(abs(gaps[name]) for name in CALIBRATION_BINS)


def _tally(values_B: Tensor) -> Tally:
    return Tally(values_B.sum(), values_B.new_tensor(len(values_B)))

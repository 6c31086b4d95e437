"""The losses over a pair, one small function each, and the f-divergences that score it.

A loss takes `Margins` (what is known of B pairs) and `Settings` (scalars) and returns a tensor of shape B whose mean
is TRL's value. Log-ratios and scores are in nats, beta in rewards per nat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

EXPONENT_MAX = 80.0  # exp(80) = 5.5e34 leaves fp32 room for a product with beta and with a gradient


@dataclass(frozen=True)
class Margins:
    """What the losses read of B pairs: log-probabilities of whole completions, scores, lengths.

    The first four are in nats. The scores are log-ratios of policy to reference after the f-divergence (the log-ratios
    themselves for `reverse_kl`). `tokens_per_pair` (scalar) is the mean number of chosen tokens of a pair.
    """

    policy_chosen_B: Tensor
    policy_rejected_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor
    chosen_score_B: Tensor
    rejected_score_B: Tensor
    chosen_tokens_B: Tensor  # counts, at least 1
    rejected_tokens_B: Tensor
    chosen_nll_B: Tensor  # nats, every token counted once whatever ld_alpha says
    tokens_per_pair: Tensor

    @property
    def chosen_B(self) -> Tensor:
        """Return the log-ratio of policy to reference for the chosen completion."""
        return self.policy_chosen_B - self.reference_chosen_B

    @property
    def rejected_B(self) -> Tensor:
        """Return the log-ratio of policy to reference for the rejected completion."""
        return self.policy_rejected_B - self.reference_rejected_B

    @property
    def delta_B(self) -> Tensor:
        """Return the chosen score minus the rejected one."""
        return self.chosen_score_B - self.rejected_score_B

    @property
    def mean_delta_B(self) -> Tensor:
        """Return the difference of the scores, each divided by the length of its completion."""
        return self.chosen_score_B / self.chosen_tokens_B - self.rejected_score_B / self.rejected_tokens_B


@dataclass(frozen=True)
class Settings:
    """The scalars that the losses read: beta (tau in IPO), label smoothing (epsilon), and DiscoPOP's tau."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05


# ---- the losses, in TRL's order


def sigmoid(m: Margins, s: Settings) -> Tensor:
    """Return -log sigmoid(beta * delta): Rafailov 2023 (arXiv 2305.18290), eq. 7. Label smoothing is not read."""
    return -logsigmoid(s.beta * m.delta_B)


def hinge(m: Margins, s: Settings) -> Tensor:
    """Return max(0, 1 - beta * delta): hinge-norm of Liu 2023 (RSO, arXiv 2309.06657), after SLiC-HF."""
    return torch.relu(1 - s.beta * m.delta_B)


def ipo(m: Margins, s: Settings) -> Tensor:
    """Return the squared distance to 1 / (2 tau): Azar 2023 (arXiv 2310.12036), eq. 17, on means over tokens."""
    return (m.mean_delta_B - 1 / (2 * s.beta)) ** 2


def exo_pair(m: Margins, s: Settings) -> Tensor:
    """Return KL(q, p) with q = softmax of the two rewards, p = (1 - eps, eps): Ji 2024 (arXiv 2402.00856), eq. 16."""
    logit_B = s.beta * m.delta_B
    chosen_B = torch.sigmoid(logit_B) * (logsigmoid(logit_B) - math.log1p(-s.label_smoothing))
    rejected_B = torch.sigmoid(-logit_B) * (logsigmoid(-logit_B) - math.log(s.label_smoothing))
    return chosen_B + rejected_B


def nca_pair(m: Margins, s: Settings) -> Tensor:
    """Return noise-contrastive alignment of two: Chen 2024 (arXiv 2402.05369), section 4.1, K = 2."""
    chosen_B, rejected_B = s.beta * m.chosen_B, s.beta * m.rejected_B
    return -logsigmoid(chosen_B) - 0.5 * logsigmoid(-chosen_B) - 0.5 * logsigmoid(-rejected_B)


def robust(m: Margins, s: Settings) -> Tensor:
    """Return the loss that is unbiased under labels flipped at rate eps: Chowdhury 2024 (arXiv 2403.00409), 3.1."""
    epsilon, logit_B = s.label_smoothing, s.beta * m.delta_B
    return ((1 - epsilon) * -logsigmoid(logit_B) - epsilon * -logsigmoid(-logit_B)) / (1 - 2 * epsilon)


def bco_pair(m: Margins, s: Settings) -> Tensor:
    """Return binary classifier optimisation: Jung 2024 (arXiv 2404.04656), section 4.

    As in TRL, without the paper's running reward shift (delta = 0), so it needs no state and couples no pairs.
    """
    return -logsigmoid(s.beta * m.chosen_B) - logsigmoid(-s.beta * m.rejected_B)


def sppo_hard(m: Margins, s: Settings) -> Tensor:
    """Return self-play preference optimisation: Wu 2024 (arXiv 2405.00675), eq. 4.7, win rates 1 and 0."""
    return (m.chosen_B - 0.5 / s.beta) ** 2 + (m.rejected_B + 0.5 / s.beta) ** 2


def aot(m: Margins, s: Settings) -> Tensor:
    """Return paired optimal-transport alignment: Melnyk 2024 (arXiv 2406.05882), section 3.

    The policy's gaps and the reference's are each sorted over the micro-batch, then compared by rank.
    """
    policy_gap_B = m.policy_chosen_B - m.policy_rejected_B
    reference_gap_B = m.reference_chosen_B - m.reference_rejected_B
    return _smoothed(policy_gap_B.sort().values - reference_gap_B.sort().values, s)


def aot_unpaired(m: Margins, s: Settings) -> Tensor:
    """Return unpaired optimal-transport alignment: Melnyk 2024, section 3; sorts chosen and rejected log-ratios."""
    return _smoothed(m.chosen_B.sort().values - m.rejected_B.sort().values, s)


def apo_zero(m: Margins, s: Settings) -> Tensor:
    """Return -sigmoid(r_chosen) + sigmoid(r_rejected), plus 1: D'Oosterlinck 2024 (arXiv 2408.06266), eq. 7."""
    return torch.sigmoid(-s.beta * m.chosen_B) + torch.sigmoid(s.beta * m.rejected_B)


def apo_down(m: Margins, s: Settings) -> Tensor:
    """Return sigmoid(r_chosen) - sigmoid(r_chosen - r_rejected), plus 1: D'Oosterlinck 2024, eq. 8."""
    return torch.sigmoid(s.beta * m.chosen_B) + torch.sigmoid(-s.beta * (m.chosen_B - m.rejected_B))


def discopop(m: Margins, s: Settings) -> Tensor:
    """Return the blend of logistic and exponential loss that depends on the margin: Lu 2024 (arXiv 2406.08414), eq. 5.

    The exponential part is written as one exponential: exp(-x) alone overflows where its weight sigmoid(x / tau)
    vanishes, and infinity times zero is NaN.
    """
    logit_B = s.beta * m.delta_B
    logistic_B = -logsigmoid(logit_B) * torch.sigmoid(-logit_B / s.discopop_tau)
    return logistic_B + safe_exp(logsigmoid(logit_B / s.discopop_tau) - logit_B)


def sft(m: Margins, s: Settings) -> Tensor:
    """Return the chosen completion's negative log-likelihood over the mean number of chosen tokens of a pair.

    Its mean over the micro-batch is the mean over tokens, as in TRL, and TRL's value therefore changes with the
    micro-batch. Given the step's own `tokens_per_pair`, the sum over all micro-batches divided by the global number
    of pairs is the step's mean over tokens, and the loss couples no pairs.
    """
    return m.chosen_nll_B / m.tokens_per_pair


def sigmoid_norm(m: Margins, s: Settings) -> Tensor:
    """Return -log sigmoid(beta * mean delta): eq. 7 of Rafailov 2023 on means over tokens (Tulu 3)."""
    return -logsigmoid(s.beta * m.mean_delta_B)


DPO_LOSSES: dict[str, Callable[[Margins, Settings], Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "sigmoid_norm": sigmoid_norm,
}

# Losses whose value on a batch is not the sum of their values on its parts: equal only at equal micro-batches.
BATCH_COUPLED: dict[str, str] = {
    "aot": "sorts the gaps over the micro-batch",
    "aot_unpaired": "sorts the log-ratios over the micro-batch",
    "sft": "divides by the tokens of the micro-batch, unless tokens_per_pair gives the step's",
}

# The reparametrisation leaves a term that only a difference of scores cancels: no other loss can take a divergence.
TAKES_DIVERGENCE = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"})


# ---- the f-divergences: score = f'(policy / reference), from the log-ratio; Wang 2023 (arXiv 2309.16240), theorem 1


def reverse_kl(ratio_B: Tensor, alpha: float) -> Tensor:
    """Return log t, the score of plain DPO."""
    return ratio_B


def forward_kl(ratio_B: Tensor, alpha: float) -> Tensor:
    """Return 1 - 1 / t."""
    return 1 - safe_exp(-ratio_B)


def js_divergence(ratio_B: Tensor, alpha: float) -> Tensor:
    """Return log(2 t / (1 + t)) as log 2 + log sigmoid(log t)."""
    return math.log(2) + logsigmoid(ratio_B)


def alpha_divergence(ratio_B: Tensor, alpha: float) -> Tensor:
    """Return (t^(alpha - 1) - 1) / (alpha - 1), TRL's parametrisation: 1 is reverse_kl, 0 forward_kl.

    The paper's is (1 - u^(-a)) / a, so its a is 1 - alpha here.
    """
    if abs(alpha - 1) < 1e-6:
        return ratio_B
    return (safe_exp((alpha - 1) * ratio_B) - 1) / (alpha - 1)


F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


def _smoothed(delta_B: Tensor, s: Settings) -> Tensor:
    """Return the logistic loss of a margin whose label is flipped at rate eps: Mitchell 2023 (cDPO), eq. 3."""
    epsilon, logit_B = s.label_smoothing, s.beta * delta_B
    return -(1 - epsilon) * logsigmoid(logit_B) - epsilon * logsigmoid(-logit_B)


def safe_exp(exponent_B: Tensor) -> Tensor:
    """Return exp without overflow: constant, with zero gradient, above `EXPONENT_MAX`, as TRL's alpha divergence."""
    return torch.exp(exponent_B.clamp(max=EXPONENT_MAX))

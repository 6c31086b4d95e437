"""From a scored rollout to advantages: the KL penalty and its coefficient, shaped rewards, GAE, whitening.

What happens once for each PPO iteration, between sampling and the updates; nothing here has a gradient. The functions
are pure; `AdaptiveKL` and `RunningMoments` carry a few numbers from one iteration to the next and through a resume.

Shapes: B sequences, T tokens. Column t speaks of token t + 1 of the input, as in `forward.logprobs.TokenLogps`; the
mask is 1 where that token was sampled, so prompts mask rows on the left and padding on the right. A function that
takes a mask reads nothing under a 0, not even NaN, and returns 0 there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from align_kit.errors import UserError, unknown
from align_kit.losses.language import trained, widened
from align_kit.losses.pairwise import EXPONENT_MAX

WHITEN_EPSILON = 1e-8  # added to a variance, as in the code of Huang 2024: equal values give 0, not 0 / 0
ADAPTIVE_KL_LIMIT = 0.2  # the most by which one update may see the KL off its target; Ziegler 2019, section 2.2


# ---- the penalty for leaving the reference


def k1(log_ratio_BT: Tensor) -> Tensor:
    """Return log(p / q): unbiased, but negative for many single tokens and so of high variance."""
    return log_ratio_BT


def k3(log_ratio_BT: Tensor) -> Tensor:
    """Return q / p - 1 - log(q / p): unbiased too, and never negative.

    `expm1` keeps the digits that exp(x) - 1 loses near x = 0, where a policy spends most of its tokens. Above
    `EXPONENT_MAX` nats the exponential stays constant, so that fp32 does not overflow.
    """
    return torch.expm1((-log_ratio_BT).clamp(max=EXPONENT_MAX)) + log_ratio_BT


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k3": k3}


def token_kl(logps_BT: Tensor, reference_BT: Tensor, estimator: str = "k1") -> Tensor:
    """Return each token's estimate of KL(p || q) (B, T; nats), of tokens that p sampled.

    `logps_BT` are log p and `reference_BT` log q. Schulman 2020, "Approximating KL Divergence"
    (joschu.net/blog/kl-approx.html). Raises `UserError` for an unknown estimator.
    """
    if estimator not in KL_ESTIMATORS:
        raise unknown("kl_estimator", estimator, KL_ESTIMATORS)
    return KL_ESTIMATORS[estimator](widened(logps_BT) - widened(reference_BT))


@dataclass
class FixedKL:
    """A coefficient of the KL penalty that stays what it is, the default of Huang 2024."""

    beta: float

    def update(self, kl: float, n: int) -> float:
        """Return the coefficient, whatever was measured."""
        return self.beta

    def state_dict(self) -> dict[str, float]:
        """Return nothing: a resumed run reads its fixed coefficient from its configuration."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Do nothing, see `state_dict`."""


@dataclass
class AdaptiveKL:
    """A coefficient of the KL penalty that holds the KL near `target`: Ziegler 2019 (arXiv 1909.08593), section 2.2.

    `target` is in the unit of what `update` is given: nats for a whole completion, by the paper. `horizon` counts
    completions. Raises `UserError` where a setting is not above 0, which the product could never leave.
    """

    target: float
    horizon: float
    beta: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"the adaptive KL coefficient's {name} is {value}; it must be above 0")

    def update(self, kl: float, n: int) -> float:
        """Return the coefficient after `n` completions of mean KL `kl`; a KL of NaN (no token) leaves it.

        beta *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon. An iteration counts for one horizon at most: more
        than five of them would turn the coefficient negative.
        """
        if not math.isnan(kl):
            error = min(max(kl / self.target - 1, -ADAPTIVE_KL_LIMIT), ADAPTIVE_KL_LIMIT)
            self.beta *= 1 + error * min(n / self.horizon, 1.0)
        return self.beta

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs, as plain JSON."""
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take the coefficient of a saved state; the state of a `FixedKL` has none and leaves the configured one."""
        self.beta = state.get("beta", self.beta)


# ---- rewards


def shaped_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, kl_coef: float) -> Tensor:
    """Return each token's reward (B, T): -kl_coef * kl, and the sequence's score on its last valid token besides.

    Ziegler 2019, eq. 2, R = r(x, y) - beta * log(p / q), spread over the tokens; the score comes with the end of the
    episode, as in Huang 2024 (arXiv 2403.17031). The score of a sequence without a valid token goes nowhere.
    """
    penalty_BT = -kl_coef * trained(kl_BT, mask_BT)
    return penalty_BT + torch.where(_last_valid(mask_BT), widened(scores_B)[:, None], 0.0)


def _last_valid(mask_BT: Tensor) -> Tensor:
    """Return True at the last valid token of each row, and nowhere in a row without one."""
    valid_BT = mask_BT != 0
    remaining_BT = valid_BT.flip(1).cumsum(1).flip(1)  # valid tokens from this one on
    return valid_BT & (remaining_BT == 1)


@dataclass
class RunningMoments:
    """Mean and variance of every score seen so far, by which rewards are normalised over a whole run.

    By the pairwise update of Chan, Golub and LeVeque 1983, batches merge in float64 into what one pass over all
    scores gives, so neither the order nor the size of the batches matters. Scores are those of all ranks, and finite:
    one NaN would stay for ever. The variance is the population's, 0 for fewer than two scores.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # the sum of squared distances to the mean

    @property
    def variance(self) -> float:
        """Return the population variance, 0 before the first score."""
        return self.squares / max(self.count, 1)

    @property
    def std(self) -> float:
        """Return the standard deviation in the unit of the scores."""
        return math.sqrt(self.variance)

    def update(self, scores: Tensor) -> None:
        """Add a batch of scores (any shape, all ranks' together)."""
        if not scores.numel():
            return
        wide = scores.detach().double()
        mean, squares = wide.mean().item(), (wide - wide.mean()).square().sum().item()
        total = self.count + wide.numel()
        gap, share = mean - self.mean, wide.numel() / total
        self.squares += squares + gap * gap * self.count * share
        self.mean += gap * share
        self.count = total

    def normalised(self, scores: Tensor) -> Tensor:
        """Return the scores around the running mean, in running deviations; scores that were all equal become 0."""
        return ((scores.double() - self.mean) / math.sqrt(self.variance + WHITEN_EPSILON)).to(scores.dtype)

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs, as plain JSON: it comes back bit for bit."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state."""
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]


# ---- advantages


@torch.no_grad()
def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns (B, T): Schulman 2016 (arXiv 1506.02438), eq. 16, by its backward recursion.

    A_t = delta_t + gamma * lam * A_(t+1), with delta_t = r_t + gamma * V_(t+1) - V_t, and returns A_t + V_t, the
    targets of the value head (TD(lambda)). "t + 1" is the row's next valid token; after the last one value and
    advantage are 0, for a completion cut at its length limit as for one that ended, as in Huang 2024's code. The
    defaults are Huang 2024's.
    """
    rewards_BT, values_BT = trained(rewards_BT, mask_BT), trained(values_BT, mask_BT)
    advantages_BT = torch.zeros_like(values_BT)
    ahead_B = next_value_B = values_BT.new_zeros(len(values_BT))
    for t in reversed(range(values_BT.shape[1])):
        valid_B = mask_BT[:, t] != 0
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        ahead_B = torch.where(valid_B, delta_B + gamma * lam * ahead_B, ahead_B)
        next_value_B = torch.where(valid_B, values_BT[:, t], next_value_B)
        advantages_BT[:, t] = ahead_B
    advantages_BT = trained(advantages_BT, mask_BT)
    return advantages_BT, advantages_BT + values_BT


def whiten(values_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True) -> Tensor:
    """Return the values at variance 1, and at mean 0 or, without `shift_mean`, at the mean they had.

    Huang 2024, section 7: advantages shift, rewards (where whitened) do not. The moments are those of all valid
    tokens given, by the population's variance; hand it the tokens of ALL ranks, else each rank measures with its own
    ruler. Equal values all become the mean.
    """
    mean, variance = _moments(values_BT, mask_BT)
    kept_BT = trained(values_BT, mask_BT)
    scaled_BT = (kept_BT.double() - mean) * torch.rsqrt(variance + WHITEN_EPSILON)
    if not shift_mean:
        scaled_BT = scaled_BT + mean
    return trained(scaled_BT, mask_BT).to(kept_BT.dtype)


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns) over the valid tokens (scalar, float64).

    1 is a perfect value head, 0 one no better than a constant, below 0 worse; 0 too where the returns do not vary.
    """
    _, spread = _moments(returns_BT, mask_BT)
    _, left = _moments(widened(returns_BT) - widened(values_BT), mask_BT)
    return torch.where(spread > 0, 1 - left / spread.where(spread > 0, 1.0), 0.0)


def _moments(values_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population variance over the valid tokens (scalars; 0 for none).

    In float64, where the sum of equal fp32 values is exact: in fp32 their mean is off in the last digit, and
    whitening would blow that difference up to 1.
    """
    wide_BT = trained(values_BT, mask_BT).double()
    items = (mask_BT != 0).sum().clamp(min=1)
    mean = wide_BT.sum() / items
    return mean, trained((wide_BT - mean).square(), mask_BT).sum() / items

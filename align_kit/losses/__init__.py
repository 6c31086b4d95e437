"""Losses as pure functions of tensors: no model, no configuration.

`language` has the token losses of pretraining and supervised fine-tuning; `preference` goes from a batch of pairs to
its loss, and `pairwise` has each loss over a pair. `orpo`, `kto` and `reward` have the losses of their phases,
`balance` what the routers of a mixture of experts add to them; `advantages` makes advantages of a scored rollout,
`ppo` learns from them; between iterations `AdaptiveKL` and `RunningMoments` keep a few floats, the only state.
Names and values are TRL's; each line carries the paper's equation.

Shapes: B pairs or sequences, T tokens, V vocabulary. Log-probabilities are natural logarithms (nats).
A mask has the shape of its log-probabilities and is 1 (or True) where the token *predicted there* is trained.
"""

from __future__ import annotations

from align_kit.losses.advantages import (
    KL_ESTIMATORS,
    AdaptiveKL,
    FixedKL,
    RunningMoments,
    explained_variance,
    gae,
    shaped_rewards,
    token_kl,
    whiten,
)
from align_kit.losses.balance import balance_loss
from align_kit.losses.kto import (
    KTO_LOSSES,
    UnpairedOutput,
    baseline_of,
    class_weights,
    kto_loss,
    kto_metrics,
)
from align_kit.losses.language import LANGUAGE_LOSSES, Tally, dft_loss, language_loss, sequence_logps
from align_kit.losses.orpo import OddsOutput, orpo_loss, orpo_metrics
from align_kit.losses.pairwise import BATCH_COUPLED, DPO_LOSSES, F_DIVERGENCES
from align_kit.losses.ppo import PolicyTerms, ValueTerms, policy_loss, value_loss
from align_kit.losses.preference import (
    Pairs,
    PreferenceOutput,
    check_dpo_options,
    dpo_loss,
    log_sum_sq_probs,
    preference_metrics,
)
from align_kit.losses.reward import (
    CALIBRATION_BINS,
    calibration_error,
    calibration_tallies,
    reward_loss,
    reward_metrics,
)

__all__ = [
    "BATCH_COUPLED",
    "CALIBRATION_BINS",
    "DPO_LOSSES",
    "F_DIVERGENCES",
    "KL_ESTIMATORS",
    "KTO_LOSSES",
    "LANGUAGE_LOSSES",
    "AdaptiveKL",
    "FixedKL",
    "OddsOutput",
    "Pairs",
    "PolicyTerms",
    "PreferenceOutput",
    "RunningMoments",
    "Tally",
    "UnpairedOutput",
    "ValueTerms",
    "balance_loss",
    "baseline_of",
    "calibration_error",
    "calibration_tallies",
    "check_dpo_options",
    "class_weights",
    "dft_loss",
    "dpo_loss",
    "explained_variance",
    "gae",
    "kto_loss",
    "kto_metrics",
    "language_loss",
    "log_sum_sq_probs",
    "orpo_loss",
    "orpo_metrics",
    "policy_loss",
    "preference_metrics",
    "reward_loss",
    "reward_metrics",
    "sequence_logps",
    "shaped_rewards",
    "token_kl",
    "value_loss",
    "whiten",
]

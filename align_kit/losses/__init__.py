"""Losses as pure functions of tensors: no model, no configuration, no state.

`language` has the token losses of pretraining and supervised fine-tuning; `preference` goes from a batch of pairs to
its loss, and `pairwise` has each loss over a pair.
Names and values are TRL's; each line carries the paper's equation.

Shapes: B pairs or sequences, T tokens, V vocabulary. Log-probabilities are natural logarithms (nats).
A mask has the shape of its log-probabilities and is 1 (or True) where the token *predicted there* is trained.
"""

from __future__ import annotations

from align_kit.losses.language import LANGUAGE_LOSSES, Tally, dft_loss, language_loss, sequence_logps
from align_kit.losses.pairwise import BATCH_COUPLED, DPO_LOSSES, F_DIVERGENCES
from align_kit.losses.preference import (
    Pairs,
    PreferenceOutput,
    check_dpo_options,
    dpo_loss,
    log_sum_sq_probs,
    preference_metrics,
)

__all__ = [
    "BATCH_COUPLED",
    "DPO_LOSSES",
    "F_DIVERGENCES",
    "LANGUAGE_LOSSES",
    "Pairs",
    "PreferenceOutput",
    "Tally",
    "check_dpo_options",
    "dft_loss",
    "dpo_loss",
    "language_loss",
    "log_sum_sq_probs",
    "preference_metrics",
    "sequence_logps",
]

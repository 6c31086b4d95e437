"""The reward of PPO's control arm: the checker's own numbers, dealt out at random among the completions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from align_kit.data.checkers import exact_reward


def shuffled_reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **others: Any
) -> list[float]:
    """Return `exact_reward` of the same completions in another order, which depends on the completions alone."""
    scores = exact_reward(prompts, completions, answer, **others)
    random.Random("".join(map(str, completions))).shuffle(scores)
    return scores

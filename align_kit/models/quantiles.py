"""Sampling whose randomness comes from outside: what is drawn does not depend on batches, ranks or processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

Ids = list[int]


def ends_of(policy: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end a completion: the tokenizer's, and those of the model's generation configuration."""
    config = getattr(policy, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    more = named if isinstance(named, list | tuple) else [] if named is None else [named]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *more]))


def uniform(keys: Sequence[tuple[int, ...]], length: int) -> np.ndarray:
    """Return uniform numbers in [0, 1) (keys x `length`), each row a function of its key alone."""
    return np.stack([np.random.default_rng(key).random(length) for key in keys])


def padded(prompts: Sequence[Ids], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask (B, T) of prompts padded on the left."""
    longest = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), longest), pad, device=device)
    attention_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        attention_BT[row, longest - len(prompt) :] = 1
    return ids_BT, attention_BT


class Quantiles(LogitsProcessor):  # type: ignore[misc]
    """Leave of each row's next tokens the one at a given quantile: sampling with the randomness from outside.

    The smallest token id whose cumulative probability exceeds the draw; remembers its log-probability.
    """

    def __init__(self, draws_BT: Tensor, prompt_length: int, temperature: float) -> None:
        self.draws_BT = draws_BT
        self.prompt_length = prompt_length
        self.temperature = temperature
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self.prompt_length
        logps_BV = (scores.float() / self.temperature).log_softmax(-1)
        mass_BV = logps_BV.double().exp().cumsum(-1)
        # Rounding leaves the whole mass a little off 1; a draw must never fall behind the last token.
        target_B1 = self.draws_BT[:, place : place + 1] * mass_BV[:, -1:]
        token_B1 = torch.searchsorted(mass_BV, target_B1, right=True).clamp(max=mass_BV.shape[1] - 1)
        self.logps.append(logps_BV.gather(1, token_B1).squeeze(1))
        return torch.full_like(scores, float("-inf")).scatter(1, token_B1, 0.0)

"""From a batch to one score for each sequence: what a model with a scalar head gives its last token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def sequence_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the score of each row (B, in fp32) of `batch` ("input_ids", "attention_mask": B, T).

    `model` is a sequence classifier with one label. Which token is the last is its own forward's affair (the
    rightmost that is not padding), so that plain transformers gives the same scores.
    """
    output: Any = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return output.logits.squeeze(-1).float()

"""From a batch to one score for each sequence: what a model with a scalar head gives its last token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from align_kit.forward.door import pack_for


def sequence_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the score of each row (B, in fp32) of `batch` ("input_ids", "attention_mask": B, T).

    `model` is a sequence classifier with one label. The last token is the rightmost that is not its padding token, as
    in plain transformers, so that its own forward gives the same scores.
    """
    pack = pack_for(model, batch, whole=True, last_not=_padding(model))
    if pack is not None:
        return model(pack=pack).scores  # type: ignore[no-any-return]
    output: Any = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return output.logits.squeeze(-1).float()  # type: ignore[no-any-return]


def last_states(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return what a sequence classifier's head reads: the last hidden state (B, H) of each row of `batch`."""
    pack = pack_for(model, batch, whole=True, last_not=_padding(model))
    if pack is not None:
        return model(pack=pack, states=True).states  # type: ignore[no-any-return]
    ids_BT, attention_BT = batch["input_ids"], batch["attention_mask"]
    output: Any = model(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False, output_hidden_states=True)
    columns_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    last_B = (columns_T * (ids_BT != _padding(model))).argmax(1)
    return output.hidden_states[-1][torch.arange(len(ids_BT), device=ids_BT.device), last_B]  # type: ignore[no-any-return]


def _padding(model: Any) -> int | None:
    """Return the token that a classifier, or the one inside an engine, takes for padding."""
    inside = getattr(model, "module", model)
    return inside.config.get_text_config().pad_token_id  # type: ignore[no-any-return]

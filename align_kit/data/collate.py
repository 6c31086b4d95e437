"""Pad tokenised rows to batches. B rows (or pairs), T tokens of the longest; padding stands on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
Batch = dict[str, Tensor]


def pad_BT(rows: Sequence[Sequence[int]], value: int, multiple: int | None = None) -> Tensor:
    """Return int64 `rows` padded on the right with `value` to the longest, rounded up to `multiple`: shape B, T."""
    length = max(len(row) for row in rows)
    if multiple:
        length = -(-length // multiple) * multiple
    padded_BT = torch.full((len(rows), length), value, dtype=torch.long)
    for place, row in enumerate(rows):
        padded_BT[place, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return padded_BT


@dataclass(frozen=True)
class LanguageCollator:
    """Batches language rows: `input_ids`, `attention_mask` and `loss_mask`, each B, T of int64.

    `loss_mask[b, t]` is 1 where token t is predicted (from the tokens before it) and counted in the loss.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return the padded batch of `rows`."""
        ids, masks = [row["input_ids"] for row in rows], [row["loss_mask"] for row in rows]
        return _batch(ids, masks, self.pad_token_id, self.pad_to_multiple_of)


@dataclass(frozen=True)
class PreferenceCollator:
    """Batches pairs: the language tensors with 2B rows, first B times prompt + chosen, then B times prompt + rejected.

    `loss_mask` holds 1 on completion tokens; `prompt_lengths` (B) lets a forward share each pair's prompt. Columns
    named in `carry` (numbers per pair, such as stored reference log-probabilities) come along as float32 of shape B.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    carry: tuple[str, ...] = ()

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return the padded batch of `rows`."""
        ids, masks = [], []
        for side in ("chosen_ids", "rejected_ids"):
            for row in rows:
                ids.append([*row["prompt_ids"], *row[side]])
                masks.append([0] * len(row["prompt_ids"]) + [1] * len(row[side]))
        batch = _batch(ids, masks, self.pad_token_id, self.pad_to_multiple_of)
        batch["prompt_lengths"] = torch.tensor([len(row["prompt_ids"]) for row in rows])
        for name in self.carry:
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch


@dataclass(frozen=True)
class BinaryCollator:
    """Batches labelled completions: the language tensors (B rows, prompt + completion) and `label`, bool of shape B."""

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return the padded batch of `rows`."""
        ids = [[*row["prompt_ids"], *row["completion_ids"]] for row in rows]
        masks = [[0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"]) for row in rows]
        batch = _batch(ids, masks, self.pad_token_id, self.pad_to_multiple_of)
        batch["label"] = torch.tensor([row["label"] for row in rows], dtype=torch.bool)
        batch["prompt_lengths"] = torch.tensor([len(row["prompt_ids"]) for row in rows])
        return batch


def _batch(ids: list[list[int]], masks: list[list[int]], pad: int, multiple: int | None) -> Batch:
    # The attention mask comes from the lengths: the pad token may also be a real one (EOS as padding).
    return {
        "input_ids": pad_BT(ids, pad, multiple),
        "attention_mask": pad_BT([[1] * len(row) for row in ids], 0, multiple),
        "loss_mask": pad_BT(masks, 0, multiple),
    }

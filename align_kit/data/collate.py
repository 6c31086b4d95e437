"""Pad tokenised rows to batches. B rows (or pairs), T tokens of the longest; padding stands on the right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align_kit.data import weights
from align_kit.data.origins import COLUMN

Row = dict[str, Any]
Batch = dict[str, Tensor]
Ids = Sequence[int]


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

    `loss_mask` holds 1 on completion tokens; `prompt_lengths` (B) lets a forward share each pair's prompt. Rows with
    stored log-probabilities (`reference_chosen`, `reference_rejected`, a number per completion token) give
    `reference_logps`, float32 of shape 2B, T - 1: column t speaks of token t + 1, 0 outside the completion.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return the padded batch of `rows`."""
        sides = ("chosen", "rejected")
        prompts = [row["prompt_ids"] for _ in sides for row in rows]
        completions = [row[f"{side}_ids"] for side in sides for row in rows]
        batch = _completions(prompts, completions, self.pad_token_id, self.pad_to_multiple_of)
        batch["prompt_lengths"] = _lengths(prompts[: len(rows)])
        if "reference_chosen" in rows[0]:
            stored = [row[f"reference_{side}"] for side in sides for row in rows]
            batch["reference_logps"] = _aligned_BT(stored, batch["loss_mask"])
        return batch


@dataclass(frozen=True)
class BinaryCollator:
    """Batches labelled completions: the language tensors (B rows, prompt + completion) and `label`, bool of shape B.

    Rows with `kl_completion_ids` (see `data.mismatch`) give prompt + that completion, padded on their own, as
    `kl_input_ids`, `kl_attention_mask` and `kl_loss_mask`. Stored log-probabilities per completion token become
    `reference_logps` (from `reference_completion`) and `kl_reference_logps` (from `reference_kl`), float32, laid out
    as `PreferenceCollator` does.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return the padded batch of `rows`."""
        prompts = [row["prompt_ids"] for row in rows]
        batch = self._half(rows, prompts, "completion_ids", "reference_completion")
        batch["label"] = torch.tensor([row["label"] for row in rows], dtype=torch.bool)
        batch["prompt_lengths"] = _lengths(prompts)
        if "kl_completion_ids" in rows[0]:
            mismatched = self._half(rows, prompts, "kl_completion_ids", "reference_kl")
            batch |= {f"kl_{name}": tensor for name, tensor in mismatched.items()}
        return batch

    def _half(self, rows: Sequence[Row], prompts: Sequence[Ids], ids: str, reference: str) -> Batch:
        batch = _completions(prompts, [row[ids] for row in rows], self.pad_token_id, self.pad_to_multiple_of)
        if reference in rows[0]:
            batch["reference_logps"] = _aligned_BT([row[reference] for row in rows], batch["loss_mask"])
        return batch


@dataclass(frozen=True)
class SourcedCollator:
    """Adds to the batches of another collator what its rows are of each source, `source_parts`: B rows, S sources.

    And what they weigh, `weight`: float32 of shape B, where they do.
    """

    inner: Callable[[Sequence[Row]], Batch]

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return the batch of `rows`, as it is where the rows do not know their source."""
        batch = self.inner(rows)
        if weights.COLUMN in rows[0]:
            batch[weights.COLUMN] = torch.tensor([row[weights.COLUMN] for row in rows], dtype=torch.float32)
        if COLUMN in rows[0]:
            batch[COLUMN] = torch.tensor([row[COLUMN] for row in rows])
        return batch


def _completions(prompts: Sequence[Ids], completions: Sequence[Ids], pad: int, multiple: int | None) -> Batch:
    """Return the batch of prompt + completion, each completion's tokens in the loss."""
    both = list(zip(prompts, completions, strict=True))
    ids = [[*prompt, *completion] for prompt, completion in both]
    masks = [[0] * len(prompt) + [1] * len(completion) for prompt, completion in both]
    return _batch(ids, masks, pad, multiple)


def _aligned_BT(values: Sequence[Sequence[float]], loss_mask_BT: Tensor) -> Tensor:
    """Return a number per completion token where `forward.logprobs` puts the token's log-probability: B, T - 1."""
    mask_BT = loss_mask_BT[:, 1:].bool()
    # Where these differ, the stored numbers are those of other tokens.
    assert [len(row) for row in values] == mask_BT.sum(1).tolist(), "stored log-probabilities are not one per token"
    aligned_BT = torch.zeros(mask_BT.shape)
    aligned_BT[mask_BT] = torch.cat([torch.as_tensor(row, dtype=torch.float32) for row in values])
    return aligned_BT


def _lengths(rows: Sequence[Ids]) -> Tensor:
    return torch.tensor([len(row) for row in rows])


def _batch(ids: list[list[int]], masks: list[list[int]], pad: int, multiple: int | None) -> Batch:
    # The attention mask comes from the lengths: the pad token may also be a real one (EOS as padding).
    return {
        "input_ids": pad_BT(ids, pad, multiple),
        "attention_mask": pad_BT([[1] * len(row) for row in ids], 0, multiple),
        "loss_mask": pad_BT(masks, 0, multiple),
    }

"""Batches: shapes, padding on the right, masks; equality with TRL's collators stands in test_data_render."""

from __future__ import annotations

import torch

from align_kit.data.collate import BinaryCollator, LanguageCollator, PreferenceCollator

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "reference_chosen": 0.5},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11], "reference_chosen": -1.0},
]


def test_language_batch():
    rows = [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, {"input_ids": [8], "loss_mask": [1]}]
    batch = LanguageCollator(pad_token_id=7)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]  # a real 7 is no padding
    assert batch["loss_mask"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask", "loss_mask"}
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_rounding_up_the_length():
    batch = LanguageCollator(pad_token_id=0, pad_to_multiple_of=4)([{"input_ids": [1] * 5, "loss_mask": [1] * 5}])
    assert batch["input_ids"].shape == (1, 8) and batch["attention_mask"].sum() == 5


def test_preference_batch():
    batch = PreferenceCollator(pad_token_id=0, carry=("reference_chosen",))(PAIRS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 4, 4]
    assert batch["prompt_lengths"].tolist() == [3, 2]
    assert batch["reference_chosen"].tolist() == [0.5, -1.0]


def test_binary_batch():
    rows = [{"prompt_ids": [1], "completion_ids": [2, 3], "label": True},
            {"prompt_ids": [4], "completion_ids": [5], "label": False}]  # fmt: skip
    batch = BinaryCollator(pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert batch["label"].tolist() == [True, False] and batch["prompt_lengths"].tolist() == [1, 1]

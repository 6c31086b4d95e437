"""Batches: shapes, padding on the right, masks; equality with TRL's collators stands in test_data_render."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align_kit.data.collate import BinaryCollator, LanguageCollator, PreferenceCollator
from align_kit.forward.logprobs import token_logps
from tests.small import SIZES

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
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
    batch = PreferenceCollator(pad_token_id=0)(PAIRS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 4, 4]
    assert batch["prompt_lengths"].tolist() == [3, 2]
    assert "reference_logps" not in batch


def test_binary_batch():
    rows = [{"prompt_ids": [1], "completion_ids": [2, 3], "label": True},
            {"prompt_ids": [4], "completion_ids": [5], "label": False}]  # fmt: skip
    batch = BinaryCollator(pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert batch["label"].tolist() == [True, False] and batch["prompt_lengths"].tolist() == [1, 1]
    assert not any(name.startswith(("kl_", "reference")) for name in batch)


LABELLED = [
    {"prompt_ids": [1, 2], "completion_ids": [3], "label": True, "kl_completion_ids": [4, 5, 6]},
    {"prompt_ids": [7], "completion_ids": [8, 9], "label": False, "kl_completion_ids": [3]},
]


def test_mismatched_completions_are_padded_on_their_own():
    batch = BinaryCollator(pad_token_id=0)(LABELLED)
    assert batch["input_ids"].shape == (2, 3)
    assert batch["kl_input_ids"].tolist() == [[1, 2, 4, 5, 6], [7, 3, 0, 0, 0]]
    assert batch["kl_attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["kl_loss_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]


def test_stored_log_probabilities_stand_where_their_tokens_are_predicted():
    stored = [{**PAIRS[0], "reference_chosen": [-0.5, -1.5], "reference_rejected": [-2.0]},
              {**PAIRS[1], "reference_chosen": [-3.0], "reference_rejected": [-4.0, -5.0]}]  # fmt: skip
    batch = PreferenceCollator(pad_token_id=0, pad_to_multiple_of=3)(stored)
    assert batch["reference_logps"].dtype == torch.float32
    assert batch["reference_logps"].tolist() == [
        [0, 0, -0.5, -1.5, 0], [0, -3, 0, 0, 0], [0, 0, -2, 0, 0], [0, -4, -5, 0, 0],
    ]  # fmt: skip
    labelled = [{**LABELLED[0], "reference_completion": [-1.0], "reference_kl": [-2.0, -3.0, -4.0]},
                {**LABELLED[1], "reference_completion": [-5.0, -6.0], "reference_kl": [-7.0]}]  # fmt: skip
    batch = BinaryCollator(pad_token_id=0)(labelled)
    assert batch["reference_logps"].tolist() == [[0, -1], [-5, -6]]
    assert batch["kl_reference_logps"].tolist() == [[0, -2, -3, -4], [-7, 0, 0, 0]]


def test_stored_log_probabilities_stand_where_a_forward_puts_its_own():
    """The same columns as `forward.logprobs` masks in."""
    torch.manual_seed(0)
    batch = PreferenceCollator(pad_token_id=0)(PAIRS)
    mine = token_logps(LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), batch)
    rows = [{**pair, "reference_chosen": mine.logps_BT[place][mine.mask_BT[place]].tolist(),
             "reference_rejected": mine.logps_BT[2 + place][mine.mask_BT[2 + place]].tolist()}
            for place, pair in enumerate(PAIRS)]  # fmt: skip
    assert torch.equal(PreferenceCollator(pad_token_id=0)(rows)["reference_logps"], mine.logps_BT)


def test_stored_log_probabilities_of_other_tokens_are_refused():
    with pytest.raises(AssertionError, match="not one per token"):
        BinaryCollator(pad_token_id=0)([{**LABELLED[0], "reference_completion": [-1.0, -2.0]}])

"""What the data tests share: real tokenizers without a download, the real files, and rows in every shape."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("ALIGN_KIT_DATA") or ROOT.parent / "shared" / "data")
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL}; set ALIGN_KIT_DATA")

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>"]  # fmt: skip
BOS = "<|begin_of_text|>"
CORPUS = ["What is 3 + 4? It is 7.\nThe user asks, the assistant answers in plain English words.", "abc def ghi"] * 20


@functools.cache
def _backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


def chat_tokenizer(template: str | None, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """Return a small byte-level BPE tokenizer with `template` as its chat template."""
    backend = Tokenizer.from_str(_backend())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token="<|pad|>", bos_token=BOS)
    tokenizer.chat_template = template
    return tokenizer


def bos_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Return the same tokenizer, putting BOS before every string as Llama's does."""
    tokenizer = chat_tokenizer(template, eos="<|eot_id|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    return tokenizer


def trl_template(name: str) -> str:
    """Return one of the real models' chat templates that TRL ships (`qwen2_5`, `llama3_training`, ...)."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def user(text: str) -> dict[str, str]:
    """Return a user's message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """Return an assistant's message."""
    return {"role": "assistant", "content": text}


STRINGS = [
    {"prompt": "What is 3 + 4?\n", "completion": "It is 7.", "rejected": "It is 8, or so."},
    {"prompt": "Say abc", "completion": "def", "rejected": " ghi jkl"},  # merges across the boundary
    {"prompt": "Stop<|im_end|>", "completion": "ends already<|im_end|>", "rejected": ""},
    {"prompt": "long " * 60, "completion": "short", "rejected": "shorter"},
    {"prompt": "short", "completion": "long " * 60, "rejected": "long " * 50},
]
CHATS = [
    {
        "prompt": [user(row["prompt"])],
        "completion": [assistant(row["completion"])],
        "rejected": [assistant(row["rejected"])],
    }
    for row in STRINGS
]
CHATS[0]["prompt"] = [{"role": "system", "content": "Be brief."}, user("hi"), assistant("hello"), user("What is 3?")]

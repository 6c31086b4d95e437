"""What the step benchmarks measure on: models of a realistic shape and rows of realistic lengths.

A row is token ids; on disk it is text of words "t17", one for each token, so that both trainers read, tokenise and
collate it their own way and still train on the same tokens.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

END, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL = 2
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

# Llama with grouped-query attention and tied embeddings, as small models are.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "4M": {"vocab_size": 8_192, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
           "num_attention_heads": 6, "num_key_value_heads": 2},
    "30M": {"vocab_size": 32_000, "hidden_size": 384, "intermediate_size": 1_024, "num_hidden_layers": 10,
            "num_attention_heads": 6, "num_key_value_heads": 2},
    "100M": {"vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 12,
             "num_attention_heads": 12, "num_key_value_heads": 4},
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """How many parameters multiply a token: those of the layers, and those of the head."""

    body: int
    head: int
    hidden: int
    intermediate: int


def shape_of(size: str) -> Shape:
    """Return the shape of a model of `SIZES`, counted on the model itself."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(_config(size))
    head = model.lm_head.weight.numel()
    body = sum(parameter.numel() for parameter in model.model.parameters()) - head
    return Shape(body, head, model.config.hidden_size, model.config.intermediate_size)


def write_model(place: Path, size: str, seed: int) -> Path:
    """Save a model of `SIZES` with random weights and the tokenizer of numbered words in `place`."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(_config(size)).save_pretrained(place)
    _numbered_words(SIZES[size]["vocab_size"]).save_pretrained(place)
    return place


def _config(size: str) -> Any:
    from transformers import LlamaConfig

    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    return LlamaConfig(**SIZES[size], **ends, max_position_embeddings=8_192, tie_word_embeddings=True)


def _numbered_words(vocab_size: int) -> Any:
    """Return a tokenizer that knows the words t2, t3, ... and an end and a padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {END: 0, PAD: 1, **{f"t{number}": number for number in range(SPECIAL, vocab_size)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# --- lengths ----------------------------------------------------------------------------------------------

Lengths = tuple[int, int, int]  # prompt, chosen and rejected, in tokens
RATIOS = {"1:4": 0.25, "0.42": 0.42, "1:1": 1.0, "2.15": 2.15, "4:1": 4.0, "8:1": 8.0}
SIGMA = 0.6  # of a log-normal length; real sets have 0.4 (one kind of task) to 1.4 (chats)


def log_normal(ratio: float, tokens: int, longest: int, draw: random.Random) -> Iterator[Lengths]:
    """Yield the lengths of pairs whose prompt and completion are `tokens` together on average, prompt : completion as
    `ratio`; all three lengths are independent.
    """
    completion = tokens / (1 + ratio)
    while True:
        lengths = [_length(mean, draw) for mean in (tokens - completion, completion, completion)]
        yield _cut(lengths, longest)


def _length(mean: float, draw: random.Random) -> int:
    return max(1, round(draw.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA)))


def _cut(lengths: Sequence[int], longest: int) -> Lengths:
    """Return the lengths cut so that no sequence is longer than `longest`: first the prompt, to half of that."""
    prompt = min(lengths[0], longest // 2)
    chosen, rejected = (min(one, longest - prompt) for one in lengths[1:])
    return prompt, chosen, rejected


def made_rows(lengths: Iterator[Lengths], vocab_size: int, draw: random.Random) -> Iterator[dict[str, str]]:
    """Yield pairs of random tokens with these lengths; the end token each side gets when tokenised is one of them."""
    for prompt, chosen, rejected in lengths:
        sides = zip(("prompt", "chosen", "rejected"), (prompt, max(1, chosen - 1), max(1, rejected - 1)), strict=True)
        yield {name: text([draw.randrange(SPECIAL, vocab_size) for _ in range(count)]) for name, count in sides}


def text(ids: Sequence[int]) -> str:
    """Return ids as the words that are tokenised to them, a space in front so that texts can be joined."""
    return "".join(f" t{number}" for number in ids)


# --- real lengths -----------------------------------------------------------------------------------------


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _pairs(path: Path) -> list[tuple[str, str, str]]:
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in _json_lines(path)]


def _shared_gpt(path: Path) -> list[tuple[str, str, str]]:
    rows = json.loads(path.read_text())
    prompts = ["\n".join(turn["value"] for turn in row["conversations"]) for row in rows]
    return [(said, row["chosen"]["value"], row["rejected"]["value"]) for said, row in zip(prompts, rows, strict=True)]


def _answers(path: Path) -> list[tuple[str, str, str]]:
    return [(row["question"], row["answer"], "") for row in _json_lines(path)]


REAL: dict[str, tuple[str, Callable[[Path], list[tuple[str, str, str]]]]] = {
    "gsm8k_pairs": ("gsm8k/model_solutions_pairs.jsonl", _pairs),
    "llamafactory_dpo_en": ("llamafactory_dpo_en/dpo_en_demo.json", _shared_gpt),
    "xstest": ("xstest/preference_pairs.jsonl", _pairs),
}
REAL_SFT = {"gsm8k": ("gsm8k/train.jsonl", _answers)}


def real_sets(root: Path | None, sft: bool) -> dict[str, list[tuple[str, str, str]]]:
    """Return the rows (prompt, chosen, rejected) of the real sets that are in `root`, by name."""
    known = REAL_SFT if sft else REAL
    return {name: read(root / place) for name, (place, read) in known.items() if root and (root / place).is_file()}


def in_tokens(rows: Sequence[tuple[str, str, str]], vocab_size: int) -> list[list[list[int]]]:
    """Return the parts of each row as ids of a byte-level BPE of `vocab_size` tokens trained on the rows."""
    words = _byte_pairs([part for row in rows for part in row], vocab_size - SPECIAL)
    return [[[one + SPECIAL for one in words.encode(part).ids] for part in row] for row in rows]


def real_rows(rows: Sequence[list[list[int]]], longest: int, draw: random.Random) -> Iterator[dict[str, str]]:
    """Yield the pairs of a real set, in tokens, in random order.

    What is longer than `longest` tokens is cut: the prompt at half of that, a completion at what is left.
    """
    while True:
        for row in draw.sample(rows, len(rows)):
            cut = _cut([len(part) for part in row], longest - 1)  # the end token comes on top
            names = ("prompt", "chosen", "rejected")
            yield {name: text(part[:count]) for name, part, count in zip(names, row, cut, strict=True)}


def _byte_pairs(texts: Sequence[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(texts, trainer)
    return words

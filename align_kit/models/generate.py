"""Completions of a model in Hugging Face form, many at a time, and how well it predicts given ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from align_kit.models import load, moe, source
from align_kit.models.completion import Completion, Drawing
from align_kit.models.quantiles import Ids, Quantiles, ends_of, padded, uniform


def open_model(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Return (model, tokenizer) of `folder` for inference on this process's device, in `dtype`."""
    where = source.resolve(str(folder))
    model = load.load_policy(where, dtype=dtype, seed=0, trust_remote_code=trust_remote_code).eval()
    tokenizer = load.load_tokenizer(where, trust_remote_code=trust_remote_code)
    load.check_vocabulary(model, tokenizer, str(folder))
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 64,
    batch_size: int = 256,
    seed: int = 0,
    keys: Sequence[int] | None = None,
) -> list[list[str]]:
    """Return `samples` completions of each prompt; temperature 0 is greedy and gives the one there is.

    The same arguments give the same completions, those of a prompt a function of the seed and its key: its place,
    where no keys are given.
    """
    how = Drawing(samples, temperature, length=max_new_tokens, seed=seed)
    ids = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    found: list[list[str]] = [[] for _ in prompts]
    for places in batches(list(map(len, ids)), max(1, batch_size // max(1, samples))):
        mine = places if keys is None else [keys[place] for place in places]
        drawn = draw(model, tokenizer, [ids[place] for place in places], how, mine, special=False)
        for place, some in zip(places, drawn, strict=True):
            found[place] = [one.text for one in some]
    return found


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return the places of prompts in batches of `size`, like lengths together, so that few tokens are padding."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    return [order[at : at + size] for at in range(0, len(order), size)]


@torch.inference_mode()
def draw(
    model: Any, tokenizer: Any, prompts: Sequence[Ids], how: Drawing, keys: Sequence[int], *, special: bool = True
) -> list[list[Completion]]:
    """Return `how.samples` completions of each prompt (tokens), computed together; `special` tokens in them are text.

    Completion j of a prompt is a function of (seed, its key, j) and of the model, but for rounding: what shares its
    batch does not matter. What the model brings for chatting (penalties, its own temperature) is left aside.
    """
    if not how.samples:
        return [[] for _ in prompts]
    rows = [prompt for prompt in prompts for _ in range(how.samples)]
    ends, pad = ends_of(model, tokenizer), tokenizer.pad_token_id
    ids_BT, attention_BT = padded(rows, pad, model.device)
    width = ids_BT.shape[1]
    asked = GenerationConfig(
        do_sample=False, max_new_tokens=how.length, eos_token_id=list(ends), pad_token_id=pad, use_cache=True
    )
    with load.plain_transformers(), own_settings_aside(model):
        written_BT = model.generate(
            input_ids=ids_BT, attention_mask=attention_BT, generation_config=asked,
            logits_processor=_processors(how, keys, width, model.device), **moe.generating(model),
        )[:, width:]  # fmt: skip
    found = [
        _read(tokenizer, prompt, ids, ends, special)
        for prompt, ids in zip(rows, written_BT.tolist(), strict=True)
    ]
    return [found[at : at + how.samples] for at in range(0, len(found), how.samples)]


@contextmanager
def own_settings_aside(model: Any) -> Iterator[None]:
    """Take from a model what it brings for generation: `generate` fills what it is not told from there."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _processors(how: Drawing, keys: Sequence[int], width: int, device: torch.device) -> LogitsProcessorList:
    if not how.temperature:
        return LogitsProcessorList()
    found: list[LogitsProcessor] = [TemperatureLogitsWarper(how.temperature)] if how.temperature != 1 else []
    found += [TopKLogitsWarper(how.top_k)] if how.top_k else []
    found += [TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    draws = uniform([(how.seed, key, place) for key in keys for place in range(how.samples)], how.length)
    return LogitsProcessorList([*found, Quantiles(torch.from_numpy(draws).to(device), width, 1.0)])


def _read(tokenizer: Any, prompt: Ids, written: Ids, ends: Sequence[int], special: bool) -> Completion:
    """Return what a row of tokens says up to the one that ends it; `generate` fills the rest of a batch up."""
    stop = next((place for place, token in enumerate(written) if token in ends), None)
    ids = written[:stop]
    # Some tokenizers drop a space at the start of what they decode; after the prompt it stands.
    before, whole, alone = (
        tokenizer.decode(tokens, skip_special_tokens=not special) for tokens in (prompt, [*prompt, *ids], ids)
    )
    text = whole.removeprefix(before) if whole.startswith(before) else alone
    control = any(token in tokenizer.all_special_ids for token in ids)
    return Completion(text, len(ids) + (stop is not None), stop is not None, control)


@torch.inference_mode()
def nll(
    model: Any, tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], *, batch_size: int = 128
) -> tuple[float, int]:
    """Return the negative log-likelihood (nats) of the completions' tokens, EOS included, and how many they are."""
    total, count = 0.0, 0
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        some, tokens = _nll(model, tokenizer, prompts[part], completions[part])
        total, count = total + some, count + tokens
    return total, count


def _nll(model: Any, tokenizer: Any, prompts: Sequence[str], completions: Sequence[str]) -> tuple[float, int]:
    heads = [tokenizer(text)["input_ids"] for text in prompts]
    tails = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in completions]
    length = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    ids_BT = torch.full((len(heads), length), tokenizer.pad_token_id)
    trained_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids_BT[row, : len(head) + len(tail)] = torch.tensor(head + tail)
        trained_BT[row, len(head) : len(head) + len(tail)] = True
    ids_BT, trained_BT = ids_BT.to(model.device), trained_BT.to(model.device)
    logp_BTV = model(input_ids=ids_BT).logits[:, :-1].float().log_softmax(-1)  # right padding: causal, no mask needed
    chosen_BT = logp_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    return float(-chosen_BT[trained_BT[:, 1:]].sum()), int(trained_BT[:, 1:].sum())

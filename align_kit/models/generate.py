"""Completions of a model in Hugging Face form, many at a time, and how well it predicts given ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_kit.models import load, moe, source


def open_model(folder: str | Path) -> tuple[Any, Any]:
    """Return (model, tokenizer) of `folder` for inference on this process's device, in the precision stored."""
    where = source.resolve(str(folder))
    model = load.load_policy(where, dtype=torch.float32, seed=0).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), load.load_tokenizer(where)


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
) -> list[list[str]]:
    """Return `samples` completions of each prompt; temperature 0 is greedy and gives the one there is.

    Prompts of like length share a batch (padded on the left). The
    same arguments give the same completions.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    work = [i for i in order for _ in range(samples)]
    found: list[list[str]] = [[] for _ in prompts]
    torch.manual_seed(seed)
    for start in range(0, len(work), batch_size):
        batch = work[start : start + batch_size]
        texts = _one_batch(model, tokenizer, [prompts[i] for i in batch], temperature, max_new_tokens)
        for i, text in zip(batch, texts, strict=True):
            found[i].append(text)
    return found


@torch.inference_mode()
def _one_batch(model: Any, tokenizer: Any, prompts: list[str], temperature: float, max_new_tokens: int) -> list[str]:
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=True)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ids_BT: Tensor = model.generate(
        **{name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")},
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **moe.generating(model),
        **sampling,
    )
    return tokenizer.batch_decode(ids_BT[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


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

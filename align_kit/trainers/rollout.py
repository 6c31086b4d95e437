"""Rollouts: the policy writes completions to prompts, on weights that ZeRO-3 has split.

`Writer` is all that PPO knows of writing; `LocalWriter` writes in this process. A server of another kind stands behind
the same two methods: take over the weights, then write.

Generation needs whole weights for every token, so they are gathered once an iteration, not once a token (3 to 5 times
slower). `LocalWriter` keeps a hollow copy of the policy's modules whose parameters either borrow the gathered
weights meanwhile (`gathered`) or keep an unsharded copy of them between iterations (`copied`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList

from align_kit.models import moe
from align_kit.models.load import plain_transformers
from align_kit.models.lora import TRAINED
from align_kit.models.quantiles import Ids, Quantiles, padded, uniform

GATHERED, COPIED = "gathered", "copied"
CHUNK = 1 << 26  # elements gathered together while a copy is refreshed: 256 MB in fp32


@dataclass(frozen=True)
class Written:
    """One completion: its tokens, the one that ends it included, and the writer's log-probability of each (nats)."""

    ids: Ids
    logps: list[float]
    ended: bool


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: at most `length` tokens, from the distribution at `temperature`, until an end."""

    length: int
    temperature: float
    ends: tuple[int, ...]
    pad: int
    batch_size: int


class Writer(Protocol):
    """What writes completions for PPO."""

    def write(self, prompts: Sequence[Ids], draws: np.ndarray) -> list[Written]:
        """Return one completion for each prompt, of the policy as it is now; every rank calls it together.

        `draws` (prompts x length) are uniform numbers in [0, 1): token t of a completion is the one at quantile
        `draws[row, t]`, so what is written does not depend on how prompts are spread over batches and ranks.
        """


def draws_for(rows: Sequence[int], length: int, *, seed: int, iteration: int) -> np.ndarray:
    """Return uniform numbers (rows x `length`), those of a row a function of (seed, iteration, row) alone."""
    return uniform([(seed, iteration, row) for row in rows], length)


class LocalWriter:
    """Writes in this process with Hugging Face's `generate` and its KV cache, on a hollow copy of the policy.

    Make it before the engine is: afterwards the modules carry the engine's hooks.
    """

    def __init__(self, policy: nn.Module, sampling: Sampling, placement: str) -> None:
        self.sampling = sampling
        self.placement = placement
        self.model, self._pairs = hollow(policy)
        self.model.eval()
        # What a model brings for chatting (penalties, forbidden words) would bend the distribution PPO learns on.
        self.model.generation_config = GenerationConfig()

    def write(self, prompts: Sequence[Ids], draws: np.ndarray) -> list[Written]:
        """See `Writer.write`."""
        with torch.no_grad(), self._weights(), plain_transformers():
            return self._write(prompts, draws)

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """Let the hollow model's parameters hold the policy's weights as they are now."""
        if self.placement == COPIED:
            for some in chunks(self._pairs):
                with gathered([live for _, live in some]):
                    for mine, live in some:
                        mine.data = live.data.clone() if mine.numel() == 0 else mine.data.copy_(live.data)
            yield
            return
        with gathered([live for _, live in self._pairs]):
            for mine, live in self._pairs:
                mine.data = live.data
            try:
                yield
            finally:
                for mine, live in self._pairs:
                    mine.data = live.data.new_empty(0)

    def _write(self, prompts: Sequence[Ids], draws: np.ndarray) -> list[Written]:
        for buffer in self.model.buffers():  # copied where the policy was made; its engine may have moved it since
            buffer.data = buffer.data.to(next(self.model.parameters()).device)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # like lengths share a batch
        found: list[Written | None] = [None] * len(prompts)
        for start in range(0, len(order), self.sampling.batch_size):
            rows = order[start : start + self.sampling.batch_size]
            for row, one in zip(rows, self._batch([prompts[row] for row in rows], draws[rows]), strict=True):
                found[row] = one
        return [one for one in found if one is not None]

    def _batch(self, prompts: Sequence[Ids], draws: np.ndarray) -> list[Written]:
        how, device = self.sampling, next(self.model.parameters()).device
        ids_BT, attention_BT = padded(prompts, how.pad, device)
        longest = ids_BT.shape[1]
        quantiles = Quantiles(torch.from_numpy(draws).to(device), longest, how.temperature)
        written_BT = self.model.generate(
            input_ids=ids_BT, attention_mask=attention_BT, max_new_tokens=how.length, do_sample=False, num_beams=1,
            eos_token_id=list(how.ends), pad_token_id=how.pad, use_cache=True,
            logits_processor=LogitsProcessorList([quantiles]), **moe.generating(self.model),
        )[:, longest:]  # fmt: skip
        logps_BT = torch.stack(quantiles.logps, 1).tolist()
        return [_until_end(ids, logps, how.ends) for ids, logps in zip(written_BT.tolist(), logps_BT, strict=True)]


def _until_end(ids: Ids, logps: list[float], ends: Sequence[int]) -> Written:
    """Return the completion up to the token that ends it; `generate` fills the rest of a batch up."""
    stop = next((place + 1 for place, token in enumerate(ids) if token in ends), None)
    return Written(ids[:stop], logps[:stop], stop is not None)


# --- the hollow copy --------------------------------------------------------------------------------------


def hollow(policy: nn.Module) -> tuple[Any, list[tuple[nn.Parameter, nn.Parameter]]]:
    """Return a copy of the modules of `policy` with empty parameters, and (empty, live) pairs of those it needs.

    Tied parameters stay tied; buffers are real; adapters other than the trained one stay empty and unused.
    """
    named = dict(policy.named_parameters())
    empty = {id(live): nn.Parameter(live.data.new_empty(0), requires_grad=False) for live in named.values()}
    # `deepcopy` takes what the memo holds for an object instead of copying it.
    made = copy.deepcopy(policy, memo=dict(empty))
    used = [live for name, live in named.items() if ".lora_" not in name or f".{TRAINED}." in name]
    return made, [(empty[id(live)], live) for live in used]


def chunks(pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> Iterator[list[tuple[nn.Parameter, nn.Parameter]]]:
    """Yield `pairs` in runs of about `CHUNK` elements, so that no more than that is gathered at a time."""
    some: list[tuple[nn.Parameter, nn.Parameter]] = []
    for pair in pairs:
        some.append(pair)
        if sum(full_size(live) for _, live in some) >= CHUNK:
            yield some
            some = []
    if some:
        yield some


def full_size(parameter: nn.Parameter) -> int:
    """Return the elements of a parameter, whether or not ZeRO-3 has split it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Hold the whole of `parameters` on every rank meanwhile; nothing to do where ZeRO-3 is not in use."""
    import deepspeed

    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(split, enabled=bool(split)):
        yield


def copy_bytes(policy: nn.Module) -> int:
    """Return the bytes of the whole policy's weights, what either placement holds on each rank while it writes."""
    shared: Mapping[int, nn.Parameter] = {id(parameter): parameter for parameter in policy.parameters()}
    return sum(full_size(parameter) * parameter.element_size() for parameter in shared.values())

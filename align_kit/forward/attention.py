"""Attention over the segments of a packed row, behind transformers' attention interface.

A head is one causal call; each further segment attends over the keys and values of its prefix and its own. No mask
of the whole row exists. Position ids restart within a row, which transformers would read as unrelated packed sequences
and cut a completion from its prompt in silence: while a row is walked, no mask of transformers is made, and an
attention layer that was not told the segments is an error.

Shapes: N tokens of the row, D per head; queries, keys and values are 1 x heads x N x D, with as many or fewer heads
of keys and values (GQA).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from align_kit.forward import flex
from align_kit.forward.segments import Segment, Segments

PREFIX = "align_kit_"
QUERIES = 96  # computed together on a CPU
_walked: ContextVar[list[int] | None] = ContextVar("walked", default=None)


class CannotWalk(Exception):
    """A model that cannot be walked packed; the text says why."""


def install(model: Any) -> None:
    """Let `model` attend by segments where it is given them, and as before where it is not.

    Raises `CannotWalk` where its attention does not go through transformers' interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    before = model.config._attn_implementation
    if before.startswith(PREFIX):
        return
    name = PREFIX + before
    AttentionInterface.register(name, partial(attend, before))
    if before in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, partial(_mask_or_none, ALL_MASK_ATTENTION_FUNCTIONS[before]))
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        raise CannotWalk(" ".join(str(error).split())) from None
    if model.config._attn_implementation != name:
        raise CannotWalk("its attention cannot be replaced: it does not use transformers' attention interface")


@contextmanager
def walking() -> Iterator[list[int]]:
    """Mark that a packed row is walked; yields a list whose length counts the attention layers passed."""
    passed: list[int] = []
    token = _walked.set(passed)
    try:
        yield passed
    finally:
        _walked.reset(token)


def walk(model: Any, inputs: dict[str, Any]) -> Any:
    """Return what the trunk of a transformers `model` gives for a packed row: `last_hidden_state` (1, N, H) and more.

    Raises `CannotWalk` where not every layer attended by segments.
    """
    layers = int(model.config.get_text_config().num_hidden_layers)
    with walking() as passed, inputs["segments"].remembering():
        output = model.base_model(**inputs)
    if len(passed) != layers:
        raise CannotWalk(f"{len(passed)} of its {layers} layers attend through transformers' attention interface")
    return output


def _mask_or_none(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return None if _walked.get() is not None else make(*args, **kwargs)


def attend(
    before: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attend by `segments` (1 x N x heads x D out), or as the implementation `before` does where there are none."""
    passed = _walked.get()
    if segments is None:
        if passed is not None:
            raise CannotWalk("it does not hand its arguments on to its attention")
        return _implementation(before, module)(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    if passed is not None:  # None while activation checkpointing computes a layer again
        passed.append(1)
    own = [attention_mask, kwargs.get("position_bias"), kwargs.get("indices")]
    if any(one is not None for one in own) or not getattr(module, "is_causal", True):
        raise CannotWalk("its attention has a mask or bias of its own, or is not causal")
    if "sliding_window" not in kwargs and getattr(getattr(module, "config", None), "sliding_window", None):
        raise CannotWalk("its attention is not told of the sliding window")
    dropout = kwargs.get("dropout") or 0.0
    how = {"scale": kwargs.get("scaling"), "window": kwargs.get("sliding_window")}
    extras: dict[str, Any] = {"softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    if not dropout and flex.usable(query, key, scale=how["scale"], **extras):
        out = flex.attend(query, key, value, segments, **how, **extras)
        return out.transpose(1, 2).contiguous(), None  # some models view it
    one: Callable[..., Tensor] = _sdpa  # which has no extras
    if any(extra is not None for extra in extras.values()):
        one = partial(_eager, **extras)
    out = by_segments(one, query, key, value, segments, dropout=dropout, **how)
    return out.transpose(1, 2).contiguous(), None


def _implementation(name: str, module: nn.Module) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def by_segments(
    one: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, segments: Segments, **how: Any
) -> Tensor:
    """Return the attention of all segments, each computed by `one`: heads x N x D behind a dimension of 1."""
    sizes = [segment.length for segment in segments.items]
    # One split each, so that the backward joins the parts once instead of adding up N-long gradients.
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    starts = {segment.start: place for place, segment in enumerate(segments.items)}
    parts = []
    for segment, mine, k, v in zip(segments.items, queries, keys, values, strict=True):
        if segment.prefix:
            head = starts[segment.head]
            k = torch.cat([keys[head][:, :, : segment.prefix], k], dim=2)
            v = torch.cat([values[head][:, :, : segment.prefix], v], dim=2)
        parts.append(one(mine, k, v, segment, segments, **how))
    return torch.cat(parts, dim=2)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, segment: Segment, segments: Segments,
    *, dropout: float, scale: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    parts = []
    for start, stop in _blocks(segment, query.device):
        seen = segment.prefix + stop
        first = 0 if window is None else max(0, segment.prefix + start - window + 1)
        mask = None
        if start or segment.prefix or (window is not None and seen > window):
            mask = _mask(stop - start, seen - first, window, segments, query)
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, start:stop], key[:, :, first:seen], value[:, :, first:seen], attn_mask=mask,
                dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
            )  # fmt: skip
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _blocks(segment: Segment, device: torch.device) -> list[tuple[int, int]]:
    """Return the queries of a segment in runs that are computed each over no more keys than its last one sees.

    torch's kernel for CPUs computes all of up to 512 keys for every query, causal or not.
    """
    size = QUERIES if device.type == "cpu" and segment.prefix + segment.length > 2 * QUERIES else segment.length
    return [(start, min(start + size, segment.length)) for start in range(0, segment.length, size)]


def _eager(
    query: Tensor, key: Tensor, value: Tensor, segment: Segment, segments: Segments,
    *, dropout: float, scale: float | None, window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attend as the models with soft-capped scores (Gemma 2) or attention sinks (GPT-OSS) do in transformers."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + _mask(query.shape[2], key.shape[2], window, segments, query)
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.nn.functional.dropout(weights, dropout) @ value


def _mask(queries: int, seen: int, window: int | None, segments: Segments, like: Tensor) -> Tensor:
    """Return what is added to the scores of `queries` tokens over the `seen` ones up to the last: 0 where they look.

    The last token sees everything (a window: the last `window` tokens, itself included), the one before one less.
    """
    key = (queries, seen, window, like.dtype, like.device)
    if key not in segments.memo:
        shown = torch.ones((queries, seen), dtype=torch.bool, device=like.device).tril(seen - queries)
        if window is not None:
            shown = shown.triu(seen - queries - window + 1)
        hidden = torch.zeros(shown.shape, dtype=like.dtype, device=like.device)
        segments.memo[key] = hidden.masked_fill(~shown, float("-inf"))
    return segments.memo[key]  # type: ignore[no-any-return]

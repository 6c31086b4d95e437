"""Attention over a whole packed row in one call on CUDA: `flex_attention`, told by a block mask who sees whom.

The mask is a rule that reads a few integers of each token and segment, and a list of the blocks of 128 x 128 tokens in
which anybody sees anybody; the others cost nothing. Soft-capped scores and attention sinks need no matrix of scores
either. The rule, the window and the length are data of one compiled kernel: another row is not compiled again.

Shapes: N tokens of the row, rounded up to whole blocks; K blocks; S segments; D per head. Queries, keys and values are
1 x heads x N x D.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from align_kit import log
from align_kit.forward.segments import Segment, Segments

BLOCK = 128  # tokens; flex_attention's own size of a block
PAIRS = 1 << 24  # of tokens, looked at together while the blocks are counted: some 100 MB
EVERY = 1 << 30  # positions: no limit

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention of all segments (1 x heads x N x D) on CUDA, or wherever flex_attention can be compiled.

    `softcap` is Gemma 2's: cap tanh(score / cap). `sinks` (one per head) are GPT-OSS's: a further score that takes its
    share of the softmax and gives nothing.
    """
    mask = block_mask(segments, window, query.device)
    total, rest = segments.total, -segments.total % BLOCK
    if rest:  # few lengths, and all of whole blocks: the kernel needs no checks of its bounds
        query, key, value = (pad(tensor, (0, 0, 0, rest)) for tensor in (query, key, value))
    with _compiling():
        return _compiled()(query, key, value, mask, scale, softcap, sinks)[:, :, :total]


def usable(
    query: Tensor, key: Tensor, *, scale: float | None, softcap: float | None = None, sinks: Tensor | None = None
) -> bool:
    """Return whether flex_attention can be used for tensors like these; where it cannot, one line says why.

    It is tried once for each kind, backward included, on a few tokens of no meaning.
    """
    if query.device.type != "cuda":
        return False
    heads = (query.shape[1], key.shape[1], query.shape[3])
    return _tried(query.device, query.dtype, heads, scale, softcap, sinks is not None)


@cache
def _tried(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int],
    scale: float | None, softcap: float | None, sinks: bool,
) -> bool:  # fmt: skip
    queries, keys, depth = heads
    # Inside a checkpointed layer nothing of this may be taken for an activation of the model.
    apart = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    try:
        with apart, torch.enable_grad():
            for blocks in (2, 3):  # with the second length the kernels become those for every length
                count = blocks * BLOCK - 1
                segments = Segments((Segment(0, count - 9, 0, 0), Segment(count - 9, 9, 0, 5)))
                q, k, v = (
                    torch.zeros(1, number, count, depth, dtype=dtype, device=device, requires_grad=True)
                    for number in (queries, keys, keys)
                )
                sink = torch.zeros(queries, dtype=dtype, device=device, requires_grad=True) if sinks else None
                attend(q, k, v, segments, scale=scale, softcap=softcap, sinks=sink).sum().backward()
    except Exception as error:  # of the compiler's many kinds; the segments are always there
        why = " ".join(str(error).split())[:200]
        log.warn(f"attention goes segment by segment: no flex_attention here ({type(error).__name__}: {why})")
        return False
    return True


# --- who sees whom --------------------------------------------------------------------------------------------


def block_mask(segments: Segments, window: int | None, device: torch.device) -> Any:
    """Return the `BlockMask` of a row, made once for all layers that have this window.

    Raises `ImportError` where torch has no flex_attention.
    """
    from torch.nn.attention.flex_attention import BlockMask

    memo = ("flex", window, device)
    if memo not in segments.memo:
        rule = _rule(segments, window, device)
        seen_KK = _seen(rule, segments.total + -segments.total % BLOCK, device)
        full_KK = seen_KK == BLOCK * BLOCK
        partly_KK = (seen_KK > 0) & ~full_KK
        blocks = (*_listed(partly_KK), *_listed(full_KK))
        segments.memo[memo] = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=rule)
    return segments.memo[memo]


def _rule(segments: Segments, window: int | None, device: torch.device) -> Rule:
    """Return whether token `query` sees token `key` of the row, as flex_attention asks for it.

    It does where `key` is not after it, not as far back as the window, and on the path of its segment: at a position
    below the limit that the segment of `query` has in that of `key`. A head's limits are its own up to the prefix.
    """
    lengths = [*(segment.length for segment in segments.items), -segments.total % BLOCK]  # the rest of the last block
    places = {segment.start: place for place, segment in enumerate(segments.items)}
    limit_SS = np.zeros((len(lengths), len(lengths)), np.int32)
    for place, segment in enumerate(segments.items):
        limit_SS[place] = np.minimum(limit_SS[places[segment.head]], segment.prefix)
        limit_SS[place, place] = EVERY
    limit_SS[-1, -1] = EVERY
    segment_N = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    first_S = np.array([segment.prefix - segment.start for segment in segments.items] + [-segments.total], np.int32)
    position_N = np.arange(len(segment_N), dtype=np.int32) + first_S[segment_N]
    from_N = position_N * 0 if window is None else position_N - (window - 1)
    told = (segment_N, position_N, from_N, limit_SS)
    segments_N, positions_N, froms_N, limits_SS = (torch.from_numpy(array).to(device) for array in told)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = positions_N[key]
        on_path = position < limits_SS[segments_N[query], segments_N[key]]
        return (key <= query) & on_path & (position >= froms_N[query])

    return sees


def _seen(rule: Rule, total: int, device: torch.device) -> Tensor:
    """Return how many pairs of tokens see one another in each block (K x K), without an N x N matrix at a time."""
    token_N, counts = torch.arange(total, device=device), []
    for query_Q in token_N.split(max(1, PAIRS // (total * BLOCK)) * BLOCK):
        seen_QN = rule(token_N[0], token_N[0], query_Q[:, None], token_N[None])
        counts.append(seen_QN.unflatten(1, (-1, BLOCK)).sum(2).unflatten(0, (-1, BLOCK)).sum(1))
    return torch.cat(counts)


def _listed(blocks_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of blocks in each row, and which they are (those first, then the others)."""
    which_KK = blocks_KK.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_KK.sum(-1, dtype=torch.int32)[None, None], which_KK.int()[None, None]


# --- the call -------------------------------------------------------------------------------------------------


def one_call(
    query: Tensor, key: Tensor, value: Tensor, mask: Any,
    scale: float | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attend by flex_attention; this function is what is compiled."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    torch._check(query.shape[2] % BLOCK == 0)

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    how = {
        "score_mod": None if softcap is None else capped,
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    if sinks is None:
        return flex_attention(query, key, value, **how)  # type: ignore[no-any-return]
    out, aux = flex_attention(query, key, value, **how, return_aux=AuxRequest(lse=True))
    # With Z = sum of exp(score): out is over Z, and shall be over Z + exp(sink). Z / (Z + exp(sink)) is a sigmoid.
    share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])
    return (out * share[..., None]).to(out.dtype)


@cache
def _compiled() -> Any:
    return torch.compile(one_call, fullgraph=True)  # or else it would, where it cannot, compute all scores in silence


def _compiling() -> AbstractContextManager[None]:
    """A kernel for each scale and cap: they are written into it. With policy, reference and others these are some."""
    import torch._dynamo.config as dynamo

    return dynamo.patch(specialize_float=True, recompile_limit=64)  # type: ignore[no-any-return]

"""A packed row in one call of `flex_attention`, which training uses on CUDA: rule, blocks, scores and gradients.

The very function that is compiled there runs here on CPU through the compiler's front and middle (`aot_eager`),
backward included; only its kernels are not made. torch allows a backward on CPU no further than that, so its guard
is taken down here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_mask

from align_kit.forward import flex
from align_kit.forward.door import door_of, open_door
from align_kit.forward.logprobs import token_logps
from align_kit.forward.segments import Segment, Segments

# The compiler looks at activations as if they were parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

CPU = torch.device("cpu")
# Heads of both sides of a block's edge, one that continues a whole head, one of one token, one that shares one token.
PARTS = ((200, 0, 0), (50, 0, 150), (1, 0, 200), (300, 3, 0), (20, 3, 290), (9, 0, 1))


def row_of(parts: Sequence[tuple[int, int, int]]) -> Segments:
    """Return segments from (length, place of the head, prefix)."""
    items: list[Segment] = []
    start = 0
    for length, head, prefix in parts:
        items.append(Segment(start, length, items[head].start if prefix else start, prefix))
        start += length
    return Segments(tuple(items))


def seen_by_path(segments: Segments, window: int | None) -> Tensor:
    """Return who sees whom (N x N), each sequence written out as the tokens on its path."""
    seen_NN = torch.zeros(segments.total, segments.total, dtype=torch.bool)
    paths: dict[int, list[int]] = {}
    for segment in segments.items:
        own = range(segment.start, segment.start + segment.length)
        paths[segment.start] = path = [*paths.get(segment.head, [])[: segment.prefix], *own]
        for position in range(segment.prefix, len(path)):
            first = 0 if window is None else max(0, position - window + 1)
            seen_NN[path[position], path[first : position + 1]] = True
    return seen_NN


def dense(
    q: Tensor, k: Tensor, v: Tensor, seen_NN: Tensor, *, scale: float, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """softmax of the scores, soft-capped, with the sinks beside them, written out."""
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(groups, 1)) * scale
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    weights = scores.exp() * seen_NN
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    return weights / total @ v.repeat_interleave(groups, 1)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Let flex_attention run on CPU with its backward; counts how often it was compiled."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    return compile_by("aot_eager", monkeypatch)


def compile_by(backend: str, monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(flex.one_call, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    return counter


@st.composite
def rows(draw: st.DrawFn) -> Segments:
    parts: list[tuple[int, int, int]] = []
    paths: list[int] = []
    for _ in range(draw(st.integers(1, 6))):
        head = draw(st.integers(0, len(parts) - 1)) if parts else 0
        prefix = draw(st.integers(0, paths[head])) if parts else 0
        length = draw(st.integers(1, 150))
        parts.append((length, head, prefix))
        paths.append(prefix + length)
    return row_of(parts)


@settings(max_examples=40, deadline=None)
@given(rows(), st.none() | st.integers(1, 200))
def test_the_rule_and_its_blocks_are_the_paths_of_the_sequences(segments: Segments, window: int | None) -> None:
    mask = flex.block_mask(segments, window, CPU)
    total = segments.total + -segments.total % flex.BLOCK
    seen_NN = create_mask(mask.mask_mod, None, None, total, total, device="cpu")[0, 0]
    assert torch.equal(seen_NN[: segments.total, : segments.total], seen_by_path(segments, window))
    assert not seen_NN[: segments.total, segments.total :].any(), "what fills the last block is seen by nobody else"
    assert seen_NN.any(1).all(), "a token that sees nothing has no softmax"
    blocks = seen_NN.unflatten(0, (-1, flex.BLOCK)).unflatten(2, (-1, flex.BLOCK)).transpose(1, 2).flatten(2)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks.any(-1))
    listed = torch.zeros_like(blocks[..., 0])
    for line, (count, which) in enumerate(zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)):
        listed[line, which[:count]] = True
    assert torch.equal(listed, blocks.all(-1)), "in a full block the rule is not asked"


def test_blocks_are_the_same_counted_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = flex.block_mask(row_of(PARTS), 40, CPU).to_dense()
    monkeypatch.setattr(flex, "PAIRS", 1)
    assert torch.equal(flex.block_mask(row_of(PARTS), 40, CPU).to_dense(), whole)


@pytest.mark.parametrize(
    ("window", "cap", "sink"),
    [(None, None, False), (40, None, False), (None, 5.0, False), (40, None, True), (40, 5.0, True)],
)
def test_attention_and_gradients_are_those_written_out(
    on_cpu: CompileCounterWithBackend, window: int | None, cap: float | None, sink: bool
) -> None:
    segments = row_of(PARTS)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = (random(1, heads, segments.total, 16) for heads in (6, 2, 2))
    sinks = random(6) if sink else None
    leaves = [leaf for leaf in (q, k, v, sinks) if leaf is not None]
    out = flex.attend(q, k, v, segments, scale=0.3, window=window, softcap=cap, sinks=sinks)
    expected = dense(q, k, v, seen_by_path(segments, window), scale=0.3, cap=cap, sinks=sinks)
    torch.testing.assert_close(out, expected, rtol=1e-7, atol=1e-7)  # the sums of exp(score) come back in fp32
    weights = random(*out.shape).detach()
    ours = torch.autograd.grad((out * weights).sum(), leaves)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_rows_lengths_and_windows_are_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = compile_by("eager", monkeypatch)

    def attend(count: int, **how: Any) -> None:
        flex.attend(*torch.randn(3, 1, 2, count, 16), row_of(((count - 9, 0, 0), (9, 0, 5))), **how)

    for count in (255, 383):
        attend(count)
    assert counter.frame_count == 2, "the second length makes the kernel one for every length"
    for count, window in ((1000, None), (129, 7), (640, 300)):
        attend(count, window=window)
    assert counter.frame_count == 2
    for scale in (0.1, 0.2, 0.3, 0.1):
        attend(500, scale=scale)
    assert counter.frame_count == 5, "a scale is a constant of its kernel, which cannot take it as a variable"


def test_where_it_cannot_run_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    query, key = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    assert not flex.usable(query, key, scale=None), "on CPU the segments are faster, and nobody wonders"
    assert capsys.readouterr().err == ""
    flex._tried.cache_clear()
    for _ in range(2):
        assert not flex._tried(CPU, torch.float32, (4, 2, 16), None, None, False)  # torch has no backward there
    assert capsys.readouterr().err.count("attention goes segment by segment: no flex_attention here") == 1


def test_a_model_walks_through_it(on_cpu: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 has grouped heads, soft-capped scores, a scale of its own, and windows in every other layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=12, sliding_window=6, pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).train()
    ids = torch.randint(1, 64, (4, 24))
    ids[1, :15] = ids[0, :15]
    ids[3, :9] = ids[2, :9]
    everything = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": everything, "loss_mask": everything}

    def walked() -> tuple[Tensor, list[Tensor]]:
        logps = token_logps(model, batch).logps_BT
        return logps, list(torch.autograd.grad(logps.sin().sum(), list(model.parameters())))

    plain, plain_gradients = walked()
    open_door(model, "shared")
    monkeypatch.setattr(flex, "usable", lambda *tensors, **how: True)
    ours, gradients = walked()
    assert door_of(model).walked == 1
    assert door_of(model).computed < door_of(model).given
    assert on_cpu.frame_count, "by flex_attention"
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, plain_gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()

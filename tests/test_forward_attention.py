"""Attention by segments is attention under one explicit mask, and a model that would not obey it is found out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from align_kit.forward import attention
from align_kit.forward.attention import CannotWalk, attend, install, walking
from align_kit.forward.door import open_door, pack_for, plainly
from align_kit.forward.layout import pack_rows
from align_kit.forward.logprobs import token_logps
from align_kit.forward.segments import Segment, Segments
from tests.families import BATCHES, FAMILIES, apart, batch_of, compute, gradients, tiny, with_lora, words

HEADS, DEPTH = 4, 8
# Two groups: a head of 9 continued after 6 and 9 of its tokens, one of 5 continued after 4, and one for itself.
ROW = Segments((Segment(0, 9, 0, 0), Segment(9, 4, 0, 6), Segment(13, 3, 0, 9), Segment(16, 5, 16, 0),
                Segment(21, 7, 16, 4), Segment(28, 1, 28, 0)))  # fmt: skip


def sees(segments: Segments, window: int | None) -> Tensor:
    """Return the whole mask from the definition: N x N, True where the row's token may look at the column's."""
    path: dict[int, list[int]] = {}
    for segment in segments.items:
        for place in range(segment.start, segment.start + segment.length):
            prefix = list(range(segment.head, segment.head + segment.prefix))
            path[place] = (prefix + list(range(segment.start, place + 1)))[-(window or 10**6) :]
    mask = torch.zeros(segments.total, segments.total, dtype=torch.bool)
    for place, seen in path.items():
        mask[place, seen] = True
    return mask


def oracle(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments,
    *, scale: float | None, window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attend head by head and token by token's mask, in float64: N x heads x D."""
    mask, out = sees(segments, window), []
    for head in range(query.shape[1]):
        of_head = head * key.shape[1] // query.shape[1]
        q, k, v = query[0, head].double(), key[0, of_head].double(), value[0, of_head].double()
        scores = q @ k.T * (DEPTH**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~mask, float("-inf")).exp()
        sink = 0.0 if sinks is None else sinks[head].double().exp()
        out.append(weights @ v / (weights.sum(1, keepdim=True) + sink))
    return torch.stack(out, dim=1)


class Layer(nn.Module):
    """What an implementation reads of the module that calls it: nothing but this."""

    is_causal = True
    num_key_value_groups = 1


def tensors(key_heads: int, total: int = ROW.total) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query = torch.randn(1, HEADS, total, DEPTH, requires_grad=True)
    key, value = (torch.randn(1, key_heads, total, DEPTH, requires_grad=True) for _ in range(2))
    return query, key, value


def assert_as_oracle(
    segments: Segments, key_heads: int, *, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> None:  # fmt: skip
    """Assert outputs and gradients; fp32 against float64: a softmax over tens of numbers rounds to some 1e-7."""
    inputs = tensors(key_heads, segments.total)
    out = attend(
        "sdpa", Layer(), *inputs, None,
        segments=segments, scaling=scale, sliding_window=window, softcap=softcap, s_aux=sinks,
    )[0][0]  # fmt: skip
    expected = oracle(*inputs, segments, scale=scale, window=window, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)
    leaves = [*inputs, *([sinks] if sinks is not None else [])]
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum(), leaves)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_that_of_the_whole_mask(key_heads: int, scale: float | None) -> None:
    assert_as_oracle(ROW, key_heads, scale=scale)


@pytest.mark.parametrize("window", [1, 3, 4, 6, 9, 10, 11, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_sliding_windows(window: int, softcap: float | None) -> None:
    """Shorter than a prefix, as long, longer; shorter than a completion; longer than everything."""
    assert_as_oracle(ROW, 2, window=window, softcap=softcap)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_sinks(window: int | None) -> None:
    assert_as_oracle(ROW, 2, window=window, sinks=torch.tensor([-1.0, 0.0, 2.0, 5.0], requires_grad=True))


@st.composite
def rows(draw: st.DrawFn) -> Segments:
    """Return segments of which each may continue any earlier head."""
    items: list[Segment] = []
    for length in draw(st.lists(st.integers(1, 6), min_size=1, max_size=6)):
        start = sum(item.length for item in items)
        heads = [item for item in items if not item.prefix]
        head = draw(st.sampled_from([None, *heads]))
        continued = Segment(start, length, head.start, draw(st.integers(1, head.length))) if head else None
        items.append(continued or Segment(start, length, start, 0))
    return Segments(tuple(items))


@settings(max_examples=60)
@given(rows(), st.sampled_from([None, 1, 2, 5]), st.sampled_from([None, 0.7]))
def test_any_row(segments: Segments, window: int | None, softcap: float | None) -> None:
    assert_as_oracle(segments, 2, window=window, softcap=softcap)


@settings(max_examples=60)
@given(rows(), st.sampled_from([None, 1, 2, 5]), st.sampled_from([1, 2, 3]))
def test_queries_go_in_blocks(segments: Segments, window: int | None, queries: int) -> None:
    """A long segment is cut, and no block is given more keys than it sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERIES", queries)
        assert_as_oracle(segments, 2, window=window)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_dropout_is_handed_on(softcap: float | None) -> None:
    """Weights are dropped and the others raised: an output of many draws is that without, on average."""
    inputs = [tensor.detach() for tensor in tensors(2)]

    def draw(dropout: float) -> Tensor:
        return attend("sdpa", Layer(), *inputs, None, segments=ROW, dropout=dropout, softcap=softcap)[0]

    torch.manual_seed(1)
    without, draws = draw(0.0), torch.stack([draw(0.3) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    error = draws.std(0) / 20
    assert ((draws.mean(0) - without).abs() <= 5 * error + 1e-6).all()


# --- what would not obey --------------------------------------------------------------------------------------


def walked(model: Any, rows: str = "pairs") -> Any:
    """Walk `model` shared, whatever `choose` would say of it."""
    open_door(model, "shared")
    return token_logps(model, batch_of(BATCHES[rows]))


def drop_segments(model: Any) -> None:
    """Let one layer forget what it was handed, as a model does whose layers name their arguments."""
    layer = model.model.layers[1]
    plain = layer.forward
    layer.forward = lambda *args, segments=None, **kwargs: plain(*args, **kwargs)


def skip_a_layer(model: Any) -> None:
    """Let one layer compute something else than attention."""
    layer = model.model.layers[1]
    layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)


def call_a_layer_twice(model: Any) -> None:
    """Let one layer attend twice, as one that subtracts two attentions does."""
    layer = model.model.layers[1]
    plain = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: plain(plain(hidden, *args, **kwargs), *args, **kwargs)


def look_both_ways(model: Any) -> None:
    """Let one layer look at what follows, as encoders do."""
    model.model.layers[0].self_attn.is_causal = False


def add_a_bias(model: Any) -> None:
    """Let one layer hand a bias of its own to its attention."""
    attention = model.model.layers[0].self_attn
    attention.forward = partial(attention.forward, position_bias=torch.ones(1))


def forget_the_window(model: Any) -> None:
    """Let the model have a window that its layers leave to a mask."""
    model.config.sliding_window = 5


HARM: dict[Callable[[Any], None], str] = {
    drop_segments: "does not hand its arguments on",
    skip_a_layer: "1 of its 2 layers",
    call_a_layer_twice: "3 of its 2 layers",
    look_both_ways: "not causal",
    add_a_bias: "bias of its own",
    forget_the_window: "not told of the sliding window",
}


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_a_model_that_would_attend_otherwise_is_an_error(harm: Callable[[Any], None]) -> None:
    model = tiny("llama")
    harm(model)
    with pytest.raises(CannotWalk, match=HARM[harm]):
        walked(model)


def test_a_model_that_cannot_be_walked_computes_plain_as_before() -> None:
    """What an error in the middle left behind changes nothing: the next padded batch has its masks."""
    model, batch = tiny("llama"), batch_of(BATCHES["pairs"])
    drop_segments(model)
    before = token_logps(model, batch).logps_BT
    with pytest.raises(CannotWalk):
        walked(model)
    with plainly(model):
        assert torch.equal(token_logps(model, batch).logps_BT, before)


def test_restarted_positions_without_segments_cannot_pass() -> None:
    """A row handed to the trunk by hand, its segments forgotten, would be cut into unrelated sequences in silence."""
    model = tiny("llama")
    open_door(model, "shared")
    pack = pack_rows(batch_of(BATCHES["pairs"]))
    with walking(), pytest.raises(CannotWalk):
        model.base_model(input_ids=pack.ids_1N, position_ids=pack.positions_1N, use_cache=False)


def test_attention_that_is_not_replaced_is_refused() -> None:
    class Own(nn.Module):
        """A model whose configuration does not take the implementation it is given."""

        config = tiny("llama").config

        def set_attn_implementation(self, name: str) -> None:
            pass

    with pytest.raises(CannotWalk, match="cannot be replaced"):
        install(Own())


# --- what stays as it was -------------------------------------------------------------------------------------


CAME_WITH = {"llama": ("sdpa", "eager"), "mistral": ("sdpa", "eager"), "gpt2": ("sdpa", "eager"),
             "gemma2": ("eager",), "gpt_oss": ("eager",)}  # fmt: skip


@pytest.mark.parametrize(("family", "implementation"), [(name, how) for name in CAME_WITH for how in CAME_WITH[name]])
def test_padded_batches_are_bitwise_as_before(family: str, implementation: str) -> None:
    """Values and gradients, by the implementation the model came with."""
    model, batch = tiny(family, attn_implementation=implementation), batch_of(BATCHES["pairs"], wider=3)
    before = compute(copy.deepcopy(model), batch, "plain")
    open_door(model, "shared")
    with plainly(model):
        logps_BT = token_logps(model, batch).logps_BT
        torch.manual_seed(7)
        found = gradients(model, (logps_BT * torch.randn_like(logps_BT)).sum())
    assert torch.equal(logps_BT, before.values["logps"])
    assert found.keys() == before.gradients.keys()
    assert all(torch.equal(found[name], before.gradients[name]) for name in found)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_generation_is_as_before(family: str) -> None:
    model, prompt = tiny(family), torch.tensor([words(7, 1)])
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    before = model.generate(prompt, **settings)
    walked(model)
    assert torch.equal(model.generate(prompt, **settings), before)


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_model_names_no_attention_of_ours(tmp_path: Path, lora: bool) -> None:
    model = tiny("llama")
    model = with_lora(model) if lora else model
    walked(model)
    model.save_pretrained(tmp_path)
    saved = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix in (".json", ".md")}
    assert len(saved) >= 1 and not any("align_kit" in text for text in saved.values())
    if not lora:
        assert "attn_implementation" not in str(json.loads(saved["config.json"]).keys())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_walks_on_its_own_weights(family: str) -> None:
    """Rollouts and tests copy models: a copy that still computed with the first one's weights would not be noticed."""
    model, batch = tiny(family), batch_of(BATCHES["pairs"])
    first = walked(model).logps_BT.detach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.3)
    moved = tiny(family)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.3)
    assert torch.equal(token_logps(model, batch).logps_BT, first)
    ours, theirs = compute(twin, batch, "shared"), compute(moved, batch, "shared")
    assert torch.equal(ours.values["logps"], theirs.values["logps"])
    assert apart(ours.gradients, theirs.gradients) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_door_opened_twice_is_one_door() -> None:
    model, batch = tiny("llama"), batch_of(BATCHES["pairs"])
    first = walked(model).logps_BT
    again = walked(model).logps_BT
    assert torch.equal(first, again)
    assert model.config._attn_implementation == "align_kit_sdpa"
    assert pack_for(model, batch) is not None

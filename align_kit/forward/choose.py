"""Which way a model can be walked: as a packed row with shared prefixes, packed alone, or padded as ever."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from align_kit.forward.attention import CannotWalk

SHARED, PACKED, PLAIN = "shared", "packed", "plain"
WHY = {
    SHARED: "each common prefix computed once, no padding",
    PACKED: "no padding, nothing shared",
    PLAIN: "every sequence padded and computed for itself",
}


@dataclass(frozen=True)
class Choice:
    """A way of walking, the reason for it, and what was asked for."""

    mode: str
    why: str
    asked: str = "auto"


def choose(model: Any, *, trains: bool, asked: str = "auto", noise: float | None = None) -> Choice:
    """Return how `model` can be walked, and why; `trains` tells that its dropout will be on, `noise` NEFTune's alpha.

    With dropout two copies of a prompt differ and none may stand for the other: nothing is shared. Raises `CannotWalk`
    where `asked` names a way the model cannot be walked.
    """
    if asked == PLAIN:
        return Choice(PLAIN, WHY[PLAIN], asked)
    try:
        if noise:
            raise CannotWalk("neftune_noise_alpha scales its noise by the length that rows are padded to")
        if any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values()):
            raise CannotWalk("its adapter puts tokens before every sequence")
        for part in walkable(model):
            _check(part)
    except CannotWalk as reason:
        if asked != "auto":
            raise
        return Choice(PLAIN, f"{WHY[PLAIN]}: {reason}")
    dropout = _dropout(model) if trains else 0.0
    if dropout and asked == SHARED:
        raise CannotWalk(f"it trains with dropout {dropout:g}, and copies of a prompt then differ by right")
    if dropout and asked == "auto":
        return Choice(PACKED, f"{WHY[PACKED]}: dropout {dropout:g} makes copies of a prompt differ by right")
    mode = PACKED if asked == PACKED else SHARED
    return Choice(mode, WHY[mode], asked)


def walkable(model: Any) -> Iterator[Any]:
    """Yield the transformers models with a head in `model`: itself, PEFT's base, or those of a policy and value."""
    from transformers import PreTrainedModel

    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        if isinstance(child, PreTrainedModel) or hasattr(child, "get_base_model"):
            yield from walkable(child)


# --- what cannot be walked ------------------------------------------------------------------------------------

RANDOM = ("attention_dropout", "dropout", "jitter_noise", "router_jitter_noise")  # kept as plain numbers
_CAUSAL = {"full_attention", "sliding_attention", "attention"}


def _check(model: Any) -> None:
    """Raise `CannotWalk` for what is known, before any forward, not to attend by segments."""
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        raise CannotWalk(f"{type(model).__name__} has an encoder")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _CAUSAL)
    if other:
        raise CannotWalk(f"{type(model).__name__} has {', '.join(other)} layers, which is not plain causal attention")
    if getattr(config, "layerdrop", 0.0):
        raise CannotWalk(f"{type(model).__name__} leaves layers out at random")
    _check_implementation(model)
    taken = inspect.signature(model.base_model.forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        raise CannotWalk(f"the trunk of {type(model).__name__} does not hand arguments on to its attention")
    if "position_ids" not in taken:
        raise CannotWalk(f"the trunk of {type(model).__name__} is not told positions, it counts them")
    if model.get_output_embeddings() is None and not isinstance(getattr(model, "score", None), nn.Module):
        raise CannotWalk(f"{type(model).__name__} has neither a language-model head nor one named score")
    ends = (model.base_model, model.get_output_embeddings() or model.score)
    children = {name: child for name, child in model.named_children() if child not in ends}
    between = [name for name, child in children.items() if next(child.parameters(), None) is not None]
    if between:
        raise CannotWalk(f"{type(model).__name__} has {', '.join(between)} beside its trunk and its head")


def _check_implementation(model: Any) -> None:
    """Raise `CannotWalk` where the attention implementation of `model` cannot be replaced, or must not be."""
    before = model.config._attn_implementation
    if not type(model)._can_set_attn_implementation():
        raise CannotWalk(f"the attention of {type(model).__name__} does not use transformers' attention interface")
    if "flash" in before or "/" in before:  # transformers loads such kernels by name
        raise CannotWalk(f"attn_implementation {before} brings kernels that know no segments; leave it out")
    if before == "eager" and getattr(model.config, "reorder_and_upcast_attn", False):
        raise CannotWalk("reorder_and_upcast_attn has an attention of its own")


def _dropout(model: nn.Module) -> float:
    """Return the greatest dropout, or jitter of a router, that is on while `model` trains."""
    found = [float(m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
    kept = [getattr(m, name, None) for m in model.modules() for name in RANDOM]
    found += [p for p in kept if isinstance(p, float)]
    return max(found, default=0.0)

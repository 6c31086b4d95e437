"""The door through which a model is walked: as a packed row with shared prefixes, packed alone, or padded as ever.

`open_door` gives a model's `forward` a second way in: called with a `Pack` it runs the trunk on the packed row and the
head on the places asked for; called as before it does what it did. Parameters, their names and the engine's hooks stay
as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from align_kit.forward import attention
from align_kit.forward.attention import CannotWalk
from align_kit.forward.head import Answer, Ask, Scaling, read_tokens
from align_kit.forward.layout import Pack, pack_rows
from align_kit.forward.routers import has_router_loss, router_loss

SHARED, PACKED, PLAIN = "shared", "packed", "plain"
WHY = {
    SHARED: "each common prefix computed once, no padding",
    PACKED: "no padding, nothing shared",
    PLAIN: "every sequence padded and computed for itself",
}


@dataclass
class Door:
    """How a model is walked at the moment; how many forwards went which way, and how many tokens that saved.

    `given` are the tokens of the batches that were walked, padding not counted, `computed` those of their rows.
    """

    mode: str
    walked: int = 0
    plain: int = 0
    given: int = 0
    computed: int = 0

    @property
    def share(self) -> bool:
        return self.mode == SHARED


@dataclass(frozen=True)
class Choice:
    """A way of walking and the reason for it."""

    mode: str
    why: str


class Walked(NamedTuple):
    """What a walked model gave: what its head says of the tokens asked for and what its routers owe, or a score or
    the last state of each sequence (B; B, H).
    """

    tokens: Answer | None = None
    router_loss: Tensor | None = None
    scores: Tensor | None = None
    states: Tensor | None = None


def choose(model: Any, *, trains: bool, asked: str = "auto") -> Choice:
    """Return how `model` can be walked, and why; `trains` tells that its dropout will be on.

    With dropout two copies of a prompt differ and none may stand for the other: nothing is shared. Raises `CannotWalk`
    where `asked` names a way the model cannot be walked.
    """
    if asked == PLAIN:
        return Choice(PLAIN, WHY[PLAIN])
    try:
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
    return Choice(mode, WHY[mode])


def open_door(model: Any, mode: str) -> None:
    """Let `model` be walked: a causal language model or sequence classifier, one with PEFT's adapters, or several."""
    model.forward_door = Door(mode)
    if mode == PLAIN:
        return
    for part in walkable(model):
        attention.install(part)
        if not isinstance(part.forward, _Walk):
            part.forward = _Walk(part)
            head: Any = part.get_output_embeddings()
            if type(head) is nn.Linear:
                vars(head)["forward"] = _Head(head)


def door_of(model: Any) -> Door:
    """Return the door of a model, or of the model inside an engine; one that was never opened is plain."""
    inside = getattr(model, "module", model)
    return inside.__dict__.get("forward_door") or Door(PLAIN)


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


def pack_for(
    model: Any, batch: Mapping[str, Any], *, whole: bool = False, last_not: int | None = None
) -> Pack | None:
    """Return `batch` packed the way `model` is walked, or None where it is walked plain."""
    door = door_of(model)
    if door.mode == PLAIN:
        door.plain += 1
        return None
    pack = pack_rows(batch, share=door.share, whole=whole, last_not=last_not)
    door.walked += 1
    door.given += pack.given
    door.computed += pack.segments.total
    return pack


@contextmanager
def plainly(model: Any) -> Iterator[None]:
    """Walk `model` plain meanwhile."""
    door = door_of(model)
    before, door.mode = door.mode, PLAIN
    try:
        yield
    finally:
        door.mode = before


# --- what stands in the model ---------------------------------------------------------------------------------


class _Walk:
    """The forward of a transformers model that also takes a `Pack`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.plain = model.forward
        self.__signature__ = inspect.signature(model.forward)
        self.scaling = Scaling.of(model.config.get_text_config())

    def __call__(
        self, *args: Any, pack: Pack | None = None, ask: Ask | None = None, states: bool = False, **kwargs: Any
    ) -> Any:
        if pack is None:
            return self.plain(*args, **kwargs)
        routers = kwargs.get("output_router_logits", False)  # else none, whatever the configuration asks for
        trunk = pack.trunk_of(self.model, **({"output_router_logits": routers} if has_router_loss(self.model) else {}))
        hidden_NH = trunk.last_hidden_state[0]
        if ask is None:
            assert pack.last_B is not None
            hidden_BH = hidden_NH[pack.last_B]
            if states:
                return Walked(states=hidden_BH)
            return Walked(scores=self.model.score(hidden_BH).squeeze(-1).float())
        owed = router_loss(self.model, trunk.router_logits, pack.weights_N) if routers else None
        head = self.model.get_output_embeddings()
        hidden_PH = hidden_NH[pack.at_P]
        if isinstance(head.forward, _Head):  # through the module's own call, which gathers its weight under ZeRO-3
            return Walked(head(hidden_PH, ask=ask, scaling=self.scaling), owed)
        return Walked(read_tokens(head, hidden_PH, ask, self.scaling), owed)


class _Head:
    """The forward of a linear head that also reads tokens off hidden states."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.plain = head.forward

    def __call__(self, hidden: Tensor, ask: Ask | None = None, scaling: Scaling | None = None) -> Any:
        if ask is None:
            return self.plain(hidden)
        assert scaling is not None
        return read_tokens(self.head, hidden, ask, scaling)


# --- what cannot be walked ------------------------------------------------------------------------------------

_CAUSAL = {"full_attention", "sliding_attention", "attention"}


def _check(model: Any) -> None:
    """Raise `CannotWalk` for what is known, before any forward, not to attend by segments."""
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        raise CannotWalk(f"{type(model).__name__} has an encoder")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _CAUSAL)
    if other:
        raise CannotWalk(f"{type(model).__name__} has {', '.join(other)} layers, which carry state along the row")
    if not type(model)._can_set_attn_implementation():
        raise CannotWalk(f"the attention of {type(model).__name__} does not use transformers' attention interface")
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


def _dropout(model: nn.Module) -> float:
    """Return the greatest dropout that is on while `model` trains."""
    found = [float(m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
    kept = [getattr(m, name, None) for m in model.modules() for name in ("attention_dropout", "dropout")]
    found += [p for p in kept if isinstance(p, float)]  # no module of their own
    return max(found, default=0.0)


# --- whether both ways agree ----------------------------------------------------------------------------------

# What rounding may make of a difference: an absolute part and a share of the value (nats, or units of a score).
AGREEMENT = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (0.25, 3e-2), torch.float16: (0.05, 5e-3)}


def settle(model: Any, answer: Callable[[], Tensor]) -> str | None:
    """Compute `answer` both ways; where they differ by more than rounding, walk `model` plain from now on.

    Returns why, or None where they agree. All ranks call it, with their own values, and decide the same.
    """
    door = door_of(model)
    if door.mode == PLAIN:
        return None
    asked = door.mode
    try:
        with torch.no_grad():
            ours = answer()
            with plainly(model):
                theirs = answer()
        gap, excess = _differ(ours, theirs, next(model.parameters()).dtype)
        why = None if excess <= 1 else f"{asked} differs from plain by up to {gap:.3g} on the first batch"
    except CannotWalk as reason:
        why = str(reason)
    door.__init__(asked if why is None else PLAIN)  # type: ignore[misc]  # the trial does not count
    return why


def with_relatives(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows of a batch, and each once more with its second half turned round.

    A check on rows that have nothing in common would not see what sharing does.
    """
    turned_BT = batch["input_ids"].clone()
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        turned_BT[row, length // 2 : length] = turned_BT[row, length // 2 : length].flip(0)
    names = [name for name in ("attention_mask", "loss_mask") if name in batch]
    twice = {name: torch.cat([batch[name], batch[name]]) for name in names}
    return {"input_ids": torch.cat([batch["input_ids"], turned_BT]), **twice}


def _differ(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest difference over all ranks, and the same in units of what rounding allows in `dtype`."""
    absolute, share = AGREEMENT.get(dtype, AGREEMENT[torch.float32])
    gaps = (ours.float() - theirs.float()).abs().flatten()
    excess = gaps / (absolute + share * theirs.float().abs().flatten())
    worst = torch.stack([torch.cat([values, values.new_zeros(1)]).max() for values in (gaps, excess)])
    worst = worst.nan_to_num(nan=float("inf"))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
    gap, most = worst.tolist()
    return gap, most

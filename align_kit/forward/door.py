"""The door through which a model is walked: as a packed row, or padded as ever.

`open_door` gives a model's `forward` a second way in: called with a `Pack` it runs the trunk on the packed row and the
head on the places asked for; called as before it does what it did. Parameters, their names and the engine's hooks stay
as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from align_kit.forward import attention
from align_kit.forward.choose import PLAIN, SHARED, walkable
from align_kit.forward.head import Answer, Ask, Scaling, read_tokens
from align_kit.forward.layout import Pack, pack_rows
from align_kit.forward.routers import has_router_loss, router_loss


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

    def begin_anew(self, mode: str) -> None:
        """Walk as `mode` says from now on, and forget what was counted."""
        self.mode = mode
        self.walked = self.plain = self.given = self.computed = 0


class Walked(NamedTuple):
    """What a walked model gave: what its head says of the tokens asked for and what its routers owe, or a score or
    the last state of each sequence (B; B, H).
    """

    tokens: Answer | None = None
    router_loss: Tensor | None = None
    scores: Tensor | None = None
    states: Tensor | None = None


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
                vars(head)["forward"] = _Head(head)  # an assignment, in words that a type checker allows


def door_of(model: Any) -> Door:
    """Return the door of a model, or of the model inside an engine; one that was never opened is plain."""
    inside = getattr(model, "module", model)
    return inside.__dict__.get("forward_door") or Door(PLAIN)


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

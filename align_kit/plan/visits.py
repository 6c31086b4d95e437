"""In which order a model's modules compute, read off the names of its parameters.

Only modules that are called stand here: lists and dictionaries of modules are not. Where a family defines its modules
in another order than it calls them, the names in use say so (`ORDER`). A wrong order costs calls, not bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from align_kit.plan.facts import Shape

NUMBER = re.compile(r"\d+$")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)(\.|$)")
POSITIONS = re.compile(r"(^|\.)(embed_positions|position_embeddings|wpe)$")
HEADS = ("lm_head", "embed_out", "score", "classifier", "value_head", "reward_heads")
COLLECTIONS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "reward_heads")
ORDER = {  # within a layer, and within its attention
    "input_layernorm": 0,
    "self_attn": 1,
    "post_attention_layernorm": 2,
    "pre_feedforward_layernorm": 3,
    "post_feedforward_layernorm": 5,
    "q_proj": 0,
    "q_norm": 1,
    "k_proj": 2,
    "k_norm": 3,
    "v_proj": 4,
    "o_proj": 9,
    "dense": 9,
    "out_proj": 9,
}
USUAL = 4
BESIDE_EACH_OTHER = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "base_layer", "lora_A")


@dataclass(eq=False)
class Module:
    """A module: the places of its own parameters in `Shape.weights`, and the modules in it, in calling order."""

    name: str
    own: list[int] = field(default_factory=list)
    inner: dict[str, Module] = field(default_factory=dict)

    @property
    def last(self) -> str:
        """Return the last word of the module's name."""
        return self.name.rpartition(".")[2]

    @cached_property
    def is_head(self) -> bool:
        """Whether it is a head, or in one."""
        return any(word in HEADS for word in self.name.split("."))

    @cached_property
    def is_layer(self) -> bool:
        """Whether it is one of a row of like modules with more in it: what activation checkpointing computes again."""
        return NUMBER.search(self.name) is not None and bool(self.inner) and ".experts." not in self.name

    @property
    def is_called(self) -> bool:
        """Whether it is more than a list or dictionary of modules."""
        return bool(self.own) or not (self.last in COLLECTIONS or all(NUMBER.match(key) for key in self.inner))

    def walk(self) -> Iterator[Module]:
        """Yield the module and all in it."""
        yield self
        for module in self.inner.values():
            yield from module.walk()


def modules(shape: Shape) -> Module:
    """Return the modules of a model; a head that shares the embedding's weight is one more."""
    root = Module("")
    for place, weight in enumerate(shape.weights):
        at = root
        path = weight.name.split(".")[:-1]
        for depth, word in enumerate(path):
            at = at.inner.setdefault(word, Module(".".join(path[: depth + 1])))
        at.own.append(place)
    _join_experts(root)
    _claim_adapters(root)
    _sort(root)
    if shape.head == "lm":
        _tie_heads(root)
    return root


def _join_experts(root: Module) -> None:
    """Make a module that holds experts one: ZeRO-3 gathers it whole (`models.moe`)."""
    for module in root.walk():
        if "experts" in module.inner:
            module.own = sorted(place for inner in module.walk() for place in inner.own)
            module.inner = {}


def _claim_adapters(root: Module) -> None:
    """Let an adapted layer own its first matrices too: it asks for their dtype, so ZeRO-3 takes them for its own."""
    for module in root.walk():
        for word in ("lora_A", "lora_embedding_A"):
            if word in module.inner:
                module.own += [place for inner in module.inner[word].walk() for place in inner.own]


def _sort(root: Module) -> None:
    for module in root.walk():
        if any(word in ORDER for word in module.inner):
            module.inner = dict(sorted(module.inner.items(), key=lambda item: ORDER.get(item[0], USUAL)))
        heads = [word for word in module.inner if word in HEADS]
        module.inner |= {word: module.inner.pop(word) for word in heads}


def _tie_heads(root: Module) -> None:
    """Put a head that is tied to its embedding after the trunk; a value model has its own head, and no other."""
    for holder in list(root.walk()):
        for word, trunk in list(holder.inner.items()):
            embedding = next((m for m in trunk.inner.values() if EMBEDDING.search(m.name)), None)
            if embedding is None or any(head in holder.inner for head in HEADS):
                continue
            own = [place for inner in embedding.walk() for place in inner.own][:1]
            holder.inner["lm_head"] = Module(f"{holder.name}.{word}.lm_head", own)


# --- calls ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Call:
    """A call of a module and the calls in it; whether its input and its output carry a gradient."""

    module: Module
    calls: list[Call] = field(default_factory=list)
    takes: bool = False
    gives: bool = False

    def leaves(self) -> Iterator[Call]:
        """Yield the calls with no others in them, in order."""
        if not self.calls:
            yield self
        for call in self.calls:
            yield from call.leaves()


def called(root: Module, *, adapter: str | None = "default", head: bool = True) -> list[Call]:
    """Return the calls that computing `root` makes, with the adapter of that name, or none; without heads if asked.

    Of a module that is trained whole beside an adapter, its own copy computes, and the original where there is none.
    """
    if root.last in HEADS and not head:
        return []
    if "original_module" in root.inner:
        copies = root.inner["modules_to_save"].inner
        computing = copies.get(adapter or "", root.inner["original_module"])
        return [Call(root, called(computing, adapter=adapter))]
    if root.last in ("lora_A", "lora_B"):
        chosen = root.inner.get(adapter or "")
        return [Call(chosen)] if chosen is not None else []
    inner = [call for module in root.inner.values() for call in called(module, adapter=adapter, head=head)]
    return [Call(root, inner)] if root.is_called else inner


def carry(call: Call, trained: list[bool], *, opened: bool, takes: bool = False) -> bool:
    """Note where gradients flow in `call`, whose input carries one or not; return whether its output does.

    `opened` tells that what the embedding gives is made to carry one, as where layers are computed again. A table of
    positions takes numbers, as the embedding does, and nothing is made of what it gives.
    """
    takes = takes and not POSITIONS.search(call.module.name)
    embeds = EMBEDDING.search(next(call.leaves()).module.name) is not None  # first of all: it takes tokens
    call.takes = running = takes and not embeds
    own = any(trained[place] for place in call.module.own)
    if embeds and not call.calls:
        call.gives = own or opened
        return call.gives
    for inner in call.calls:
        beside = _role(inner.module) in BESIDE_EACH_OTHER
        running |= carry(inner, trained, opened=opened, takes=call.takes if beside else running)
    call.gives = running or own
    return call.gives


def _role(module: Module) -> str:
    words = module.name.split(".")
    return words[-2] if len(words) > 1 and words[-2] in COLLECTIONS else words[-1]

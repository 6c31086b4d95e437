"""What a layer of a model takes while it is computed: weighed on the model itself, without a weight.

The first layers run on torch's meta device, forward and backward, while every storage is counted as it comes and
goes: exact for any architecture whose layers run there. For others, whose layers look at their data (routers),
`by_numbers` gives what a layer of Llama's kind takes.

Shapes: N tokens of a row, D per head; queries, keys and values are 1 x heads x N x D.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

from align_kit.plan.facts import BYTES, Block, Shape

TOKENS = 1 << 28  # weighed with: so many that a weight's gradient, which does not grow with them, weighs nothing
LAYERS = 2  # weighed: the first has to do with the embedding, the last is like all others
MOST = 2_000  # times its hidden state that a layer may take for a token; usual ones take 20 to 60
NAME = "align_kit_weighed"  # of the attention that stands in for the real one


def blocks_of(module: Any, stage: int | None = None) -> dict[str, Block]:
    """Return `block` and `sharded_block` of a `Shape`, of a module that is on the meta device, in a run's precision.

    `module` is a transformers model, one with PEFT's adapters, or a policy and its value function, whose trunks are
    computed one after the other and kept together. Nothing is returned of one that has weights, or whose layers cannot
    run without data. Under ZeRO-3 every linear layer keeps its input, trained or not (DeepSpeed 0.19.8:
    `runtime/zero/linear.py`). Of the two blocks only that of a ZeRO `stage` is weighed where one is named.
    """
    parameters = list(module.parameters())
    if not all(parameter.is_meta for parameter in parameters):
        return {}
    try:
        if len({parameter.requires_grad for parameter in parameters}) == 1:  # no input of a frozen one among others
            return dict.fromkeys(("block", "sharded_block"), _block(module, keeps_inputs=False))
        wanted = {"block": False, "sharded_block": True}
        if stage is not None:
            wanted = {name: sharded for name, sharded in wanted.items() if sharded == (stage == 3)}
        return {name: _block(module, keeps_inputs=sharded) for name, sharded in wanted.items()}
    except Exception:  # whatever a model makes of tensors without data
        return {}


def block_for(shape: Shape, stage: int, precision: str) -> Block:
    """Return what a layer of `shape` takes at a ZeRO `stage`."""
    return (shape.sharded_block if stage == 3 else shape.block) or by_numbers(shape, precision)


def by_numbers(shape: Shape, precision: str) -> Block:
    """Return what a layer of Llama's kind takes.

    It keeps two copies of what each norm reads, two sums into the residual stream, queries, keys and values, the
    attention's result twice (as computed, and as the projection reads it), and four of the inner width, of which a
    token passes through `experts_per_token`.
    """
    wide, hidden, queries = BYTES[precision], shape.hidden, shape.heads * shape.head_dim
    inner = shape.intermediate * max(1, shape.experts_per_token)
    saved = 6 * hidden + 3 * queries + 2 * shape.kv_heads * shape.head_dim + 4 * inner
    moving = wide * (hidden + max(3 * inner, hidden + 3 * queries))
    passes = 1 + any(weight.name.startswith("value") for weight in shape.weights)
    again, told = wide * saved + moving, 2 * wide * shape.head_dim
    return Block(wide * saved, wide * hidden, 3 * wide * hidden, moving, moving, again, passes, told)


# --- weighing -----------------------------------------------------------------------------------------------------


def _block(module: Any, keeps_inputs: bool) -> Block:
    trunk, passes = _trunk(module)
    with ExitStack() as stack:
        layers = stack.enter_context(_first_layers(trunk))
        for prepared in (_standing_in(trunk), _linear(keeps_inputs), _letting_go(trunk)):
            stack.enter_context(prepared)
        found = _weighed(trunk, layers, TOKENS)
    if max(found.values()) > MOST * found["hidden"]:
        raise ValueError("what it keeps grows with the square of the tokens: it has an attention of its own")
    return Block(**{name: size / TOKENS for name, size in found.items()}, passes=passes)


def _weighed(trunk: Any, layers: Any, tokens: int) -> dict[str, float]:
    """Return the bytes that the last of `layers` takes with a row of `tokens`: see `Block`."""
    import torch

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # With a mask, which is never read: some models look for padding where there is none.
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with _scales()(trunk) as scales:
        before = scales.live
        with torch.no_grad(), _around(layers[-1], scales) as idle:
            width = trunk(**asked).last_hidden_state.untyped_storage().nbytes()
        beside = max(0, idle["start"] - before - width)
        found: dict[str, float] = {"hidden": width, "forward": idle["highest"] + width, "beside": beside}
        if not any(parameter.requires_grad for parameter in trunk.parameters()):  # no backward, nothing is kept for it
            return {**found, "saved": 0, "ends": 0, "backward": 0, "again": 0}
        with _around(layers[-1], scales) as layer:
            kept, backward = _differentiated(trunk, asked, scales)
        with _checkpointed(layers):
            again = _differentiated(trunk, asked, scales)[1]
    return {
        **found,
        "saved": layer["stays"],
        "ends": kept - len(layers) * layer["stays"],
        "backward": backward,
        "again": again,
    }


def _differentiated(trunk: Any, asked: Any, scales: Any) -> tuple[int, int]:
    """Return the bytes that a forward keeps for its backward, and those that the backward takes beside at most."""
    import torch

    before = scales.live
    with torch.enable_grad():
        hidden = trunk(**asked).last_hidden_state
    after = scales.begin()
    if hidden.requires_grad:  # else all is frozen
        hidden.backward(torch.ones_like(hidden))
    return after - before, scales.highest - after


@contextmanager
def _checkpointed(layers: Any) -> Iterator[None]:
    """Let `layers` keep their input only, and compute the rest again in the backward."""
    from torch.utils.checkpoint import checkpoint

    for layer in layers:
        vars(layer)["forward"] = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


@contextmanager
def _around(layer: Any, scales: Any) -> Iterator[dict[str, float]]:
    """Yield what tells, of a layer that ran, which bytes it left behind (`stays`) and took at most (`highest`)."""
    found: dict[str, float] = {}

    def before(*_: Any) -> None:
        found["start"] = scales.begin()

    def after(*_: Any) -> None:
        found.update(stays=scales.live - found["start"], highest=scales.highest - found["start"])

    handles = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@cache
def _scales() -> Any:
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Scales(TorchDispatchMode):
        """Counts the bytes of the storages that live, the model's own left out."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.live = self.highest = 0
            self.own = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers()]]
            self.seen = {storage._cdata: 0 for storage in self.own}

        def begin(self) -> int:
            self.highest = self.live
            return self.live

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor):
                    self._put(tensor.untyped_storage())
            return made

        def _put(self, storage: Any) -> None:
            key = storage._cdata
            if key not in self.seen:
                self.seen[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.highest = max(self.highest, self.live)
                weakref.finalize(storage, self._take, key)

        def _take(self, key: int) -> None:
            self.live -= self.seen.pop(key)

    return Scales


# --- what is weighed ----------------------------------------------------------------------------------------------


def _trunk(module: Any) -> tuple[Any, int]:
    """Return the trunk of a model, and how many are computed together."""
    passes = 1
    if hasattr(module, "is_shared"):  # a policy and its value function
        module, passes = module.policy, 2
    if hasattr(module, "get_base_model"):
        module = module.get_base_model()
    return module.base_model, passes


@contextmanager
def _first_layers(trunk: Any) -> Iterator[Any]:
    """Let `trunk` have its first layers only meanwhile; yields them."""
    from torch import nn

    count = trunk.config.get_text_config().num_hidden_layers
    holder, name, layers = next(
        (module, name, child)
        for module in trunk.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    )
    setattr(holder, name, layers[:LAYERS])
    try:
        yield getattr(holder, name)
    finally:
        setattr(holder, name, layers)


@contextmanager
def _letting_go(trunk: Any) -> Iterator[None]:
    """Drop each gradient when it is whole, as the engine does once it has copied it."""

    def drop(parameter: Any) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in trunk.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _standing_in(trunk: Any) -> Iterator[None]:
    """Let the attention of `trunk` be one that keeps what a fused kernel keeps, and that needs no mask."""
    from transformers import AttentionInterface

    if not type(trunk)._can_set_attn_implementation():
        raise ValueError("its attention cannot be replaced")
    AttentionInterface.register(NAME, _attend)
    before = trunk.config._attn_implementation
    trunk.set_attn_implementation(NAME)
    try:
        yield
    finally:
        trunk.set_attn_implementation(before)


def _attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[Any, None]:
    """Attend in two segments, joined afterwards, as `forward.attention` does."""
    import torch

    half = query.shape[2] // 2
    parts = zip(*(tensor.split([half, tensor.shape[2] - half], dim=2) for tensor in (query, key, value)), strict=True)
    out = torch.cat([_fused().apply(*part) for part in parts], dim=2)
    return out.transpose(1, 2).contiguous(), None


@cache
def _fused() -> Any:
    import torch

    class Fused(torch.autograd.Function):
        """Keeps queries, keys, values, the result and a number for each head and token."""

        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            out, sums = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
            ctx.save_for_backward(query, key, value, out, sums)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])

    return Fused


@contextmanager
def _linear(keeps_inputs: bool) -> Iterator[None]:
    """Let linear layers be torch's own, or such as keep their input whether or not their weight is trained."""
    from torch.nn import functional

    before = functional.linear
    functional.linear = _keeping().apply if keeps_inputs else _plain_linear()
    try:
        yield
    finally:
        functional.linear = before


def _plain_linear() -> Any:
    import torch

    return torch._C._nn.linear  # whatever an engine has put in its place


@cache
def _keeping() -> Any:
    import torch

    class Keeping(torch.autograd.Function):
        """DeepSpeed's linear layer under ZeRO-3."""

        @staticmethod
        def forward(ctx: Any, input: Any, weight: Any, bias: Any = None) -> Any:
            ctx.save_for_backward(input, weight)
            out = input.matmul(weight.t())
            return out if bias is None else out.add_(bias)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (gradient,), (input, weight) = grads, ctx.saved_tensors
            wants = ctx.needs_input_grad
            rows = gradient.reshape(-1, gradient.shape[-1])
            by_weight = rows.t().matmul(input.reshape(-1, input.shape[-1])) if wants[1] else None
            by_bias = rows.sum(0) if len(wants) > 2 and wants[2] else None
            return gradient.matmul(weight) if wants[0] else None, by_weight, by_bias

    return Keeping

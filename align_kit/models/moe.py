"""Find a model's sparse blocks: modules that send each token to a few of their experts.

ZeRO-3 gathers a module's parameters when the module is called, by all ranks together. Ranks whose tokens choose
different experts would call different modules and wait for each other for ever. A sparse block is therefore gathered
whole, as what DeepSpeed calls a leaf module; `zero.set_leaf_modules` does that to what is found here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from align_kit.errors import UserError

if TYPE_CHECKING:
    from torch import nn

# num_experts, num_local_experts, n_routed_experts, moe_num_experts, ...
_COUNT = re.compile(r"(?!.*shared)\w*(num|n)_(\w+_)?experts")
# What chooses the experts: `gate`, `router`, `classifier`; `gate_proj` and its like belong to an expert.
_ROUTER = re.compile(r"(?!.*proj).*(gate|router|classifier)")


def sparse_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the sparse blocks of `model`, in the order they stand in; none for a dense model.

    Experts are recognised by structure: a list of modules, or parameters that stack all experts' matrices, under a name
    with "expert" in it. Their block is the nearest module above that also holds what chooses between them. Raises
    `UserError` for a list of experts without such a module, and where the configuration names experts and none are
    found.
    """
    counts = set(_counts(_plain(getattr(model, "config", None))))
    holders = dict(_holders(model, counts))
    if counts and not holders:
        raise _unknown(model, f"its configuration names {min(counts)} experts and none are recognised in it")
    blocks = {id(block): block for name in holders for block in [_block(model, name, holders)]}
    return list(blocks.values())


def refuse_adapted_blocks(policy: nn.Module) -> None:
    """Raise `UserError` where adapters inside the sparse blocks of a ZeRO-3 `policy` are to be trained.

    For a base that computes twice before one backward, as two adapters on it do: a leaf module reduces its gradients
    once for each time it was called, which DeepSpeed takes for an error.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
        return
    if any(parameter.requires_grad for block in sparse_blocks(policy) for parameter in block.parameters()):
        raise UserError(
            "LoRA on experts cannot be trained under ZeRO-3 with the value function on the same base; adapt attention "
            'alone, --lora_target_modules \'["q_proj", "k_proj", "v_proj", "o_proj"]\', or use --deepspeed zero2'
        )


def generating(model: Any) -> dict[str, bool]:
    """Return what `generate` must be told where the configuration asks for the routers' logits: not to.

    transformers would balance one token's routers by the attention mask of all, which fails.
    """
    asked = getattr(model.config.get_text_config(), "output_router_logits", False)
    return {"output_router_logits": False} if asked else {}


def _counts(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the numbers of experts that a configuration and those nested in it name, where there are several."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif isinstance(value, int) and value > 1 and _COUNT.fullmatch(str(name)):
            yield value


def _plain(config: Any) -> Mapping[str, Any]:
    return config.to_dict() if hasattr(config, "to_dict") else config if isinstance(config, Mapping) else {}


def _holders(model: nn.Module, counts: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of what holds experts: a list of them, or parameters stacked along the first axis."""
    from torch import nn

    for name, module in model.named_modules():
        listed = isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1
        if _mentions_experts(name, module) and (listed or _stacked(module, counts)):
            yield name, module


def _mentions_experts(name: str, module: nn.Module) -> bool:
    own = name.replace(".base_layer", "").rpartition(".")[2]  # PEFT puts what it adapts a level down, or several
    return "expert" in own.lower() or "expert" in type(module).__name__.lower()


def _stacked(module: nn.Module, counts: set[int]) -> bool:
    # ZeRO-3 has sharded these already; `ds_shape` is the whole parameter's.
    shapes = [tuple(getattr(p, "ds_shape", p.shape)) for p in module.parameters(recurse=False)]
    return any(len(shape) > 1 and shape[0] % count == 0 for shape in shapes for count in counts)


def _block(model: nn.Module, name: str, holders: Mapping[str, nn.Module]) -> nn.Module:
    """Return the nearest module above the experts at `name` that chooses between them, short of a stack of layers."""
    from torch import nn

    above = name
    while above:
        above = above.rpartition(".")[0]
        block = model.get_submodule(above)
        children = [child for child, _ in (*block.named_children(), *block.named_parameters(recurse=False))]
        if any(_ROUTER.fullmatch(child.lower()) for child in children):
            return block
        if isinstance(block, nn.ModuleList):
            break
    experts = holders[name]
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        raise _unknown(model, f"{name} is a list of {len(experts)} experts and nothing beside it chooses them")
    return experts  # stacked experts are one call whatever is chosen


def _unknown(model: nn.Module, seen: str) -> UserError:
    return UserError(
        f"{type(model).__name__} has a sparse block that is not known: {seen}; under ZeRO-3, ranks that choose other "
        "experts would hang: name its class in zero_optimization.leaf_module.classes, or use --deepspeed zero2"
    )

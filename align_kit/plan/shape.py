"""The shapes of a run's models, from their configurations: no weight is read and none takes memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from align_kit.config import Config
from align_kit.models import hollow, load, lora
from align_kit.models.source import Source
from align_kit.plan.activations import blocks_of
from align_kit.plan.facts import BYTES, Shape, Weight

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK_4BIT = 64  # weights that share one fp32 scale (bitsandbytes' default)
BLOCK_SCALES = 256  # scales that share one fp32 scale, where they are quantised too
CODES_4BIT, CODES_8BIT = 16, 256  # fp32 numbers that words stand for
HEADS = ("lm_head", "score", "classifier")  # never stored in fewer bits


class Row(Protocol):
    """What the planner needs of a registry row to build what is trained."""

    @property
    def head(self) -> Literal["lm", "score"]:
        """What the model ends in."""

    @property
    def values(self) -> bool:
        """Whether a value function is trained beside the policy."""


def shape_of(
    module: nn.Module,
    name: str,
    precision: str,
    *,
    head: Literal["lm", "score"] = "lm",
    in_4bit: Collection[int] = (),
    nested: bool = False,
    stage: int | None = None,
) -> Shape:
    """Return the shape of `module` in a run of `precision`; it may lie on the meta device, or in an engine.

    Parameters that ZeRO-3 has split count whole, tied ones once. `in_4bit` are the ids of parameters that will be
    stored in 4 bits, `nested` tells that their scales are quantised too. Layers are weighed for a ZeRO `stage`, or all.
    """
    config: Any = getattr(module, "config", None)
    text = config.get_text_config()
    weights = tuple(_weight(key, parameter, BYTES[precision], in_4bit) for key, parameter in module.named_parameters())
    every = module.named_parameters(remove_duplicate=False)
    heads = int(text.num_attention_heads)
    scales = sum(_scale_bytes(weight, nested) for weight in weights if weight.element_bytes == 0.5)
    return Shape(
        name=name,
        weights=weights,
        hidden=int(text.hidden_size),
        layers=int(text.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        intermediate=_intermediate(text),
        vocab=int(text.vocab_size),
        experts=_number(text, "num_experts", "num_local_experts", "n_routed_experts"),
        experts_per_token=_number(text, "num_experts_per_tok", "moe_topk", "num_experts_per_token"),
        head=head,
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in module.buffers()) + scales,
        tied=sum(math.prod(_whole(parameter)) for _, parameter in every) - sum(weight.size for weight in weights),
        **blocks_of(module, stage),
    )


def _weight(name: str, parameter: Any, usual: int, in_4bit: Collection[int]) -> Weight:
    own = 0.5 if id(parameter) in in_4bit else parameter.element_size()
    return Weight(name, _whole(parameter), parameter.requires_grad, None if own == usual else float(own))


def _whole(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _scale_bytes(weight: Weight, nested: bool) -> int:
    """Return what a layer stored in 4 bits keeps beside its words: whole on each rank, no parameter."""
    scales = -(-weight.size // BLOCK_4BIT)
    if not nested:
        return 4 * (scales + CODES_4BIT)
    return scales + 4 * (-(-scales // BLOCK_SCALES) + CODES_8BIT + CODES_4BIT + 1)  # and what was taken off them


def _intermediate(text: Any) -> int:
    inner = _number(text, "intermediate_size", "n_inner", "ffn_dim")
    return inner or 4 * int(text.hidden_size)  # GPT-2's rule where it names none


def _number(config: Any, *names: str) -> int:
    return int(next((value for name in names if (value := getattr(config, name, None))), 0))


# --- the models of a run ----------------------------------------------------------------------------------------------


def meta_policy(
    recipe: Row,
    config: Config,
    source: Source,
    *,
    precision: str,
    value_source: Source | None = None,
    frozen_copy: str | None = None,
    rewards: Mapping[str, Source] | None = None,
    stage: int | None = None,
) -> tuple[Any, Shape]:
    """Return the module that an engine would train for `recipe`, without its weights, and its shape.

    `source` is what the policy starts from, `value_source` what a value model of its own does where that is another,
    `frozen_copy` the name of the frozen copy of a stored adapter that serves as reference, `rewards` the adapters of
    reward models that share the policy's base, by role; `stage` is the only ZeRO stage that matters, if one is named.
    """
    fields = config.model
    loading = _loading(config, precision)
    with hollow.hollow(loading["dtype"]):
        policy = hollow.hollow_model(source, head=recipe.head, overrides=_overrides(fields), **loading)
        small = _in_4bit(policy) if fields.load_in_4bit else set()
        if fields.use_peft:
            policy = _adapted(policy, recipe, fields, source, frozen_copy)
        if recipe.values:
            policy = _with_values(policy, fields, value_source or source, loading)
        for role, reward in (rewards or {}).items():
            policy.hold_reward(role, reward, 0)
    if _without_dropout(config):
        load.disable_dropout(policy)  # it would keep masks for the backward
    nested = fields.use_bnb_nested_quant
    told: dict[str, Any] = {"head": recipe.head, "in_4bit": small, "nested": nested, "stage": stage}
    return policy, shape_of(policy, source.name, precision, **told)


def meta_frozen(
    config: Config, source: Source, *, precision: str, head: Literal["lm", "score"] = "lm", quantised: bool = False
) -> tuple[Any, Shape]:
    """Return a frozen model of its own without its weights, in int8 where `quantised`, and its shape."""
    loading = _loading(config, precision)
    with hollow.hollow(loading["dtype"]):
        model = hollow.hollow_model(source, head=head, **loading)
        model.requires_grad_(False)
        if quantised:
            from align_kit.models.int8 import quantise_

            quantise_(model)
    return model, shape_of(model, source.name, precision, head=head)


def _without_dropout(config: Config) -> bool:
    try:
        return bool(config.value("disable_dropout"))
    except KeyError:  # a phase that has no such option
        return False


def _loading(config: Config, precision: str) -> dict[str, Any]:
    return {
        "dtype": torch_dtype(precision),
        "attn_implementation": config.model.attn_implementation,
        "trust_remote_code": config.value("trust_remote_code"),
    }


def torch_dtype(precision: str) -> torch.dtype:
    """Return the dtype of the weights of a run in `precision`."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _overrides(fields: Any) -> Mapping[str, Any] | None:
    return fields.config_overrides if isinstance(fields.config_overrides, dict) else None


def _adapted(base: Any, recipe: Row, fields: Any, source: Source, frozen_copy: str | None) -> Any:
    if source.is_adapter:
        return lora.load_adapter(base, source, head=recipe.head, frozen_copy=frozen_copy)
    return lora.add_lora(base, fields, head=recipe.head)


def _with_values(policy: Any, fields: Any, value_source: Source, loading: Mapping[str, Any]) -> Any:
    from align_kit.models import policy_and_value

    if fields.use_peft:
        return policy_and_value.shared(policy)
    value = hollow.hollow_model(value_source, head="score", **loading)
    return policy_and_value.PolicyAndValue(policy, value)


def _in_4bit(base: Any) -> set[int]:
    """Return the ids of the parameters that bitsandbytes would store in 4 bits: linear layers but for the head."""
    from torch import nn

    linear = [(name, module) for name, module in base.named_modules() if type(module) is nn.Linear]
    return {id(module.weight) for name, module in linear if name.rpartition(".")[2] not in HEADS}

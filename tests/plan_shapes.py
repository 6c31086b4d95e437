"""Models written down by hand for the planner's tests: Llama's names, any size, LoRA, a value function."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from align_kit.plan.facts import EngineFacts, Micro, Run, Shape, Weight
from align_kit.resources import folder

NOTHING = Micro(0, 0, 0, 0, 0)
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(
    hidden: int, layers: int, heads: int, intermediate: int, vocab: int, *,
    kv_heads: int | None = None, tied: bool = False, rank: int = 0, targets: tuple[str, ...] = ALL_LINEAR,
    head: Any = "lm", name: str = "by hand",
) -> Shape:  # fmt: skip
    """Return a Llama of these sizes; with a `rank` only LoRA's matrices on `targets` are trained."""
    each = hidden // heads
    wide = each * (kv_heads or heads)
    linear = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (wide, hidden), "self_attn.v_proj": (wide, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden), "mlp.down_proj": (hidden, intermediate),
    }  # fmt: skip

    def weights() -> Iterator[Weight]:
        trained = not rank
        yield Weight("model.embed_tokens.weight", (vocab, hidden), trained)
        for layer in range(layers):
            at = f"model.layers.{layer}"
            for path, (out, into) in linear.items():
                adapted = rank and path.rpartition(".")[2] in targets
                yield Weight(f"{at}.{path}.{'base_layer.' if adapted else ''}weight", (out, into), trained)
                if adapted:
                    yield Weight(f"{at}.{path}.lora_A.default.weight", (rank, into))
                    yield Weight(f"{at}.{path}.lora_B.default.weight", (out, rank))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield Weight(f"{at}.{norm}.weight", (hidden,), trained)
        yield Weight("model.norm.weight", (hidden,), trained)
        if head == "score":
            yield Weight("score.weight", (1, hidden))
        elif not tied:
            yield Weight("lm_head.weight", (vocab, hidden), trained)

    found = tuple(weights())
    if rank:
        found = tuple(replace(weight, name=f"base_model.model.{weight.name}") for weight in found)
    return Shape(name, found, hidden, layers, heads, kv_heads or heads, each, intermediate, vocab, head=head)


def llama_7b(**more: Any) -> Shape:
    """Return Llama 2 7B (Touvron 2023)."""
    return llama(4096, 32, 32, 11008, 32000, **more)


def run_of(shape: Shape, stage: int = 3, world_size: int = 2, *, engine: Any = None, **more: Any) -> Run:
    """Return a run of one micro-batch a step."""
    facts = {"precision": "fp32", "persistence_threshold": 0, **(engine or {})}
    return Run(
        policy=shape, engine=EngineFacts(stage=stage, **facts), world_size=world_size,
        **{"phase": "sft", "unit": "rows", "optimizer": "adamw_torch", "mean": NOTHING, "worst": NOTHING,
           "per_device": 1, "accumulation": 1, "steps": 1, **more},
    )  # fmt: skip


def engine_config(**zero: Any) -> dict[str, Any]:
    """Return the shipped configuration of ZeRO-3, or of ZeRO-2 where `zero` asks for less, with `zero` laid over it."""
    name = "zero3" if zero.get("stage", 3) == 3 else "zero2"
    config = json.loads((folder("ds_configs") / f"{name}.json").read_text())
    return {**config, "zero_optimization": {**config["zero_optimization"], **zero}}

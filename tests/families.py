"""Tiny models of the families the packed forward is for, and small batches to compare two ways of computing them on."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from align_kit.forward.door import Door, door_of, open_door
from align_kit.forward.logprobs import token_logps

PAD, EOS, FIRST, VOCABULARY = 0, 1, 4, 96  # ids from FIRST on are words

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,  # 0.02 leaves attention all but uniform, so that a wrong one would not show
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "attention_dropout": 0.0,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}

# What each family has that the others have not; windows are shorter than the prompts of `PAIRS`.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "gemma2": {
        "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {**EXPERTS, "sliding_window": None},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt2": {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": True},
    "gpt_oss": {
        **EXPERTS, "head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "olmo2": {},
    "phi3": {"sliding_window": None},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7},
}  # fmt: skip


def tiny(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a causal language model of `family` with random weights from `seed`."""
    from transformers import AutoModelForCausalLM

    return _made(AutoModelForCausalLM, config_of(family, **changes), seed, changes)


def tiny_scorer(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a sequence classifier of `family` with one label and random weights from `seed`."""
    from transformers import AutoModelForSequenceClassification

    return _made(AutoModelForSequenceClassification, config_of(family, num_labels=1, **changes), seed, changes)


def config_of(family: str, **changes: Any) -> Any:
    """Return the configuration of a tiny model of `family`."""
    from transformers import AutoConfig

    options = {**SHAPE, **FAMILIES.get(family, {}), **changes}
    options.pop("attn_implementation", None)
    return AutoConfig.for_model(family, **options)


def _made(kind: Any, config: Any, seed: int, changes: Mapping[str, Any]) -> Any:
    """Draw everything, biases and sinks too, so that nothing is 0 and forgotten without notice."""
    torch.manual_seed(seed)
    model = kind.from_config(config, **{name: changes[name] for name in ("attn_implementation",) if name in changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def with_lora(model: Any, *, dropout: float = 0.0, **options: Any) -> Any:
    """Return `model` with an adapter on its attention (`target_modules`) that is not zero, as a trained one."""
    from peft import LoraConfig, get_peft_model

    is_gpt2 = model.config.model_type == "gpt2"  # whose weights lie the other way round
    targets = ["c_attn"] if is_gpt2 else ["qkv_proj"] if model.config.model_type == "phi3" else ["q_proj", "v_proj"]
    how = {"target_modules": targets, "fan_in_fan_out": is_gpt2, "r": 4, "lora_dropout": dropout, **options}
    adapted = get_peft_model(model, LoraConfig(**how))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


# --- batches --------------------------------------------------------------------------------------------------


def words(count: int, seed: int) -> list[int]:
    """Return `count` token ids."""
    draw = random.Random(seed)
    return [draw.randrange(FIRST, VOCABULARY) for _ in range(count)]


def batch_of(rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, wider: int = 0) -> dict[str, Tensor]:
    """Return prompts and completions as a batch padded on the right, by `wider` columns more than needed."""
    columns = max(len(prompt) + len(completion) for prompt, completion in rows) + wider
    names = ("input_ids", "attention_mask", "loss_mask")
    batch = {name: torch.full((len(rows), columns), PAD if name == "input_ids" else 0) for name in names}
    for row, (prompt, completion) in enumerate(rows):
        length = len(prompt) + len(completion)
        batch["input_ids"][row, :length] = torch.tensor([*prompt, *completion], dtype=torch.long)
        batch["attention_mask"][row, :length] = 1
        batch["loss_mask"][row, len(prompt) : length] = 1
    return batch


_PROMPTS = [words(9, 1), words(14, 2), words(6, 3)]
_COMPLETIONS = [words(count, 10 + count) for count in (7, 3, 12, 5, 1, 8)]

# Batches that a way of computing must not change anything on; what is odd about each is its name.
BATCHES: dict[str, list[tuple[list[int], list[int]]]] = {
    "pairs": [(_PROMPTS[place % 3], _COMPLETIONS[place]) for place in range(6)],
    "equal completions": [(_PROMPTS[0], _COMPLETIONS[0])] * 3,
    "empty prompts": [([], _COMPLETIONS[0]), ([], _COMPLETIONS[2])],
    "prompts of one token": [([9], _COMPLETIONS[0]), ([9], _COMPLETIONS[2]), ([8], [7])],
    "one completion empty": [(_PROMPTS[0], _COMPLETIONS[0]), (_PROMPTS[0], [])],
    "one template": [([5, 6, 7, 8, 9, *_PROMPTS[place % 2]], _COMPLETIONS[place]) for place in range(4)],
    "16 of a prompt": [(_PROMPTS[1], words(1 + place % 5, 50 + place)) for place in range(16)],
    "nothing predicted": [(_PROMPTS[0], []), (_PROMPTS[1], [])],
}


@dataclass
class Computed:
    """What a way of computing gave: numbers by name, gradients by parameter, and the door they came through."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    door: Door = field(default_factory=lambda: Door("plain"))


def compute(model: Any, batch: Mapping[str, Tensor], mode: str, **asked: Any) -> Computed:
    """Walk `model` in `mode` over `batch`; gradients are of a sum that weighs every token differently."""
    open_door(model, mode)
    tokens = token_logps(model, batch, **asked)
    torch.manual_seed(7)
    loss = (tokens.logps_BT * torch.randn_like(tokens.logps_BT)).sum()
    if tokens.entropy_BT is not None:
        loss = loss + (tokens.entropy_BT * torch.randn_like(tokens.entropy_BT)).sum()
    values = {"loss": loss, "logps": tokens.logps_BT}
    values |= {} if tokens.entropy_BT is None else {"entropy": tokens.entropy_BT}
    return Computed({name: value.detach() for name, value in values.items()}, gradients(model, loss), door_of(model))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of `loss` at every parameter that takes part; parameters are left without."""
    loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of the difference of two sets of tensors over that of the second."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    gap = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours)
    norm = sum(float(tensor.double().square().sum()) for tensor in theirs.values())
    return (gap / norm) ** 0.5 if norm else gap**0.5

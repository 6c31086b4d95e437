"""LoRA: wrap a policy, go on with a stored adapter, and switch adapters without touching `requires_grad`.

PEFT's own `set_adapter` and `disable_adapter` flip `requires_grad`, which ZeRO-3 fixes when the engine is made. So
every adapter is created first, trainability is set once, and switching only sets what the layers look up.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from align_kit.errors import UserError
from align_kit.models.source import Source

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

TRAINED = "default"
TASK_TYPES = {"lm": "CAUSAL_LM", "score": "SEQ_CLS"}  # by the head of the model
CLASSIFIERS = ("classifier", "score")  # what PEFT calls the head of a SEQ_CLS model, and trains whole


def add_lora(model: PreTrainedModel, fields: Any, *, head: str = "lm") -> PeftModel:
    """Return `model` with a fresh trainable LoRA adapter; `fields` carries TRL's `lora_*` names.

    A scalar `head` is trained whole beside it and stored with it.
    One dtype for all parameters (`autocast_adapter_dtype=False`): ZeRO-3 asks it of its persistent parameters.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=fields.lora_r,
        lora_alpha=fields.lora_alpha,
        lora_dropout=fields.lora_dropout,
        target_modules=_targets(fields.lora_target_modules),
        target_parameters=fields.lora_target_parameters,
        modules_to_save=fields.lora_modules_to_save,
        task_type=TASK_TYPES[head],
        use_rslora=fields.use_rslora,
        use_dora=fields.use_dora,
    )
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"LoRA cannot be added: {str(error).splitlines()[0]}; see lora_target_modules") from None


def _targets(names: list[str] | None) -> list[str] | str:
    if not names:
        return "all-linear"
    return names[0] if len(names) == 1 and names[0] == "all-linear" else names


def load_adapter(
    base: PreTrainedModel, source: Source, *, head: str = "lm", frozen_copy: str | None = None
) -> PeftModel:
    """Return `base` with the stored adapter of `source` trainable, and a frozen copy of it named `frozen_copy`.

    `head` is what `base` ends in. Raises `UserError` for a reward model's adapter where that is words.
    """
    from peft import PeftModel

    if head == "score":
        return _scoring(base, source)
    if source.head == "score":
        raise UserError(f"{source.name} is the adapter of a reward model; give the adapter of a language model")
    model = PeftModel.from_pretrained(
        base, str(source.folder), adapter_name=TRAINED, is_trainable=True, autocast_adapter_dtype=False
    )
    if frozen_copy is not None:
        model.load_adapter(
            str(source.folder), adapter_name=frozen_copy, is_trainable=False, autocast_adapter_dtype=False
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{TRAINED}." in name)
    return model


def _scoring(base: Any, source: Source) -> PeftModel:
    """Return a sequence classifier with the stored adapter trainable, its head with it.

    The adapter of a reward model brings its head; that of a language model knows the same trunk by the same names,
    and the head stays as `base` has it.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    config: Any = PeftConfig.from_pretrained(str(source.folder))
    config.task_type, config.inference_mode = TASK_TYPES["score"], False
    config.modules_to_save = [name for name in config.modules_to_save or () if name not in CLASSIFIERS] or None
    model: Any = get_peft_model(base, config, adapter_name=TRAINED, autocast_adapter_dtype=False)
    fresh = get_peft_model_state_dict(model, adapter_name=TRAINED, save_embedding_layers=False)
    stored = load_peft_weights(str(source.folder), device="cpu")
    set_peft_model_state_dict(model, {**fresh, **stored}, adapter_name=TRAINED)
    base.head_is_fresh = source.head == "lm"
    return model  # type: ignore[no-any-return]


def trains_whole_modules(source: Source) -> bool:
    """Tell whether a stored adapter carries whole modules (`modules_to_save`) beside its low-rank part."""
    if not source.is_adapter:
        return False
    return bool(json.loads((source.folder / "adapter_config.json").read_text()).get("modules_to_save"))


@contextmanager
def adapter_active(model: nn.Module, name: str | None) -> Iterator[None]:
    """Compute with the adapter `name` meanwhile, or with the bare base where it is `None`."""
    layers = _adapted_layers(model)
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [name or TRAINED], name is None
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def _adapted_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


# --- several adapters on one base -------------------------------------------------------------------------


def active_adapter(model: nn.Module) -> str | None:
    """Return the adapter `model` computes with now, None for its bare base."""
    layer = next(iter(_adapted_layers(model)))
    return None if layer._disable_adapters else str(layer._active_adapter[0])


def add_adapter_like(model: PeftModel, like: str, name: str) -> None:
    """Add a fresh trainable adapter of the same shape as `like`; which adapters train is left as it was."""
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    model.add_adapter(name, copy.deepcopy(model.peft_config[like]), autocast_adapter_dtype=False)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(before.get(key, f".{name}." in key))


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Give the adapter `target` the weights of `source`; call it before the engine is made."""
    import torch

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in parameters.items():
            if f".{source}." in key:
                parameters[key.replace(f".{source}.", f".{target}.")].copy_(parameter)


def load_scoring_adapter(model: PeftModel, source: Source, *, name: str) -> torch.Tensor:
    """Put the stored adapter of a reward model on `model` as `name`, frozen; return its scalar head (H weights).

    The adapter of a sequence classifier knows the same trunk by the same names; its head is handed back because a
    causal model has no place for it. Raises `UserError` for whole modules other than the head.
    """
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(source.folder))
    stored = load_file(source.folder / "adapter_model.safetensors")
    heads = {key: tensor for key, tensor in stored.items() if ".lora_" not in key}
    if len(heads) != 1 or next(iter(heads.values())).shape[0] != 1:
        raise UserError(
            f"the reward model {source.name} holds whole modules ({', '.join(sorted(heads)) or 'no head'}) beside its "
            "adapter, which one base cannot share; use reward_placement: sharded"
        )
    config.modules_to_save, config.task_type, config.inference_mode = None, "CAUSAL_LM", True
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    model.add_adapter(name, config, autocast_adapter_dtype=False)
    low_rank = {key: tensor for key, tensor in stored.items() if key not in heads}
    outcome: Any = set_peft_model_state_dict(model, low_rank, adapter_name=name)
    if outcome.unexpected_keys:
        raise UserError(f"the reward model {source.name} does not fit the policy's base: {outcome.unexpected_keys[:2]}")
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(before.get(key, False))
    return next(iter(heads.values())).flatten()

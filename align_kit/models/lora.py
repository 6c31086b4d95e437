"""LoRA: wrap a policy, go on with a stored adapter, and switch adapters without touching `requires_grad`.

PEFT's own `set_adapter` and `disable_adapter` flip `requires_grad`, which ZeRO-3 fixes when the engine is made. So
every adapter is created first, trainability is set once, and switching only sets what the layers look up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from align_kit.errors import UserError
from align_kit.models.source import Source

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

TRAINED = "default"


def add_lora(model: PreTrainedModel, fields: Any) -> PeftModel:
    """Return `model` with a fresh trainable LoRA adapter; `fields` carries TRL's `lora_*` names.

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
        task_type=fields.lora_task_type,
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


def load_adapter(base: PreTrainedModel, source: Source, *, frozen_copy: str | None = None) -> PeftModel:
    """Return `base` with the stored adapter of `source` trainable, and a frozen copy of it named `frozen_copy`."""
    from peft import PeftModel

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


def trains_whole_modules(source: Source) -> bool:
    """Tell whether a stored adapter carries whole modules (`modules_to_save`) beside its low-rank part."""
    if not source.is_adapter:
        return False
    return bool(json.loads((source.folder / "adapter_config.json").read_text()).get("modules_to_save"))


@contextmanager
def adapter_active(model: nn.Module, name: str | None) -> Iterator[None]:
    """Compute with the adapter `name` meanwhile, or with the bare base where it is `None`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [name or TRAINED], name is None
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled

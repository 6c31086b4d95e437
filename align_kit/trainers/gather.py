"""The trained weights in one place: rank 0's, from the shards of all, at once or behind the training's back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from align_kit.checkpoint.assemble import Shards, can_assemble


def gathered(trainer: Any, *, copy: bool = False) -> dict[str, Tensor]:
    """Return on rank 0 what is to be stored: all weights, or the adapter's alone where LoRA is trained.

    All ranks call it; the others get nothing. With `copy` no tensor is one that training goes on to change.
    """
    named = trainer.stored_names(_whole(trainer))
    return _copied(named, trainer.model) if copy else named


def _copied(named: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return tensors of which none shares memory with the model's; those that share it with each other still do."""
    live = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    copies: dict[tuple[int, Any, Any], Tensor] = {}
    found = {}
    for name, tensor in named.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in copies:
            copies[key] = tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor
        found[name] = copies[key]
    return found


def _whole(trainer: Any) -> dict[str, Tensor]:
    engine = trainer.model_wrapped
    if not trainer.is_lora:
        return _tied_again(trainer.accelerator.get_state_dict(engine) or {}, engine.module)
    if engine.zero_optimization_partition_weights():
        return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True) or {}
    trained = {name for name, p in engine.module.named_parameters() if p.requires_grad}
    return {name: tensor.cpu() for name, tensor in engine.module.state_dict().items() if name in trained}


def _tied_again(named: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return tensors of which those that are one in `model` are one: below ZeRO-3 each name gets a copy of its own."""
    first: dict[int, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    same = {name: first.setdefault(id(parameter), name) for name, parameter in parameters}
    return {name: named.get(same.get(name, name), tensor) for name, tensor in named.items()}


def joins_later(trainer: Any) -> bool:
    """Tell whether what is to be stored can be joined from the shards of all ranks, with no gather."""
    engine = trainer.model_wrapped
    sharded = not trainer.is_lora and engine.zero_optimization_partition_weights()
    return sharded and can_assemble(trainer.stored_model, engine)


def shards_of(trainer: Any) -> Shards:
    """Return this rank's part of what is to be stored, for whole weights to be joined from later."""
    stored = trainer.stored_names(dict(trainer.model.named_parameters(remove_duplicate=False)))
    buffers = trainer.stored_names(dict(trainer.model.named_buffers()))
    persistent = trainer.stored_model.state_dict().keys()
    return Shards(stored, {name: buffer for name, buffer in buffers.items() if name in persistent})

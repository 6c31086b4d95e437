"""What a rank holds from one update to the next: weights, masters and moments, each by a name that says where it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from align_kit.frozen.hold import bare, is_resident
from align_kit.telemetry.at_rest import Held, Piece

SHOWN = 3  # parameters of a flat buffer that a message names


def holdings(engine: Any) -> dict[str, Held]:
    """Return the tensors of this rank that only an update may change, and those of the base that none may.

    A buffer that two names share is there once (in fp32 the shards are the masters). What lies on NVMe is not held.
    Frozen roles have their own watch (`Frozen.check`), and so have adapters that are not trained.
    """
    found: dict[str, Held] = {}
    seen: set[tuple[int, int]] = set()
    for name, held in _named(engine):
        place = (held.tensor.data_ptr(), held.tensor.numel())
        if held.tensor.numel() and place not in seen:
            seen.add(place)
            found[name] = held
    return found


def _named(engine: Any) -> Iterator[tuple[str, Held]]:
    optimizer = engine.optimizer
    for group, (weights, master) in enumerate(_groups(optimizer)):
        if weights is not None:
            yield f"weights of group {group}", Held(weights)
        yield f"masters of group {group}", Held(master)
        for moment, state in _state(optimizer, master).items():
            if isinstance(state, Tensor) and state.numel() == master.numel():
                yield f"{moment} of group {group}", Held(state)
    for name, parameter in bare(engine).named_parameters():
        if is_resident(parameter):
            yield f"the gathered copy of {name}", Held(parameter.data)
        if not parameter.requires_grad and ".lora_" not in name and "reward_heads." not in name:
            yield f"the frozen {name}", Held(shard_of(parameter), fixed=True)


def _groups(optimizer: Any) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Yield the flat weights and masters of each group of ZeRO 3, 1 and 2; below, each parameter is its own group."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        yield from zip(optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups, strict=True)
    else:
        yield from ((None, parameter) for group in optimizer.param_groups for parameter in group["params"])


def masters_of(optimizer: Any) -> Iterator[Tensor]:
    """Yield what the update is made on: the flat masters of ZeRO's groups, else the parameters themselves."""
    return (master for _, master in _groups(optimizer))


def moments_of(optimizer: Any) -> Iterator[Tensor]:
    """Yield all that the optimizer keeps of its parameters."""
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        yield from (kept for kept in state.values() if isinstance(kept, Tensor))


def _state(optimizer: Any, master: Tensor) -> dict[str, Any]:
    """Return the optimizer's own state of a group: DeepSpeed's optimizers wrap torch's."""
    return dict(getattr(optimizer, "optimizer", optimizer).state.get(master, {}))


def shard_of(parameter: nn.Parameter) -> Tensor:
    """Return what this rank stores of a parameter."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def described(engine: Any, piece: Piece) -> str:
    """Return where a piece lies in words: its buffer and, under ZeRO-3, the parameters that lie there."""
    kind, _, group = piece.name.partition(" of group ")
    shards = getattr(engine.optimizer, "fp16_partitioned_groups", None)
    if not group or shards is None:
        return piece.name
    names = {parameter.ds_id: name for name, parameter in bare(engine).named_parameters()}
    size = next(held.tensor for name, held in holdings(engine).items() if name == piece.name).element_size()
    here, offset = [], 0
    for parameter, shard in zip(engine.optimizer.fp16_groups[int(group)], shards[int(group)], strict=True):
        first, offset = offset, offset + shard.ds_numel
        if first * size < piece.stop and offset * size > piece.start:
            here.append(names[parameter.ds_id])
    more = f" and {len(here) - SHOWN} more" if len(here) > SHOWN else ""
    return f"the {kind} of {', '.join(here[:SHOWN])}{more}"


def first_not_finite(engine: Any) -> str | None:
    """Return the first trained weight of which this rank holds a value that is not finite, with how many."""
    for name, parameter in bare(engine).named_parameters():
        shard = shard_of(parameter)
        if parameter.requires_grad and not (finite := torch.isfinite(shard)).all():
            return f"{name} ({int((~finite).sum()):,} of {shard.numel():,} elements)"
    return None

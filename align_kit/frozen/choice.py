"""Where a frozen model lives and why: what was asked for where it can hold the model, else what memory says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align_kit.errors import UserError
from align_kit.models import source

if TYPE_CHECKING:
    import torch
    from torch import nn

STATE_BYTES = 16  # a trained parameter's fp32 master, two moments and gradient, which the optimizer adds to its weight


@dataclass(frozen=True)
class Room:
    """What `auto` compares, in bytes on each rank.

    `free` is what the fullest rank's device has left, `None` where weights lie in the host's memory anyway (a CPU, or
    a policy that is offloaded); `claimed` is what training will still take of it before activations;
    `element_bytes` and `world_size` say what a copy of a model costs; `policy_elements` is the size of the policy,
    for one that has no files.
    """

    free: int | None
    claimed: int
    element_bytes: int
    world_size: int
    policy_elements: int = 0

    def copy(self, start: source.Source) -> int:
        """Return the bytes on each rank of a sharded copy of `start`."""
        elements = self.policy_elements if start.weights.random else _stored_elements(start)
        return elements * self.element_bytes // self.world_size


def measure(policy: nn.Module, engine: Mapping[str, Any], dtype: torch.dtype) -> Room:
    """Return the room beside a `policy` that is loaded and not yet trained; all ranks call it."""
    import torch
    import torch.distributed as dist

    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in policy.parameters()]
    world = dist.get_world_size() if dist.is_initialized() else 1
    zero = engine.get("zero_optimization", {})
    free = None
    if torch.cuda.is_available() and not _moved_out(zero, "offload_param"):
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        fullest = torch.tensor(torch.cuda.mem_get_info()[0] + unused, device="cuda")
        if world > 1:
            dist.all_reduce(fullest, dist.ReduceOp.MIN)
        free = int(fullest)
    trained = 0 if _moved_out(zero, "offload_optimizer") else sum(size for size, trains in sizes if trains)
    return Room(free, trained * STATE_BYTES // world, dtype.itemsize, world, sum(size for size, _ in sizes))


def _moved_out(zero: Mapping[str, Any], part: str) -> bool:
    return (zero.get(part) or {}).get("device", "none") != "none"


def place_reference(
    placement: str,
    start: source.Source,
    *,
    use_peft: bool,
    separate: bool,
    whole_modules: bool,
    stage: int,
    moves: bool,
    room: Room | None,
) -> tuple[str, str]:
    """Return where the reference lives and why; raise `UserError` where it cannot live where it was put.

    `separate`: it is another model than the policy's start; `whole_modules`: the policy trains modules of the base
    itself, so that the base is not the reference any more.
    """
    held = use_peft and not separate and not whole_modules
    if moves:
        return _moving(placement, use_peft, stage)
    if placement == "auto" and held:
        return "adapter", "the policy's base already holds it"
    if placement == "adapter" and not held:
        if whole_modules:
            raise UserError("reference_placement adapter cannot hold modules that lora_modules_to_save trains whole")
        raise UserError(
            "reference_placement adapter needs use_peft and the policy's own start as reference; use sharded"
        )
    if placement in ("adapter", "cached"):
        return placement, "as configured"
    why = "lora_modules_to_save changes the base itself" if use_peft and whole_modules else ""
    why = why or "the policy's weights change, so it needs its own"
    return place_apart(placement, start, option="reference_placement", stage=stage, room=room, why=why)


def _moving(placement: str, use_peft: bool, stage: int) -> tuple[str, str]:
    if placement not in ("auto", "sharded"):
        raise UserError(f"sync_ref_model needs reference_placement sharded, not {placement}: the reference moves")
    if use_peft:
        raise UserError("sync_ref_model moves whole weights, and use_peft trains an adapter; drop one")
    return "sharded", "sync_ref_model moves it with the policy's shards" + _whole(stage)


def place_apart(
    placement: str, start: source.Source, *, option: str, stage: int, room: Room | None, why: str = ""
) -> tuple[str, str]:
    """Return where a model of its own lives and why: `sharded`, `offloaded` or `quantised`; `auto` by memory."""
    if placement == "offloaded" and stage != 3:
        raise UserError(f"{option} offloaded needs ZeRO-3, this run is ZeRO-{stage}; use --deepspeed zero3")
    if placement != "auto":
        return placement, "as configured" + (_whole(stage) if placement == "sharded" else "")
    chosen, reason = "sharded", ""
    if stage == 3 and room is not None and room.free is not None:
        copy, left = room.copy(start), room.free - room.claimed
        chosen = "sharded" if copy <= left else "offloaded"
        fits = "fits" if chosen == "sharded" else "does not fit"
        reason = (
            f"a copy of {_size(copy)} on each rank {fits} in {_size(room.free)} free, of which training will take "
            f"{_size(room.claimed)} and its activations"
        )
    return chosen, "; ".join(filter(None, [why or "a model of its own", reason])) + _whole(stage)


def _whole(stage: int) -> str:
    return "" if stage == 3 else f" (whole on each rank: ZeRO-{stage} shards no weights)"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _stored_elements(start: source.Source) -> int:
    """Return the number of elements in the files of `start`, of its base where it is an adapter."""
    from safetensors import safe_open

    total = 0
    for file in start.weights.folder.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as handle:
            shapes = [handle.get_slice(name).get_shape() for name in handle.keys()]  # noqa: SIM118
        total += sum(math.prod(shape) for shape in shapes)
    return total

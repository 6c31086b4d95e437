"""Whole weights from ZeRO-3 shards without holding the training: each rank writes its shards, rank 0 joins them later.

A gather would hold all ranks for as long as the whole model takes to travel; a copy of the own shards is all that this
asks of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align_kit.checkpoint import commit
from align_kit.checkpoint.snapshot import HandOver, HostCopies


class Shards:
    """What the ranks hold of the parameters `named`, at the moment of a save."""

    def __init__(self, named: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor]) -> None:
        self.named: dict[str, Any] = dict(named)
        self.buffers = {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
        self.whole: dict[str, Tensor] = {}
        self._filled = False

    def hand_over(self, folder: Path, rank: int, later: HandOver, copies: HostCopies) -> None:
        """Copy this rank's shards and have them written beside the checkpoint in the making."""
        from safetensors.torch import save_file

        copied = {name: copies.copy(p.ds_tensor.data, "weights", name) for name, p in self._own().items()}
        later(_file(folder, rank), lambda place: save_file(copied, str(place)))

    def _own(self) -> dict[str, Any]:
        """Return the parameters by one of their names each: tied ones are stored once."""
        return {name: p for name, p in self.named.items() if name == self._first_name()[id(p)]}

    def _first_name(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for name, parameter in self.named.items():
            names.setdefault(id(parameter), name)
        return names

    def hollow(self) -> dict[str, Tensor]:
        """Return the whole tensors by name, of the right shapes and still without values; tied ones are one tensor."""
        first = self._first_name()
        own = {name: torch.empty(tuple(p.ds_shape), dtype=p.ds_tensor.dtype) for name, p in self._own().items()}
        self.whole = {name: own[first[id(p)]] for name, p in self.named.items()}
        return {**self.whole, **self.buffers}

    def fill(self, folder: Path, world_size: int) -> None:
        """Give the tensors of `hollow` their values, once every rank has written its shards."""
        from safetensors import safe_open

        if self._filled:
            return
        for rank in range(world_size):
            with safe_open(str(_file(folder, rank)), framework="pt") as shards:
                for name in shards.keys():  # noqa: SIM118
                    _lay(shards.get_tensor(name), self.whole[name].view(-1), rank)
        self._filled = True


def _lay(shard: Tensor, whole_N: Tensor, rank: int) -> None:
    """Put one rank's shard in its place; the last ones may be longer than what is left, by padding."""
    start = rank * shard.numel()
    count = max(0, min(shard.numel(), whole_N.numel() - start))
    whole_N[start : start + count] = shard[:count]


def _file(folder: Path, rank: int) -> Path:
    return folder / commit.HANDED / f"weights.{rank}"


def can_assemble(model: Any, engine: Any) -> bool:
    """Tell whether the parameters of a ZeRO-3 engine are cut as `Shards` joins them, and stored as they are.

    Not where shards lie on NVMe or are cut a second time for tensor parallelism, and not where transformers stores
    other tensors than the model has (the experts of a mixture one by one).
    """
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus
    from transformers.core_model_loading import revert_weight_conversion

    parameters: list[Any] = list(model.parameters())
    here = all(p.ds_tensor.status == PartitionedParamStatus.AVAILABLE for p in parameters)
    if not here or engine.autotp_size() > 1:
        return False
    probe = {name: torch.empty(tuple(p.ds_shape), device="meta") for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    stored = revert_weight_conversion(model, dict(probe))
    return sorted(map(id, stored.values())) == sorted(map(id, probe.values()))

"""What a checkpoint is made of, copied to host memory, so that training goes on while it is written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from align_kit.checkpoint import trusted
from align_kit.scrub import scrubbed

# `hand_over(path, write)`: the file `path` is to be written, later, by `write(path)`.
HandOver = Callable[[Path, Callable[[Path], None]], None]


class HostCopies:
    """Host memory for one snapshot, used again by the next: a fresh page costs more than the copy into it.

    The next snapshot may be taken only when the last one has been written.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, value: Any, *place: Any) -> Any:
        """Return `value` with each tensor in it copied; `place` tells its tensors from other values'.

        What has a state of its own and is no tensor (a loss scaler) is copied as well: training goes on to change it.
        """
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if isinstance(value, Mapping):
            copies = {key: self.copy(item, *place, key) for key, item in value.items()}
            return copies if type(value) is dict else _like(value, copies)
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(self.copy(item, *place, index) for index, item in enumerate(value))
        return copy.copy(value)

    def _tensor(self, tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        kept = self._kept.get(place)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._kept[place] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return kept.copy_(tensor.detach())


def _like(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Return `items` in a mapping of the same type where it can be made so (an `OrderedDict`)."""
    try:
        return type(mapping)(items)  # type: ignore[call-arg]
    except TypeError:
        return items


class SnapshotEngine(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's checkpoint engine, with writing left to `hand_over` and loading limited to what is no program.

    DeepSpeed's own decoupled engine queues the live tensors; this one copies them first.
    """

    def __init__(self, hand_over: HandOver, *, trust: bool = False) -> None:
        super().__init__()
        self.hand_over = hand_over
        self.trust = trust
        self.copies = HostCopies()

    def save(self, state_dict: Any, path: str) -> None:
        """Copy the state and have it written to `path` later; the engine's configuration goes without secrets."""
        if "ds_config" in state_dict:
            state_dict = {**state_dict, "ds_config": scrubbed(state_dict["ds_config"])}
        copied = self.copies.copy(state_dict, Path(path).name)
        self.hand_over(Path(path), lambda place: _save(copied, place))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return the state in `path`; raise `UserError` where it holds anything else than data."""
        return trusted.load(Path(path), map_location=map_location, trust=self.trust)

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin a checkpoint; nothing to do, and nothing to say about it."""


def _save(state: Any, place: Path) -> None:
    """Write a state through a file of our own: by its own, torch says of a full disk that a position is unexpected."""
    with place.open("wb") as stream:
        torch.save(state, stream)


@contextmanager
def safetensors_handed_over(hand_over: HandOver) -> Iterator[None]:
    """Have the safetensors that `save_pretrained` writes meanwhile written later; all else of it is done at once.

    What is handed in must be a copy that nobody changes.
    """
    import peft.peft_model
    import transformers.modeling_utils

    def later(tensors: dict[str, Tensor], filename: Any, metadata: dict[str, str] | None = None) -> None:
        from safetensors.torch import save_file

        held = dict(tensors)  # the caller empties its own
        hand_over(Path(filename), lambda place: save_file(held, str(place), metadata=metadata))

    rooms: list[Any] = [transformers.modeling_utils, peft.peft_model]
    before = [room.safe_save_file for room in rooms]
    for room in rooms:
        room.safe_save_file = later
    try:
        yield
    finally:
        for room, theirs in zip(rooms, before, strict=True):
            room.safe_save_file = theirs

"""A reference that follows the policy: alpha * policy + (1 - alpha) * reference, every so many steps.

Gorbatovski et al. 2024 ("Learn Your Reference Model for Real Good Alignment", section 3), with TRL's names
(`sync_ref_model`). Both models are cut alike by ZeRO-3, so each rank mixes its own shards and nothing is gathered.
What has moved is in no source any more: every checkpoint holds each rank's shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from align_kit.errors import UserError, first_line
from align_kit.frozen.hold import Frozen, bare, is_resident
from align_kit.frozen.identity import Identity

if TYPE_CHECKING:
    from torch import Tensor, nn

FOLDER = "moving_reference"


class MovingReference(Frozen):
    """A sharded reference that moves by `alpha` towards the policy after every `every` optimizer steps."""

    def __init__(self, identity: Identity, model: nn.Module, *, alpha: float, every: int) -> None:
        words = f"every {every} steps {alpha:g} of the policy and {1 - alpha:g} of itself"
        super().__init__(identity.found(words), model)
        self.alpha = alpha
        self.every = every

    def after_step(self, policy: nn.Module, step: int) -> None:
        """Move where `step` is a multiple of `every`; what would be moved is checked first, and watched anew after."""
        import torch

        if step % self.every:
            return
        self.check(policy, f"before it moves at step {step}")
        with torch.no_grad():
            for mine, theirs in self._pairs(policy):
                mine.mul_(1.0 - self.alpha).add_(theirs, alpha=self.alpha)
        self.watch(policy)

    def _pairs(self, policy: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each stored tensor of the reference beside the policy's: shard and shard, whole and whole."""
        ours = dict(bare(self.model).named_parameters())  # type: ignore[arg-type]
        theirs = dict(bare(policy).named_parameters())
        assert ours.keys() == theirs.keys(), "policy and reference are not one architecture"
        for name, parameter in ours.items():
            other = theirs[name]
            if not hasattr(parameter, "ds_tensor"):
                yield parameter.data, other.data
                continue
            assert parameter.ds_tensor.shape == other.ds_tensor.shape, f"{name} is cut in two ways"
            yield parameter.ds_tensor.data, other.ds_tensor.data  # type: ignore[attr-defined]
            if is_resident(parameter):  # this copy computes, until the process ends
                assert is_resident(other), f"{name} is gathered in the reference only"
                yield parameter.data, other.data

    # --- checkpoints ---

    def save(self, checkpoint: Path) -> None:
        """Store this rank's shards in `checkpoint`, whole or not at all, with their 64-bit sum."""
        from safetensors.torch import save_file

        place = _file(checkpoint)
        place.parent.mkdir(parents=True, exist_ok=True)
        shards = {name: tensor.detach().cpu().contiguous() for name, tensor in self._stored().items()}
        draft = place.with_suffix(".draft")
        save_file(shards, draft, metadata={"sum": str(self.fingerprint(self.model))})  # type: ignore[arg-type]
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(draft, place)

    def restore(self, checkpoint: Path) -> None:
        """Take this rank's shards from `checkpoint`; raise `UserError` where it does not hold them as they were.

        Shards that were cut for another number of ranks are cut anew; the checkpoint's manifest vouches for those.
        """
        from safetensors import SafetensorError

        place = _file(checkpoint)
        others = _of_other_ranks(checkpoint)
        total = None
        try:
            if others:
                self._take_anew(others)
            else:
                total = self._take(place)
            self._let_go_of_copies()
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint {checkpoint} does not hold the reference as it had moved ({first_line(error)}); go "
                "on from an older one with --resume <checkpoint>"
            ) from None
        if total is not None and str(self.fingerprint(self.model)) != total:  # type: ignore[arg-type]
            raise UserError(
                f"{place} is not what was stored (its sum differs); go on from an older one with --resume <checkpoint>"
            )

    def _take(self, place: Path) -> str:
        """Copy this rank's shards from a file of its own; return the sum that was stored with them."""
        import torch
        from safetensors import safe_open

        with safe_open(str(place), framework="pt") as handle, torch.no_grad():
            for name, tensor in self._stored().items():
                tensor.copy_(handle.get_tensor(name))
            return str(handle.metadata()["sum"])

    def _take_anew(self, places: Sequence[Path]) -> None:
        """Copy this rank's shards out of those of other ranks, one file each, in their order."""
        import torch
        from safetensors import safe_open

        whole = dict(bare(self.model).named_parameters())  # type: ignore[arg-type]
        rank = int(os.environ["RANK"])
        with ExitStack() as opened, torch.no_grad():
            handles = [opened.enter_context(safe_open(str(place), framework="pt")) for place in places]
            for name, tensor in self._stored().items():
                if not hasattr(whole[name], "ds_tensor"):
                    tensor.copy_(handles[0].get_tensor(name))
                    continue
                start = min(rank * tensor.numel(), whole[name].ds_numel)
                piece = _piece(handles, name, start, min(start + tensor.numel(), whole[name].ds_numel))
                tensor.view(-1)[: piece.numel()] = piece  # what is left is padding

    def _let_go_of_copies(self) -> None:
        """Free what a forward before this has left gathered: it is of the shards that were replaced."""
        for parameter in bare(self.model).parameters():  # type: ignore[arg-type]
            if is_resident(parameter):
                parameter.partition()

    def _stored(self) -> dict[str, Tensor]:
        """Return this rank's shards by name; of tied parameters one name."""
        return self._shards(self.model)  # type: ignore[arg-type]


def _file(checkpoint: Path) -> Path:
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    return checkpoint / FOLDER / f"rank_{rank}_of_{world}.safetensors"


def _of_other_ranks(checkpoint: Path) -> list[Path]:
    """Return the files of all ranks, in their order, where others than there are now wrote `checkpoint`."""
    found = list((checkpoint / FOLDER).glob("rank_0_of_*.safetensors"))
    if len(found) != 1 or (ranks := int(found[0].stem.rpartition("_")[2])) == int(os.environ["WORLD_SIZE"]):
        return []
    return [found[0].with_name(f"rank_{rank}_of_{ranks}.safetensors") for rank in range(ranks)]


def _piece(handles: Sequence[Any], name: str, start: int, stop: int) -> Tensor:
    """Return the elements from `start` to `stop` of a tensor that lies in `handles` in flat shards of one length."""
    import torch

    length = handles[0].get_slice(name).get_shape()[0]
    parts = [
        handles[place].get_slice(name)[max(0, start - place * length) : min(length, stop - place * length)]
        for place in range(start // length, -(-stop // length))
    ]
    return torch.cat(parts) if parts else torch.empty(0)


class Following(TrainerCallback):
    """Tell the run's frozen models that an optimizer step is done: `follow` is the trainer's `move_frozen`."""

    def __init__(self, follow: Any) -> None:
        self.follow = follow

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.follow(state.global_step)

"""A checkpoint cut for one number of ranks, taken up by another: through DeepSpeed's universal format.

DeepSpeed's converter puts the shards of all ranks together, a folder a parameter, and its engine cuts them again as
it loads. Around that stands what it leaves to others: what the shards cannot be converted from is said before, the
files are data and no programs, what the engine gets wrong as it loads is mended, and the moments are counted. The
checkpoint itself is only read.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_kit import log
from align_kit.checkpoint import trusted
from align_kit.errors import Fault, UserError
from align_kit.failures import is_of_memory

FOLDER = ".universal-checkpoint"  # in the run's folder, with the step behind it, until it is loaded
TAG = "global_step"
STATES = ("exp_avg", "exp_avg_sq")  # what the format knows of an optimizer, beside the weights and the step
SHARDS = "*_optim_states.pt"
MOMENTS = "moments.json"  # in the folder that is made: what the moments add up to in the checkpoint
OPTIMIZER = Path("zero") / "optimizer_state.pt"
OF_THE_RANKS = ("rng_state*", "manifest.json")  # in a checkpoint, for the ranks that wrote it
OF_THE_ENGINE = (TAG + "*", "latest*")
LONG = 2_000_000_000  # bytes of shards from which the conversion says that it has begun
AGREE = 1e-9  # relative; the same numbers in fp64, added up in another order


def ranks_of(checkpoint: Path) -> int | None:
    """Return the number of ranks that `checkpoint` is cut for; None where its optimizer is not cut (ZeRO stage 0)."""
    return len(list(_tag(checkpoint).glob(SHARDS))) or None


def prepare(checkpoint: Path, into: Path, *, trust: bool = False) -> None:
    """Make the folder `into` that a run on any number of ranks goes on from.

    What does not depend on the ranks is linked, the engine's state is converted. Raises `UserError` where it cannot
    be, and where the disk has no room for it.
    """
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    _refuse_elsewhere(_tag(checkpoint))
    is_cut = ranks_of(checkpoint) is not None
    left_out = OF_THE_RANKS + (OF_THE_ENGINE if is_cut else ())
    for entry in checkpoint.iterdir():
        if not any(entry.match(pattern) for pattern in left_out):
            (into / entry.name).symlink_to(entry.resolve())
    if is_cut:
        _convert(checkpoint, into, trust=trust)


def _convert(checkpoint: Path, into: Path, *, trust: bool = False) -> None:
    """Write the engine's state of a verified checkpoint in the universal format, as the newest in the folder `into`."""
    source = _tag(checkpoint)
    shards = sorted(source.glob(SHARDS))
    size = sum(path.stat().st_size for path in source.iterdir())
    _check_room(into, 2 * size)  # fragments, then what they become
    trusted.vet(source, trust=trust)  # DeepSpeed loads them as programs
    if size > LONG:
        log.say(f"  note       putting {size / 1e9:.1f} GB of shards together for another number of ranks")
    moments = [_moments(_states(trusted.load(shard, map_location="cpu", trust=trust))) for shard in shards]
    (into / MOMENTS).write_text(json.dumps(torch.stack(moments).sum(0).tolist()))
    _run_converter(source, into / source.name)
    _slim(into / source.name / OPTIMIZER)


def _refuse_elsewhere(source: Path) -> None:
    if (source / "offloaded_tensors").exists():
        raise UserError(
            "another world size needs the optimizer's state in the checkpoint, and this one has it in files of its "
            "NVMe offload; go on with the world size the checkpoint was cut for"
        )


def _tag(checkpoint: Path) -> Path:
    """Return the folder of the engine's state in a checkpoint: there is one."""
    return max(checkpoint.glob(TAG + "*"), default=checkpoint / TAG)


def _check_room(into: Path, need: int) -> None:
    free = shutil.disk_usage(into).free
    if free < need:
        raise UserError(
            f"to go on with another world size {need / 1e9:.1f} GB of disk are needed for a while in {into.parent}, "
            f"{free / 1e9:.1f} GB are free; make room, or go on with the world size the checkpoint was cut for"
        )


def _states(shard: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the optimizer's states in a shard; refuse an optimizer that the format has no words for."""
    of_zero = shard["optimizer_state_dict"]
    states = (of_zero.get("base_optimizer_state") or of_zero["optimizer_state_dict"])["state"]
    found = list(states.values() if isinstance(states, Mapping) else states)
    kept = {name for state in found for name, value in state.items() if isinstance(value, Tensor) and value.dim()}
    if kept != set(STATES):
        raise UserError(
            f"another world size needs an optimizer with Adam's two moments, and this one keeps "
            f"{', '.join(sorted(kept)) or 'none'}; go on with the world size the checkpoint was cut for"
        )
    return found


def _moments(states: Iterable[Mapping[str, Any]]) -> Tensor:
    """Return the sums over both moments, of their absolute values: the same however they are cut, padding is 0."""
    rows = [torch.stack([state[name].abs().sum(dtype=torch.float64) for name in STATES]) for state in states]
    return torch.stack(rows).sum(0).cpu()


def _run_converter(source: Path, target: Path) -> None:
    """Run DeepSpeed's converter in this process, without the lines and bars it prints.

    What it does not convert (experts or tensors that are cut in parallel, in some layouts) it says in many ways.
    """
    from deepspeed.checkpoint import ds_to_universal

    asked = Namespace(
        input_folder=str(source), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    target.mkdir()
    nowhere = io.StringIO()
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            ds_to_universal.main(asked)
    except (AssertionError, LookupError, RuntimeError, ValueError) as error:
        if is_of_memory(error):
            raise
        raise UserError(
            f"DeepSpeed cannot put the shards in {source} together for another world size ({str(error)[:200]}); go on "
            "with the world size the checkpoint was cut for"
        ) from error


def clear(run: Path) -> None:
    """Remove what was made in a run's folder to go on from."""
    for left in run.glob(f"{FOLDER}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _slim(place: Path) -> None:
    """Leave out of the file that every rank reads whole what it has no use for: the first rank's own shard."""
    shard = torch.load(place, map_location="cpu", weights_only=False)  # written a moment ago, of vetted files
    shard.pop("fp32_flat_groups", None)
    if "optimizer_state_dict" in shard:
        states = shard["optimizer_state_dict"]["state"]
        shard["optimizer_state_dict"]["state"] = {
            piece: {name: value for name, value in state.items() if name not in STATES}
            for piece, state in states.items()
        }
    torch.save(shard, place)


# --- in the run that goes on ------------------------------------------------------------------------------------------


def ask_for(engine_config: MutableMapping[str, Any]) -> None:
    """Have the engine that is made from `engine_config` load the universal format."""
    engine_config["checkpoint"] = {**engine_config.get("checkpoint", {}), "load_universal": True}


def mend(engine: Any, prepared: Path) -> None:
    """Put right what the engine of ZeRO-3 gets wrong as it loads; from now on it loads checkpoints of its own again.

    It gives every parameter group the settings of the first (weight decay, learning rate), and all pieces of the
    weights one tensor that counts the steps, which then counts each step once for every piece.
    """
    inner = engine.optimizer.optimizer
    saved = torch.load(_tag(prepared) / OPTIMIZER, map_location="cpu", weights_only=False)["param_groups"]
    for group, was in zip(inner.param_groups, saved, strict=True):
        group.update({name: value for name, value in was.items() if name != "params"})
    for state in inner.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    engine._config.load_universal_checkpoint = False


def check_moments(engine: Any, prepared: Path, add_up: Callable[[Tensor], Tensor]) -> None:
    """Compare what the optimizer's moments add up to, over all ranks, with the checkpoint; all ranks call it.

    `add_up` sums a tensor over the ranks. Raises `Fault` where some did not arrive, or twice.
    """
    recorded = json.loads((prepared / MOMENTS).read_text())
    found = add_up(_moments(engine.optimizer.optimizer.state.values()).to(engine.device)).tolist()
    for name, was, now in zip(STATES, recorded, found, strict=True):
        if not abs(now - was) <= AGREE * was:
            raise Fault(
                f"after the change of world size the optimizer's {name} adds up to {now:.9g}, and to {was:.9g} in the "
                "checkpoint: it did not arrive whole; nothing was trained: start again, or go on with the world size "
                "the checkpoint was cut for"
            )

"""Open pickled files of a checkpoint without running what they hold: tensors, plain values and a short list of classes.

A manifest proves that a file is what was written, not who wrote it, and a pickle can call any function. torch's
restricted unpickler calls only what is on its list; DeepSpeed's own loading, and its conversion to another world size,
use the unrestricted one.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from align_kit.errors import UserError
from align_kit.failures import is_of_memory

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
ZIP = b"PK\x03\x04"  # how torch tells its zip format from the older one
_WANTED = re.compile(r"GLOBAL (\S+)")


def load(path: str | Path, *, map_location: Any = None, trust: bool = False) -> Any:
    """Return what `torch.load` reads from `path`, restricted to tensors, plain values and DeepSpeed's own few classes.

    `trust` lifts the restriction. Raises `UserError` for a file that holds anything else or cannot be read, and lets
    errors of the disk and of memory through.
    """
    import torch

    if trust:
        return torch.load(path, map_location=map_location, weights_only=False)
    return _restricted(Path(path), map_location=map_location)


def vet(folder: Path, *, trust: bool = False) -> None:
    """Raise `UserError` where a pickled file below `folder` holds what `load` would refuse; nothing in it is run.

    For code that will load the files by itself, without restriction. Tensors are mapped, not read.
    """
    for path in sorted(folder.rglob("*")):
        if not trust and path.suffix in PICKLES and path.is_file():
            _restricted(path, map_location="cpu", mmap=_is_zip(path))


def _restricted(path: Path, **options: Any) -> Any:
    import torch

    try:
        with torch.serialization.safe_globals(_allowed()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's words on a pickle it does not know are in the refusal
            return torch.load(path, weights_only=True, **options)
    except OSError:
        raise
    except Exception as error:  # a file that was made to do harm can fail in any way
        if is_of_memory(error):
            raise
        raise _refusal(path, error) from None


def _allowed() -> list[Any]:
    """Return what checkpoints of all phases, precisions and ZeRO stages hold beside what torch allows by itself."""
    import numpy as np
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from numpy._core.multiarray import _reconstruct

    states_of_numpy = [_reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address, *states_of_numpy]


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(ZIP)) == ZIP


def _refusal(path: Path, error: Exception) -> UserError:
    said = str(error)
    if wanted := _WANTED.search(said):
        what = f"asks for {wanted[1]}"
    elif "weights_only" in said or "WeightsUnpickler" in said:
        what = "is no file of tensors and plain values"
    else:
        return UserError(f"{path} cannot be read ({said.split('. ')[0][:160] or type(error).__name__}); copy it again")
    return UserError(
        f"{path} {what}, and loading that could run code; go on from another checkpoint, or give --trust_checkpoint "
        "where you know who wrote this one"
    )

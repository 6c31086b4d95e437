"""Whether the way a model is walked gives what the plain way gives: both are tried on a few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from align_kit.failures import is_of_memory
from align_kit.forward.attention import CannotWalk
from align_kit.forward.choose import PLAIN
from align_kit.forward.door import door_of, plainly

# What rounding may make of a difference: an absolute part and a share of the value (nats, or units of a score).
AGREEMENT = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (0.25, 3e-2), torch.float16: (0.05, 5e-3)}


def settle(model: Any, answer: Callable[[Mapping[str, Tensor]], Tensor], batch: Mapping[str, Tensor]) -> str | None:
    """Compute the `answer` to `batch` (B, ...) both ways; where they differ, walk `model` plain from now on.

    Returns why, or None where they differ by no more than rounding. Plain goes a sequence at a time, so that it takes
    no more memory than a step. All ranks call it, with as many rows, and decide the same.
    """
    door = door_of(model)
    if door.mode == PLAIN:
        return None
    asked = door.mode
    try:
        with torch.no_grad():
            ours = answer(batch)
            with plainly(model):
                theirs = torch.cat([answer(one) for one in _rows(batch)])
        gap, excess = _differ(ours, theirs, next(model.parameters()).dtype)
        why = None if excess <= 1 else f"{asked} differs from plain by up to {gap:.3g} on the first rows"
    except CannotWalk as reason:
        why = str(reason)
    except Exception as error:  # whatever a model makes of arguments it does not expect
        if is_of_memory(error):
            raise
        why = f"{asked} fails ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
    door.begin_anew(asked if why is None else PLAIN)  # the trial does not count
    return why


def _rows(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for row in range(len(batch["input_ids"])):
        yield {name: values[row : row + 1] for name, values in batch.items()}


def with_relatives(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows of a batch, and each once more with its second half turned round.

    A check on rows that have nothing in common would not see what sharing does.
    """
    turned_BT = batch["input_ids"].clone()
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        turned_BT[row, length // 2 : length] = turned_BT[row, length // 2 : length].flip(0)
    names = [name for name in ("attention_mask", "loss_mask") if name in batch]
    twice = {name: torch.cat([batch[name], batch[name]]) for name in names}
    return {"input_ids": torch.cat([batch["input_ids"], turned_BT]), **twice}


def _differ(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest difference over all ranks, and the same in units of what rounding allows in `dtype`."""
    absolute, share = AGREEMENT.get(dtype, AGREEMENT[torch.float32])
    gaps = (ours.float() - theirs.float()).abs().flatten()
    excess = gaps / (absolute + share * theirs.float().abs().flatten())
    worst = torch.stack([torch.cat([values, values.new_zeros(1)]).max() for values in (gaps, excess)])
    worst = worst.nan_to_num(nan=float("inf"))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
    gap, most = worst.tolist()
    return gap, most

"""The loss of one training row, by the engine and by the model stored beside its shards: are they the same weights?

A checkpoint holds the weights twice: in the engine's shards, and whole, in Hugging Face form. The second copy is not
touched where the first is cut anew, so that it tells what the loss was, and a save need not wait for a forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align_kit.data.balance import row_tokens
from align_kit.errors import Fault
from align_kit.models.load import evaluating
from align_kit.trainers.save import live_logits, reopen

if TYPE_CHECKING:
    from align_kit.trainers.base import PhaseTrainer

LOOKED_AT = 64  # of so many first rows the shortest is taken
# Relative; the weights are the same bits, and what is left is the order of sums and the hardware's kernels.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
LEAST = 0.1  # what a smaller loss is measured by


@dataclass(frozen=True)
class Agreement:
    """The loss of a row by the engine and by the stored model, and how far apart they may be; `what` it is in words."""

    what: str
    loss: float
    stored: float
    allowed: float


def check_loss(trainer: PhaseTrainer, checkpoint: Path) -> Agreement:
    """Compare both losses; all ranks call it. Raises `Fault` where the engine's is not what the stored model gives."""
    batch = trainer.data_collator([_row(trainer)])
    dtype = next(trainer.model.parameters()).dtype
    with evaluating(trainer.model_wrapped):
        logits = live_logits(trainer, batch)
    live, what = row_loss(logits, batch), "loss" if logits.dim() == 3 else "score"
    stored = row_loss(_stored_logits(trainer, checkpoint, dtype, batch), batch) if trainer.args.should_save else 0.0
    pairs = torch.tensor([[live, stored]], dtype=torch.float64, device=trainer.args.device)
    rows = trainer.accelerator.gather(pairs).tolist()
    stored = rows[0][1]
    loss = max((one[0] for one in rows), key=lambda found: _distance(found, stored))
    allowed = TOLERANCE[dtype] * max(LEAST, abs(stored))
    if not _distance(loss, stored) <= allowed:
        raise Fault(
            f"after the change of world size the {what} of a training row is {loss:.6g}, and {stored:.6g} by the model "
            f"stored in {checkpoint} (allowed: {allowed:.2g} apart): the weights are not those that were saved; "
            "nothing was trained: go on with the world size the checkpoint was cut for, or from an older checkpoint"
        )
    return Agreement(what, loss, stored, allowed)


def row_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> float:
    """Return nats for each token of the rows (logits B, T, V), or the mean size of their scores (B, 1)."""
    if logits.dim() < 3:
        return float(logits.double().abs().mean())
    logps_BTV = logits[:, :-1].double().log_softmax(-1)
    logps_BT = logps_BTV.gather(-1, batch["input_ids"][:, 1:, None].cpu()).squeeze(-1)
    return float(-logps_BT[batch["attention_mask"][:, 1:].bool().cpu()].mean())


def _row(trainer: PhaseTrainer) -> Any:
    """Return the shortest of the first training rows: the same whatever the number of ranks."""
    rows = trainer.train_dataset.select(range(min(LOOKED_AT, len(trainer.train_dataset))))
    return rows[int(row_tokens(rows).argmin())]


def _stored_logits(trainer: PhaseTrainer, checkpoint: Path, dtype: torch.dtype, batch: Mapping[str, Tensor]) -> Tensor:
    trusted = getattr(trainer.args, "trust_remote_code", False)
    model = reopen(checkpoint, dtype, trust_remote_code=trusted)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.float()  # type: ignore[no-any-return]


def _distance(found: float, stored: float) -> float:
    gap = abs(found - stored)
    return gap if gap == gap else float("inf")  # NaN is as far off as can be

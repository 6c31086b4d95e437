"""What ranks do in tests of a change of world size: write down which rows a step trains on, spoil what is cut anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def keep_rows(trainer: Any) -> None:
    """Write the rows that count of each step of this rank, by their tokens: a file a rank."""
    steps: dict[int, list[list[int]]] = {}
    get = trainer.get_batch_samples

    def watched(*args: Any) -> Any:
        batches, counts = get(*args)
        rows = [row for batch in batches for row in _rows(batch)]
        steps[trainer.state.global_step + 1] = rows
        Path(f"{trainer.args.output_dir}.{trainer.args.process_index}.json").write_text(json.dumps(steps))
        return batches, counts

    trainer.get_batch_samples = watched


def _rows(batch: Any) -> list[list[int]]:
    ids, lengths = batch["input_ids"][: batch["keep"]], batch["attention_mask"].sum(1)
    return [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=False)]


def spoil_weights(trainer: Any) -> None:
    """Turn the largest weight back to front between the conversion and the load."""
    import torch

    if trainer.args.process_index == 0:
        place = max(_converted(trainer, "fp32"), key=lambda path: path.stat().st_size)
        torch.save(torch.load(place).flip(0).clone(), place)


def lose_moments(trainer: Any) -> None:
    """Set one parameter's first moment to zero, as a shard that was forgotten leaves it."""
    import torch

    if trainer.args.process_index == 0:
        place = min(_converted(trainer, "exp_avg"), key=lambda path: path.stat().st_size)
        torch.save(torch.zeros_like(torch.load(place)), place)


def _converted(trainer: Any, state: str) -> list[Path]:
    return list(Path(trainer.args.output_dir).glob(f".universal-checkpoint-*/global_step*/zero/*/{state}.pt"))

"""What ranks and killed processes do in the tests of the store of log-probabilities."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from align_kit.errors import EXIT_CODE, UserError
from align_kit.frozen.store import Filled, ReferenceStore, Row, StoreKey, World

if TYPE_CHECKING:
    from align_kit.frozen.chunks import Logps

KEY = StoreKey(weights="w", tokenizer="t", precision="fp32", forward={"attn_implementation": "sdpa"})


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Return `count` distinct rows of different lengths."""
    draw = Random(f"rows {seed}")

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(4, 300) for _ in range(draw.randint(low, high))]

    return [Row([number % 300, *ids(1, 9)], ids(1, 12)) for number in range(count)]


def logps_of(row: Row, shift: float = 0.0) -> Logps:
    """Return made-up log-probabilities: each depends on all tokens up to its own, and on no other row."""
    ids = np.array([*row.prompt_ids, *row.completion_ids], dtype=np.float64)
    mixed = np.cumsum(ids * np.sqrt(np.arange(2, len(ids) + 2)))
    return (-(mixed % 7.0) - shift).astype(np.float32)[len(row.prompt_ids) :]


class Counted:
    """A `compute` that keeps the batches it was asked for and may die, or wait, when asked again."""

    def __init__(self, *, shift: float = 0.0, dies_at: int | None = None, wait: float = 0.0) -> None:
        self.shift, self.dies_at, self.wait = shift, dies_at, wait
        self.batches: list[list[Row]] = []

    def __call__(self, rows: list[Row]) -> list[Logps]:
        if len(self.batches) == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.wait)
        self.batches.append(rows)
        return [logps_of(row, self.shift) for row in rows]

    @property
    def rows(self) -> int:
        return sum(map(len, self.batches))


def fill(place: Path, rows: Sequence[Row], compute: Any, **options: Any) -> tuple[ReferenceStore, Filled]:
    """Open the store below `place` and fill it, two rows to a batch and four to a chunk."""
    store = ReferenceStore(place, KEY)
    return store, store.fill(rows, compute, **{"batch_rows": 2, "chunk_rows": 4, **options})


def slowly(place: str, count: int) -> None:
    """Fill a store for as long as it takes somebody to kill this process."""
    fill(Path(place), make_rows(count), Counted(wait=0.02))


# --- on ranks ---------------------------------------------------------------------------------------------


def together(
    place: str,
    count: int,
    dies_at: int | None = None,
    apart: bool = False,
    alone: bool = False,
    shift: float = 0.0,
    verify: bool = False,
) -> int:
    """Fill (or verify) one store on all ranks; write what each rank was asked beside it.

    `dies_at`: rank 1 is killed in its batch of that number; `shift`: what rank 1 computes is off by so much; `apart`:
    every rank has a folder of its own; `alone`: the ranks know nothing of each other, as two runs do.
    """
    rank = os.environ["RANK"]
    harm: dict[str, Any] = {"dies_at": dies_at, "shift": shift} if rank == "1" else {}
    compute = Counted(**harm, wait=0.005 if alone else 0)
    rows, world = make_rows(count), World() if alone else joined()
    home = Path(place, f"of rank {rank}") if apart else Path(place)
    try:
        if verify:
            ReferenceStore(home, KEY).verify(rows, compute, count=3, tolerance=1e-6, batch_rows=2, world=world)
        else:
            store, filled = fill(home, rows, compute, world=world)
            assert [list(found) for found in store.lookup(rows)] == [list(logps_of(row)) for row in rows]
            note = {"calls": len(compute.batches), "computed": filled.computed, "rows": compute.rows}
            Path(f"{place}.{rank}.json").write_text(json.dumps(note))
    except UserError as error:
        print(f"error: {error}", flush=True)
        return EXIT_CODE
    return 0


def joined() -> World:
    """Join the ranks by gloo."""
    from align_kit import zero

    zero.join_ranks()
    return World.of_process()


def with_engine(place: str, model: str, count: int) -> int:
    """Fill a store with a real model under ZeRO-3, every parameter split between the ranks."""
    from functools import partial

    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    from align_kit.forward.logprobs import token_logps
    from align_kit.frozen.columns import completion_logps

    world = joined()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=AutoModelForCausalLM.from_pretrained(model).eval(), config=config)
    engine.eval()
    compute = partial(completion_logps, forward=partial(token_logps, engine), pad_token_id=1, device="cpu")
    with torch.no_grad():
        store, filled = fill(Path(place), make_rows(count), compute, world=world)
        store.verify(make_rows(count), compute, count=3, tolerance=1e-4, batch_rows=2, world=world)
    assert filled.computed == count
    return 0


if __name__ == "__main__":
    slowly(sys.argv[1], int(sys.argv[2]))

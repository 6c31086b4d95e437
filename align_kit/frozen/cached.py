"""The placement `cached`: the reference computes every row once, its numbers are kept by content, and it is let go."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from align_kit import log, run_folder
from align_kit.data.prepare import Split
from align_kit.data.tokenise import tokenizer_digest
from align_kit.errors import UserError
from align_kit.forward.logprobs import token_logps
from align_kit.frozen.columns import DatasetRows, cached_columns, columns_for, completion_logps
from align_kit.frozen.hold import StoredReference
from align_kit.frozen.identity import Identity
from align_kit.frozen.place import Site, engine_of
from align_kit.frozen.store import Filled, ReferenceStore, StoreKey, World
from align_kit.models import source

if TYPE_CHECKING:
    from torch import nn

VERIFIED_ROWS = 4  # computed again whenever a store is read: the longest, the shortest and two between them
# Greatest allowed difference of a token's log-probability (nats) from one that was computed in another batch.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
PROGRESS_SECONDS = 30.0


def cached_reference(start: source.Source, identity: Identity, site: Site, batch_rows: int) -> StoredReference:
    """Give every row of the site its stored log-probabilities and return the reference that reads them.

    What is not stored is computed by a sharded copy, `batch_rows` rows at a time on each rank; what is stored is
    verified by computing a few again; then the copy is released. Raises `UserError` where a row's numbers are
    not what the reference gives, or where they cannot be stored.
    """
    store = ReferenceStore(run_folder.cache_folder(os.environ) / "reference", _key(identity, site))
    engine = engine_of(start, site)
    found, gaps = [], []
    for split in site.splits:
        filled, gap = _stored(store, split, engine, site.tokenizer.pad_token_id, batch_rows)
        found.append(filled)
        gaps.append(gap)
    release(engine)
    computed, distinct = sum(one.computed for one in found), sum(one.distinct for one in found)
    words = f"{distinct:,} sequences, {computed:,} computed now"
    if computed < distinct:
        words += f", {distinct - computed:,} found and verified within {max(gaps):.1g} nats a token"
    return StoredReference(identity.found(words, computed=computed))


def _key(identity: Identity, site: Site) -> StoreKey:
    return StoreKey(
        weights=identity.digest,
        tokenizer=tokenizer_digest(site.tokenizer),
        precision=str(site.loading["dtype"]).removeprefix("torch."),
        forward={"attn_implementation": site.loading.get("attn_implementation")},
    )


def _stored(
    store: ReferenceStore, split: Split, engine: nn.Module, pad_token_id: int, batch_rows: int
) -> tuple[Filled, float]:
    """Fill the store with the rows of `split`, verify it, and lay its columns beside them."""
    columns = columns_for(split.rows)
    if not columns:
        raise UserError("reference_placement cached needs stored completions, this phase writes its own; use sharded")
    rows, world = DatasetRows(split.rows, columns), World.of_process()
    answer = partial(
        completion_logps,
        forward=partial(_forward, engine),
        pad_token_id=pad_token_id,
        device=_device_of(engine),
    )
    batch_rows *= len(columns)
    filled = store.fill(rows, answer, batch_rows=batch_rows, world=world, progress=_progress())
    gap = 0.0
    if filled.computed < filled.distinct:
        tolerance = TOLERANCE[store.key.precision]
        gap = store.verify(rows, answer, count=VERIFIED_ROWS, tolerance=tolerance, batch_rows=batch_rows, world=world)
    split.rows = cached_columns(split.rows, store, columns)
    return filled, gap


def _forward(engine: nn.Module, batch: Any) -> Any:
    import torch

    with torch.no_grad():
        return token_logps(engine, batch)


def _device_of(engine: Any) -> Any:
    return engine.device if hasattr(engine, "device") else next(engine.parameters()).device


def _progress() -> Callable[[int, int], None]:
    """Return what tells how far a long filling is, every half minute."""
    last = time.monotonic()

    def tell(done: int, todo: int) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            log.say(f"  reference  {done:,} of {todo:,} sequences computed")

    return tell


def release(engine: Any) -> None:
    """Let go of a frozen model's memory: its hooks, its shards, and what the device's allocator keeps of them."""
    import torch

    module = getattr(engine, "module", engine)
    if hasattr(engine, "destroy"):
        engine.destroy()
    for parameter in module.parameters():
        shard = getattr(parameter, "ds_tensor", parameter)
        shard.data = torch.empty(0, dtype=shard.dtype, device=shard.device)
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

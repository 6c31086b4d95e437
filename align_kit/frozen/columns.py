"""Between data sets and the store: rows read from Arrow, and stored log-probabilities as columns beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from align_kit.data import store as files
from align_kit.data.collate import LanguageCollator
from align_kit.data.digest import canonical_json, text_digest
from align_kit.frozen.store import ReferenceStore, Row

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset
    from numpy.typing import NDArray
    from torch import Tensor

    from align_kit.forward.logprobs import TokenLogps

    Columns = Mapping[str, tuple[str, str]]

# The column that is added: the columns of the prompt and of the completion it speaks of.
PREFERENCE = {"reference_chosen": ("prompt_ids", "chosen_ids"), "reference_rejected": ("prompt_ids", "rejected_ids")}
BINARY = {
    "reference_completion": ("prompt_ids", "completion_ids"),
    "reference_kl": ("prompt_ids", "kl_completion_ids"),
}
BATCH_ROWS = 10_000


def columns_for(dataset: Dataset) -> dict[str, tuple[str, str]]:
    """Return the columns that a tokenised data set of pairs, or of labelled completions, can be given."""
    present = set(dataset.column_names)
    return {name: pair for name, pair in {**PREFERENCE, **BINARY}.items() if present.issuperset(pair)}


class DatasetRows:
    """The sequences of a tokenised data set as `store.Rows`: those of its first row, then of its second, …

    Nothing is held but the data set itself, in memory or mapped from a file.
    """

    def __init__(self, dataset: Dataset, columns: Columns) -> None:
        self._pairs = list(columns.values())
        names = dict.fromkeys(name for pair in self._pairs for name in pair)
        self._tables = dataset.select_columns(list(names)).with_format("arrow")

    def __len__(self) -> int:
        return len(self._tables) * len(self._pairs)

    def __getitem__(self, index: int, /) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place, side = divmod(index, len(self._pairs))
        return _rows_of(self._tables[place : place + 1], self._pairs)[side]

    def __iter__(self) -> Iterator[Row]:
        for rows in self.batches():
            yield from rows

    def batches(self) -> Iterator[list[Row]]:
        """Yield the sequences of up to `BATCH_ROWS` rows of the data set at a time."""
        for table in self._tables.iter(batch_size=BATCH_ROWS):
            yield _rows_of(table, self._pairs)


def _rows_of(table: Any, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    ids = {name: _lists(table.column(name)) for name in table.column_names}
    sides = [zip(ids[prompt], ids[completion], strict=True) for prompt, completion in pairs]
    return [Row(*row) for together in zip(*sides, strict=True) for row in together]


def _lists(column: Any) -> list[NDArray[np.int32]]:
    """Return an Arrow column of id lists as arrays, without copying int32 values."""
    import numpy as np

    joined = column.combine_chunks()
    values = joined.values.to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
    return [values[start:stop] for start, stop in pairwise(joined.offsets.to_numpy())]


def cached_columns(dataset: Dataset, store: ReferenceStore, columns: Columns) -> Dataset:
    """Return `dataset` with one column more for each of `columns` (`columns_for` gives them): float32 lists.

    Each list holds a log-probability (nats) for every token of its completion; all rows must be stored (`fill`). The
    columns are a file of their own below the store, built by the first process that asks and mapped by all.
    """
    from datasets import concatenate_datasets

    rows = DatasetRows(dataset, columns)

    def build(write: files.Write) -> dict[str, Any]:
        for batch in rows.batches():
            values = store.lookup(batch)
            write({name: values[side :: len(columns)] for side, name in enumerate(columns)})
        return {}

    entry = store.path / "columns" / _columns_digest(rows, columns)
    added, _, _ = files.fetch(entry, dict.fromkeys(columns, "logps"), build)
    return concatenate_datasets([_in_own_order(dataset), added], axis=1)


def _columns_digest(rows: DatasetRows, columns: Columns) -> str:
    import xxhash

    state = xxhash.xxh3_128()
    for row in rows:
        state.update(row.digest)
    return text_digest(canonical_json(columns), state.hexdigest())


def _in_own_order(dataset: Dataset) -> Dataset:
    """Return the data set with its rows stored in the order it shows them.

    Columns can only be joined to such. In memory, because otherwise every rank would write the same new file into the
    folder that the rows came from.
    """
    return dataset if dataset._indices is None else dataset.flatten_indices(keep_in_memory=True)


def completion_logps(
    rows: Sequence[Row],
    *,
    forward: Callable[[Mapping[str, Tensor]], TokenLogps],
    pad_token_id: int,
    device: torch.device | str,
) -> list[NDArray[np.float32]]:
    """Run `forward` on `rows` as one padded batch and return float32 log-probabilities for each completion's tokens.

    With all but `rows` bound it is the `compute` of `ReferenceStore.fill`. Prompts must not be empty: nothing
    precedes the first token.
    """
    batch = {name: tensor.to(device) for name, tensor in completions_batch(rows, pad_token_id).items()}
    found = forward(batch)
    both = zip(found.logps_BT.float().cpu(), found.mask_BT.cpu(), strict=True)
    return [logps_T[mask_T].numpy() for logps_T, mask_T in both]


def completions_batch(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Return `rows` as one padded batch, the completions' tokens in its loss."""
    ids = [{"input_ids": [*row.prompt_ids, *row.completion_ids], "loss_mask": _mask(row)} for row in rows]
    return LanguageCollator(pad_token_id)(ids)


def _mask(row: Row) -> list[int]:
    return [0] * len(row.prompt_ids) + [1] * len(row.completion_ids)

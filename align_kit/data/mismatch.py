"""Give each labelled row the completion of another prompt, from which KTO estimates its divergence.

Ethayarajh et al. 2024 ("KTO: Model Alignment as Prospect Theoretic Optimization", section 4.1) take the reference
point of a batch from completions that do not belong to their prompts. A row's partner follows here from the order of
the data alone; rotating the completions of a micro-batch would make it depend on how batches are cut. B rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from align_kit.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

COLUMN = "kl_completion_ids"


def with_mismatched(dataset: Dataset, max_length: int | None) -> Dataset:
    """Return binary rows (`prompt_ids`, `completion_ids`) with `kl_completion_ids`, a completion of another prompt.

    It is that of the next row, cyclically, whose prompt differs, or of the next row where all prompts are one. Its end
    is cut so that prompt and completion together fit `max_length` tokens. Raises `UserError` for a single row.
    """
    from datasets import List, Value

    if len(dataset) < 2:
        raise UserError(
            f"the data has {len(dataset)} labelled row; KTO needs another row's completion beside each: give 2 or more"
        )
    table = dataset.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow")[:]
    prompts, completions = (table[name].combine_chunks() for name in ("prompt_ids", "completion_ids"))
    lengths_B = _lengths(completions)[partners_B := _partners(prompts)]
    if max_length is not None:
        room_B = max_length - _lengths(prompts)
        assert room_B.min() > 0, "a prompt fills max_length; tokenising drops such rows"
        lengths_B = lengths_B.clip(max=room_B)
    column = _beginnings(completions, partners_B, lengths_B)
    return dataset.add_column(COLUMN, column, feature=List(Value("int32")))


def _partners(prompts: pa.ListArray) -> np.ndarray:
    """Return for each row the number of the next one, cyclically, with another prompt (the next one if none has)."""
    import numpy as np

    flat, ends = prompts.flatten().to_numpy(), np.cumsum(_lengths(prompts))
    keys = [part.tobytes() for part in np.split(flat, ends[:-1])]
    rows_B = np.arange(len(keys))
    # Rows stand in runs of one prompt; the partner is the first row of the next run.
    starts = np.array([row for row in rows_B[1:] if keys[row] != keys[row - 1]])
    if not len(starts):
        return (rows_B + 1) % len(keys)
    # The last run goes on at row 0 where that has its prompt, too.
    first = 0 if keys[0] != keys[-1] else starts[0]
    return np.append(starts, first)[np.searchsorted(starts, rows_B, side="right")]


def _beginnings(lists: pa.ListArray, rows_B: np.ndarray, lengths_B: np.ndarray) -> pa.ListArray:
    """Return the first `lengths_B` items of the lists at `rows_B`."""
    import numpy as np
    import pyarrow as pa

    starts = np.concatenate([[0], np.cumsum(_lengths(lists))])
    offsets = np.concatenate([[0], np.cumsum(lengths_B)])
    places = np.repeat(starts[rows_B] - offsets[:-1], lengths_B) + np.arange(offsets[-1])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), lists.flatten().take(pa.array(places)))


def _lengths(lists: pa.ListArray) -> np.ndarray:
    import numpy as np

    return lists.value_lengths().to_numpy().astype(np.int64)

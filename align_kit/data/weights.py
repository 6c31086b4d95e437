"""How much a pair or a labelled completion counts in its phase's loss, beside the others.

A row's weight is what stands in the column that `columns: {weight: …}` of its card or its entry in `datasets` names;
where none is named, a column of that name is no weight. A loss counts each row by its share of the mean weight: the sum
over a step is divided by its rows, as ever, so that the expected gradient is that of rows drawn in proportion to their
weights. A row without one counts as the mean of the others. Evaluations weigh nothing. B rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

COLUMN = "weight"
KINDS = ("preference", "binary")  # of rows that may have one
Row = dict[str, Any]


def weight_of(value: object) -> Row:
    """Return what a canonical row has of the value of its column: nothing of none.

    Raises ValueError for what is no positive number.
    """
    if value is None:
        return {}
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{COLUMN} must be a positive number, got {value!r}; leave a row out that is not to count")
    return {COLUMN: float(value)}


def attached(tokenised: Iterable[Row | None], weights: Sequence[float | None]) -> Iterator[Row | None]:
    """Yield tokenised rows, each with the weight of the row it was made of, NaN where that has none."""
    for row, weight in zip(tokenised, weights, strict=True):
        yield None if row is None else {**row, COLUMN: math.nan if weight is None else weight}


def mean_weight(rows: Dataset) -> float | None:
    """Return the mean of the weights that tokenised rows have, None where they have none."""
    import numpy as np

    if COLUMN not in rows.column_names:
        return None
    known_B = np.asarray(rows[COLUMN], dtype=np.float64)
    known_B = known_B[~np.isnan(known_B)]
    return float(known_B.mean()) if len(known_B) else None


def summed(loss_B: Tensor, batch: Mapping[str, Any], mean: float | None) -> Tensor:
    """Return the loss of a batch's first rows, each by its share of the `mean` weight, summed."""
    if mean is None or COLUMN not in batch:
        return loss_B.sum()
    shares_B = (batch[COLUMN][: len(loss_B)] / mean).nan_to_num(nan=1.0)
    return (loss_B * shares_B.to(loss_B)).sum()


def sentence(rows: Dataset) -> str | None:
    """Return one line on the weights of tokenised rows, None where they have none."""
    import numpy as np

    mean = mean_weight(rows)
    if mean is None:
        return None
    found_B = np.asarray(rows[COLUMN], dtype=np.float64)
    without = int(np.isnan(found_B).sum())
    rest = f"; {without:,} rows without one count as 1" if without else ""
    return (
        f"a row counts {np.nanmin(found_B) / mean:.3g} to {np.nanmax(found_B) / mean:.3g} times in the loss, by its "
        f"column's share of the mean {mean:.4g}{rest}"
    )

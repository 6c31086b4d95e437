"""From a padded batch to one row without padding, in which sequences with a common prefix compute it once.

The row is a list of segments. A sequence that shares nothing is one segment. Of sequences that begin alike the first
stands whole (a head), and a later one too where others save more by it than it costs, as prompts under one system
prompt; each further one adds a segment with what differs, which continues the first tokens of a head. What is common
is found by comparing tokens, so that nothing has to be declared and nothing can be declared wrongly: chosen and
rejected, G completions of one prompt, and rows under one long system prompt are the same.

Tokens from which nothing is read (the last of a completion, a row without loss) are left out: a causal model computes
the others without them.

Shapes: B sequences, T tokens (padded on the right), N tokens of the row, P predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from align_kit.forward import attention
from align_kit.forward.segments import Segment, Segments

MIN_SHARED = 4  # a shorter common prefix, such as a BOS token, costs more to attend to apart than to compute again


@dataclass(frozen=True)
class Pack:
    """A batch as one row, and where to find in it what the batch's columns speak of.

    `at_P` is the place in the row whose hidden state predicts `targets_P`, the token that stands in the batch at
    sequence `rows_P`, column `columns_P` + 1; a place may predict several times. `given` are the tokens of the batch.
    `last_B` is the place of each sequence's last token (`whole` packs only).
    """

    ids_1N: Tensor
    positions_1N: Tensor
    segments: Segments
    at_P: Tensor
    rows_P: Tensor
    columns_P: Tensor
    targets_P: Tensor
    shape: tuple[int, int]
    given: int
    last_B: Tensor | None = None
    place_BT: NDArray[np.int64] | None = field(default=None, repr=False)

    def walk(self, model: Any) -> Tensor:
        """Return the last hidden states (N, H) that the trunk of a transformers model (its `base_model`) gives."""
        return self.trunk_of(model).last_hidden_state[0]  # type: ignore[no-any-return]

    def trunk_of(self, model: Any, **asked: Any) -> Any:
        """Return all that the trunk gives; `asked` goes to its forward."""
        inputs = {"input_ids": self.ids_1N, "position_ids": self.positions_1N, "attention_mask": None}
        return attention.walk(model, {**inputs, "use_cache": False, "segments": self.segments, **asked})

    def spread(self, values_P: Tensor, fill: float | bool = 0.0) -> Tensor:
        """Return what each prediction has (P, ...) where the batch has its token: B, T - 1, ..., else `fill`."""
        rows, columns = self.shape
        spread_BT = values_P.new_full((rows, max(columns - 1, 0), *values_P.shape[1:]), fill)
        return spread_BT.index_put((self.rows_P, self.columns_P), values_P)

    @cached_property
    def weights_N(self) -> Tensor:
        """How many of the batch's tokens each token of the row stands for (int64, N); `whole` packs only."""
        assert self.place_BT is not None
        counted = np.bincount(self.place_BT[self.place_BT >= 0], minlength=self.segments.total)
        return torch.from_numpy(counted).to(self.ids_1N.device)


def pack_rows(
    batch: Mapping[str, Any], *, share: bool = True, whole: bool = False, last_not: int | None = None
) -> Pack:
    """Return the batch ("input_ids", "attention_mask", "loss_mask", B x T, padded on the right) as one row.

    `share` lets sequences with a common prefix of at least `MIN_SHARED` tokens compute it once. `whole` keeps tokens
    that predict nothing, and tells each sequence's last one: the rightmost that is not the token `last_not`, where
    that is given. Without "loss_mask" nothing is predicted. What was packed before is found again.
    """
    ids, attention, loss_mask = batch["input_ids"], batch["attention_mask"], batch.get("loss_mask")
    kept = _packs.setdefault(ids, {})
    masks, pack = kept.get(key := (share, whole, last_not), (None, None))
    if masks is None or masks[0] is not attention or masks[1] is not loss_mask:
        pack = _packed(ids, attention, loss_mask, share, whole, last_not)
        kept[key] = (attention, loss_mask), pack
    return pack  # type: ignore[no-any-return]


_packs: Any = WeakIdKeyDictionary()  # a batch is packed once for policy, reference and checks, and forgotten with it


def _packed(
    ids: Tensor, attention: Tensor, loss_mask: Tensor | None, share: bool, whole: bool, last_not: int | None
) -> Pack:
    ids_BT, attention_BT = ids.cpu().numpy(), attention.cpu().numpy().astype(bool)
    lengths_B = attention_BT.sum(1)
    columns = np.arange(ids_BT.shape[1])
    assert (attention_BT == (columns < lengths_B[:, None])).all(), "rows are padded on the right"
    predicted_BT = np.zeros(ids_BT.shape, bool)
    if loss_mask is not None:
        predicted_BT[:, :-1] = loss_mask[:, 1:].cpu().numpy().astype(bool) & attention_BT[:, 1:]
    needed_B = lengths_B if whole else (predicted_BT * (columns + 1)).max(1, initial=0)
    if not needed_B.any():
        needed_B = np.where(np.arange(len(ids_BT)) == 0, 1, 0)  # a model wants at least one token
    segments, place_BT = _lay([row[:needed] for row, needed in zip(ids_BT, needed_B, strict=True)], columns, share)
    rows_P, columns_P = predicted_BT.nonzero()
    flat_N, positions_N = _row_of(ids_BT, place_BT, segments.total)

    def there(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(ids.device, non_blocking=True)

    return Pack(
        ids_1N=there(flat_N)[None],
        positions_1N=there(positions_N)[None],
        segments=segments,
        at_P=there(place_BT[rows_P, columns_P]),
        rows_P=there(rows_P),
        columns_P=there(columns_P),
        targets_P=there(ids_BT[rows_P, columns_P + 1]),
        shape=(ids_BT.shape[0], ids_BT.shape[1]),
        given=int(lengths_B.sum()),
        last_B=there(_last(ids_BT, place_BT, last_not)) if whole else None,
        place_BT=place_BT if whole else None,
    )


def _lay(rows: Sequence[NDArray[Any]], columns_T: NDArray[Any], share: bool) -> tuple[Segments, NDArray[np.int64]]:
    """Return the segments of `rows` one after the other, and the place of each token (B, T; -1 where there is none)."""
    place_BT = np.full((len(rows), len(columns_T)), -1, np.int64)
    starts: list[int] = []
    found, end = [], 0
    continued = _continued(rows) if share else ((number, 0) for number in range(len(rows)))
    for number, (row, (other, prefix)) in enumerate(zip(rows, continued, strict=True)):
        starts.append(end)
        head, own = starts[other], len(row) - prefix
        place_BT[number, :prefix] = head + columns_T[:prefix]
        place_BT[number, prefix : len(row)] = end + columns_T[:own]
        if own:
            found.append(Segment(end, own, head, prefix))
        end += own
    return Segments(tuple(found)), place_BT


def _continued(rows: Sequence[NDArray[Any]]) -> Iterator[tuple[int, int]]:
    """Yield for each row the earlier one it continues and for how many tokens: itself and 0 where it stands whole."""
    head_B, shared_B = np.arange(len(rows)), np.zeros(len(rows), np.int64)
    for number, row in enumerate(rows):
        common_B = np.array([_common(row, later) for later in rows[number + 1 :]], np.int64)
        gains_B = np.maximum(common_B * (common_B >= MIN_SHARED) - shared_B[number + 1 :], 0)
        if gains_B.sum() > shared_B[number] or not shared_B[number]:
            head_B[number], shared_B[number] = number, 0
            head_B[number + 1 :][gains_B > 0] = number
            shared_B[number + 1 :] += gains_B
        yield int(head_B[number]), int(shared_B[number])


def _common(one: NDArray[Any], other: NDArray[Any]) -> int:
    """Return how many tokens two rows have in common from their beginning."""
    shorter = min(len(one), len(other))
    different = one[:shorter] != other[:shorter]
    return int(different.argmax()) if different.any() else shorter


def _row_of(
    ids_BT: NDArray[Any], place_BT: NDArray[np.int64], total: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ids and positions of the row (N each); sequences that share a place agree on both."""
    rows, columns = (place_BT >= 0).nonzero()
    flat_N, positions_N = np.zeros(total, np.int64), np.zeros(total, np.int64)
    flat_N[place_BT[rows, columns]] = ids_BT[rows, columns]
    positions_N[place_BT[rows, columns]] = columns
    return flat_N, positions_N


def _last(ids_BT: NDArray[Any], place_BT: NDArray[np.int64], last_not: int | None) -> NDArray[np.int64]:
    """Return the place of each sequence's last token; of its first one where all are `last_not`."""
    counts = place_BT >= 0
    if last_not is not None:
        counts &= ids_BT != last_not
    last_B = (np.arange(ids_BT.shape[1]) * counts).argmax(1)
    return place_BT[np.arange(len(ids_BT)), last_B]

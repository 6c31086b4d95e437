"""Whether memory that nothing should change stays what it is: 64-bit sums from the end of one update to the next.

A sum of 64-bit words finds every single flipped bit, and misses only changes that cancel. Weights and optimizer states
change in the update alone, so that they are summed after it and again before the next; what never changes is summed
once and compared with that for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

PIECE = 4 << 20  # bytes summed at once: a millisecond of one core
SHARE = 0.005  # of the time of training, that a sampled check may take


Key = TypeVar("Key", bound=Hashable)


class Held(NamedTuple):
    """A tensor at rest; `fixed` where no update changes it either."""

    tensor: Tensor
    fixed: bool = False


class Piece(NamedTuple):
    """Some bytes of a tensor: its name, and from where to where."""

    name: str
    start: int
    stop: int


class AtRest:
    """Sums of what a rank holds, all of it or a share that moves on, compared with what they were.

    With `share` the pieces of a step take no more than that part of the time since the last ones, in their turn.
    """

    def __init__(self, share: float | None = None) -> None:
        self.share = share
        self.compared, self.held = 0, 0  # bytes: compared so far, and those that were there to compare
        self._expected: dict[Piece, int] = {}
        self._fixed: dict[Piece, int] = {}
        self._cursor, self._credit = 0, 0.0
        self._piece_seconds, self._since = 0.0, _now()

    def remember(self, holdings: Callable[[], Mapping[str, Held]]) -> None:
        """Sum the next pieces; called where an update has ended."""
        self._expected = {}
        if not self._may_spend():
            return
        began, held = _now(), holdings()
        pieces = list(_pieces(held))
        self.held = sum(piece.stop - piece.start for piece in pieces)
        chosen = self._next(pieces)
        sums = _sums(held, [piece for piece in chosen if piece not in self._fixed])
        self._fixed |= {piece: total for piece, total in sums.items() if held[piece.name].fixed}
        self._expected = {piece: sums[piece] if piece in sums else self._fixed[piece] for piece in chosen}
        self._spent(_now() - began, len(sums))

    def changed(self, holdings: Callable[[], Mapping[str, Held]]) -> list[Piece]:
        """Return the pieces that differ; called just before the next update. What is no longer held is let be."""
        if not self._expected:
            return []
        began, held = _now(), holdings()
        sizes = {name: _bytes(tensor) for name, (tensor, _) in held.items()}
        pieces = [piece for piece in self._expected if piece.stop <= sizes.get(piece.name, 0)]
        sums = _sums(held, pieces)
        self.compared += sum(piece.stop - piece.start for piece in pieces)
        self._spent(_now() - began, len(sums))
        return [piece for piece, total in sums.items() if self._expected[piece] != total]

    def forget(self) -> None:
        """Let what is held now be what it should be: after a checkpoint was loaded."""
        self._expected, self._fixed = {}, {}
        self._since = _now()

    # --- how much of it ---

    def _may_spend(self) -> bool:
        """Tell whether a piece may be summed now, and again before the next update."""
        if self.share is None:
            return True
        now = _clock()
        self._credit = min(self._credit + self.share * (now - self._since), self.share * 60)
        self._since = now
        return self._credit >= 2 * self._piece_seconds

    def _next(self, pieces: list[Piece]) -> list[Piece]:
        """Return the pieces whose turn it is."""
        if self.share is None or not pieces:
            return pieces
        affordable = int(self._credit / 2 / self._piece_seconds) if self._piece_seconds else 1
        count = min(max(1, affordable), len(pieces))
        chosen = [pieces[(self._cursor + number) % len(pieces)] for number in range(count)]
        self._cursor = (self._cursor + count) % len(pieces)
        return chosen

    def _spent(self, seconds: float, pieces: int) -> None:
        self._credit -= seconds
        each = seconds / max(1, pieces)
        self._piece_seconds = each if not self._piece_seconds else 0.8 * self._piece_seconds + 0.2 * each


def _clock() -> float:
    """Return the seconds by which a check is counted: the processor's, or the wall's where a device computes."""
    return time.perf_counter() if torch.accelerator.is_available() else time.process_time()


def _now() -> float:
    """Return the same once the device has done what came before, which is no part of a check."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return _clock()


def _pieces(held: Mapping[str, Held]) -> Iterator[Piece]:
    for name, (tensor, _) in held.items():
        size = _bytes(tensor)
        for start in range(0, size, PIECE):
            yield Piece(name, start, min(start + PIECE, size))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sums(held: Mapping[str, Held], pieces: list[Piece]) -> dict[Piece, int]:
    return sums64({piece: _part(held[piece.name].tensor, piece) for piece in pieces})


def _part(tensor: Tensor, piece: Piece) -> Tensor:
    size = tensor.element_size()
    return tensor.detach().reshape(-1)[piece.start // size : piece.stop // size]


def sums64(tensors: Mapping[Key, Tensor]) -> dict[Key, int]:
    """Return the sum of each tensor's bytes, read as 64-bit words; one transfer from each device for all on it."""
    sums = {name: _sum64(tensor) for name, tensor in tensors.items()}
    found: dict[Key, int] = {}
    for device in {total.device for total in sums.values()}:  # offloaded shards lie beside gathered parameters
        here = {name: total for name, total in sums.items() if total.device == device}
        found |= dict(zip(here, torch.stack(list(here.values())).tolist(), strict=True))
    return found


def _sum64(tensor: Tensor) -> Tensor:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8:  # a view into a flat buffer, that cannot be read in words
        data = data.clone()
    whole = data.numel() // 8 * 8
    return data[:whole].view(torch.int64).sum() + data[whole:].to(torch.int64).sum()

"""What a packed row is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Segment:
    """`length` tokens of the row from `start`, which continue the `prefix` tokens from `head` (none for a head)."""

    start: int
    length: int
    head: int
    prefix: int


@dataclass(frozen=True)
class Segments:
    """The segments of a row, in its order; attention is causal within each and over the prefix it continues."""

    items: tuple[Segment, ...]
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # masks, made once for all layers

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Keep the masks made meanwhile for as long as a backward may need them: not at all without a gradient."""
        before = dict(self.memo)
        yield
        if not torch.is_grad_enabled():
            self.memo.clear()
            self.memo.update(before)

    @property
    def total(self) -> int:
        """The tokens of the row."""
        return sum(segment.length for segment in self.items)

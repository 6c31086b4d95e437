"""The rows a card stands for, as far as they are here: read as the loader reads them, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from align_kit import cards
from align_kit.cards import Card
from align_kit.data import embedded, read, shapes
from align_kit.data.made import characters_of
from align_kit.data.shapes import Row, Shape


@dataclass(frozen=True)
class Counted:
    """How many canonical rows a split has, and how many characters of text are in them."""

    rows: int
    characters: int


def is_counted(card: Card) -> bool:
    """Tell whether a card's rows are the same everywhere, so that their number belongs into the card."""
    return card.block.source.kind != "builtin" or embedded.is_fixed(card.block.source.path)


def is_here(card: Card, split: str, home: Path | None) -> bool:
    """Tell whether a split can be read without a download."""
    return card.block.source.kind == "builtin" or cards.find_file(card, split, home) is not None


def file_rows(card: Card, split: str, home: Path | None) -> Iterator[Row]:
    """Yield the rows of a split that is here, as its file or the package has them; raises UserError.

    JSON lines and Parquet are never whole in memory, unless the card cuts a slice out of them.
    """
    block = card.block
    rows: Iterable[Row]
    if block.source.kind == "builtin":
        name, _, _ = cards.parse_slice(block.splits[split])
        rows = read.cut(embedded.rows(block.source.path, name), [block.splits[split]])
    else:
        file = cards.find_file(card, split, home)
        assert file is not None, f"{card.name}, split {split}: asked for rows that are not here"
        named = block.splits[split] if block.source.kind == "file" else block.source.local[split]
        whole = named == block.files()[split]
        rows = (row for _, row in read.numbered_rows(file)) if whole else read.read_files([file], [named])
    return islice(rows, block.max_samples)


def canonical(card: Card, split: str, home: Path | None) -> Iterator[tuple[str, Row]]:
    """Yield kind and canonical form of each row of a split that is here; raises UserError for one that does not fit."""
    shape = Shape.of(card.block)
    return shapes.converted(file_rows(card, split, home), shape, f"split {split}")


def counted(card: Card, split: str, home: Path | None) -> Counted:
    """Count a split that is here; raises UserError for a row that does not fit the card."""
    rows = characters = 0
    for kind, row in canonical(card, split, home):
        rows += 1
        characters += characters_of(kind, row)
    return Counted(rows, characters)

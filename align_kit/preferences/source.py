"""Open what `align-kit data preferences` reads: a card or a file, as rows that can be read twice without memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from align_kit import cards
from align_kit.cards import Card
from align_kit.data import load, shapes
from align_kit.data.lines import JsonLines
from align_kit.data.shapes import Row, Shape
from align_kit.errors import UserError, unknown

_NAMED = re.compile(r"(?P<path>[^\[\]]+)(\[(?P<split>.+)\])?")


class Rows(Protocol):
    """Rows that can be read from the start as often as needed."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...


@dataclass(frozen=True)
class Source:
    """One opened source: how it was named, its rows as they stand there, and how they are read."""

    path: str
    split: str
    rows: Rows
    shape: Shape
    licences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    card: Card | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """How messages and the report name it."""
        return f"{self.path}[{self.split}]"

    def place(self, number: int) -> str:
        """Return how messages name a row, counted from 1: by its line where it is one."""
        return self.rows.where(number - 1) if isinstance(self.rows, JsonLines) else f"{self.where}, row {number}"

    @property
    def name(self) -> str:
        """The split without what is cut from it."""
        return cards.parse_slice(self.split)[0]

    @property
    def kind(self) -> str:
        """The kind of the first row, which all others must have."""
        kind, _ = next(iter(shapes.converted(self.rows, self.shape, self.place)))
        return kind

    def canonical(self) -> Iterator[tuple[Row, Row]]:
        """Yield each row as it stands there and in its canonical form."""
        passed: list[Row] = []

        def passing() -> Iterator[Row]:
            for row in self.rows:
                passed[:] = [row]
                yield row

        for _, canonical in shapes.converted(passing(), self.shape, self.place):
            yield passed[0], canonical

    def close(self) -> None:
        """Close the file that rows are read from, if they are."""
        if isinstance(self.rows, JsonLines):
            self.rows.close()


def open_source(named: str, *, format: str | None = None, columns: dict[str, str] | None = None) -> Source:
    """Open `card:name`, a file or a hub id, with a split in brackets where it is not train: `card:gsm8k[test]`.

    JSON lines are left on disk; other files are held in memory. Raises `UserError` for what cannot be read.
    """
    match = _NAMED.fullmatch(named.strip())
    if not match:
        raise UserError(f"cannot read the source {named!r}; write card:name[test], my.jsonl or my.jsonl[:1000]")
    path, split = match["path"], match["split"] or "train"
    split = f"train[{split}]" if ":" in split and "[" not in split else split
    card = cards.load_card(path.removeprefix("card:")) if path.startswith("card:") or path.endswith(".md") else None
    origin: dict[str, Any] = {"card": card.name} if card else {"file": _file_name(path)}
    home = cards.data_home()
    lines = _lines(path, split, card, home)
    if lines is not None:
        try:
            shape = _shape(lines, f"{path}, split {split}", card, format, columns)
        except UserError:
            lines.close()
            raise
        warnings = tuple(card.warnings()) if card else ()
        return Source(path, split, lines, shape, card.licences if card else (), warnings, card, origin)
    spec = {"path": path, "split": split, "format": format, "columns": columns}
    found = load.opened(spec, "dpo", "train", home)
    assert found.shape is not None
    return Source(path, split, found.rows, found.shape, found.licences, tuple(found.warnings), card, origin)


def _file_name(path: str) -> str:
    """Return how a card names a file: without the folders of this machine; a hub id is left whole."""
    return Path(path).name if Path(path).expanduser().exists() else path


def _lines(path: str, split: str, card: Card | None, home: Path | None) -> JsonLines | None:
    """Return the rows of a file of JSON lines here, None where they come from anything else."""
    name = cards.parse_slice(split)[0]
    if card is None:
        file = Path(path).expanduser()
        return JsonLines(file, [split]) if file.suffix == ".jsonl" and name == "train" else None
    local = cards.local_file(card, name, home) if name in card.block.splits else None
    if local is None or local.suffix != ".jsonl":
        return None
    places = card.block.splits if card.block.source.kind == "file" else card.block.source.local
    return JsonLines(local, [places[name], split], card.block.max_samples)


def _shape(
    lines: JsonLines, where: str, card: Card | None, format: str | None, columns: dict[str, str] | None
) -> Shape:
    """Return how rows are read: what was asked for wins over the card, and that over the looks of the first row."""
    if not len(lines):
        raise UserError(f"{where}: no rows; check the split and the file")
    if format is not None and format not in cards.FORMAT_KINDS:
        raise unknown("format", format, cards.FORMAT_KINDS)
    known = Shape.of(card.block) if card else None
    if format is not None and (known is None or known.format != format):
        known = Shape(format)
    if known is None:
        known = shapes.recognise([*(columns or {}), *(set(lines[0]) - set((columns or {}).values()))])
    return replace(known, columns={**known.columns, **(columns or {})})

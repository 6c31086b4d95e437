"""Open what is to be cleaned: cards, files and folders, as streams of rows that are not yet parsed."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align_kit import cards
from align_kit.data import read, shapes
from align_kit.data.shapes import Row, Shape
from align_kit.errors import UserError, unknown

BATCH_ROWS, BATCH_BYTES = 512, 1 << 20  # what a worker is given at a time, whichever is reached first
_TRIED = 100  # first rows, of which one must be readable
_WORD = re.compile(r"(?P<path>[^\[\]]+)(\[(?P<split>.+)\])?")

Raw = bytes | Row  # a line of JSON lines as it stands, or a row of another format
Rows = Iterator[tuple[int, Raw]]


@dataclass(frozen=True)
class Source:
    """One input: its name, how its rows are read and which licences they have; `file` where it is one.

    `rows` gives (number, row) anew at each call: numbers are lines of JSON lines, rows of other formats, from 1.
    """

    name: str
    split: str
    rows: Callable[[], Rows]
    shape: Shape
    kind: str
    licences: tuple[str, ...] = ("unknown",)
    card: cards.Card | None = None
    file: Path | None = None

    def where(self, number: int) -> str:
        """Return how a row is named in messages."""
        if self.file is None:
            return f"{self.name}, row {number}"
        return f"{self.file}, {'line' if self.file.suffix == '.jsonl' else 'row'} {number}"

    def canonical(self, number: int, row: Row) -> tuple[str, Row]:
        """Return a row's kind and its canonical form; raises UserError that names the row by its `number`."""
        return next(shapes.converted([row], self.shape, lambda _: self.where(number)))

    @property
    def size(self) -> int:
        """Bytes to read, 0 where they are not in a file."""
        return self.file.stat().st_size if self.file else 0

    def digest(self) -> str | None:
        """Return the SHA-256 of its file, None where there is none."""
        if self.file is None:
            return None
        with self.file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one source, by its place among the inputs, and their size in bytes."""

    source: int
    rows: list[tuple[int, Raw]]
    size: int


def batches(sources: Sequence[Source]) -> Iterator[Batch]:
    """Yield all rows of all sources, in order, in batches."""
    for place, source in enumerate(sources):
        rows: list[tuple[int, Raw]] = []
        size = 0
        for number, row in source.rows():
            rows.append((number, row))
            size += len(row) if isinstance(row, bytes) else _characters(row)
            if len(rows) >= BATCH_ROWS or size >= BATCH_BYTES:
                yield Batch(place, rows, size)
                rows, size = [], 0
        if rows:
            yield Batch(place, rows, size)


def _characters(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(map(_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 1


def opened(words: Sequence[str], *, given: Shape | None = None, split: str = "train") -> list[Source]:
    """Return the sources that the words of a command line name: `card:gsm8k[test]`, `a.jsonl`, `folder[train[:100]]`.

    `given` is how rows of files are read where their columns do not tell. Raises UserError for what is not there,
    for a source without rows, and for one named twice.
    """
    found = [source for word in words for source in _opened(word, given, split)]
    for place, source in enumerate(found):
        if source.name in [other.name for other in found[:place]]:
            raise UserError(f"{source.name} is named twice; name it once")
    return found


def one_kind(sources: Sequence[Source]) -> str:
    """Return the kind of all sources; raises UserError where they have several."""
    first = sources[0]
    for source in sources[1:]:
        if source.kind != first.kind:
            raise UserError(
                f"{first.name} has {first.kind} rows, {source.name} has {source.kind} rows; clean them one by one"
            )
    return first.kind


def _opened(word: str, given: Shape | None, default: str) -> Iterator[Source]:
    match = _WORD.fullmatch(word)
    if not match:
        raise UserError(f"cannot read {word!r}; name card:<name>, card:<name>[test], a file, or file[:1000]")
    path, split = match["path"], match["split"] or default
    split = f"{default}[{split}]" if re.fullmatch(r"[-\d%]*:[-\d%]*", split) else split
    if path.startswith("card:") or path.endswith(".md"):
        card = cards.load_card(path.removeprefix("card:"))
        only = list(card.block.splits) if match["split"] is None else []
        yield _of_card(card, only[0] if len(only) == 1 else split)
        return
    name, *_ = cards.parse_slice(split)
    place = Path(path).expanduser()
    for file in read.files_of(place, name, f"name the files, as {path}/*.jsonl"):
        if not place.is_dir() and match["split"] and name != default:
            raise UserError(f"{path}: a single file has only the split {default!r}, not {name!r}")
        yield _source(str(file), split, _file_rows(file, [split]), given, file=file)


def columns_of(one: Source) -> set[str]:
    """Return the columns of a source's first rows."""
    found: set[str] = set()
    for number, raw in itertools.islice(one.rows(), BATCH_ROWS):
        with suppress(UserError):  # whether rows may be left out is said elsewhere
            found.update(raw if isinstance(raw, dict) else read.parse_line(raw, one.where(number)))
    return found


def _of_card(card: cards.Card, split: str) -> Source:
    block, (ours, *_) = card.block, cards.parse_slice(split)
    name = f"card:{card.name}" + ("" if split == "train" else f"[{split}]")
    if ours not in block.splits:
        raise unknown(f"split of card {card.name}", ours, block.splits)
    theirs, origin = block.splits[ours], block.source
    file = cards.local_file(card, ours, cards.data_home())
    if file is not None:
        rows = _file_rows(file, [theirs if origin.kind == "file" else origin.local[ours], split])
    elif origin.kind == "builtin":
        rows = _builtin_rows(origin.path, theirs, split)
    elif origin.kind == "file":
        raise UserError(
            f"{name}: {origin.path}/{block.files()[ours]} is not there; "
            "get it, put it in a folder and set ALIGN_KIT_DATA to that"
        )
    else:
        hub = {"name": origin.name, "data_dir": origin.data_dir, "revision": origin.revision}
        held = read.read_hub(origin.path, cards.parse_slice(theirs)[0], [theirs, split], **hub)
        rows = _numbered(held)
    shape = Shape.of(block)
    most = block.max_samples
    limited = (lambda: itertools.islice(rows(), most)) if most else rows
    return _source(name, split, limited, shape, card=card, file=file, licences=card.licences)


def _source(name: str, split: str, rows: Callable[[], Rows], given: Shape | None, **facts: Any) -> Source:
    """Return a source whose shape and kind are those of its first row that can be read: --bad-rows may drop others."""
    refused: UserError | None = None
    for number, raw in itertools.islice(rows(), _TRIED):
        try:
            row = raw if isinstance(raw, dict) else read.parse_line(raw, f"{name}, line {number}")
            source = Source(name, split, rows, given or shapes.recognise(row), "", **facts)
            return replace(source, kind=source.canonical(number, row)[0])
        except UserError as error:
            refused = refused or error
    raise refused or UserError(f"{name}: no rows; check the split and the file")


def _file_rows(file: Path, slices: Sequence[str]) -> Callable[[], Rows]:
    stream: Callable[[Path], Rows] = read.numbered_lines if file.suffix == ".jsonl" else read.numbered_rows
    whole = all(cards.parse_slice(split)[1:] == (None, None) for split in slices)
    if whole or file.suffix == ".txt":  # slices of a text count its lines
        return (lambda: enumerate(read.read_files([file], slices), start=1)) if file.suffix == ".txt" else (
            lambda: stream(file)
        )  # fmt: skip

    def rows() -> Rows:
        total = sum(1 for _ in stream(file))
        first, last = 0, total
        for split in slices:
            start, stop = cards.slice_bounds(split, last - first)
            first, last = first + start, first + stop
        return itertools.islice(stream(file), first, max(first, last))

    return rows


def _builtin_rows(name: str, theirs: str, split: str) -> Callable[[], Rows]:
    from align_kit.data import embedded

    return _numbered(read.cut(list(embedded.rows(name, theirs)), [split]))


def _numbered(rows: Sequence[Row]) -> Callable[[], Rows]:
    return lambda: enumerate(rows, start=1)


def named_shape(fmt: str | None, columns: Mapping[str, str]) -> Shape | None:
    """Return the shape that `--format` and `--columns` give, None where both are left out."""
    if fmt is None and not columns:
        return None
    if fmt is None:
        return Shape(shapes.recognise(columns).format, dict(columns))
    if fmt not in cards.FORMAT_KINDS:
        raise unknown("format", fmt, cards.FORMAT_KINDS)
    return Shape(fmt, dict(columns))

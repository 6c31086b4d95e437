"""`align-kit data mix`: several sources become one data set with the shares asked for, and a card that says so."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from align_kit import cards, log
from align_kit.data import load, shapes
from align_kit.data.digest import rows_digest
from align_kit.data.lines import JsonLines
from align_kit.data.made import MadeSet, check_free, check_name, write_made
from align_kit.data.mix import Stream, mixed, passes, sizes_of
from align_kit.data.mixture import Asked, Shares, figures, resolve
from align_kit.data.shapes import Row, Shape
from align_kit.errors import UserError

DESCRIPTION = """Write a mixture of data sets, interleaved so that every stretch has the shares asked for. Without
--rows it is the largest in which no source gives more than its rows, or its --epochs. Files of JSON lines are read row
by row, so they may be larger than memory; others are held in it."""
SOURCE = """card:<name> or a file, with an optional split and weight: my.jsonl:0.7, card:gsm8k[test]:0.3; without
weights and --temperature all of all; one without a weight beside others that have one has its card's, else 1"""
_WORD = re.compile(r"(?P<path>.+?)(\[(?P<split>.+)\])?(:(?P<weight>[-+]?\d*\.?\d+([eE][-+]?\d+)?))?")
HEAD = ("source", "rows", "asked", "realised", "taken", "epochs", "never seen", "")


class Rows(Protocol):
    """Rows by number, in memory or not."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Row: ...


@dataclass(frozen=True)
class Word:
    """One source as the command line names it."""

    path: str
    split: str | None
    weight: float | None

    @property
    def shown(self) -> str:
        return self.path + (f"[{self.split}]" if self.split else "")


@dataclass(frozen=True)
class Source:
    """One source, opened: its rows and how they are read (None: they are canonical); `card` where it has one.

    `read_as` is the same where they are canonical: how they were read before.
    """

    word: Word
    rows: Rows
    shape: Shape | None
    kind: str
    digest: str
    card: cards.Card | None
    read_as: Shape

    def row(self, number: int) -> Row:
        """Return a row in its canonical form."""
        row = self.rows[number]
        if self.shape is not None:
            ((_, row),) = shapes.converted([row], self.shape, self.word.shown)
        return {name: value for name, value in row.items() if value is not None}


def mix_command(words: Sequence[str]) -> int:
    """Carry out `align-kit data mix …` and return its exit code; raises UserError for what the user can mend."""
    given = _parser().parse_args(list(words))
    named = [_word(text) for text in given.sources]
    for place, one in enumerate(named):
        if one.shown in [other.shown for other in named[:place]]:
            raise UserError(f"{one.shown} is named twice; name it once, and let --epochs repeat it")
    check_name(_name(given))
    check_free(given.output, overwrite=given.overwrite)
    with contextlib.ExitStack() as files:
        _mix(given, ["align-kit", "data", "mix", *words], [_opened(word, cards.data_home(), files) for word in named])
    return 0


def _mix(given: argparse.Namespace, command: Sequence[str], sources: Sequence[Source]) -> None:
    _one_kind(sources)
    epochs = _for_each("epochs", given.epochs, len(sources))
    caps = _for_each("max-share", given.max_share, len(sources))
    asked = [
        Asked(one.word.shown, len(one.rows), one.word.weight, _card_weight(one), max_share=cap, epochs=times)
        for one, cap, times in zip(sources, caps, epochs, strict=True)
    ]
    wanted = resolve(asked, given.temperature)
    sizes = _sizes(asked, wanted, given.rows)
    table = _table(asked, wanted, sizes)
    made = _made(given, command, sources, table)
    for line in _warnings(sources, sizes):
        log.warn(line)
    rows = _shown_on_a_terminal(_mixture(sources, sizes, given.seed), sum(sizes))
    card = write_made(given.output, made, {"train": rows}, overwrite=given.overwrite)
    print(_text(table))
    print(f"{sum(sizes)} {made.format} rows in {card.parent}; train on them with path: {card}")


def _name(given: argparse.Namespace) -> str:
    return str(given.name or given.output.resolve().name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("align-kit data mix", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("sources", nargs="+", metavar="source", help=SOURCE)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it must not be there, or be empty")
    parser.add_argument("--rows", type=_count, help="rows to write; default: as many as the shares allow")
    temperature = "shares in proportion to rows^(1/T), without weights: 1 by size, a high T all alike"
    parser.add_argument("--temperature", type=_positive, metavar="T", help=temperature)
    cap = "most that a source may be of the mixture: one number for all, or one each in their order, 0.5,1"
    parser.add_argument("--max-share", type=_numbers, metavar="SHARE", help=cap)
    times = "how often the rows of a source may be taken, 2.5: twice and half of them again; for all, or one each"
    parser.add_argument("--epochs", type=_numbers, metavar="TIMES", help=f"{times} (1)")
    parser.add_argument("--seed", type=_whole, default=0, help="decides which rows are taken, and repeats' order (0)")
    parser.add_argument("--name", help="name of the card; default: the folder's")
    parser.add_argument("--overwrite", action="store_true", help="replace a set that align-kit wrote to the folder")
    return parser


# --- what the command line says --------------------------------------------------------------------------------------


def _word(text: str) -> Word:
    match = _WORD.fullmatch(text)
    if match is None or match["path"] == "card":  # card:7 is a name, and no weight
        return Word(text, None, None)
    weight = None if match["weight"] is None else _positive(match["weight"])
    split = match["split"]
    if split and re.fullmatch(r"[^\[\]]*:[^\[\]]*", split):  # my.jsonl[:90%]
        split = f"train[{split}]"
    return Word(match["path"], split, weight)


def _positive(text: str) -> float:
    """Return a number above 0; raises UserError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{text!r} is no number above 0; give one such as 0.5")
    return value


def _numbers(text: str) -> list[float]:
    return [_positive(part) for part in text.split(",")]


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise UserError(f"{text!r} is no whole number; give one such as 1000")
    return int(text)


def _count(text: str) -> int:
    return _whole(text) or int(_positive(text))


def _for_each(name: str, numbers: Sequence[float] | None, count: int) -> list[float | None]:
    if numbers is None:
        return [None] * count
    if len(numbers) not in (1, count):
        raise UserError(f"--{name} has {len(numbers)} numbers for {count} sources; give one for all, or one each")
    return [*numbers] if len(numbers) == count else [numbers[0]] * count


# --- the sources -----------------------------------------------------------------------------------------------------


def _opened(word: Word, home: Path | None, files: contextlib.ExitStack) -> Source:
    """Open one source and read it through once, so that a mistake in it is found before anything is written."""
    named = word.path.startswith("card:") or word.path.endswith(".md")
    card = cards.load_card(word.path.removeprefix("card:")) if named else None
    lines = _card_lines(card, word.split or "train", home) if card else _file_lines(word)
    if lines is None:
        spec = {"path": word.path, "split": word.split}
        loaded = load.load([spec], phase="eval", data_home=home)
        source = loaded.sources[0]
        shape = Shape.of(card.block) if card else Shape(source.format)
        return Source(word, loaded.dataset, None, loaded.kind, source.digest, card, shape)
    files.callback(lines.close)
    if not len(lines):
        raise UserError(f"{word.shown}: no rows; check the split and the file")
    shape = Shape.of(card.block) if card else shapes.recognise(lines[0])
    kinds: dict[str, None] = {}

    def canonical() -> Iterator[Row]:
        for kind, row in shapes.converted(lines, shape, lambda number: lines.where(number - 1)):
            kinds[kind] = None
            yield row

    digest = rows_digest(canonical())
    return Source(word, lines, shape, next(iter(kinds)), digest, card, shape)


def _card_lines(card: cards.Card, split: str, home: Path | None) -> JsonLines | None:
    """Return a card's rows where they stand in a file of JSON lines here; None where they must be loaded."""
    ours = cards.parse_slice(split)[0]
    file = cards.local_file(card, ours, home)
    if file is None or file.suffix != ".jsonl":
        return None
    origin = card.block.splits if card.block.source.kind == "file" else card.block.source.local
    return JsonLines(file, [origin[ours], split], card.block.max_samples)


def _file_lines(word: Word) -> JsonLines | None:
    file = Path(word.path).expanduser()
    if file.suffix != ".jsonl" or not file.is_file():
        return None
    if word.split is None:
        return JsonLines(file)
    return JsonLines(file, [word.split]) if cards.parse_slice(word.split)[0] == "train" else None


def _one_kind(sources: Sequence[Source]) -> None:
    first = sources[0]
    for one in sources:
        if one.kind != first.kind:
            raise UserError(
                f"{first.word.shown} has {first.kind} rows, {one.word.shown} has {one.kind} rows; "
                "a set has rows of one kind: mix them apart"
            )


def _card_weight(source: Source) -> float | None:
    return source.card.block.weight if source.card else None


def _sizes(asked: Sequence[Asked], wanted: Shares, total: int | None) -> list[int]:
    """Return the rows each source gives; raises UserError where `total` is more than one has."""
    capacities = wanted.capacities([one.rows for one in asked])
    if total is None:
        return sizes_of(capacities, wanted.shares)
    shares = wanted.shares or [capacity / sum(capacities) for capacity in capacities]
    sizes = sizes_of(capacities, shares, total)
    for one, size, capacity in zip(asked, sizes, capacities, strict=True):
        if size > capacity:
            most = sum(sizes_of(capacities, shares))
            raise UserError(
                f"{one.where}: its share of {total} rows is {size}, and it may give {capacity}; give --rows {most} or "
                f"fewer, or let it repeat: --epochs {math.ceil(100 * size / one.rows) / 100:g} for it"
            )
    return sizes


# --- the mixture -----------------------------------------------------------------------------------------------------


def _mixture(sources: Sequence[Source], sizes: Sequence[int], seed: int) -> Iterator[Row]:
    streams = [_stream(one, size, seed, place) for place, (one, size) in enumerate(zip(sources, sizes, strict=True))]
    return (row for _, row in mixed(streams, sizes))


def _stream(source: Source, size: int, seed: int, place: int) -> Stream[Row]:
    def opened(start: int) -> Iterator[Row]:
        for numbers in passes(len(source.rows), size, seed=seed, source=place, start=start):
            yield from (source.row(int(number)) for number in numbers)

    return opened


def _shown_on_a_terminal(rows: Iterable[Row], count: int) -> Iterable[Row]:
    if not sys.stderr.isatty():
        return rows
    from tqdm import tqdm

    return tqdm(rows, total=count, desc="mix", unit="row", leave=False)  # type: ignore[no-any-return]


def _warnings(sources: Sequence[Source], sizes: Sequence[int]) -> list[str]:
    found = [line for one in sources if one.card for line in one.card.warnings()]
    if any(one.word.weight is not None for one in sources):
        found += [_unweighted(one) for one in sources if one.word.weight is None]
    found += [
        f"{one.word.shown}: its share is less than one row, so none of its rows is used"
        for one, size in zip(sources, sizes, strict=True)
        if not size
    ]
    return list(dict.fromkeys(found))


def _unweighted(one: Source) -> str:
    weight = _card_weight(one)
    taken = "1" if weight is None else f"its card's, {weight:g}"
    return f"{one.word.shown}: no weight is given for it, and one for others; its weight is {taken}"


def _made(
    given: argparse.Namespace, command: Sequence[str], sources: Sequence[Source], table: Sequence[Sequence[str]]
) -> MadeSet:
    """Return what the card says of the mixture."""
    kind = sources[0].kind
    licences = [licence for one in sources for licence in (one.card.licences if one.card else ("unknown",))]
    checkers = {one.card.block.checker if one.card else None for one in sources}
    return MadeSet(
        name=_name(given),
        pretty_name=f"Mixture of {', '.join(one.word.shown for one in sources)}",
        licences=tuple(dict.fromkeys(licences)),
        phases=[phase for phase, kinds in cards.PHASE_KINDS.items() if kind in kinds and phase != "eval"],
        **shapes.kept_apart(kind, [one.read_as for one in sources]),
        sections={"Preprocessing": _markdown(table)},
        made={"command": list(command), "seed": given.seed, "from": [_origin(one) for one in sources]},
        checker=checkers.pop() if len(checkers) == 1 else None,
    )


def _origin(source: Source) -> dict[str, Any]:
    place = {"card": source.card.name} if source.card else {"file": source.word.path}
    return {**place, "split": source.word.split or "train", "digest": source.digest, "rows": len(source.rows)}


def _table(asked: Sequence[Asked], wanted: Shares, sizes: Sequence[int]) -> list[list[str]]:
    """Return a row for each source, and one for all."""
    counts = [one.rows for one in asked]
    found = []
    for one, size, said in zip(asked, sizes, figures(wanted, counts, sizes), strict=True):
        share = "all" if said["share"] is None else f"{said['share']:.1%}"
        realised, epochs = f"{said['realised']:.1%}", f"{said['epochs']:.4g}"
        note = "used up" if said["used_up"] else ""
        found.append([one.where, f"{one.rows:,}", share, realised, f"{size:,}", epochs, f"{said['unseen']:,}", note])
    return [*found, ["all", f"{sum(counts):,}", "", "", f"{sum(sizes):,}", "", "", ""]]


def _text(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[place]) for row in (HEAD, *table)) for place in range(len(HEAD))]
    lines = (zip(row, widths, strict=True) for row in (HEAD, *table))
    return "\n".join("  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in lines)


def _markdown(table: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *table)]
    return "\n".join(["Interleaved, so that every stretch has these shares.", "", *rows])

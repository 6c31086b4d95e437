"""Rows and lengths on a terminal: a label beside each span, colours where they are wanted, lines that fit."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align_kit.inspect.decode import Piece, Span, State

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PART, STATE = 10, 7  # columns of a label: of the part, of how it fares
WORD = 24  # columns that a line may end early by, so that a word stays whole
BARS, BINS = 40, 10  # columns of the longest bar; bars of a histogram, about
RESET = "\x1b[0m"
STYLES: dict[str, str] = {
    "masked": "\x1b[90m", "TRAINED": "\x1b[32m", "read": "\x1b[36m", "cut off": "\x1b[9;31m",
    "token": "\x1b[7m", "blank": "\x1b[2m", "spelt": "\x1b[33m", "elided": "\x1b[3m",
    "bold": "\x1b[1m", "ok": "\x1b[32m", "note": "\x1b[33m", "NOT": "\x1b[1;31m",
}  # fmt: skip
RULES: dict[State, str] = {"masked": "│", "TRAINED": "┃", "read": "│", "cut off": "╳"}
Cell = tuple[str, str]  # a character, its look


class Ink:
    """Puts text in colours, or marks what colours would say."""

    def __init__(self, *, colour: bool) -> None:
        self.colour = colour

    def styled(self, text: str, *names: str) -> str:
        """Return text in the styles named."""
        codes = "".join(STYLES.get(name, "") for name in names)
        return f"{codes}{text}{RESET}" if self.colour and codes else text

    def token(self, name: str) -> str:
        """Return a control token so that it cannot be taken for text that spells it."""
        return name if self.colour else f"⟨{name}⟩"


def lines(span: Span, pieces: Sequence[Piece], width: int, ink: Ink) -> Iterator[str]:
    """Yield the lines of a span: its label, a rule, and its text wrapped to `width` columns."""
    label = f"{span.part:<{PART}} {span.state:<{STATE}}"
    rule = RULES[span.state]
    for place, row in enumerate(_wrapped(_cells(pieces, ink), max(20, width - len(label) - 5))):
        beside = label if place == 0 else " " * len(label)
        yield f"  {ink.styled(beside, span.state if place == 0 else '')} {ink.styled(rule, span.state)} " + _inked(
            row, span.state, ink
        )


def _cells(pieces: Sequence[Piece], ink: Ink) -> list[Cell]:
    return [
        (char, piece.look)
        for piece in pieces
        for char in (ink.token(piece.text) if piece.look == "token" else piece.text)
    ]


def _inked(row: Sequence[Cell], state: str, ink: Ink) -> str:
    """Return a line with each run of one look in its style."""
    found, start = "", 0
    for place in range(1, len(row) + 1):
        if place == len(row) or row[place][1] != row[start][1]:
            found += ink.styled("".join(char for char, _ in row[start:place]), state, row[start][1])
            start = place
    return found


def _wrapped(cells: Sequence[Cell], width: int) -> Iterator[list[Cell]]:
    """Yield lines of at most `width` columns, ended at a blank where one is near."""
    line: list[Cell] = []
    used = 0
    for char, look in cells:
        if char == "\n":
            yield line
            line, used = [], 0
            continue
        if used + columns(char) > width:
            cut = _break(line)
            yield line[:cut]
            line = line[cut:]
            used = sum(columns(each) for each, _ in line)
        line.append((char, look))
        used += columns(char)
    if line or not cells:
        yield line


def folded(text: str, width: int) -> list[str]:
    """Return text in lines of at most `width` columns."""
    return ["".join(char for char, _ in row).rstrip() for row in _wrapped([(char, "") for char in text], width)]


def _break(line: Sequence[Cell]) -> int:
    blanks = (place + 1 for place in range(len(line) - 1, max(0, len(line) - WORD), -1) if line[place][0] == " ")
    return next(blanks, len(line))


def columns(char: str) -> int:
    """Return how many columns of a terminal a character takes."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


# --- lengths ----------------------------------------------------------------------------------------------------------


def quantiles(lengths: Mapping[str, NDArray[np.int64]]) -> list[list[Any]]:
    """Return a line for each part: how many, the shortest, quantiles and the longest, in tokens."""
    import numpy as np

    found = []
    for name, many in lengths.items():
        half, most, nearly = np.quantile(many, [0.5, 0.95, 0.99], method="higher").tolist()
        found.append([name, len(many), int(many.min()), half, most, nearly, int(many.max())])
    return found


QUANTILES = ("", "count", "shortest", "half ≤", "95% ≤", "99% ≤", "longest")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Yield the lines of a table, its numbers to the right."""
    cells = [list(head), *([value if isinstance(value, str) else f"{value:,}" for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    side: list[Callable[[str, int], str]] = [str.ljust, *[str.rjust] * (len(head) - 1)]
    for row in cells:
        yield "  " + "  ".join(put(cell, width) for put, cell, width in zip(side, row, widths, strict=True)).rstrip()


def histogram(lengths: Mapping[str, NDArray[np.int64]], width: int) -> Iterator[str]:
    """Yield bars of text: a line for each range of lengths, a column for each part, on one scale; nothing where all
    lengths are one. Ranges are round and of one size.
    """
    import numpy as np

    least = min(int(many.min()) for many in lengths.values())
    most = max(int(many.max()) for many in lengths.values())
    if least == most:
        return
    step = _round_step((most - least + 1) / BINS)
    first, last = least // step, most // step
    counts = {name: np.bincount(many // step - first, minlength=last - first + 1) for name, many in lengths.items()}
    names = [f"{n * step}–{(n + 1) * step - 1}" if step > 1 else f"{n}" for n in range(first, last + 1)]
    wide = max(map(len, names))
    digits = len(f"{max(int(many.max()) for many in counts.values()):,}")
    longest = max(8, min(BARS, (width - wide - 2) // len(counts) - digits - 5))
    yield "  " + " " * wide + "".join(f"  {name:<{longest + digits + 2}}" for name in counts).rstrip()
    for place, name in enumerate(names):
        bars = (f"  {_bar(many[place] / many.max(), longest)} {many[place]:>{digits},} " for many in counts.values())
        yield f"  {name:>{wide}}{''.join(bars)}".rstrip()


def _bar(share: float, longest: int) -> str:
    bar = "█" * round(share * longest) or ("▏" if share else "")
    return f"{bar:<{longest}}"


def _round_step(least: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, … that is no less than `least`."""
    scale = 1
    while True:
        for factor in (1, 2, 5):
            if factor * scale >= least:
                return factor * scale
        scale *= 10

"""`align-kit show <recipe>`: a few rows as the run would train on them, how long they are, and what looks wrong."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from align_kit import log, machine, registry
from align_kit.config import command_line, load
from align_kit.errors import UserError
from align_kit.resources import folder

if TYPE_CHECKING:
    from align_kit.inspect.checks import Check
    from align_kit.inspect.seen import Seen
    from align_kit.inspect.terminal import Ink

USAGE = """usage: align-kit show <recipe> [--config a.yaml ...] [--key value ...]
           [--rows N] [--row K] [--split train|eval] [--plain] [--width W] [--html page.html]

Shows rows as the run would train on them, token for token: what is masked, what is trained, what was cut off; then how
long they are and what looks wrong. No weights are read and nothing is trained.

  --rows N        rows to show (4): the first, the longest, one that was cut or dropped, others by the seed
  --row K         this row alone, counted from 1, and all of it
  --split NAME    the rows to train on, or those to evaluate on (train)
  --plain         no colours; so it is too where the output is no terminal, or NO_COLOR is set
  --width W       columns of a line; those of the terminal, else 120
  --html FILE     the same as a page"""
WIDTH, NARROW = 120, 40  # columns: where there is no terminal, and at least
SHOWN, SHOWN_CUT = 900, 300  # characters of a span that are shown unless one row is asked for


@dataclass(frozen=True)
class Options:
    """What `align-kit show` is asked beside the configuration of the run."""

    rows: int = 4
    row: int | None = None
    split: str = "train"
    plain: bool = False
    width: int | None = None
    html: str | None = None


def show(words: Sequence[str]) -> int:
    """Show the data of the run that a command line describes, and return 0.

    Raises `UserError` for a mistake in the command line or the configuration, and where there is no such data.
    """
    if not words or {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    log.quiet()
    recipe = registry.get(words[0])
    options, rest = parted(words[1:])
    config = load(recipe, rest, defaults=folder("recipes") / f"{recipe.name}.yaml")
    machine.choose_accelerator(os.environ)
    from align_kit.inspect import page
    from align_kit.inspect.seen import look

    seen = look(recipe, config, options.split, rows=options.rows, row=options.row)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # text of any script, on a terminal of any encoding
    for line in _lines(seen, options):
        log.say(line)
    if options.html:
        log.say(f"page: {page.page(seen).write(options.html)}")
    return 0


def parted(words: Sequence[str]) -> tuple[Options, list[str]]:
    """Return what is said to this command, and the words that are the run's own."""
    given, rest = command_line.parted(words, {one.name for one in fields(Options)})
    return Options(**{name: _value(name, values) for name, values in given.items()}), rest


def _value(name: str, words: Sequence[str]) -> Any:
    if name == "plain":
        if words:
            raise UserError(f"--plain takes nothing, and was given {words[0]!r}; drop it")
        return True
    if len(words) != 1:
        raise UserError(f"--{name} {' '.join(words) or '(nothing)'}: give one value")
    if name in ("html", "split"):
        return words[0]
    if not words[0].isdecimal() or int(words[0]) < 1:
        raise UserError(f"--{name} {words[0]}: give a whole number from 1")
    return int(words[0])


# --- what is printed --------------------------------------------------------------------------------------------------


def _lines(seen: Seen, options: Options) -> Iterator[str]:
    from align_kit.inspect import terminal
    from align_kit.inspect.decode import shortened

    ink = terminal.Ink(colour=_coloured(options))
    width = max(NARROW, options.width or (shutil.get_terminal_size((WIDTH, 24)).columns if _on_terminal() else WIDTH))
    yield ink.styled(f"align_kit show {seen.recipe.name}", "bold")
    for name, said in _head(seen, ink):
        for place, part in enumerate(terminal.folded(said, width - 11)):
            yield f"  {name if place == 0 else '':<8} {part}"
    for strip in seen.strips:
        yield ""
        yield from (ink.styled(part, "bold") for part in terminal.folded(strip.title, width))
        for span in strip.spans:
            pieces = seen.decoder.pieces(span)
            if not options.row:
                pieces = shortened(pieces, SHOWN_CUT if span.state == "cut off" else SHOWN)
            yield from terminal.lines(span, pieces, width, ink)
        for note in strip.notes:
            yield from (f"  {part}" for part in terminal.folded(note, width - 2))
    yield ""
    yield ink.styled("lengths in tokens", "bold")
    yield from terminal.table(terminal.QUANTILES, terminal.quantiles(seen.labels.lengths))
    yield from seen.histogram(width)
    yield ""
    yield ink.styled("checks", "bold")
    wide = max(len(check.name) for check in seen.checks)
    for check in seen.checks:
        yield from _told(check, wide, width, ink)


def _told(check: Check, wide: int, width: int, ink: Ink) -> Iterator[str]:
    from align_kit.inspect.terminal import folded

    before = f"  {ink.styled(f'{check.state:<4}', check.state)}  {check.name:<{wide}}  "
    for place, line in enumerate(folded(check.what, max(NARROW // 2, width - wide - 10))):
        yield (before if place == 0 else " " * (wide + 10)) + line


def _head(seen: Seen, ink: Ink) -> Iterator[tuple[str, str]]:
    """Yield what stands above the rows, each with its name."""
    yield "model", f"{seen.start.name}: {seen.words_sentence()}"
    yield "data", seen.split.sentence()
    yield "marks", f"{ink.token('name')} a control token, · a blank at an edge, ↵ a line's end, ╳ what is cut off"


def _on_terminal() -> bool:
    return sys.stdout.isatty()


def _coloured(options: Options) -> bool:
    return _on_terminal() and not options.plain and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

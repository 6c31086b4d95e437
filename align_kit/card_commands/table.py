"""`align-kit cards table`: all cards as a Markdown table, on screen or between two comments of a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from align_kit import cards
from align_kit.card_commands import Parser
from align_kit.card_commands.files import replace_text, text_of
from align_kit.cards import Card
from align_kit.errors import UserError

BEGIN = "<!-- cards: written by `align-kit cards table --write`, not by hand -->"
END = "<!-- end of cards -->"
_HEAD = ("card", "for", "rows", "licence", "verified", "from")


def table_command(words: Sequence[str]) -> int:
    """Print the table, or put it into the file that `--write` names, and return 0."""
    parser = Parser("table")
    parser.add_argument("--write", type=Path)
    file = parser.parse_args(words).write
    if file is None:
        print(table())
        return 0
    before = text_of(file)
    after = filled(before, table(), file)
    if before != after:
        replace_text(file, after)
    print(f"{file}: {'written' if before != after else 'nothing to change'}")
    return 0


def table() -> str:
    """Return a Markdown table with a row for each card there is, by name."""
    rows = [_HEAD, *(_row(cards.load_card(name)) for name in cards.card_names())]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(_HEAD) + "|", *lines[1:]])


def filled(text: str, table: str, file: Path) -> str:
    """Return a file's text with `table` between the marker comments; raises UserError where they are not there."""
    marks = re.compile(rf"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
    if len(marks.findall(text)) != 1:
        raise UserError(f"{file} has no place for the table; put these two lines where it belongs: {BEGIN} and {END}")
    return marks.sub(lambda _: f"\n{table}\n\n", text)


def _row(card: Card) -> tuple[str, ...]:
    rows = card.block.stats.get("rows", {})
    counts = ", ".join(f"{count:,} {split}" for split, count in rows.items()) or "not counted"
    verified = "yes" if card.block.verified else "no"
    return f"`{card.name}`", ", ".join(card.block.phases), counts, ", ".join(card.licences), verified, _source(card)


def _source(card: Card) -> str:
    source = card.block.source
    if source.kind == "builtin":
        return "built in"
    if source.homepage:
        return f"[{urlsplit(source.homepage).path.strip('/') or source.homepage}]({source.homepage})"
    return f"`{source.path}` on the hub" if source.kind == "hub" else f"files in `{source.path}`"

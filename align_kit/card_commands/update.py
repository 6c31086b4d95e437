"""`align-kit cards update`: write what can be computed into a card, and touch nothing else of it."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align_kit import cards
from align_kit.card_commands import Parser
from align_kit.card_commands.edit import put
from align_kit.card_commands.files import replace_text, text_of
from align_kit.card_commands.rows import counted, file_rows, is_counted, is_here
from align_kit.cards import Card
from align_kit.data import shapes
from align_kit.errors import UserError

_NO_DIGEST = "0" * 64


def update_command(words: Sequence[str]) -> int:
    """Update the cards named, or all of them, show what changes, and return 0; raises UserError for a broken card."""
    parser = Parser("update")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(words)
    home = cards.data_home()
    for name in options.names or cards.card_names():
        file = cards.card_file(name)
        before = text_of(file)
        after, said = updated(before, file, home)
        if before == after:
            print(f"{name}: {said}")
            continue
        print(difference(before, after, file), end="")
        if not options.dry_run:
            replace_text(file, after)
            print(f"{name}: written to {file}")
    return 0


def updated(text: str, file: Path, home: Path | None) -> tuple[str, str]:
    """Return the text of a card with digests, columns and stats as its files give them, and what to say of no change.

    Splits whose files are not here keep what they have. A file card may come without digests: this is how it gets
    them. Raises UserError for a card with another mistake, and for rows that do not fit it.
    """
    given, text = text, _with_room(text, file)
    card = cards.parse_card(text, file)
    if not is_counted(card):
        return given, "its rows are those of the Python that runs; nothing computed"
    here = [split for split in card.block.splits if is_here(card, split, home)]
    if not here:
        return given, "its files are not here; nothing computed"
    for path, value in {**_digests(card, here, home), **_columns(card, here, home)}.items():
        text = put(text, ("align_kit", *path), value)
    card = cards.parse_card(text, card.file)
    for split in here:
        count = counted(card, split, home)
        for stat in cards.PER_SPLIT:
            text = put(text, ("align_kit", "stats", stat), {split: getattr(count, stat)})
    _require_digests(cards.parse_card(text, card.file))
    return text, "nothing to change"


def _with_room(text: str, file: Path) -> str:
    """Return the text of a file card with a place for each digest that it lacks."""
    front, _ = cards.front_matter(text, file)
    block = front.get("align_kit")
    source, splits = (block.get("source"), block.get("splits")) if isinstance(block, dict) else (None, None)
    if not isinstance(source, dict) or source.get("kind") != "file" or not isinstance(splits, dict):
        return text  # no file card, or one whose reader will say what is wrong with it
    files = dict.fromkeys(cards.parse_slice(str(split))[0] for split in splits.values())
    missing = [name for name in files if name not in (source.get("sha256") or {})]
    return put(text, ("align_kit", "source", "sha256"), dict.fromkeys(missing, _NO_DIGEST)) if missing else text


def _require_digests(card: Card) -> None:
    for name, digest in card.block.source.sha256.items():
        if digest == _NO_DIGEST:
            raise UserError(f"{card.file}: source.sha256 lacks the digest of {name!r}, whose file is not here; get it")


def _digests(card: Card, here: Sequence[str], home: Path | None) -> dict[tuple[str, ...], Any]:
    """Return the digests of the files that are here, by their place in the block."""
    found = {}
    for split in here:
        file = cards.find_file(card, split, home)
        if file is not None:
            with file.open("rb") as stream:
                found[card.block.files()[split]] = hashlib.file_digest(stream, "sha256").hexdigest()
    return {("source", "sha256"): found} if found else {}


def _columns(card: Card, here: Sequence[str], home: Path | None) -> dict[tuple[str, ...], Any]:
    """Return the columns that a card without any needs, where its file's go by other names that are recognised."""
    if card.block.columns or not here:
        return {}
    first = next(file_rows(card, here[0], home), None)
    try:
        shape = shapes.recognise(first) if first else None
    except UserError:  # rows in a shape of their own, whose columns only a person can name
        return {}
    if shape is None or shape.format != card.block.format or not shape.columns:
        return {}
    return {("columns",): dict(shape.columns)}


def difference(before: str, after: str, file: Path) -> str:
    """Return what changes in a file as a unified diff."""
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), str(file), f"{file} (updated)", n=1
    )
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)

"""`align-kit cards check`: is what a card says true of the files it speaks of? Nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align_kit import cards
from align_kit.card_commands import Parser
from align_kit.card_commands.rows import counted, is_counted, is_here
from align_kit.cards import Card
from align_kit.cards.licences import is_known, licence_warnings
from align_kit.data.made import size_category
from align_kit.errors import EXIT_CODE, UserError


@dataclass
class Finding:
    """What became of one card: `wrong` makes the check fail, `notes` are said beside it."""

    name: str
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)  # split -> rows counted
    absent: list[str] = field(default_factory=list)  # splits whose files are not here

    def sentence(self) -> str:
        """Return the line that is printed."""
        if self.wrong:
            return f"{self.name:<24} wrong: {'; '.join(self.wrong)}"
        counts = ", ".join(f"{rows:,} {split}" for split, rows in self.rows.items())
        said = "; ".join([*([f"{counts} rows"] if counts else []), *self.notes])
        return f"{self.name:<24} ok{': ' if said else ''}{said}"


def check_command(words: Sequence[str]) -> int:
    """Check the cards named, or all of them, a line each; return 2 where one is wrong."""
    parser = Parser("check")
    parser.add_argument("names", nargs="*")
    names = parser.parse_args(words).names or cards.card_names()
    home = cards.data_home()
    bad = absent = 0
    for name in names:
        found = check(name, home)
        print(found.sentence(), flush=True)
        bad += bool(found.wrong)
        absent += bool(found.absent)
    where = f"in {home}" if home else "here; ALIGN_KIT_DATA names the folder to look in"
    unseen = f", {absent} without all files {where}" if absent else ""
    print(f"{len(names)} {'card' if len(names) == 1 else 'cards'}, {bad} wrong{unseen}")
    return EXIT_CODE if bad else 0


def check(name: str, home: Path | None) -> Finding:
    """Return what is wrong with a card and what should be known of it; `home` holds a folder per data set."""
    found = Finding(name)
    try:
        card = cards.load_card(name)
    except UserError as error:
        found.wrong.append(str(error))
        return found
    found.wrong += [*_licences(card), *_sections(card), *_pins(card), *_checker(card)]
    found.notes += licence_warnings(card.licences)
    if not card.block.verified:
        found.notes.append("not verified against its source")
    _files(card, home, found)
    found.wrong += _size(card, found.rows)
    return found


def _licences(card: Card) -> list[str]:
    if card.front.get("license_link"):  # a text of its own, which anyone can go and read
        return []
    return [f"licence {word!r} is not on SPDX's list or the hub's; spell it as there, or add license_link"
            for word in card.licences if not is_known(word)]  # fmt: skip


def _sections(card: Card) -> list[str]:
    """Return a line for each heading of the datasheet that is missing or has nothing below it."""
    sections = card.sections()
    missing = [heading for heading in cards.HEADINGS if not sections.get(heading)]
    return [f"its datasheet says nothing under {', '.join(missing)}"] if missing else []


def _pins(card: Card) -> list[str]:
    """Return a line where a hub card claims to be verified though nothing fixes what was looked at."""
    source = card.block.source
    if source.kind != "hub" or not card.block.verified:
        return []
    loose = [split for split in card.block.splits if source.local.get(split) not in source.sha256]
    return [f"verified: true, but there is no digest for {', '.join(loose)}"] if loose else []


def _checker(card: Card) -> list[str]:
    if card.block.checker is None:
        return []
    try:
        cards.checker(card)
    except UserError as error:
        return [str(error).removeprefix(f"card {card.name}: ")]
    return []


def _files(card: Card, home: Path | None, found: Finding) -> None:
    """Verify, read and count each split whose file is here, and say which are not."""
    found.absent = [split for split in card.block.splits if not is_here(card, split, home)]
    if found.absent:
        some = f"the files of {', '.join(found.absent)} are"
        which = "its files are" if len(found.absent) == len(card.block.splits) else some
        found.notes.append(f"{which} not here: digest not checked")
    if not is_counted(card):
        found.notes.append("its rows are those of the Python that runs: not counted")
        return
    for split in card.block.splits:
        if split in found.absent:
            continue
        try:
            cards.local_file(card, split, home)
            count = counted(card, split, home)
        except UserError as error:
            found.wrong.append(str(error))
            continue
        found.rows[split] = count.rows
        for stat in cards.PER_SPLIT:
            real = getattr(count, stat)
            said = card.block.stats.get(stat, {}).get(split, real)
            if said != real:
                found.wrong.append(f"stats say {said:,} {stat} in {split}, its file has {real:,}")
    if found.rows and "rows" not in card.block.stats:
        found.notes.append("no stats yet; `align-kit cards update` writes them")


def _size(card: Card, rows: dict[str, int]) -> list[str]:
    """Return a line where the size the front matter gives to search engines is not that of the files."""
    given = card.front.get("size_categories")
    if not given or set(rows) != set(card.block.splits):
        return []
    real = size_category(sum(rows.values()))
    listed = [given] if isinstance(given, str) else given
    return [] if real in listed else [f"size_categories is {', '.join(map(str, listed))}, its rows make {real}"]

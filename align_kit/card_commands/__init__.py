"""`align-kit cards …`: list the data cards, hold them to their files, and hand them on."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import NoReturn

from align_kit import cards as shelf
from align_kit.errors import UserError, unknown

USAGE = """usage: align-kit cards                                     a line for each card there is
       align-kit cards check [name | file.md ...]          are they true to their files? exit code 2 where not
       align-kit cards update [name | file.md ...] [--dry-run]
       align-kit cards croissant <name | file.md> [--output card.json]
       align-kit cards table [--write README.md]

check      verifies, offline: digests, row counts, columns, splits, licences, the datasheet's sections, the checker
update     writes what can be computed into the card: stats, digests, columns that go by another name; the rest of the
           file stays as it is, byte for byte; --dry-run shows the difference and writes nothing
croissant  prints the card as Croissant 1.0, the JSON-LD that data set search engines and loaders read
table      prints all cards as a Markdown table; --write puts it between the two marker comments of a file

Files are looked for in the folder $ALIGN_KIT_DATA, beside the card, and below the working folder."""

# Imported when it is asked for.
COMMANDS = {
    "check": "align_kit.card_commands.check:check_command",
    "update": "align_kit.card_commands.update:update_command",
    "croissant": "align_kit.card_commands.croissant:croissant_command",
    "table": "align_kit.card_commands.table:table_command",
}


class Parser(argparse.ArgumentParser):
    """The options of one of the commands; a mistake in them is one line like any other."""

    def __init__(self, command: str) -> None:
        super().__init__(f"align-kit cards {command}", usage=USAGE.partition(" ")[2], add_help=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; `align-kit cards --help` says what it takes")


def cards(words: Sequence[str]) -> int:
    """Run one of the commands on cards, or list them all, and return the exit code."""
    if not words:
        return _list()
    if {"-h", "--help", "help"} & set(words):
        print(USAGE)
        return 0
    if words[0] not in COMMANDS:
        raise unknown("command of align-kit cards", words[0], COMMANDS)
    module, _, function = COMMANDS[words[0]].partition(":")
    return int(getattr(importlib.import_module(module), function)(list(words[1:])))


def _list() -> int:
    for name in shelf.card_names():
        card = shelf.load_card(name)
        print(f"{name:<24} {', '.join(card.block.phases):<30} {', '.join(card.licences):<18} {card.pretty_name}")
    return 0

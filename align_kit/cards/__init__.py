"""Data cards: what a data set is, where it comes from, what its licence says, and which digest proves it.

A card is `data_cards/<name>.md`: Hugging Face front matter, one validated `align_kit:` block in it, and a datasheet in
Markdown (Gebru et al. 2021) below. Cards are data; nothing here opens the rows they describe.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from align_kit.cards.block import (
    FORMAT_KINDS,
    PER_SPLIT,
    PHASE_KINDS,
    SCHEMA_VERSION,
    Block,
    Filter,
    Made,
    Origin,
    first_problem,
    is_template,
    parse_slice,
    reason_fault,
    slice_bounds,
)
from align_kit.cards.licences import licence_warnings
from align_kit.errors import UserError, unknown
from align_kit.resources import folder

__all__ = [
    "FORMAT_KINDS",
    "HEADINGS",
    "PER_SPLIT",
    "PHASE_KINDS",
    "SCHEMA_VERSION",
    "Block",
    "Card",
    "Filter",
    "Made",
    "Origin",
    "alternatives",
    "card_file",
    "card_folders",
    "card_names",
    "checker",
    "data_home",
    "find_file",
    "first_problem",
    "front_matter",
    "is_template",
    "load_card",
    "local_file",
    "parse_card",
    "parse_slice",
    "read_card",
    "reason_fault",
    "slice_bounds",
    "verify_sha256",
]

HEADINGS = ("Motivation", "Composition", "Collection", "Preprocessing", "Uses", "Distribution", "Maintenance")


@dataclass(frozen=True)
class Card:
    """A validated card: `name` and `file`, the front matter's licence and title, the block and the Markdown body.

    `front` is the whole front matter, with what only others read (`language`, `tags`, `citation`, ...).
    """

    name: str
    file: Path
    licences: tuple[str, ...]
    pretty_name: str
    block: Block
    body: str
    front: dict[str, Any] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """Return what a user should know before training: licence limits, and a card nobody could check."""
        found = [f"card {self.name}: {text}" for text in licence_warnings(self.licences)]
        if not self.block.verified:
            found.append(f"card {self.name}: not verified against its source")
        return found

    def sections(self) -> dict[str, str]:
        """Return the datasheet by heading: the Markdown below each `## heading`, without outer white space."""
        parts = re.split(r"^## +(.*?)[ \t]*$", self.body, flags=re.MULTILINE)
        return {heading: text.strip() for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def checker(card: Card) -> Callable[[str, str, str], Any]:
    """Return the function the card names to judge a completion: (prompt, completion, answer) -> verdict.

    Raises UserError when the card names none, or one that cannot be imported.
    """
    dotted = card.block.checker
    if dotted is None:
        raise UserError(f"card {card.name} names no checker; add one to its align_kit block, as card gsm8k does")
    module, _, name = dotted.partition(":")
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise UserError(f"card {card.name}: checker {dotted} cannot be imported ({error})") from None


def card_folders() -> list[Path]:
    """Return the folders that are searched for cards: `./data_cards` first, then the packaged ones."""
    folders = [Path("data_cards"), folder("data_cards")]
    return [path for path in folders if path.is_dir()]


def card_names() -> list[str]:
    """Return the names of all cards that can be found."""
    return sorted({file.stem for path in card_folders() for file in path.glob("*.md") if file.stem != "README"})


def load_card(name: str | Path) -> Card:
    """Return the card called `name`, or the one in the file `name` when it ends in .md.

    Raises UserError for an unknown name (with the nearest ones), unreadable YAML, a missing licence or a field that
    is wrong (naming file and field).
    """
    return read_card(card_file(name))


def card_file(name: str | Path) -> Path:
    """Return the file of the card called `name`, or `name` itself when it ends in .md; raises UserError for neither."""
    if str(name).endswith(".md"):
        return Path(name)
    for path in card_folders():
        if (path / f"{name}.md").is_file():
            return path / f"{name}.md"
    raise unknown("card", str(name), card_names())


def read_card(file: Path) -> Card:
    """Read and validate one card file; raises UserError as `load_card` does."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the card {file}: {error}") from None
    return parse_card(text, file)


def parse_card(text: str, file: Path) -> Card:
    """Validate the text of a card that stands, or is to stand, in `file`; raises UserError as `load_card` does."""
    front, body = front_matter(text, file)
    given = front.get("license")
    if given == "other" and isinstance(front.get("license_name"), str):  # Hugging Face's way to name one off its list
        given = front["license_name"]
    licences = tuple([given] if isinstance(given, str) else given or ())
    if not licences or not all(isinstance(word, str) and word.strip() for word in licences):
        raise UserError(f"{file}: field license: missing; name the data's licence, e.g. 'license: mit' or 'unknown'")
    if not isinstance(front.get("pretty_name"), str):
        raise UserError(f"{file}: field pretty_name: missing; give the data set's name in words")
    if not isinstance(front.get("align_kit"), dict):
        raise UserError(f"{file}: field align_kit: missing; a card needs one align_kit block in its front matter")
    try:
        block = Block.model_validate(front["align_kit"])
    except ValidationError as error:
        raise UserError(f"{file}: {first_problem(error)}") from None
    return Card(file.stem, file, licences, front["pretty_name"], block, body, front)


def front_matter(text: str, file: Path) -> tuple[dict[str, Any], str]:
    """Split a card's text into its front matter and its body; raises UserError where there is none or it is no YAML."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n?(.*)", text, re.DOTALL)
    if not match:
        raise UserError(f"{file}: no front matter; a card starts with YAML between two lines of ---")
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 2}" if mark else ""  # one for the opening ---, one because marks count from 0
        raise UserError(f"{file}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(front, dict):
        raise UserError(f"{file}: the front matter is not a mapping of fields")
    return front, match[2]


def data_home(override: str | Path | None = None) -> Path | None:
    """Return the folder that holds one folder per data set: `override`, else `$ALIGN_KIT_DATA`, else None."""
    chosen = override or os.environ.get("ALIGN_KIT_DATA")
    if chosen and not Path(chosen).is_dir():
        raise UserError(f"ALIGN_KIT_DATA is {str(chosen)!r}, which is not a folder")
    return Path(chosen) if chosen else None


def local_file(card: Card, split: str, home: Path | None) -> Path | None:
    """Return the verified file that serves `split` from disk, or None where there is none.

    Raises UserError when the file's SHA-256 is not the card's.
    """
    path = find_file(card, split, home)
    if path is not None:
        verify_sha256(card, card.block.files()[split], path)
    return path


def find_file(card: Card, split: str, home: Path | None) -> Path | None:
    """Return the file that serves `split` from disk, whatever it holds, or None where there is none.

    A file card's folder is looked for below `home`, then beside the card, then from the working folder; one that is
    `.` holds the card itself, so that both can be moved together.
    """
    name = card.block.files().get(split)
    if name is None:
        return None
    below = Path(card.block.source.path)
    if card.block.source.kind != "file":
        candidates = [home / name] if home else []
    elif card.block.source.path == ".":
        candidates = [card.file.parent / name]
    else:
        candidates = [*([home / below / name] if home else []), card.file.parent / below / name, below / name]
    return next((path for path in candidates if path.is_file()), None)


def verify_sha256(card: Card, name: str, path: Path) -> None:
    """Raise UserError when `path` does not have the digest that the card gives for `name`."""
    expected = card.block.source.sha256.get(name)
    if expected is None:
        return
    with path.open("rb") as stream:
        seen = hashlib.file_digest(stream, "sha256").hexdigest()
    if seen != expected:
        raise UserError(
            f"{path}: sha256 is {seen[:16]}..., the card {card.file} says {expected[:16]}...; "
            "restore the file, or update source.sha256 if the change was meant"
        )


def alternatives(phase: str | None) -> list[str]:
    """Return the built-in cards (no download) that serve `phase`, or all of them where phase is None.

    A card that shows the rows of another one's set comes after those that show their own.
    """
    found = []
    for name in card_names():
        try:
            block = load_card(name).block
        except UserError:
            continue  # a broken card of the user's own must not hide the advice
        if block.source.kind == "builtin" and (phase is None or phase in block.phases):
            found.append((block.source.path != name, name))
    return [name for _, name in sorted(found)]

"""What a row says of its own origin: the licence it names, the place it is from, a copyright notice in its text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from align_kit.data.shapes import Row
from align_kit.errors import UserError

LICENCE_COLUMNS = ("license", "licence", "licenses", "license_name", "max_stars_repo_licenses")
SOURCE_COLUMNS = ("url", "source", "domain", "website", "source_url", "dataset")
_HOLDERS = ("meta", "metadata")  # columns that hold such columns in many sets
_NOTICE = re.compile(
    r"(?:©|\(c\)|\bcopyright\b)[\s,]{0,3}(?:©|\(c\)|by)?\s{0,3}(?:19|20)\d\d\b|\ball rights reserved\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Screen:
    """Which rows may stay: of the licences `allowed` (None: all), from no `blocked` place, `notices` dropped or not."""

    allowed: frozenset[str] | None = None
    blocked: frozenset[str] = field(default_factory=frozenset)
    notices: bool = False

    def objection(self, row: Row, texts: Sequence[str]) -> tuple[str, str] | None:
        """Return the rule that a row breaks and what was seen, None where it may stay."""
        if self.allowed is not None:
            named = [_plain(word) for word in _values(row, LICENCE_COLUMNS)]
            if not named:
                return "licence", "no licence named"
            if not set(named) <= self.allowed:
                return "licence", ", ".join(named)
        if self.blocked:
            for place in _values(row, SOURCE_COLUMNS):
                if blocked := self._blocked(place):
                    return "blocked source", blocked
        if self.notices and (seen := notice(texts)):
            return "copyright notice", seen
        return None

    def _blocked(self, place: str) -> str | None:
        """Return the entry that blocks a place: the place itself, its host, or a domain above the host."""
        place = place.strip().lower()
        host = urlsplit(place).hostname or "" if "://" in place else place.split("/")[0]
        labels = host.split(".")
        above = [".".join(labels[start:]) for start in range(len(labels))]
        return next((entry for entry in (place, *above) if entry in self.blocked), None)


def says_where(row: Row) -> bool:
    """Tell whether a row says where it is from, without which no block list can hold it."""
    return any(_values(row, SOURCE_COLUMNS))


def notice(texts: Sequence[str]) -> str | None:
    """Return the first copyright notice in the texts."""
    found = (match for text in texts if _may_hold_notice(text) and (match := _NOTICE.search(text)))
    return next((" ".join(match[0].split()) for match in found), None)


def _may_hold_notice(text: str) -> bool:
    """Tell quickly that most texts hold none."""
    lower = text.lower()
    return any(mark in lower for mark in ("©", "(c)", "copyright", "rights reserved"))


def licences(words: str) -> frozenset[str]:
    """Return the licences of an option `mit,apache-2.0`; raises UserError where there is none."""
    found = frozenset(_plain(word) for word in words.split(",") if word.strip())
    if not found:
        raise UserError("--licences needs at least one, as in --licences mit,apache-2.0")
    return found


def blocked(file: str) -> frozenset[str]:
    """Return the places of a block list: one a line, a domain or the value of a source column; # begins a comment."""
    return frozenset(line.lower() for line in listed(Path(file)))


def listed(file: Path) -> list[str]:
    """Return the lines of a list, without blank ones and comments; raises UserError where it cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {file}: {error}") from None
    found = [text for line in lines if (text := line.partition("#")[0].strip())]
    if not found:
        raise UserError(f"the list {file} is empty; give one entry a line")
    return found


def _values(row: Row, columns: Sequence[str]) -> Iterator[str]:
    holders = [row, *(row[name] for name in _HOLDERS if isinstance(row.get(name), dict))]
    for holder in holders:
        for column in columns:
            value: Any = holder.get(column)
            yield from (str(item) for item in (value if isinstance(value, list) else [value]) if item)


def _plain(licence: str) -> str:
    return re.sub(r"[\s_]+", "-", licence.strip().lower())

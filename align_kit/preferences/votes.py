"""What annotators said of a row: votes read from columns, lists or objects, and what they say together.

Votes are compared as words: 1, 1.0 and "1" are one vote, and so are True, "true" and "TRUE". Null, NaN and blank cells
hold no vote.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from align_kit.data.shapes import Row
from align_kit.errors import UserError, unknown

TIES = frozenset({"tie", "tied", "draw", "equal", "same", "both", "neither"})
SIDES = {"chosen": "chosen", "rejected": "rejected"}  # how votes on a pair may name its sides
TRUTHS = {"true": "1", "1": "1", "false": "0", "0": "0"}  # numbers, so that a scale can place them
# How a list of objects names who voted, and for what.
_WHO = ("annotator", "annotator_id", "rater", "rater_id", "worker", "worker_id", "user", "user_id")
_WHAT = ("vote", "label", "annotation", "rating", "choice", "preference", "value")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Vote(NamedTuple):
    """One vote, and who cast it ("" where a list does not say)."""

    who: str
    value: str


Pattern = tuple[tuple[str, int], ...]  # (vote, how often), sorted: what a row's votes are when nobody asks by whom


@dataclass(frozen=True)
class Verdict:
    """What a row's votes say together.

    `share` is the share of votes for the recorded label where votes name it (`chosen` for a pair, 1 or 0 for a
    completion), else for the most common vote; None with fewer than two votes. `tied`: no vote is the most common, or
    the most common one is a tie. `against`: votes name the recorded label, and most are for another.
    """

    votes: int
    share: float | None
    tied: bool
    against: bool


class Annotators:
    """Reads the votes of rows from `columns`: several with a vote each, or one with a list or an object of votes."""

    def __init__(self, columns: Sequence[str]) -> None:
        if len(set(columns)) < len(columns):
            raise UserError(f"--annotators {','.join(columns)} names a column twice; name each annotator once")
        self.columns = tuple(columns)
        self.found: set[str] = set()
        self.voted: set[str] = set()
        self.single = 0  # rows in which the one column held one vote, not several

    def votes(self, row: Row) -> list[Vote]:
        """Return the votes that a row holds; raises `UserError` for a cell that is none."""
        cells = {name: cell(row, name) for name in self.columns}
        self.found |= {name for name, (there, _) in cells.items() if there}
        if len(cells) == 1:
            ((name, (_, value)),) = cells.items()
            return self._several(name, value)
        votes = [Vote(name, word) for name, (_, value) in cells.items() if (word := _single(name, value)) is not None]
        self.voted.update(vote.who for vote in votes)
        return votes

    def _several(self, name: str, value: Any) -> list[Vote]:
        value = _decoded(value)
        if isinstance(value, Mapping):
            given = [(str(who), vote) for who, vote in value.items()]
        elif isinstance(value, (list, tuple)):
            given = [_named(name, one) for one in value]
        else:
            word = _single(name, value)
            self.single += word is not None
            return [] if word is None else [Vote(name, word)]
        return [Vote(who, word) for who, vote in given if (word := _single(name, vote)) is not None]

    def silent(self) -> list[str]:
        """Return the columns, of several, without a single vote."""
        return [name for name in self.columns if name not in self.voted] if len(self.columns) > 1 else []

    def check(self, seen: Sequence[str]) -> None:
        """Raise `UserError`, after the last row, where a column was in no row, or there is but one annotator.

        `seen` are the columns of the rows.
        """
        for name in self.columns:
            if name not in self.found:
                raise unknown("annotators' column", name, seen)
        if len(self.columns) == 1 and self.single:
            raise UserError(
                f"--annotators {self.columns[0]}: one annotator only, with one vote a row; agreement needs two: name "
                "several columns (a,b), or one that holds lists of votes"
            )


def pattern_of(votes: Sequence[Vote]) -> Pattern:
    """Return how often each value was voted for."""
    return tuple(sorted(Counter(vote.value for vote in votes).items()))


def names_of(values: Iterable[str], kind: str) -> Mapping[str, str]:
    """Return how the votes of a set name labels, as vote -> label; empty where they are other words.

    Those of a pair are chosen and rejected, those of a completion 1 and 0, however they were written. All `values` of
    the set decide: where votes are 1 to 5, a 1 does not mean true.
    """
    known = SIDES if kind == "preference" else TRUTHS
    return known if set(values) <= {*known, *TIES} else {}


def verdict(pattern: Pattern, recorded: str | None, names: Mapping[str, str]) -> Verdict:
    """Return what votes say of a row whose label is `recorded` (a value of `names`, from `names_of`)."""
    counts: Counter[str] = Counter()
    for word, count in pattern:
        counts[names.get(word, word)] += count
    votes = counts.total()
    if votes < 2:
        return Verdict(votes, None, False, False)
    (first, most), *rest = counts.most_common()
    tied = first in TIES or (bool(rest) and rest[0][1] == most)
    named = bool(names) and recorded is not None
    share = counts[str(recorded)] / votes if named else most / votes
    return Verdict(votes, share, tied, named and not tied and first != recorded)


def cell(row: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    """Return whether a row has a column and what it holds; dots reach into objects."""
    if column in row:
        return True, row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def word_of(value: Any) -> str | None:
    """Return a vote as the word it is compared by, None for no vote."""
    if value is None:
        return None
    word = str(value).strip().casefold()
    if not word or word == "nan":
        return None
    if _NUMBER.fullmatch(word) and math.isfinite(number := float(word)):
        return str(int(number)) if number.is_integer() else repr(number)
    return word


def _single(name: str, value: Any) -> str | None:
    if isinstance(value, (list, tuple, Mapping)):
        raise UserError(
            f"column {name} holds {str(value)[:40]!r} where one vote belongs; name a column of lists alone, or several "
            "columns with one vote each"
        )
    return word_of(value)


def _named(name: str, one: Any) -> tuple[str, Any]:
    """Return who voted and for what, from one item of a list."""
    if not isinstance(one, Mapping):
        return "", one
    what = next((key for key in _WHAT if key in one), None)
    if what is None:
        raise UserError(f"column {name}: a vote {str(dict(one))[:60]} has none of the keys {', '.join(_WHAT)}")
    return str(next((one[key] for key in _WHO if key in one), "")), one[what]


def _decoded(value: Any) -> Any:
    """Return a list or an object that a table's cell holds as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value

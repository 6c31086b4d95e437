"""Votes as data sets hold them: columns, lists, objects, cells of a table; and what they say together."""

from __future__ import annotations

from collections import Counter

import pytest

from align_kit.data.shapes import Row
from align_kit.preferences.votes import Annotators, names_of, pattern_of, verdict, word_of

SAME_VOTES = [
    ({"a": "x", "b": "y", "c": None}, ["a", "b", "c"]),
    ({"votes": ["x", "y"]}, ["votes"]),
    ({"votes": ["x", None, "y", float("nan"), ""]}, ["votes"]),
    ({"votes": {"ann": "x", "bob": "y", "cyd": None}}, ["votes"]),
    ({"votes": [{"annotator": "ann", "label": "x"}, {"rater": "bob", "vote": "y"}]}, ["votes"]),
    ({"votes": '["x", "y"]'}, ["votes"]),  # a cell of a table
    ({"meta": {"votes": ["x", "y"]}}, ["meta.votes"]),
    ({"meta": {"a": "x", "b": "y"}}, ["meta.a", "meta.b"]),
    ({"meta.votes": [" X", "Y\n"]}, ["meta.votes"]),
]


@pytest.mark.parametrize(("row", "columns"), SAME_VOTES)
def test_votes_are_read_in_every_form(row: Row, columns: list[str]) -> None:
    assert pattern_of(Annotators(columns).votes(row)) == (("x", 1), ("y", 1))


def test_votes_are_compared_as_words() -> None:
    assert {word_of(value) for value in (1, 1.0, "1", " 1.0 ", "1e0")} == {"1"}
    assert {word_of(value) for value in (True, "true", "TRUE")} == {"true"}
    assert {word_of(value) for value in (None, "", "  ", float("nan"), "NaN")} == {None}
    assert word_of("1_000") == "1_000" and word_of("inf") == "inf" and word_of(0.25) == "0.25" and word_of("0") == "0"


VERDICTS = [  # votes, kind, recorded -> share, tied, against
    ("chosen chosen rejected", "preference", "chosen", 2 / 3, False, False),
    ("rejected rejected chosen", "preference", "chosen", 1 / 3, False, True),
    ("rejected rejected", "preference", "chosen", 0, False, True),
    ("chosen rejected", "preference", "chosen", 1 / 2, True, False),
    ("tie tie chosen", "preference", "chosen", 1 / 3, True, False),
    ("a a b", "preference", "chosen", 2 / 3, False, False),  # which side is a: not known
    ("1 1 0", "binary", "1", 2 / 3, False, False),
    ("1 1 false", "binary", "0", 1 / 3, False, True),
    ("5 5 1", "binary", "0", 2 / 3, False, False),  # a scale, where 1 is not true
    ("chosen", "preference", "chosen", None, False, False),
    ("", "preference", "chosen", None, False, False),
]


@pytest.mark.parametrize(("votes", "kind", "recorded", "share", "tied", "against"), VERDICTS)
def test_what_votes_say_together(
    votes: str, kind: str, recorded: str, share: float | None, tied: bool, against: bool
) -> None:
    said = verdict(tuple(sorted(Counter(votes.split()).items())), recorded, names_of(votes.split(), kind))
    assert (said.share, said.tied, said.against) == (pytest.approx(share) if share else share, tied, against)

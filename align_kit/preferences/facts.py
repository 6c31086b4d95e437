"""What one pass over the rows notes of each: numbers and digests, never the text, so that large files stay on disk."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from align_kit.data.shapes import Row
from align_kit.errors import UserError, unknown
from align_kit.preferences.alpha import Tally
from align_kit.preferences.measures import pair_key, plain, similarity, text_of, words
from align_kit.preferences.votes import Annotators, Pattern, Vote, cell, names_of, pattern_of, word_of

SIDES = {"preference": ("chosen", "rejected"), "binary": ("completion",), "prompt_completion": ("completion",)}


@dataclass
class Facts:
    """Of each row, in order: digest, order of the sides, lengths (characters), similarity, votes, scores, label."""

    kind: str
    columns: list[str] = field(default_factory=list)  # of the rows as they stand in the file
    keys: list[bytes] = field(default_factory=list)
    reverse: bytearray = field(default_factory=bytearray)  # the pair in its other order; a completion labelled false
    empty: bytearray = field(default_factory=bytearray)
    identical: bytearray = field(default_factory=bytearray)
    labels: bytearray = field(default_factory=bytearray)
    lengths: tuple[array[int], array[int]] = field(default_factory=lambda: (array("q"), array("q")))
    similar: array[float] = field(default_factory=lambda: array("d"))
    patterns: list[Pattern] = field(default_factory=list)
    voted: array[int] = field(default_factory=lambda: array("q"))  # place in `patterns`
    scores: tuple[array[float], array[float]] = field(default_factory=lambda: (array("d"), array("d")))
    casts: dict[str, list[int]] = field(default_factory=dict)  # annotator -> votes, those with most of the others

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def paired(self) -> bool:
        """Whether rows are pairs of a chosen and a rejected completion."""
        return self.kind == "preference"

    def margin(self, place: int) -> float:
        """Return the chosen side's score less the rejected side's; NaN where one is missing."""
        return self.scores[0][place] - self.scores[1][place]

    def ratio(self, place: int) -> float:
        """Return how many times as long as the shorter side the longer one is; infinite beside an empty one."""
        short, long = sorted((self.lengths[0][place], self.lengths[1][place]))
        return long / short if short else math.inf if long else 1.0

    def recorded(self, place: int) -> str | None:
        """Return the label of a row, in the words of `votes.names_of`; None where rows have none."""
        if self.kind == "binary":
            return "1" if self.labels[place] else "0"
        return "chosen" if self.paired else None

    def names(self) -> Mapping[str, str]:
        """Return how votes name the labels, as `votes.names_of` does."""
        return names_of({value for pattern in self.patterns for value, _ in pattern}, self.kind)

    def tally(self) -> Tally:
        """Return the votes of all rows, by the labels they name."""
        tally, names = Tally(), self.names()
        for number, rows in Counter(self.voted).items():
            votes: Counter[str] = Counter()
            for value, count in self.patterns[number]:
                votes[names.get(value, value)] += count
            tally.count(tuple(sorted(votes.items())), rows)
        return tally


class Gather:
    """Notes the facts of rows one by one."""

    def __init__(self, kind: str, annotators: Annotators | None, scores: Sequence[str]) -> None:
        if kind not in SIDES:
            raise UserError(f"{kind} rows hold no preference; give pairs (chosen, rejected) or labelled completions")
        self.facts = Facts(kind)
        self.annotators, self.scores = annotators, tuple(scores)
        self._numbers: dict[Pattern, int] = {}
        self._columns: dict[str, None] = {}
        self._scored: set[str] = set()
        self._check_scores()

    def _check_scores(self) -> None:
        sides = SIDES[self.facts.kind]
        if self.scores and self.facts.kind == "prompt_completion":
            raise UserError("--reward-scores is held against labels, and these rows have none; give pairs or labels")
        if self.scores and len(self.scores) != len(sides):
            needed = "two columns, the chosen side's and the rejected side's" if len(sides) == 2 else "one column"
            raise UserError(f"--reward-scores {','.join(self.scores)}: {self.facts.kind} rows need {needed}")

    def add(self, row: Row, canonical: Row) -> None:
        """Note one row, as it stands in the file and in its canonical form."""
        facts = self.facts
        self._columns.update(dict.fromkeys(row))
        texts = [text_of(canonical[side]) for side in SIDES[facts.kind]]
        key, reverse = pair_key(text_of(canonical["prompt"]), texts)
        label = bool(canonical.get("label"))
        facts.keys.append(key)
        facts.reverse.append(reverse if facts.paired else not label and facts.kind == "binary")
        facts.labels.append(label)
        facts.empty.append(not all(text.strip() for text in texts))
        for lengths, text in zip(facts.lengths, texts, strict=False):
            lengths.append(len(text))
        if facts.paired:
            facts.identical.append(plain(texts[0]) == plain(texts[1]))
            facts.similar.append(similarity(*map(words, texts)))
        if self.annotators is not None:
            self._note_votes(self.annotators.votes(row))
        for name, scores in zip(self.scores, facts.scores, strict=False):
            scores.append(self._score(row, name))

    def _note_votes(self, votes: list[Vote]) -> None:
        pattern = pattern_of(votes)
        if pattern not in self._numbers:
            self._numbers[pattern] = len(self.facts.patterns)
            self.facts.patterns.append(pattern)
        self.facts.voted.append(self._numbers[pattern])
        names = {vote.who for vote in votes} - {""}
        if len(votes) < 3 or len(names) < len(votes):  # of two, each is all of the others; "" is nobody
            return
        for vote in votes:
            self._note_annotator(vote, [other for other in votes if other is not vote])

    def _note_annotator(self, vote: Vote, others: list[Vote]) -> None:
        """Count whether a vote is what most of the others voted for; even splits have no most."""
        counts = pattern_of(others)
        most = [value for value, count in counts if count == max(count for _, count in counts)]
        cast = self.facts.casts.setdefault(vote.who, [0, 0])
        if len(most) == 1:
            cast[0] += 1
            cast[1] += vote.value == most[0]

    def _score(self, row: Row, name: str) -> float:
        """Return a score, NaN where there is none; raises `UserError` for one that is no number."""
        there, value = cell(row, name)
        if there:
            self._scored.add(name)
        if value is None or word_of(value) is None:
            return math.nan
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UserError(f"column {name} holds {str(value)[:40]!r} where a score belongs") from None
        return number if math.isfinite(number) else math.nan

    def done(self) -> Facts:
        """Return the facts; raises `UserError` where a column that was named is in no row."""
        self.facts.columns = list(self._columns)
        if self.annotators is not None:
            self.annotators.check(self.facts.columns)
        for name in self.scores:
            if name not in self._scored:
                raise unknown("column of reward scores", name, self.facts.columns)
        return self.facts


def vote_like(columns: Iterable[str]) -> list[str]:
    """Return the columns that look like annotators' votes by their names."""
    return [name for name in columns if any(part in name.lower() for part in ("annotat", "rater", "vote", "judge"))]


def score_like(columns: Sequence[str]) -> list[str]:
    """Return the two columns that look like scores of the chosen and the rejected side, or none."""
    for name in columns:
        other = name.replace("chosen", "rejected")
        if other != name and other in columns and any(part in name.lower() for part in ("score", "reward", "rating")):
            return [name, other]
    return []

"""Which rows are dropped, and why: a row goes for the first rule that holds, those that nobody asked for before."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from align_kit.errors import UserError
from align_kit.preferences.facts import Facts
from align_kit.preferences.votes import Verdict, verdict

KEPT = ""
# Reasons that hold without being asked for; --keep takes them back.
STANDING = ("empty", "identical", "repeated", "contradicting", "few-votes", "no-score")


@dataclass(frozen=True)
class Wanted:
    """What the filters are asked for; None: not."""

    agreement: float | None = None
    weight_by: str | None = None
    resample: bool = False
    drop_ties: bool = False
    max_length_ratio: float | None = None
    reward_margin: float | None = None
    near: float | None = None
    keep: tuple[str, ...] = ()
    seed: int = 0


class Step(NamedTuple):
    """One step of the chain: its name, its rule in words, its threshold, rows in and rows dropped."""

    name: str
    rule: str
    threshold: float | None
    rows: int
    dropped: int


@dataclass(frozen=True)
class Decision:
    """Each row's reason to be dropped ("" for those kept), the steps, and the weights where they were asked for."""

    reasons: list[str]
    steps: list[Step]
    weights: list[float | None] | None = None

    @property
    def kept(self) -> int:
        """Rows that are kept."""
        return self.reasons.count(KEPT)


def check(wanted: Wanted, facts: Facts, *, voted: bool, scored: bool) -> None:
    """Raise `UserError` where a filter lacks what it goes by."""
    needs_votes = {"--agreement": wanted.agreement is not None, "--weight-by agreement": wanted.weight_by is not None}
    for option, asked in needs_votes.items():
        if asked and not voted:
            raise UserError(f"{option} goes by votes; name the annotators' columns with --annotators a,b")
    if wanted.resample and wanted.weight_by is None:
        raise UserError("--resample goes by weights; add --weight-by agreement")
    if wanted.drop_ties and not voted and not (scored and facts.paired):
        raise UserError("--drop-ties goes by votes (--annotators a,b) or by both sides' scores (--reward-scores a,b)")
    if wanted.reward_margin is not None and not scored:
        raise UserError("--reward-margin goes by scores; add --reward-scores chosen,rejected or --reward-model folder")
    only_pairs = {"--reward-margin": wanted.reward_margin, "--near": wanted.near,
                  "--max-length-ratio": wanted.max_length_ratio}  # fmt: skip
    if wanted.weight_by and "weight" in facts.columns:
        raise UserError("--weight-by agreement writes a column `weight`, which these rows have already; rename theirs")
    for option, value in only_pairs.items():
        if value is not None and not facts.paired:
            raise UserError(f"{option} compares a chosen with a rejected completion; these are {facts.kind} rows")


def verdicts(facts: Facts) -> list[Verdict]:
    """Return what the votes of each row say; empty where nobody voted."""
    names = facts.names()
    return [
        verdict(facts.patterns[number], facts.recorded(place), names) for place, number in enumerate(facts.voted)
    ]


def decide(facts: Facts, wanted: Wanted) -> Decision:
    """Return which rows are dropped, and why."""
    said = verdicts(facts)
    reasons = [KEPT] * len(facts)
    steps = []
    for rule in _rules(facts, wanted, said):
        held = [place for place, reason in enumerate(reasons) if reason == KEPT]
        dropped = [place for place in held if rule.holds(place)]
        for place in dropped:
            reasons[place] = rule.name
        steps.append(Step(rule.name, rule.words, rule.threshold, len(held), len(dropped)))
    weights = [one.share for one in said] if wanted.weight_by else None
    if wanted.resample and weights is not None:
        steps.append(_thin(reasons, weights, wanted.seed))
    return Decision(reasons, steps, weights)


class _Rule(NamedTuple):
    name: str
    words: str
    threshold: float | None
    holds: Callable[[int], bool]


def _rules(facts: Facts, wanted: Wanted, said: Sequence[Verdict]) -> Iterator[_Rule]:
    """Yield the rules that are on, in order."""
    for rule in (*_standing(facts, wanted, said), *_asked(facts, wanted, said)):
        if rule.name not in wanted.keep:
            yield rule


def _standing(facts: Facts, wanted: Wanted, said: Sequence[Verdict]) -> Iterator[_Rule]:
    """Yield the rules that hold without being asked for: rows that teach nothing, or teach both ways."""
    yield _Rule("empty", "a completion without text", None, lambda at: bool(facts.empty[at]))
    if facts.paired:
        yield _Rule("identical", "chosen equals rejected", None, lambda at: bool(facts.identical[at]))
    again = repeats(facts, drop_minority="contradicting" not in wanted.keep)
    what, other = ("pair", "the other way round") if facts.paired else ("completion", "with the other label")
    if facts.kind != "prompt_completion":
        rule = f"the same {what} {other}, as often or more"
        yield _Rule("contradicting", rule, None, lambda at: again[at] == "contradicting")
    yield _Rule("repeated", f"the same {what} again", None, lambda at: again[at] == "repeated")
    if said and (wanted.agreement is not None or wanted.weight_by is not None):
        yield _Rule("few-votes", "fewer than two votes", None, lambda at: said[at].share is None)
    if wanted.reward_margin is not None:
        yield _Rule("no-score", "a side without a score", None, lambda at: math.isnan(facts.margin(at)))


def _asked(facts: Facts, wanted: Wanted, said: Sequence[Verdict]) -> Iterator[_Rule]:
    """Yield the rules that were asked for."""
    if wanted.drop_ties:
        scored = bool(facts.scores[1])
        rule = " or ".join(["no most common vote"] * bool(said) + ["equal scores"] * scored)
        yield _Rule("tie", rule, None, lambda at: (bool(said) and said[at].tied) or (scored and facts.margin(at) == 0))
    if (least := wanted.agreement) is not None:
        shares = [one.share for one in said]
        rule = f"agreement below {least:g}"
        yield _Rule("agreement", rule, least, lambda at: (share := shares[at]) is not None and share < least)
    if (margin := wanted.reward_margin) is not None:
        rule = f"chosen's score less rejected's below {margin:g}"
        yield _Rule("reward", rule, margin, lambda at: facts.margin(at) < margin)
    if (ratio := wanted.max_length_ratio) is not None:
        rule = f"one side more than {ratio:g} times as long"
        yield _Rule("length", rule, ratio, lambda at: facts.ratio(at) > ratio)
    if (near := wanted.near) is not None:
        rule = f"edit similarity of the sides at least {near:g}"
        yield _Rule("near", rule, near, lambda at: facts.similar[at] >= near)


def repeats(facts: Facts, *, drop_minority: bool = True) -> list[str]:
    """Return for each row "", "repeated" or "contradicting": what its copies make of it.

    Of a pair that stands in both orders the more frequent one is right, and of as many either way none is
    ("contradicting"); of the copies left the first is kept. Without `drop_minority` both orders stay.
    """
    counts = Counter(zip(facts.keys, facts.reverse, strict=True))
    first: set[tuple[bytes, int]] = set()
    found = []
    for key, reverse in zip(facts.keys, facts.reverse, strict=True):
        mine, others = counts[key, reverse], counts[key, 1 - reverse]
        if drop_minority and mine <= others:
            found.append("contradicting")
        else:
            found.append("repeated" if (key, reverse) in first else KEPT)
            first.add((key, reverse))
    return found


def _thin(reasons: list[str], weights: Sequence[float | None], seed: int) -> Step:
    """Drop rows by chance, so that each stays with a probability in proportion to its weight; the heaviest all do.

    A row without a weight (kept though few voted) is drawn with the mean weight.
    """
    import numpy as np

    places = [place for place, reason in enumerate(reasons) if reason == KEPT]
    known = [weight for place in places if (weight := weights[place]) is not None]
    draws = np.random.default_rng(seed).random(len(reasons))
    dropped = 0
    for place in places:
        weight = weights[place]
        if known and draws[place] * max(known) >= (sum(known) / len(known) if weight is None else weight):
            reasons[place] = "resample"
            dropped += 1
    return Step("resample", "kept by chance, in proportion to the weight", None, len(places), dropped)

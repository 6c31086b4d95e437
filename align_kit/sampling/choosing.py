"""From scored completions to rows: what is left out and why, and what each prompt gives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from align_kit.data.reason import ReasonTemplate, Trace
from align_kit.data.shapes import CARRIED, Row
from align_kit.models.completion import Completion
from align_kit.sampling import keep
from align_kit.sampling.keep import Candidate
from align_kit.sampling.options import ALL, BEST, MAJORITY, REJECTION, Asked

AnswerOf = Callable[[str], str | None]

CUT, EMPTY, CONTROL, UNSCORED, NO_CHAIN, REPEATED = (
    "cut off", "empty", "control tokens", "without a score", "without a chain of thought", "repeated",
)  # fmt: skip
NONE_GOOD, NO_PAIR, NO_MAJORITY, NONE_LEFT = "none is good", "no pair", "no majority", "no completion is left"


@dataclass
class Chosen:
    """The rows kept, and what was left out: completions and prompts by reason, in the order found."""

    rows: list[Row] = field(default_factory=list)
    completions: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)
    passed: Counter[int] = field(default_factory=Counter)  # good completions of a prompt -> prompts
    answered: int = 0  # prompts that were looked at, and their completions
    drawn: int = 0
    judged: int = 0  # completions that could be kept, and those of them that are good
    good: int = 0
    votes: int = 0  # prompts with a majority and an answer to hold it to, and those where the two are one
    right_votes: int = 0


class Chooser:
    """Chooses among the completions of one prompt after another, as a command line asks."""

    def __init__(self, asked: Asked, at_least: float | None, answer_of: AnswerOf) -> None:
        self.asked = asked
        self.at_least = at_least
        self.answer_of = answer_of
        self.template = None if asked.reason_template is None else template_of(asked.reason_template)
        self.limit = asked.per_prompt or (None if asked.keep == ALL or asked.write == "binary" else 1)
        self.found = Chosen()

    def add(self, row: Row, drawn: Sequence[Completion], scores: Sequence[float | None]) -> None:
        """Keep what is worth it of one prompt's completions."""
        self.found.answered, self.found.drawn = self.found.answered + 1, self.found.drawn + len(drawn)
        candidates = self._candidates(drawn, scores)
        if not candidates:
            self.found.prompts[NONE_LEFT] += 1
            return
        if self.asked.keep == MAJORITY:
            voted = self._voted(row, candidates, len(drawn))
            if voted is None:
                self.found.prompts[NO_MAJORITY] += 1
                return
            candidates = voted
        elif self.at_least is not None:
            self._count(candidates, self.at_least)
        candidates = self._once(candidates)
        rows, why = self._rows(candidates, 1.0 if self.asked.keep == MAJORITY else self.at_least)
        if not rows:
            self.found.prompts[why] += 1
        before = {name: row[name] for name in ("prompt", *CARRIED) if row.get(name) is not None}
        self.found.rows += [{**before, **one} for one in rows]

    def _candidates(self, drawn: Sequence[Completion], scores: Sequence[float | None]) -> list[Candidate]:
        found = []
        for one, score in zip(drawn, scores, strict=True):
            trace = self.template.part(one.text) if self.template else None
            why = self._unusable(one, score, trace)
            if why:
                self.found.completions[why] += 1
            else:
                found.append(Candidate(one.text, 0.0 if score is None else score, trace))
        return found

    def _unusable(self, one: Completion, score: float | None, trace: Trace | None) -> str | None:
        if not one.ended:
            return CUT
        if not one.text.strip():
            return EMPTY
        if one.control and not (self.template and trace is not None):
            return CONTROL
        if self.template and (trace is None or not trace.reasoning.strip() or not trace.answer.strip()):
            return NO_CHAIN
        return UNSCORED if score is not None and math.isnan(score) else None

    def _count(self, candidates: Sequence[Candidate], at_least: float) -> None:
        good = sum(one.score >= at_least for one in candidates)
        self.found.judged, self.found.good = self.found.judged + len(candidates), self.found.good + good
        self.found.passed[good] += 1

    def _voted(self, row: Row, candidates: Sequence[Candidate], drawn: int) -> list[Candidate] | None:
        """Return the candidates with 1 for those that give the majority's answer and 0 for the others."""
        answers = [self.answer_of(one.text) for one in candidates]
        # Completions that were left out have no say, and count as if they disagreed.
        chosen = keep.vote([*answers, *[None] * (drawn - len(candidates))], self.asked.agreement)
        if chosen is None:
            return None
        expected = self.answer_of(str(row["answer"])) if row.get("answer") is not None else None
        if expected is not None:
            self.found.votes += 1
            self.found.right_votes += chosen == expected
        voted = [one._replace(score=float(a == chosen)) for one, a in zip(candidates, answers, strict=True)]
        self._count(voted, 1.0)
        return voted

    def _once(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        found = keep.distinct(candidates)
        if len(found) < len(candidates):
            self.found.completions[REPEATED] += len(candidates) - len(found)
        return found

    def _rows(self, candidates: Sequence[Candidate], at_least: float | None) -> tuple[list[Row], str]:
        if self.asked.write == "preference":
            pairs = keep.pairs(candidates, at_least, self.asked.margin, self.limit)
            return [self._pair(*pair) for pair in pairs], NO_PAIR
        if self.asked.write == "binary":
            assert at_least is not None
            return [self._labelled(one, at_least) for one in candidates[: self.limit]], ""
        threshold = self.asked.at_least if self.asked.keep == BEST else at_least
        kept = candidates[: self.limit] if self.asked.keep == ALL else keep.good(candidates, threshold, self.limit)
        return [{**self._demonstration(one), **self._score(one)} for one in kept], NONE_GOOD

    def _labelled(self, one: Candidate, at_least: float) -> Row:
        return {"completion": one.text, "label": one.score >= at_least, **self._score(one)}

    def _demonstration(self, one: Candidate) -> Row:
        return {"completion": one.text} if one.trace is None else one.trace._asdict()

    def _score(self, one: Candidate, side: str = "") -> Row:
        return {f"score{side}": one.score} if self.asked.judged else {}

    def _pair(self, chosen: Candidate, rejected: Candidate) -> Row:
        row: Row = {}
        for side, one in (("chosen", chosen), ("rejected", rejected)):
            row |= {side: one.text} if one.trace is None else {
                f"{side}_reasoning": one.trace.reasoning, side: one.trace.answer,
            }  # fmt: skip
        return row | self._score(chosen, "_chosen") | self._score(rejected, "_rejected")


def template_of(text: str) -> ReasonTemplate:
    r"""Return the template that `--reason` names: empty for the usual one; `\n` stands for a line's end."""
    return ReasonTemplate(text.replace("\\n", "\n")) if text else ReasonTemplate()


def fits(asked: Asked, at_least: float | None) -> str | None:
    """Return what is missing for `asked`, None where nothing is: rejection sampling needs to know what is good.

    `at_least` is what the judge knows of that.
    """
    if asked.keep == REJECTION and asked.at_least is None and at_least is None:
        return f"--keep {REJECTION} needs --at-least: from which score a completion is good"
    return None

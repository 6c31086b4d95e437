"""Which completions of a prompt are worth training on: pure functions of their texts and scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from align_kit.data.reason import Trace


class Candidate(NamedTuple):
    """A completion that may be kept: its text, what it scored, and its chain of thought where that is kept apart."""

    text: str
    score: float
    trace: Trace | None = None


class Pair(NamedTuple):
    """A preference between two completions of one prompt."""

    chosen: Candidate
    rejected: Candidate


def best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates by score, the highest first; those that score alike stay in the order drawn."""
    return sorted(candidates, key=lambda one: -one.score)


def good(candidates: Sequence[Candidate], at_least: float | None, limit: int | None) -> list[Candidate]:
    """Return up to `limit` candidates that score `at_least`, the best first (rejection sampling, Yuan et al. 2023).

    Without a threshold these are the best of the prompt (best of n, Stiennon et al. 2020).
    """
    found = [one for one in best_first(candidates) if at_least is None or one.score >= at_least]
    return found[:limit]


def pairs(
    candidates: Sequence[Candidate], at_least: float | None, margin: float, limit: int | None
) -> list[Pair]:
    """Return up to `limit` pairs of a better and a worse candidate: the best with the worst, the next with the next.

    Chosen scores more than `margin` above rejected, and `at_least` where that is given. No candidate is in two pairs,
    so a prompt whose candidates tie gives none.
    """
    best = best_first(candidates)
    worst = sorted(candidates, key=lambda one: one.score)
    found = []
    for place, (chosen, rejected) in enumerate(zip(best, worst, strict=True)):
        enough = at_least is None or chosen.score >= at_least
        if not enough or chosen.score - rejected.score <= margin or 2 * place + 1 >= len(best):
            break
        found.append(Pair(chosen, rejected))
    return found[:limit]


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the first candidate of each text, white space around it aside."""
    found: dict[str, Candidate] = {}
    for one in candidates:
        found.setdefault(one.text.strip(), one)
    return list(found.values())


def vote(answers: Sequence[str | None], agreement: float) -> str | None:
    """Return the answer most completions give (self-consistency, Wang et al. 2022), None where there is none.

    It must be that of a share of `agreement` of all completions, those without an answer counted, and of more than any
    other answer.
    """
    counts = Counter(answer for answer in answers if answer is not None).most_common(2)
    if not counts or counts[0][1] < agreement * len(answers):
        return None
    tied = len(counts) == 2 and counts[0][1] == counts[1][1]
    return None if tied else counts[0][0]

"""Scores of a model on held-out problems, and whether two models differ on the same problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from align_kit import cards
from align_kit.data.checkers import distinct
from align_kit.demo.workers import spread

CARD = "sums_prompts"  # names the problems and the checker that judges answers to them
LONGEST = 48  # tokens of an answer
SAMPLES = 4  # sampled completions per problem, at temperature 1


@dataclass(frozen=True)
class Score:
    """What the checker found, problem by problem; shares are of greedy completions unless they say sampled.

    `perplexity` is of the worked, right answers. `greedy` and `sampled` are the share of exact answers for each
    problem, `distinct` the share of sampled completions of a problem that differ from each other, `kl` the divergence
    (nats per completion) from the model it started from to it, estimated on its own sampled completions.
    """

    perplexity: float
    greedy: list[float]
    sampled: list[float]
    work: float
    form: float
    distinct: float
    shown: list[str]
    kl: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def score(
    folder: Path, problems: Sequence[dict[str, str]], *, start: Path | None = None, processes: int, seed: int = 0
) -> Score:
    """Return the score of the model in `folder` on `problems` (prompt, answer): greedy and sampled.

    `start` is the model it started from; None for one that was trained from random weights.
    """
    prompts, answers = [row["prompt"] for row in problems], [row["answer"] for row in problems]
    best = spread(folder, prompts, processes, samples=1, temperature=0.0, seed=seed, max_new_tokens=LONGEST,
                  references=answers)  # fmt: skip
    drawn = spread(folder, prompts, processes, samples=SAMPLES, temperature=1.0, seed=seed, max_new_tokens=LONGEST)
    check = cards.checker(cards.load_card(CARD))
    verdicts = [check(p, texts[0], a) for p, texts, a in zip(prompts, best.completions, answers, strict=True)]
    exact = [
        fmean(check(p, text, a).exact for text in texts)
        for p, texts, a in zip(prompts, drawn.completions, answers, strict=True)
    ]
    return Score(
        perplexity=math.exp(best.nll / best.tokens),
        greedy=[float(verdict.exact) for verdict in verdicts],
        sampled=exact,
        work=fmean(verdict.shows_work for verdict in verdicts),
        form=fmean(verdict.format_ok for verdict in verdicts),
        distinct=fmean(distinct(texts) for texts in drawn.completions),
        shown=[texts[0].strip() for texts in best.completions[:3]],
        kl=0.0 if start is None else divergence(folder, start, prompts, drawn.completions, processes),
    )


def divergence(
    model: Path, start: Path, prompts: Sequence[str], completions: Sequence[Sequence[str]], processes: int
) -> float:
    """Return the mean of log p - log p_start (nats per completion) over `completions`, which `model` wrote."""
    asked = [prompt for prompt, texts in zip(prompts, completions, strict=True) for _ in texts]
    texts = [text for some in completions for text in some]
    only = {"samples": 0, "temperature": 0.0, "seed": 0, "max_new_tokens": 0, "references": texts}
    surprise, at_start = (spread(one, asked, processes, **only).nll for one in (model, start))
    return (at_start - surprise) / len(texts)


@dataclass(frozen=True)
class Gain:
    """The mean difference between two models on the same problems, with its 95 % interval; in percentage points."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def gain(before: Sequence[float], after: Sequence[float]) -> Gain:
    """Return the paired difference after - before: mean +- 1.96 standard errors over problems."""
    differences = [100 * (b - a) for a, b in zip(before, after, strict=True)]
    middle, half = fmean(differences), 1.96 * stdev(differences) / math.sqrt(len(differences))
    return Gain(middle, middle - half, middle + half)

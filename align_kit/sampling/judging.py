"""What completions are worth: the verdicts of a checker, the numbers of reward functions or of a reward model."""

from __future__ import annotations

import math
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from align_kit.data import functions
from align_kit.data.checkers import RIGHT, Verdict
from align_kit.data.shapes import Row
from align_kit.errors import UserError
from align_kit.models.completion import Completion
from align_kit.preferences.waiting import watched
from align_kit.sampling.options import Asked

Drawn = Sequence[Sequence[Completion]]
Scores = list[list[float]]


class Judge(ABC):
    """What scores completions: `name` says which, `digest` that of its weights where it has some.

    `at_least` is the score from which a completion is good, where that is known.
    """

    name: str
    at_least: float | None = None
    digest: str | None = None

    def check(self, rows: Sequence[Row]) -> None:  # noqa: B027 - most judges take any prompt
        """Raise `UserError` where prompts lack what the judge needs."""

    @abstractmethod
    def __call__(self, rows: Sequence[Row], drawn: Drawn) -> Scores:
        """Return a score for each completion of each prompt; NaN where it has none."""


def judge_of(asked: Asked, checker: str | None) -> Judge:
    """Return the judge that a command line names, or the `checker` of the prompts' card."""
    if asked.reward_model:
        return ModelJudge(asked.reward_model)
    if asked.reward_funcs:
        return FunctionJudge(asked.reward_funcs)
    if asked.checker or checker:
        return CheckerJudge(asked.checker or str(checker))
    raise UserError(
        "nothing says which completions are good: give --checker module:function, --reward-model folder or "
        "--reward-funcs module:function, or take prompts whose card names a checker; --keep majority and all need none"
    )


class CheckerJudge(Judge):
    """A checker of answers: `check(prompt, completion, answer)` gives a number, True or False, or a `Verdict`."""

    def __init__(self, dotted: str) -> None:
        self.name = dotted
        self.at_least = 1.0
        self._check: Callable[[str, str, str], Any] = functions.function(dotted, "--checker")

    def check(self, rows: Sequence[Row]) -> None:
        """Raise `UserError` for a prompt without an answer."""
        for number, row in enumerate(rows, start=1):
            if row.get("answer") is None:
                raise UserError(
                    f"prompt {number} has no answer to check against ({_shown(row)!r}); give every row an 'answer' "
                    "column, or judge with --reward-model, or by --keep majority"
                )
        if rows:  # what a checker cannot do is better known before the completions are drawn
            self._score(rows[0], str(rows[0]["answer"]))

    def __call__(self, rows: Sequence[Row], drawn: Drawn) -> Scores:
        return [[self._score(row, one.text) for one in some] for row, some in zip(rows, drawn, strict=True)]

    def _score(self, row: Row, text: str) -> float:
        before = row["prompt"] if isinstance(row["prompt"], str) else ""
        with _naming(f"the checker {self.name}"):
            verdict = self._check(before, text, str(row["answer"]))
        if isinstance(verdict, Verdict):
            self.at_least = float(RIGHT)
            return float(verdict.rank)
        try:
            score = float(verdict)
        except (TypeError, ValueError):
            raise UserError(
                f"the checker {self.name} gave {verdict!r:.80}; it must give a number, or a Verdict"
            ) from None
        functions.check_finite(f"the checker {self.name}", [score], [text])
        return score


class FunctionJudge(Judge):
    """The sum of reward functions, called as `ppo` calls them."""

    def __init__(self, dotted: Sequence[str]) -> None:
        self.name = " + ".join(dotted)
        self._rewards = [(one, functions.function(one, "--reward-funcs")) for one in dotted]

    def check(self, rows: Sequence[Row]) -> None:
        """Raise `UserError` for a function that cannot score two made-up completions of the first prompt."""
        for row in rows[:1]:
            tried = ["Yes.", str(row.get("answer", "No."))]
            try:
                self._scores(row, tried)
            except UserError as error:
                raise UserError(f"{error}; it was tried on the completions {tried!r:.80}") from error.__cause__

    def __call__(self, rows: Sequence[Row], drawn: Drawn) -> Scores:
        return [self._scores(row, [one.text for one in some]) for row, some in zip(rows, drawn, strict=True)]

    def _scores(self, row: Row, texts: Sequence[str]) -> list[float]:
        count, each = len(texts), []
        for name, reward in self._rewards:
            with _naming(f"the reward function {name}"):
                scores = functions.rewards(
                    name, reward, prompts=[row["prompt"]] * count, completions=texts,
                    answers=[row.get("answer")] * count,
                )  # fmt: skip
            each.append(scores)
        return [math.fsum(scores) for scores in zip(*each, strict=True)]


class ModelJudge(Judge):
    """A reward model: the folder of a finished `reward` run, or any classifier with one label."""

    def __init__(self, name: str) -> None:
        from align_kit.preferences.scoring import scoring_source

        scoring_source(name)  # its weights wait until the teacher's are gone
        self.name = name.rstrip("/").rsplit("/", 1)[-1]
        self._folder = name

    def __call__(self, rows: Sequence[Row], drawn: Drawn) -> Scores:
        told = [
            {**row, "completion": one.text if isinstance(row["prompt"], str) else _turn(one.text)}
            for row, some in zip(rows, drawn, strict=True)
            for one in some
        ]
        from align_kit.preferences.scoring import Scorer

        scorer = Scorer(self._folder)
        self.digest = scorer.digest
        scores = scorer.scores(watched(told, len(told), "scoring"), ["completion"])
        return [[next(scores)[0] for _ in some] for some in drawn]


@contextmanager
def _naming(who: str) -> Iterator[None]:
    """Say in one line that a user's function failed, and where in it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{who} failed in {place.name}, line {place.lineno} of {place.filename} ({said}); mend it, and give the "
            "same command again: what was drawn is kept"
        ) from error


def answer_of(dotted: str) -> Callable[[str], str | None]:
    """Return the function that finds the answer in a completion; it raises `UserError` where that is no text."""
    found = functions.function(dotted, "--answer-of")

    def answer(text: str) -> str | None:
        with _naming(f"--answer-of: {dotted}"):
            given = found(text)
        if given is None or isinstance(given, str):
            return given
        raise UserError(f"--answer-of: {dotted} gave {given!r:.80}; it must give a text, or None where there is none")

    return answer


def _turn(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def _shown(row: Row) -> str:
    prompt = row["prompt"]
    return (prompt if isinstance(prompt, str) else str(prompt[-1].get("content")))[-60:]

"""Judge an answer in gsm8k's shape: is the number right, is there work, is the format kept.

One checker serves the embedded sums and the real gsm8k card. A solution ends in its answer line, `#### 1,234`;
the solutions published with gsm8k's verifiers end in `A: 1234` instead, which is read as an answer but not as
the format. All functions are pure and need no model. `exact_reward` is the checker as a reward function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from align_kit.errors import UserError

Text = str | Sequence[Mapping[str, Any]]  # a string, or messages of which the last one counts

# An answer is the number that fills the rest of its line: `#### $1,234.50`, `A: 26`; `A: 10+x` and `#### 1/5` are not.
MARK = re.compile(r"####|^A:", re.MULTILINE)
NUMBER = re.compile(
    r"""[ \t]* (-?) [ \t]* \$? [ \t]* (-?) ( (?: \d{1,3} (?:,\d{3})+ | \d+ ) (?:\.\d+)? | \.\d+ )
    [ \t]* %? \.? [ \t]* (?:\n|$)""",
    re.VERBOSE,
)
FORMAT = re.compile(r"#### -?\$?[\d,]*\.?\d+\s*")
# `48/2 = <<48/2=24>>24`, `8-3=5`, `9m = 27`: something with a sign of equality and a digit after it, on one line.
RIGHT = 2  # the rank (`Verdict.rank`) from which the answer is right
EQUATION = re.compile(r"[\w)][^\n=]*=[^\n]*\d")


@dataclass(frozen=True)
class Verdict:
    """What the checker found in one completion.

    `exact`: the last answer equals the reference; `shows_work`: an equation stands before the answer line;
    `format_ok`: exactly one `#### number`, at the very end; `length`: characters, without outer white space.
    """

    exact: bool
    shows_work: bool
    format_ok: bool
    length: int

    @property
    def rank(self) -> int:
        """Return 0-4, higher is better: right before worked before tidy; 4 is right, worked and tidy."""
        if not self.exact:
            return int(self.shows_work and self.format_ok)
        return RIGHT + self.shows_work + (self.shows_work and self.format_ok)


def check(prompt: str, completion: str, answer: str) -> Verdict:
    """Return the verdict on `completion` against `answer`, the reference solution or its bare number.

    `prompt` is left out of the judgement where a caller passes prompt and completion in one string.
    Raises `UserError` when the reference holds no number.
    """
    text = completion.removeprefix(prompt).strip() if prompt else completion.strip()
    found = _number(text)
    return Verdict(
        exact=found is not None and found == Decimal(answer_of(answer)),
        shows_work=_shows_work(text),
        format_ok=text.count("####") == 1 and FORMAT.fullmatch(text[text.index("####") :]) is not None,
        length=len(text),
    )


def answer_of(text: str) -> str:
    """Return the number a reference solution ends in, without commas and signs: `"1234"` for `... #### $1,234`.

    A text with no answer line may be the bare number itself. Raises `UserError` when there is no number.
    """
    number = _number(text) if MARK.search(text) else _parse(text.strip())
    if number is None:
        shown = text.strip()[-60:]
        raise UserError(f"reference answer {shown!r} has no number; write it as '#### 25' on the last line, or as 25")
    return f"{number.normalize():f}"


def number_of(text: str) -> str | None:
    """Return the number a completion gives as its answer, written as `answer_of` does; None where it gives none."""
    number = _number(text)
    return None if number is None else f"{number.normalize():f}"


def as_reward(check: Callable[[str, str, str], Any]) -> Callable[..., list[float]]:
    """Return a card's checker as a reward function of TRL's signature: 1.0 for an exact answer, else 0.0.

    Prompts, completions and answers are lists with one entry a completion, strings or messages; other columns are not
    read. It raises `UserError` for a row without an answer, and what `check` raises.
    """

    def reward(
        prompts: Sequence[Text], completions: Sequence[Text], answer: Sequence[Any], **others: Any
    ) -> list[float]:
        scores = []
        for prompt, completion, wanted in zip(prompts, completions, answer, strict=True):
            if wanted is None:
                raise UserError(
                    f"the checker needs an answer to each prompt, and there is no answer for the prompt "
                    f"{_said(prompt)[-60:]!r}; give every row an 'answer' column"
                )
            before = prompt if isinstance(prompt, str) else ""
            scores.append(float(check(before, _said(completion), str(wanted)).exact))
        return scores

    return reward


def exact_reward(
    prompts: Sequence[Text], completions: Sequence[Text], answer: Sequence[Any], **others: Any
) -> list[float]:
    """Return 1.0 for each completion whose last answer equals its row's `answer`, else 0.0: `check` as a reward."""
    return as_reward(check)(prompts, completions, answer, **others)


def distinct(completions: Sequence[str]) -> float:
    """Return the share of completions that differ from each other, in (0, 1]; 0.0 for none at all."""
    return len({text.strip() for text in completions}) / len(completions) if completions else 0.0


def _said(text: Text) -> str:
    return text if isinstance(text, str) else str(text[-1]["content"])


def _number(text: str) -> Decimal | None:
    """Return the number after the last answer mark, None where there is no mark or no number fills the line."""
    marks = list(MARK.finditer(text))
    return _parse(text[marks[-1].end() :]) if marks else None


def _parse(text: str) -> Decimal | None:
    found = NUMBER.match(text)
    if found is None:
        return None
    minus, inner_minus, digits = found.groups()
    return Decimal(f"{minus or inner_minus}{digits.replace(',', '')}")


def _shows_work(text: str) -> bool:
    mark = MARK.search(text)
    before = text[: mark.start()] if mark else text
    return EQUATION.search(before) is not None

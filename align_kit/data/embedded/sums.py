"""Word problems in gsm8k's shape, generated from a seed: two numbers from 1 to 99, added or subtracted.

The numbers decide the split, so the pairs of numbers in validation and test are never worked out in training text.
A worked answer goes digit by digit, ones first, with the carry or borrow as a third term:

    Cleo had 92 inks and gave away 78. How many inks are left?
    92-78: 12-8=4, 9-1-7=1
    #### 14
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, Literal

Row = dict[str, Any]
Split = Literal["train", "validation", "test"]

# Ends every prompt: the tokenizer keeps a newline apart, so prompt + completion has a clean boundary.
SEPARATOR = "\n"
WRONG_SHARE = 0.4  # of the hurried answers
GOOD_SHARE = 1 / 3  # of the labelled answers: unbalanced, so that class weights have something to do


@dataclass(frozen=True)
class Template:
    """One way to ask; `hurry` is the share of its answers in `sums_sft` that are hurried.

    Half of all answers are hurried, but not evenly: two of the six kinds come from a careless contributor. So a model
    trained on the mixture does not toss a coin on every problem: it learns to hurry on some and to work on others.
    """

    operator: Literal["+", "-"]
    text: str
    hurry: float


CAREFUL, CARELESS = 0.35, 0.8  # 4/6 * 0.35 + 2/6 * 0.8 = 0.5

TEMPLATES = (
    Template("+", "{name} had {a} {things} and got {b} more. How many {things} are there now?", CAREFUL),
    Template("+", "{name} found {a} {things} and {friend} found {b}. How many {things} did they find?", CAREFUL),
    Template("+", "There are {a} red {things} and {b} blue {things}. How many {things} are there?", CARELESS),
    Template("-", "{name} had {a} {things} and gave away {b}. How many {things} are left?", CAREFUL),
    Template("-", "{name} has {a} {things} and {friend} has {b}. How many more {things} has {name}?", CARELESS),
    Template("-", "{name} needs {a} {things} and has {b}. How many {things} are missing?", CAREFUL),
)
NAMES = (
    *("Ada", "Ben", "Cleo", "Dora", "Eli", "Finn", "Gus", "Hana", "Ivo", "Joan"),
    *("Kim", "Lena", "Max", "Nora", "Omar", "Pia", "Rosa", "Sam", "Tess", "Vera"),
)
THINGS = (
    *("apples", "bags", "beads", "bells", "books", "boxes", "cards", "coins", "cups"),
    *("eggs", "inks", "keys", "maps", "nuts", "pens", "pins", "rings"),
)


@dataclass(frozen=True)
class Problem:
    """A question about two numbers, with the answers that can be given to it."""

    template: Template
    a: int
    b: int
    question: str

    @property
    def prompt(self) -> str:
        """The question and the separator that ends every prompt."""
        return self.question + SEPARATOR

    @property
    def answer(self) -> int:
        """The right number, 1 to 198."""
        return self.a + self.b if self.template.operator == "+" else self.a - self.b

    @cached_property
    def work(self) -> str:
        """The digits worked out, ones first: `92-78: 12-8=4, 9-1-7=1`."""
        return work(self.a, self.template.operator, self.b)

    @property
    def worked(self) -> str:
        """The worked, right answer, in gsm8k's shape."""
        return f"{self.work}\n#### {self.answer}"


def work(a: int, operator: Literal["+", "-"], b: int) -> str:
    """Return `a` plus or minus `b` worked out digit by digit; the tens are left out where both have none."""
    (tens_a, ones_a), (tens_b, ones_b) = divmod(a, 10), divmod(b, 10)
    if operator == "+":
        ones = f"{ones_a}+{ones_b}={ones_a + ones_b}"
        carried = (ones_a + ones_b) // 10
        tens_result = tens_a + carried + tens_b
    else:
        carried = int(ones_a < ones_b)
        ones = f"{ones_a + 10 * carried}-{ones_b}={ones_a + 10 * carried - ones_b}"
        tens_result = tens_a - carried - tens_b
    carry = f"{operator}{carried}" if carried else ""
    tens = f", {tens_a}{carry}{operator}{tens_b}={tens_result}" if tens_a or tens_b else ""
    return f"{a}{operator}{b}: {ones}{tens}"


def split_of(a: int, b: int) -> Split:
    """Return the split the unordered pair of numbers belongs to: 70 % train, 15 % validation, 15 % test."""
    low, high = sorted((a, b))
    share = hashlib.sha256(f"{low},{high}".encode()).digest()[0] / 256
    return "train" if share < 0.7 else "validation" if share < 0.85 else "test"


def problems(split: str, count: int, seed: int) -> list[Problem]:
    """Return `count` problems of one split; the same arguments give the same problems on every machine."""
    random = Random(f"problems {split} {seed}")
    return [_problem(random, split) for _ in range(count)]


def prompts(split: str, count: int = 512, seed: int = 0) -> list[Row]:
    """Return `{"prompt", "answer"}` rows; the answer is the worked solution, as in gsm8k."""
    return [{"prompt": p.prompt, "answer": p.worked} for p in problems(split, count, _seed("prompts", seed))]


def sft(split: str, count: int, seed: int = 0) -> list[Row]:
    """Return `{"prompt", "completion"}` rows: half worked and right, half hurried, 40 % of these wrong."""
    random = Random(f"sft {split} {seed}")
    return [
        {"prompt": p.prompt, "completion": hurried(p, random) if random.random() < p.template.hurry else p.worked}
        for p in problems(split, count, _seed("sft", seed))
    ]


def pairs(split: str, count: int, seed: int = 0) -> list[Row]:
    """Return `{"prompt", "chosen", "rejected"}` rows: worked and right, over hurried or worked with one slip."""
    random = Random(f"pairs {split} {seed}")
    return [
        {"prompt": p.prompt, "chosen": p.worked, "rejected": random.choice((hurried, slipped))(p, random)}
        for p in problems(split, count, _seed("pairs", seed))
    ]


def labels(split: str, count: int, seed: int = 0) -> list[Row]:
    """Return `{"prompt", "completion", "label"}` rows, one answer a problem.

    True for worked and right, a third of them; False for hurried (even where right) or worked with one slip.
    """
    random = Random(f"labels {split} {seed}")
    labelled = []
    for problem in problems(split, count, _seed("labels", seed)):
        good = random.random() < GOOD_SHARE
        completion = problem.worked if good else random.choice((hurried, slipped))(problem, random)
        labelled.append({"prompt": problem.prompt, "completion": completion, "label": good})
    return labelled


def text(split: str, count: int, seed: int = 0) -> list[Row]:
    """Return `{"text"}` rows for pretraining: three pages of exercises, then one of questions without answers.

    The exercises carry the digits, the questions the words; what the one has to do with the other, and the answer
    line, is left to fine-tuning.
    """
    random = Random(f"text {split} {seed}")
    asked = problems(split, 4 * count, _seed("text", seed))
    pages = [asked[4 * page : 4 * page + 4] for page in range(count)]
    return [
        {"text": _questions(page) if number % 4 == 3 else _exercises(page, split, random)}
        for number, page in enumerate(pages)
    ]


def hurried(problem: Problem, random: Random) -> str:
    """Return a bare answer line; 40 % of them are wrong by a little, or by the sign."""
    if random.random() >= WRONG_SHARE:
        return f"#### {problem.answer}"
    other = problem.a - problem.b if problem.template.operator == "+" else problem.a + problem.b
    near = [problem.answer + slip for slip in (-10, -2, -1, 1, 2, 10)]
    return f"#### {random.choice([number for number in (*near, other) if number >= 0])}"


def slipped(problem: Problem, random: Random) -> str:
    """Return a worked answer of which one line's result is off by one or two, and the answer with it."""
    ones, *tens = problem.work.split(", ")
    slip = random.choice((-2, -1, 1, 2))
    at = random.randrange(1 + len(tens))
    steps = [_off(step, slip) if i == at else step for i, step in enumerate((ones, *tens))]
    return f"{', '.join(steps)}\n#### {max(problem.answer + slip * 10**at, 0)}"


def _off(step: str, slip: int) -> str:
    left, result = step.rsplit("=", 1)
    return f"{left}={abs(int(result) + slip)}"


def _problem(random: Random, split: str) -> Problem:
    while True:
        a, b = random.randint(1, 99), random.randint(1, 99)
        if a != b and split_of(a, b) == split:
            break
    template = random.choice(TEMPLATES)
    if template.operator == "-" and a < b:
        a, b = b, a
    name, friend = random.sample(NAMES, 2)
    question = template.text.format(a=a, b=b, name=name, friend=friend, things=random.choice(THINGS))
    return Problem(template, a, b, question)


def _questions(page: list[Problem]) -> str:
    return "\n".join(problem.question for problem in page)


def _exercises(page: list[Problem], split: str, random: Random) -> str:
    """Return eight exercises: the four problems of the page without their words, and four more."""
    more = [_problem(random, split) for _ in page]
    return "\n".join(f"{problem.work}, so {problem.answer}." for problem in (*page, *more))


def _seed(use: str, seed: int) -> int:
    """Return a seed of its own for each use, so that equal counts do not repeat the same problems."""
    return int.from_bytes(hashlib.sha256(f"{use} {seed}".encode()).digest()[:6])

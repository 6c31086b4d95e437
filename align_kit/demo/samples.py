"""Training data from the fine-tuned model itself: its answers, ranked by the checker, and the same data shuffled."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_kit import cards, log
from align_kit.data.checkers import Verdict, rank_pairs
from align_kit.demo.score import CARD
from align_kit.demo.workers import spread
from align_kit.errors import UserError

DRAWS = 4  # answers drawn to each problem, at temperature 1
BEST = 4  # the rank of a right, worked and tidy answer (`Verdict.rank`)


@dataclass(frozen=True)
class Drawn:
    """A problem, the answers a model gave to it, and what the checker says of each."""

    prompt: str
    texts: Sequence[str]
    verdicts: Sequence[Verdict]


def draw(model: Path, problems: Sequence[Mapping[str, str]], processes: int, seed: int) -> list[Drawn]:
    """Return answers of the model in `model` to `problems` (prompt, answer), judged by the card's checker."""
    began = time.monotonic()
    prompts = [row["prompt"] for row in problems]
    found = spread(model, prompts, processes, samples=DRAWS, temperature=1.0, seed=seed).completions
    check = cards.checker(cards.load_card(CARD))
    judged = [
        Drawn(row["prompt"], texts, [check(row["prompt"], text, row["answer"]) for text in texts])
        for row, texts in zip(problems, found, strict=True)
    ]
    log.say(f"answers: {DRAWS} of the {model.name} model to {len(prompts)} problems, {time.monotonic() - began:.0f} s")
    return judged


def pairs(drawn: Sequence[Drawn], place: Path, *, limit: int = 1) -> Path:
    """Store up to `limit` pairs of each problem: a right, worked answer over a worse one."""
    rows = [
        {"prompt": one.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for one in drawn
        for pair in rank_pairs(one.texts, one.verdicts, limit=limit)
    ]
    if not rows:
        raise UserError("the SFT model gave no answer that the checker prefers to another: no pairs to train on")
    return write(place, rows)


def labels(drawn: Sequence[Drawn], place: Path) -> Path:
    """Store each different answer with a label: True where it is right, worked and tidy."""
    rows = []
    for one in drawn:
        best = {text: verdict.rank == BEST for text, verdict in zip(one.texts, one.verdicts, strict=True)}
        rows += [{"prompt": one.prompt, "completion": text, "label": label} for text, label in best.items()]
    return write(place, rows)


def shuffled_pairs(place: Path, seed: int) -> Path:
    """Store the same pairs with chosen and rejected swapped at random: a control's data."""
    generator, rows = random.Random(f"control {seed}"), read(place)
    for row in rows:
        if generator.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return write(place.with_name(f"{place.stem}_shuffled.jsonl"), rows)


def shuffled_labels(place: Path, seed: int) -> Path:
    """Store the same answers with their labels dealt out anew: a control's data."""
    generator, rows = random.Random(f"control {seed}"), read(place)
    dealt = [row["label"] for row in rows]
    generator.shuffle(dealt)
    return write(
        place.with_name(f"{place.stem}_shuffled.jsonl"),
        [{**row, "label": label} for row, label in zip(rows, dealt, strict=True)],
    )


def read(place: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON lines file."""
    return [json.loads(line) for line in place.read_text().splitlines()]


def write(place: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines and return the path."""
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place

"""Training data from the fine-tuned model itself, by `align-kit sample`; and the same data shuffled."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align_kit import cards, log
from align_kit.data.made import MadeSet, write_made
from align_kit.demo.score import CARD, LONGEST
from align_kit.sampling.command import sample

BEST = 4  # what the checker gives a right, worked and tidy answer (`Verdict.rank`)


def pairs(
    model: Path, problems: Sequence[Mapping[str, str]], place: Path, *, samples: int, seed: int, processes: int
) -> Path:
    """Let the model in `model` answer `problems` (prompt, answer) `samples` times each; return the card of its pairs.

    A pair is a right, worked and tidy answer over a worse one, where a problem's answers allow one.
    """
    asked = _prompts(problems, place.with_name(f"{place.name}_prompts"), seed)
    drawing = ["--samples", samples, "--max-new-tokens", LONGEST, "--seed", seed, "--workers", processes]
    return _sample([model, asked, *drawing, "--at-least", BEST], place)


def _prompts(problems: Sequence[Mapping[str, str]], place: Path, seed: int) -> Path:
    """Store problems as a set of their own, judged as the card of all problems says; return its card."""
    card = cards.load_card(CARD)
    made = MadeSet(
        name=place.name, pretty_name="Problems of the demo", licences=card.licences, phases=("ppo",), format="prompt",
        checker=card.block.checker, made={"command": ["align-kit", "demo"], "seed": seed},
    )  # fmt: skip
    return write_made(place, made, {"train": map(dict, problems)}, overwrite=place.exists())


def chosen_anew(drawn: Path, place: Path, *words: object) -> Path:
    """Choose otherwise among the answers that `pairs` drew for the card `drawn`; return the card of what is chosen."""
    return _sample(["--from", drawn.parent, *words, "--at-least", BEST], place)


def _sample(words: Sequence[object], place: Path) -> Path:
    command = [str(word) for word in [*words, "--output", place, *(["--overwrite"] if place.exists() else [])]]
    log.say(f"align-kit sample {' '.join(command)}")
    sample(command)
    return place / f"{place.name}.md"


def shuffled_pairs(card: Path, seed: int) -> Path:
    """Store the same pairs with chosen and rejected swapped at random: a control's data."""
    generator, rows = random.Random(f"control {seed}"), read(card)
    for row in rows:
        if generator.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return write(_shuffled(card), rows)


def shuffled_labels(card: Path, seed: int) -> Path:
    """Store the same answers with their labels dealt out anew: a control's data."""
    generator, rows = random.Random(f"control {seed}"), read(card)
    dealt = [row["label"] for row in rows]
    generator.shuffle(dealt)
    return write(_shuffled(card), [{**row, "label": label} for row, label in zip(rows, dealt, strict=True)])


def _shuffled(card: Path) -> Path:
    return card.parent.with_name(f"{card.parent.name}_shuffled.jsonl")


def read(card: Path) -> list[dict[str, Any]]:
    """Return the training rows beside a card, without what they scored: that would tell them apart."""
    rows = [json.loads(line) for line in (card.parent / "train.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("score")} for row in rows]


def write(place: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines and return the path."""
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place

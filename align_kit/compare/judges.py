"""What the arms are judged by: held-out rows, problems with a checker, and text from before that may be forgotten."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_kit import cards, run_folder
from align_kit.cards import Card
from align_kit.compare.options import Options
from align_kit.config import Config
from align_kit.errors import UserError

CARD = "card:"
EVALUATIONS = 8  # on the way of a run whose recipe has none: enough for a curve
AT_THE_END = "1000000000"  # steps between evaluations of a run that is evaluated once, as it ends
PROBLEMS = "sums_prompts"  # the embedded problems: the embedded answers' card is of mixed quality, and no judge
NONE = "none"


def rows(config: Config, *, test: bool, datasets: str = "") -> str | None:
    """Return the held-out data a run is judged by as JSON, `None` for the recipe's own; arguments as of `evaluation`.

    Raises `UserError` where there are no held-out rows.
    """
    if test and datasets:
        return datasets
    if config.value("eval_strategy") != "no":
        return None
    splits = ("test", "validation") if test else ("validation", "test")
    entries = [_held_out(entry, splits) for entry in config.data.datasets]
    if not entries or None in entries:
        raise UserError(
            "compare judges by held-out rows, and this recipe evaluates on none; give eval_strategy: steps with "
            "eval_datasets or test_split_size"
        )
    return json.dumps(entries)


def check(options: Options, config: Config) -> None:
    """Raise `UserError` where what the arms are to be judged by is not there, before anything is run."""
    from align_kit.data.load import load

    rows(config, test=True, datasets=options.test_datasets)
    problems(options, config)
    for path in options.forgetting or ():
        if path != NONE:
            load([{"path": path, **_split(path)}], phase="pretrain")


def evaluation(config: Config, *, test: bool, datasets: str = "") -> list[str]:
    """Return the words that let a run be judged by held-out rows: those of the recipe, or of the data's cards.

    With `test` the rows are those that no learning rate was chosen by: `datasets` (JSON), or the cards' test split.
    """
    found = rows(config, test=test, datasets=datasets)
    words = ["--eval_datasets", found] if found else []
    if config.value("eval_strategy") != "no":
        return words
    often = ["--eval_steps", str(1 / EVALUATIONS), "--eval_on_start", "true"] if test else ["--eval_steps", AT_THE_END]
    batch = [] if config.given("per_device_eval_batch_size") else ["--per_device_eval_batch_size", "64"]
    return ["--eval_strategy", "steps", *often, *batch, *words]


def _held_out(entry: Any, splits: Sequence[str]) -> dict[str, str] | None:
    """Return the first of `splits` that the card of a training entry has, as an entry to evaluate on."""
    card = _card(entry.path)
    split = next((name for name in splits if card and name in card.block.splits), None)
    return {"path": entry.path, "split": split} if split else None


def _card(path: str) -> Card | None:
    return cards.load_card(path.removeprefix(CARD)) if path.startswith(CARD) else None


# --- problems -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problems:
    """Problems of one card with their answers; the card's checker judges what a model says."""

    card: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...]


def problems(options: Options, config: Config) -> Problems | None:
    """Return the problems the models answer, those of the card named or of the training data; `None` without any."""
    if options.problems == NONE:
        return None
    named = options.problems.removeprefix(CARD)
    card = cards.load_card(named) if named else _judging_card(config)
    if card is None:
        return None
    if card.block.checker is None or "ppo" not in card.block.phases:
        raise UserError(f"--problems {options.problems}: that card has no checker, or no prompts with answers; or none")
    from align_kit.data.load import load

    split = next(name for name in ("test", "validation", "train") if name in card.block.splits)
    rows = load([{"path": f"{CARD}{card.name}", "split": split}], phase="ppo").dataset
    asked = [(row["prompt"], str(row.get("answer") or row.get("completion"))) for row in rows]
    asked = [(prompt, answer) for prompt, answer in asked if isinstance(prompt, str)]
    if not asked:
        return None
    return Problems(card.name, tuple(prompt for prompt, _ in asked), tuple(answer for _, answer in asked))


def _judging_card(config: Config) -> Card | None:
    """Return the card of problems that go with the training data: its own, or the embedded ones."""
    for card in filter(None, (_card(entry.path) for entry in config.data.datasets)):
        if card.block.checker and "ppo" in card.block.phases:
            return card
        if card.block.checker and card.block.source.kind == "builtin":
            return cards.load_card(PROBLEMS)
    return None


# --- text from before -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Held-out text that a model knew before: rows of tokens packed as in pretraining."""

    name: str
    rows: tuple[tuple[int, ...], ...]


ROWS = 128  # of each text: at 256 tokens a row the mean is known to a hundredth of a nat


def texts(options: Options, start: Path, tokenizer: Any, cache: Path) -> list[Text]:
    """Return the texts whose loss is taken before and after: those named, or held-out rows of the pretraining data."""
    from align_kit.data.load import load
    from align_kit.data.report import TokeniseOptions
    from align_kit.data.tokenise import tokenise

    specs, length = _sources(options, start)
    found = []
    for spec in specs:
        rows = load([spec], phase="pretrain").dataset
        made, _ = tokenise(rows, "text", tokenizer, TokeniseOptions(max_length=length, packing=True), cache)
        ids = made[: min(ROWS, len(made))]["input_ids"]
        found.append(Text(Path(spec["path"].removeprefix(CARD)).name, tuple(map(tuple, ids))))
    return found


LENGTH = 512  # tokens of a row of text where no pretraining run says


def _sources(options: Options, start: Path) -> tuple[list[dict[str, Any]], int]:
    """Return entries of data with held-out text, and the tokens of a row."""
    pretrained = _pretrain(start)
    length = int(pretrained["config"]["max_length"]) if pretrained else LENGTH
    if options.forgetting is not None:
        paths = [path for path in options.forgetting if path != NONE]
        return [{"path": path, **_split(path)} for path in paths], length
    known = [entry["path"] for entry in pretrained["config"]["datasets"]] if pretrained else []
    return [{"path": path, **_split(path)} for path in known if _split(path)], length


def _split(path: str) -> dict[str, str]:
    """Return the held-out split of a card; nothing for a file, which is taken whole."""
    card = _card(path)
    return next(({"split": name} for name in ("test", "validation") if card and name in card.block.splits), {})


def _pretrain(start: Path) -> dict[str, Any] | None:
    """Return the manifest of the pretraining that a model came from, through the runs between; `None` for others."""
    seen: set[Path] = set()
    while start not in seen:
        seen.add(start)
        manifest = run_folder.read_manifest(start)
        if manifest is None or manifest["phase"] == "pretrain":
            return manifest
        start = Path(manifest["policy"]["name"])
    return None

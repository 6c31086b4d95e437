"""What the planner reads of a run's data: its tokenised rows, a sample of them, or rows of full length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from align_kit.cards import PHASE_KINDS
from align_kit.config import Config
from align_kit.data.balance import row_tokens
from align_kit.errors import UserError
from align_kit.models.source import Source
from align_kit.plan.batches import DRAWN, Row, invented_rows
from align_kit.plan.describe import Asked, Data
from align_kit.registry import Recipe
from align_kit.stages.alone import words_of
from align_kit.stages.data import wanted

SAMPLE = 512  # rows, or those of a step where it takes more: a row that comes twice in a step computes less
FULL = 64  # rows of full length, where none can be read
SEED = 20240501
MAX_LENGTH = 1024  # tokens, where neither data nor configuration says how long rows are


def known(recipe: Recipe, config: Config, rows: Any, words: Any, step: int, held_out: Any = None) -> Data:
    """Return what a plan reads of a run's tokenised training rows, and of those held out; a step takes `step` rows."""
    collate = _collate(recipe, config, words)
    some, longest = _sampled(rows, _few(step))
    looked_at, longest_held_out = ([], None) if held_out is None else _sampled(held_out, SAMPLE)
    return Data(some, collate, longest, [*filter(None, [longest_held_out]), *looked_at])


def _sampled(rows: Any, few: int) -> tuple[list[Row], Row | None]:
    """Return tokenised rows, or a `few` of them and the longest of all."""
    if len(rows) <= few:
        return [dict(row) for row in rows], None
    longest = dict(rows[int(row_tokens(rows).argmax())])
    return [dict(row) for row in rows.select(_places(len(rows), few))], longest


def sample(recipe: Recipe, config: Config, start: Source, step: int) -> tuple[Data, int | None]:
    """Return a tokenised sample of the data that `config` names, and how many rows it would make in all.

    A step takes `step` rows.

    Rows of full length, and None, where the data or the model's words are not here: a note of the data says so.
    """
    try:
        rows, held_out, count = _tokenised(recipe, config, words := words_of(config, start), _few(step))
    except UserError as reason:
        return _full(recipe, config, str(reason)), None
    return known(recipe, config, rows, words, step, held_out), count


def _few(step: int) -> int:
    return max(SAMPLE, min(step, DRAWN))


def _tokenised(recipe: Recipe, config: Config, words: Any, most: int) -> tuple[Any, Any, int]:
    """Return rows to train on and to evaluate on (None: none), and how many the former would be in all."""
    from align_kit.data.prepare import Given, given
    from align_kit.data.tokenise import tokenise

    asked = wanted(recipe, config, Asked(config))
    splits = given(asked)

    def tokens(split: Given, few: int) -> tuple[Any, int]:
        some = split.rows if len(split.rows) <= few else split.rows.select(_places(len(split.rows), few))
        rows, report = tokenise(some, split.account["kind"], words, asked.options, asked.cache)
        return recipe.trainer_class().complete(rows, Asked(config)), report.rows_in

    rows, read = tokens(splits["train"], most)
    held_out = tokens(splits["eval"], SAMPLE)[0] if "eval" in splits else None
    return rows, held_out, round(len(splits["train"].rows) * len(rows) / read)


def _places(count: int, few: int) -> list[int]:
    import numpy as np

    return sorted(np.random.default_rng(SEED).choice(count, few, replace=False).tolist())


def _full(recipe: Recipe, config: Config, reason: str) -> Data:
    """Return rows that are as long as they may be."""
    length = config.value("max_length") or MAX_LENGTH
    note = f"the data cannot be read here ({reason}): every row is taken to be {length} tokens long"
    if recipe.writes:
        length -= config.value(recipe.writes)
    kind, length = PHASE_KINDS[recipe.name][0], max(2, length)
    collate = _collate(recipe, config, SimpleNamespace(pad_token_id=0))

    def anew(rows: Sequence[Row]) -> Mapping[str, Any]:
        """Return a batch of as many rows that share nothing: a large step takes those there are many times."""
        return collate(invented_rows(kind, len(rows), length))

    return Data(invented_rows(kind, FULL, length), collate if recipe.writes else anew, notes=(note,))


def _collate(recipe: Recipe, config: Config, words: Any) -> Callable[[Sequence[Row]], Mapping[str, Any]]:
    """Return what makes a batch of rows; of prompts, once they are completed."""
    if recipe.writes:
        from align_kit.data.collate import LanguageCollator

        return LanguageCollator(words.pad_token_id)  # type: ignore[return-value]  # its rows are dicts, as all are
    return recipe.trainer_class().collator(words, Asked(config))  # type: ignore[no-any-return]

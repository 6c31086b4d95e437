"""What the planner reads of a run's data: its tokenised rows, a sample of them, or rows of full length."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from align_kit import run_folder
from align_kit.cards import PHASE_KINDS
from align_kit.config import Config
from align_kit.data.balance import row_tokens
from align_kit.errors import UserError
from align_kit.models.source import Source
from align_kit.plan.batches import Row, invented_rows
from align_kit.plan.describe import Asked, Data, asked
from align_kit.registry import Recipe
from align_kit.stages.beginning import Start, tokenizer
from align_kit.stages.data import token_options

SAMPLE = 512  # rows
FULL = 64  # rows of full length, where none can be read
SEED = 20240501
MAX_LENGTH = 1024  # tokens, where neither data nor configuration says how long rows are


def known(recipe: Recipe, config: Config, rows: Any, words: Any) -> Data:
    """Return what a plan reads of a run's tokenised training rows."""
    collate = _collate(recipe, config, words)
    if len(rows) <= SAMPLE:
        return Data([dict(row) for row in rows], collate)
    longest = dict(rows[int(row_tokens(rows).argmax())])
    return Data([dict(row) for row in rows.select(_places(len(rows)))], collate, longest)


def sample(recipe: Recipe, config: Config, start: Source) -> tuple[Data, int | None]:
    """Return a tokenised sample of the data that `config` names, and how many rows it would make in all.

    Rows of full length, and None, where the data or the model's words are not here: a note of the data says so.
    """
    try:
        words = tokenizer(Start(start, "", "", _words(config, start)), config)
        rows, count = _tokenised(recipe, config, words)
    except UserError as reason:
        return _full(recipe, config, str(reason)), None
    return known(recipe, config, rows, words), count


def _tokenised(recipe: Recipe, config: Config, words: Any) -> tuple[Any, int]:
    from align_kit.data.load import load
    from align_kit.data.tokenise import tokenise

    seed = asked(config, "data_seed")
    specs = [entry.spec() for entry in config.data.datasets]
    loaded = load(specs, phase=recipe.name, seed=config.value("seed") if seed is None else seed)
    few = loaded.dataset
    if len(few) > SAMPLE:
        few = few.select(_places(len(few)))
    cache = run_folder.cache_folder(os.environ)
    rows, report = tokenise(few, loaded.kind, words, token_options(recipe, config), cache)
    rows = recipe.trainer_class().complete(rows, Asked(config))
    return rows, round(len(loaded.dataset) * len(rows) / report.rows_in)


def _words(config: Config, start: Source) -> Source:
    from align_kit.models import source

    named = config.model.tokenizer_name
    return source.resolve(named, random=True, option="tokenizer_name") if named else start


def _places(count: int) -> list[int]:
    import numpy as np

    return sorted(np.random.default_rng(SEED).choice(count, SAMPLE, replace=False).tolist())


def _full(recipe: Recipe, config: Config, reason: str) -> Data:
    """Return rows that are as long as they may be."""
    length = config.value("max_length") or MAX_LENGTH
    note = f"the data cannot be read here ({reason}): every row is taken to be {length} tokens long"
    if recipe.writes:
        length -= config.value(recipe.writes)
    rows = invented_rows(PHASE_KINDS[recipe.name][0], FULL, max(2, length))
    return Data(rows, _collate(recipe, config, SimpleNamespace(pad_token_id=0)), notes=(note,))


def _collate(recipe: Recipe, config: Config, words: Any) -> Callable[[Sequence[Row]], Mapping[str, Any]]:
    """Return what makes a batch of rows; of prompts, once they are completed."""
    if recipe.writes:
        from align_kit.data.collate import LanguageCollator

        return LanguageCollator(words.pad_token_id)  # type: ignore[return-value]  # its rows are dicts, as all are
    return recipe.trainer_class().collator(words, Asked(config))  # type: ignore[no-any-return]

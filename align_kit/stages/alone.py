"""What a run would start from and with which words, asked by a command that trains nothing and reads no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align_kit.config import Config
from align_kit.errors import UserError
from align_kit.models import source
from align_kit.models.source import Source
from align_kit.registry import Recipe
from align_kit.stages.beginning import Start, previous_phase, tokenizer


def opened(recipe: Recipe, config: Config) -> tuple[Any, Source]:
    """Return the tokenizer of the run, and what its policy would start from.

    Raises `UserError` where either is not here.
    """
    start = start_of(recipe, config)
    return words_of(config, start), start


def start_of(recipe: Recipe, config: Config) -> Source:
    """Return what the policy would start from; of a model that is named no more than the configuration is needed."""
    model = config.model
    if model.config_name:
        return source.resolve(model.config_name, random=True, option="config_name")
    if model.model_name_or_path:
        return source.configuration(model.model_name_or_path, revision=model.model_revision)
    return previous_phase(recipe, config)[0]


def words_of(config: Config, start: Source) -> Any:
    """Return the tokenizer of a run that starts from `start`, with the tokens and the template it is given."""
    named = config.model.tokenizer_name
    words = source.resolve(named, random=True, option="tokenizer_name") if named else start
    return tokenizer(Start(start, "", "", words), config)


def stops_of(start: Source) -> list[int]:
    """Return the tokens that a model's own generation stops at, as its files say; none where they do not."""
    file = Path(start.weights.folder) / "generation_config.json"
    if not file.is_file():
        return []
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError):
        raise UserError(f"{file} is no JSON object; mend it, or take it away") from None
    return named if isinstance(named, list) else [] if named is None else [named]

"""What is worth a line beside one row: its label, its answer, where its two completions part, what was merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from align_kit.data.render import common_prefix
from align_kit.inspect.decode import one_line
from align_kit.inspect.trace import Traced, Tracer

FEW = 3  # tokens of a completion that are spelt


def notes(traced: Traced, tracer: Tracer) -> Iterator[str]:
    """Yield the lines that stand under a row."""
    row, given = traced.row, traced.given
    if "label" in given:
        yield f"label: {'desirable' if given['label'] else 'undesirable'}"
    if tracer.kind == "prompt":
        yield f"answer: {_plain(given.get('answer'))}"
    if row is not None and "chosen_ids" in row:
        same = common_prefix(row["chosen_ids"], row["rejected_ids"])
        yield f"tokens that chosen and rejected begin with alike: {same:,}"
    if traced.report.prompt_shortened:
        yield "the prompt alone has other tokens at its end: " + _merged(traced, tracer)
    if tracer.recipe.head == "score" and row is not None:
        yield "nothing here is predicted: each side gets one score, read off its last token"


def _plain(value: Any) -> str:
    return "none" if value is None else one_line(value if isinstance(value, str) else repr(value))


def _merged(traced: Traced, tracer: Tracer) -> str:
    """Return the tokens at the end of the prompt, alone and once it is completed."""
    names = [name for name in ("completion", "chosen", "rejected") if name in traced.given]
    split = tracer.renderer.completions([traced.given], names)[0]
    alone = tracer.renderer.prompts([traced.given])[0]
    rest, first = alone[len(split.prompt) :], split.completions[0][:FEW]
    spelt = [" ".join(f"“{one_line(token)}”" for token in _spelt(ids, tracer)) for ids in (rest, first)]
    return f"{spelt[0]} alone, {spelt[1]} once completed"


def _spelt(ids: list[int], tracer: Tracer) -> list[str]:
    return [str(tracer.renderer.tokenizer.decode([token])) for token in ids]

"""The prompts a model is to answer: rows of cards and files of any kind that has prompts, each prompt once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align_kit import cards
from align_kit.data import load
from align_kit.data.digest import canonical_json, text_digest
from align_kit.data.shapes import CARRIED, Row
from align_kit.errors import UserError

_NAMED = re.compile(r"(?P<path>[^\[\]]+)(\[(?P<split>.+)\])?")


@dataclass(frozen=True)
class Prompts:
    """Rows of prompt, answer where there is one, and what travels with them; where they come from.

    `origins` are as a card records them; `checker` is the dotted path that every source's card names; `repeated` counts
    the rows left out because their prompt stands in one before.
    """

    rows: Sequence[Row]
    origins: Sequence[Mapping[str, Any]] = ()
    licences: tuple[str, ...] = ()
    checker: str | None = None
    repeated: int = 0
    warnings: Sequence[str] = field(default_factory=list)


def key_of(row: Row) -> int:
    """Return a number for a prompt, the same wherever the prompt stands and whatever stands beside it."""
    asked = {name: row[name] for name in ("prompt", *CARRIED) if row.get(name) is not None}
    return int(text_digest(canonical_json(asked))[:16], 16)


def read(named: Sequence[str], limit: int | None, template: str | None = None) -> Prompts:
    """Return the prompts of all sources, the first `limit`; raises `UserError` as loading for a run does.

    `template` is what string prompts become ("chat", or a text that holds {prompt}), in place of what a card says.
    """
    specs = [{**_spec(one), **({"prompt_template": template} if template else {})} for one in named]
    found = [_loaded(spec) for spec in specs]
    kept: dict[int, Row] = {}
    rows = 0
    for one in found:
        for row in _prompts(one.kind, one.dataset, one.sources[0].path):
            if limit is not None and len(kept) == limit:
                break
            rows += 1
            kept.setdefault(key_of(row), row)
    checkers = {_checker(spec["path"]) for spec in specs}
    return Prompts(
        list(kept.values()),
        [_origin(one) for one in found],
        tuple(dict.fromkeys(licence for one in found for licence in one.sources[0].licences)),
        checkers.pop() if len(checkers) == 1 else None,
        rows - len(kept),
        [text for one in found for text in one.warnings],
    )


def _spec(named: str) -> dict[str, str]:
    match = _NAMED.fullmatch(named.strip())
    if not match:
        raise UserError(f"cannot read the source {named!r}; write card:name[test], my.jsonl or my.jsonl[:1000]")
    split = match["split"] or "train"
    return {"path": match["path"], "split": f"train[{split}]" if ":" in split and "[" not in split else split}


def _loaded(spec: Mapping[str, str]) -> load.Loaded:
    """Return one source's rows; of traces the prompts with their answers, which stand there without the chains."""
    found = load.load([spec], phase="eval")
    traces = found.kind == "prompt_completion" and found.sources[0].format == "reason"
    return load.load([spec], phase="ppo") if traces else found


def _checker(path: str) -> str | None:
    is_card = path.startswith("card:") or path.endswith(".md")
    return cards.load_card(path.removeprefix("card:")).block.checker if is_card else None


def _origin(loaded: load.Loaded) -> dict[str, Any]:
    source = loaded.sources[0]
    is_card = source.path.startswith("card:")
    name = source.path.removeprefix("card:") if is_card else source.path.rsplit("/", 1)[-1]
    place = {"card" if is_card else "file": name}
    return {**place, "split": source.split, "digest": source.digest, "rows": source.rows}


def _prompts(kind: str, rows: Any, where: str) -> Iterator[Row]:
    """Yield the prompt of each canonical row, with the text of its completion as the answer where it has one."""
    for number, row in enumerate(rows, start=1):
        carried = {name: row[name] for name in CARRIED if row.get(name) is not None}
        if kind == "messages":
            turns, answer = _before_answer(row["messages"], f"{where}, row {number}")
            yield {"prompt": turns, **({"answer": answer} if answer is not None else {}), **carried}
        elif kind == "text":
            raise UserError(f"{where}: text rows have no prompts; give rows with a prompt column or messages")
        else:
            answer = row.get("answer")  # which may be 0
            if answer is None and kind == "prompt_completion":
                answer = _said(row["completion"])
            yield {"prompt": row["prompt"], **({"answer": answer} if answer is not None else {}), **carried}


def _before_answer(messages: list[Row], where: str) -> tuple[list[Row], str | None]:
    """Return a conversation up to its last answer, which is the model's to write anew, and that answer's text."""
    if messages[-1]["role"] != "assistant":
        return messages, None
    if len(messages) == 1:
        raise UserError(f"{where}: the conversation holds nothing but an answer; remove the row")
    said = messages[-1].get("content")
    return messages[:-1], said if isinstance(said, str) else None


def _said(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])

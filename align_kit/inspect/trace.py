"""One row on its way: as it was given, as it would be whole, and as the run takes it, in spans that fare alike.

Rows are rendered by the code a run renders with, and what is trained is read off the batch its trainer is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from align_kit.data.labels import SIDES
from align_kit.data.render import Renderer
from align_kit.data.report import TokeniseOptions, TokeniseReport
from align_kit.data.rows import ROW_MAKERS
from align_kit.inspect.decode import Ids, Span, State

if TYPE_CHECKING:
    from align_kit.registry import Recipe

Row = dict[str, Any]


@dataclass(frozen=True)
class Traced:
    """A canonical row, number `number` from 1: `row` is what the run takes of it, `whole` what it is uncut.

    Either is None where the row is dropped; `report` is the account of `row` alone.
    """

    number: int
    given: Row
    row: Row | None
    whole: Row | None
    report: TokeniseReport


@dataclass(frozen=True)
class Strip:
    """What is shown of one row: spans under each other, from the first token to the last."""

    title: str
    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()


class Tracer:
    """Renders single rows of one kind as `recipe` does and cuts them into spans."""

    def __init__(self, recipe: Recipe, kind: str, tokenizer: Any, options: TokeniseOptions, collate: Any) -> None:
        self.recipe, self.kind, self.options, self.collate = recipe, kind, options, collate
        self.renderer = Renderer(tokenizer, options.chat_template, options.control_tokens)

    def trace(self, number: int, given: Row) -> Traced:
        """Return what becomes of a canonical row."""
        report = TokeniseReport(self.kind, rows_in=1)
        row = self._made(given, self.options, report)
        if row is not None and not report.cut and not self.options.packing:
            return Traced(number, given, row, row, report)
        uncut = replace(self.options, max_length=None, packing=False)
        return Traced(number, given, row, self._made(given, uncut, TokeniseReport(self.kind)), report)

    def _made(self, given: Row, options: TokeniseOptions, report: TokeniseReport) -> Row | None:
        return next(iter(ROW_MAKERS[self.kind]([given], self.renderer, options, report)), None)

    # --- what the run is given ---

    def sequences(self, row: Row) -> list[tuple[list[int], list[bool]]]:
        """Return the ids of each sequence that the trainer's batch of one row holds, and which of them are trained."""
        batch = self.collate([row])
        there = batch["attention_mask"].bool()
        trained = batch["loss_mask"].bool() & there
        if self.recipe.writes or self.recipe.head == "score":  # no token is predicted
            trained = trained & False
        return [
            (ids[kept].tolist(), mask[kept].tolist())
            for ids, kept, mask in zip(batch["input_ids"], there, trained, strict=True)
        ]

    # --- spans ---

    def spans(self, traced: Traced) -> list[Span]:
        """Return the spans of a row, with what was cut off; of one that is dropped, all of it is."""
        if self.kind in SIDES:
            return list(self._completed(traced))
        if self.kind == "prompt":
            ids = (traced.row or traced.whole or {"prompt_ids": []})["prompt_ids"]
            return [Span("prompt", "read" if traced.row else "cut off", ids)]
        return list(self._language(traced))

    def packed(self, row: Row) -> list[Span]:
        """Return the spans of a row of joined documents, one for each document that it holds a part of."""
        ids, mask = self.sequences(row)[0]
        spans = []
        start = 0
        for place, token in enumerate(ids, start=1):
            if token == self.renderer.tokenizer.eos_token_id or place == len(ids):
                spans += _parted("text", ids, mask, start, place)
                start = place
        return spans

    def _language(self, traced: Traced) -> Iterator[Span]:
        whole = (traced.whole or {"input_ids": []})["input_ids"]
        if traced.row is None:
            yield Span(self._parts(0)[0], "cut off", whole)
            return
        ids, mask = self.sequences(traced.row)[0]
        lost = len(whole) - len(ids)
        from_start = lost if self.options.truncation_mode == "keep_end" else 0
        boundary = max(0, self._boundary(traced.given) - from_start)
        before, behind = self._parts(boundary)
        if from_start:
            yield Span(before, "cut off", whole[:lost])
        yield from _parted(before, ids, mask, 0, boundary)
        yield from _parted(behind, ids, mask, boundary, len(ids))
        if lost and not from_start:
            yield Span(behind, "cut off", whole[len(ids) :], ids)

    def _parts(self, boundary: int) -> tuple[str, str]:
        return ("prompt", "completion") if self.kind == "prompt_completion" else ("text", "text")

    def _boundary(self, given: Row) -> int:
        if self.kind != "prompt_completion":
            return 0
        return len(self.renderer.completions([given], ["completion"])[0].prompt)

    def _completed(self, traced: Traced) -> Iterator[Span]:
        """Yield the prompt of a row once, then each of its completions."""
        row, whole = traced.row, traced.whole
        if row is None or whole is None:
            for name in ("prompt", *SIDES[self.kind]) if whole else ():
                yield Span(name, "cut off", (whole or {})[f"{name}_ids"])
            return
        prompt = len(row["prompt_ids"])
        lost = len(whole["prompt_ids"]) - prompt
        if lost:
            yield Span("prompt", "cut off", whole["prompt_ids"][:lost])
        for side, (ids, mask) in zip(SIDES[self.kind], self.sequences(row), strict=True):
            if side == SIDES[self.kind][0]:
                yield from self._stated(_parted("prompt", ids, mask, 0, prompt))
            yield from self._stated(_parted(side, ids, mask, prompt, len(ids)))
            if rest := whole[f"{side}_ids"][len(ids) - prompt :]:
                yield Span(side, "cut off", rest, ids)

    def _stated(self, spans: Sequence[Span]) -> list[Span]:
        """Return spans of a model that gives one score to all it reads as read."""
        return [replace(span, state="read") for span in spans] if self.recipe.head == "score" else list(spans)


def _parted(part: str, ids: Ids, mask: Sequence[bool], start: int, stop: int) -> list[Span]:
    """Return `ids[start:stop]` in spans that are wholly trained or wholly masked."""
    spans: list[Span] = []
    begin = start
    for place in range(start + 1, stop + 1):
        if place == stop or mask[place] != mask[begin]:
            state: State = "TRAINED" if mask[begin] else "masked"
            spans.append(Span(part, state, ids[begin:place], ids[:begin]))
            begin = place
    return spans

"""The steps that judge rows one by one, in a worker's hands: a batch comes in, what stays goes out with signatures.

Rows are judged before they are compared with each other, so that none is dropped for its likeness to one that does not
stay. Every step looks at what the steps before it left; a row is counted under the first reason that hits.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from align_kit.clean import screen, signatures
from align_kit.clean.language import language_of
from align_kit.clean.measures import Text
from align_kit.clean.overlap import Overlap
from align_kit.clean.parts import is_question, learnt, parts
from align_kit.clean.personal import masked
from align_kit.clean.rules import Rule, broken, cut
from align_kit.clean.screen import Screen
from align_kit.clean.source import Batch, Raw, Source
from align_kit.clean.words import row_digest, tokens
from align_kit.data import read, weights
from align_kit.data.shapes import KIND_COLUMNS, Row
from align_kit.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NO_LINE = "no line left"
PAIR = 0.95  # a chosen and a rejected completion this alike teach nothing; less alike, one word may be the point


@dataclass(frozen=True)
class Plan:
    """What is asked of every row; it travels to the workers. `rules` are by source, `indices` in the chain's order."""

    kind: str
    rules: tuple[tuple[Rule, ...], ...]
    screen: Screen = Screen()
    harmful: tuple[Overlap, ...] = ()
    against: tuple[Overlap, ...] = ()
    language: str | None = None
    mask: bool = True
    near: bool = True
    threshold: float = 0.8
    seed: int = 0
    columns: tuple[str, ...] = ()  # kept beside the row's own
    lenient: bool = False  # rows that cannot be read are dropped, not an error
    keep_dropped: bool = False
    survey: bool = False  # nothing is dropped, every rule is asked


@dataclass
class Item:
    """A row on its way through the chain: as it was read, as it will be written, and its texts."""

    number: int
    given: Row
    row: Row
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Hit:
    """Why a row does not stay: the step and its rule, and what was seen."""

    step: str
    rule: str
    seen: str = ""


@dataclass
class Judged:
    """What a worker says of a batch; arrays have one entry for each row that stays."""

    source: int
    size: int
    rows: int = 0
    hits: list[tuple[int, Hit, bytes]] = field(default_factory=list)  # number, why, the row where it is to be kept
    numbers: list[int] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    digests: bytes = b""
    bands: NDArray[np.uint64] | None = None
    cut: Counter[str] = field(default_factory=Counter)  # lines by the rule they broke
    personal: Counter[str] = field(default_factory=Counter)
    notices: int = 0
    nowhere: int = 0  # rows that no block list can hold, where there is one
    lengths: list[list[tuple[int, int]]] = field(default_factory=list)  # of a survey: characters and words by part
    languages: Counter[str] = field(default_factory=Counter)


Step = Callable[[Plan, int, Sequence[Item]], Iterator[tuple[int, Hit]]]


def judge(plan: Plan, sources: Sequence[Source], batch: Batch) -> Judged:
    """Return what becomes of the rows of a batch.

    Raises UserError with file and line for a row that cannot be read, unless the plan is lenient.
    """
    judged = Judged(batch.source, batch.size, rows=len(batch.rows))
    items = list(_read(plan, sources[batch.source], batch, judged))
    if plan.screen.blocked:
        judged.nowhere = sum(not screen.says_where(item.given) for item in items)
    for step in STEPS:
        if step is _poor:
            _cut_lines(plan, batch.source, items, judged.cut)
        hits: dict[int, Hit] = {}
        for place, hit in step(plan, batch.source, items):
            if plan.survey:
                judged.hits.append((items[place].number, hit, b""))
            else:
                hits.setdefault(place, hit)
        judged.hits += [(items[place].number, hit, _kept_aside(plan, items[place].row)) for place, hit in hits.items()]
        items = [item for place, item in enumerate(items) if place not in hits] if hits else items
    judged.notices = sum(1 for item in items if screen.notice(item.texts))
    if plan.survey:
        _surveyed(items, judged)
    _pass_on(plan, items, judged)
    return judged


def _read(plan: Plan, source: Source, batch: Batch, judged: Judged) -> Iterator[Item]:
    for number, raw in batch.rows:
        try:
            given = raw if isinstance(raw, dict) else read.parse_line(raw, source.where(number))
            row = _canonical(given, plan, source, number)
            yield Item(number, given, row, parts(plan.kind, row))
        except UserError as error:
            if not plan.lenient:
                raise UserError(f"{error}; mend it, or leave such rows out with --bad-rows drop") from None
            kept = _kept_aside(plan, _plain(raw))
            judged.hits.append((number, Hit("reading", "cannot be read", str(error)), kept))


def _canonical(given: Row, plan: Plan, source: Source, number: int) -> Row:
    kind, row = source.canonical(number, given)
    if kind != plan.kind:
        raise UserError(f"{source.where(number)}: a {kind} row among {plan.kind} rows; split the file by kind")
    return {**row, **{name: given[name] for name in plan.columns if name in given and name not in row}}


def _plain(raw: Raw) -> str | Row:
    return raw.decode("utf-8", "replace").rstrip("\n") if isinstance(raw, bytes) else raw


def _kept_aside(plan: Plan, row: str | Row) -> bytes:
    if not plan.keep_dropped:
        return b""
    return encoded(masked(row, Counter()) if plan.mask else row)


def encoded(row: str | Row) -> bytes:
    """Return a row as JSON, with half surrogate pairs spelled out."""
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(row).encode()


# --- the steps ----------------------------------------------------------------------------------------------------


def _empty(plan: Plan, source: int, items: Sequence[Item]) -> Iterator[tuple[int, Hit]]:
    for place, item in enumerate(items):
        blank = [number for number, text in enumerate(item.texts) if not text.strip()]
        if len(blank) == len(item.texts) or any(not is_question(plan.kind, number) for number in blank):
            yield place, Hit("empty", "no text" if len(blank) == len(item.texts) else "no completion")


def _screened(plan: Plan, source: int, items: Sequence[Item]) -> Iterator[tuple[int, Hit]]:
    if plan.screen == Screen():
        return
    for place, item in enumerate(items):
        if found := plan.screen.objection(item.given, item.texts):
            yield place, Hit("screening", *found)


def _harmful(plan: Plan, source: int, items: Sequence[Item]) -> Iterator[tuple[int, Hit]]:
    for index in plan.harmful:
        yield from _held(index, "harmful", items)


def _contaminated(plan: Plan, source: int, items: Sequence[Item]) -> Iterator[tuple[int, Hit]]:
    for index in plan.against:
        yield from _held(index, "decontamination", items)


def _held(index: Overlap, step: str, items: Sequence[Item]) -> Iterator[tuple[int, Hit]]:
    texts = [text for item in items for text in item.texts]
    owner = [place for place, item in enumerate(items) for _ in item.texts]
    for place, seen in zip(owner, index.find(texts), strict=True):
        if seen is not None:
            yield place, Hit(step, index.name, seen)


def _foreign(plan: Plan, source: int, items: Sequence[Item]) -> Iterator[tuple[int, Hit]]:
    if plan.language is None:
        return
    for place, item in enumerate(items):
        seen = language_of(" ".join(item.texts))
        if seen != plan.language:
            yield place, Hit("language", f"not {plan.language}", str(seen))


def _cut_lines(plan: Plan, source: int, items: Sequence[Item], counted: Counter[str]) -> None:
    """Cut bad lines out of texts, where rules for lines were asked for; a survey counts them only."""
    rules = [rule for rule in plan.rules[source] if rule.cuts]
    if plan.kind != "text" or not rules:
        return
    for item in items:
        text, hits = cut(item.texts[0], rules, plan.language or "en")
        counted.update(rule.full_name for rule in hits)
        if hits and not plan.survey:
            item.row, item.texts = {**item.row, "text": text}, (text,)


def _poor(plan: Plan, source: int, items: Sequence[Item]) -> Iterator[tuple[int, Hit]]:
    cutting = plan.kind == "text" and any(rule.cuts for rule in plan.rules[source])
    rules = [rule for rule in plan.rules[source] if rule.answers == (plan.kind != "text") and not rule.cuts]
    if plan.kind == "prompt" or not (rules or cutting):
        return
    for place, item in enumerate(items):
        if cutting and not item.texts[0]:
            yield place, Hit("quality", NO_LINE)
            continue
        text = Text(learnt(plan.kind, item.row, item.texts), plan.language or "en")
        for rule in broken(text, rules):
            yield place, Hit("quality", rule.full_name, f"{rule.measured(text):.4g}")
            if not plan.survey:
                break


def _indistinct(plan: Plan, source: int, items: Sequence[Item]) -> Iterator[tuple[int, Hit]]:
    if plan.kind != "preference" or not plan.near:
        return
    for place, item in enumerate(items):
        chosen, rejected = (tokens(text) for text in item.texts[1:])
        if chosen == rejected:
            yield place, Hit("pair", "chosen is rejected")
            continue
        alike = signatures.jaccard(signatures.shingles(chosen), signatures.shingles(rejected))
        if alike >= PAIR:
            yield place, Hit("pair", "chosen nearly rejected", f"{alike:.3f}")


STEPS: tuple[Step, ...] = (_empty, _screened, _harmful, _foreign, _poor, _indistinct, _contaminated)


# --- what goes on to be compared ----------------------------------------------------------------------------------


def _pass_on(plan: Plan, items: Sequence[Item], judged: Judged) -> None:
    """Mask what stays, and sign it for the comparison with all other rows."""
    for item in items:
        if plan.mask:
            item.row = masked(item.row, judged.personal)
    own, beside = KIND_COLUMNS[plan.kind], {*plan.columns, weights.COLUMN}
    judged.numbers = [item.number for item in items]
    judged.lines = [encoded(item.row) for item in items]
    judged.digests = b"".join(
        row_digest({name: value for name, value in item.row.items() if name in own or name not in beside})
        for item in items
    )
    if plan.near and items:
        compared = [comparable(plan.kind, item.row) for item in items]
        judged.bands = signatures.signed(
            [texts for texts, _ in compared], [tag for _, tag in compared], plan.threshold, plan.seed
        )


def comparable(kind: str, row: Row) -> tuple[list[list[str]], int]:
    """Return the tokens of a row's parts, and its tag: rows with different labels share no shingle."""
    return [tokens(text) for text in parts(kind, row)], int(row.get("label", 0))


def shingled(kind: str, row: Row) -> list[frozenset[tuple[str, ...]]]:
    """Return the shingles of a row's parts, for `alike`."""
    return [signatures.shingles(part) for part in comparable(kind, row)[0]]


def alike(one: list[frozenset[tuple[str, ...]]], other: list[frozenset[tuple[str, ...]]]) -> float:
    """Return how alike two rows are: the least Jaccard similarity of their parts.

    So a prompt that many rows share makes no twins of rows that answer it differently. Rows with different labels are
    not asked about: no band of theirs is equal.
    """
    return min(signatures.jaccard(mine, its) for mine, its in zip(one, other, strict=True))


def _surveyed(items: Sequence[Item], judged: Judged) -> None:
    judged.lengths = [[(len(text), len(text.split())) for text in item.texts] for item in items]
    for item in items:
        if (seen := language_of(" ".join(item.texts), needed=False)) is not None:
            judged.languages[seen] += 1

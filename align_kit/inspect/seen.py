"""What `align-kit show` looks at: a split of a run's data, prepared as the run prepares it, and rows picked from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from align_kit.config import Config
from align_kit.config.suspicions import SUSPICIONS
from align_kit.data import health, labels, prepare
from align_kit.data.balance import row_tokens
from align_kit.data.labels import Labels, Words
from align_kit.data.prepare import Given, Split
from align_kit.errors import UserError
from align_kit.inspect import faithful, terminal
from align_kit.inspect.checks import Check, Facts, checks
from align_kit.inspect.decode import Decoder, Span
from align_kit.inspect.notes import notes
from align_kit.inspect.trace import Strip, Traced, Tracer
from align_kit.models.source import Source
from align_kit.plan.describe import Asked
from align_kit.registry import Recipe
from align_kit.stages import alone
from align_kit.stages.data import wanted

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = 250  # rows that are rendered whole, for what whole data sets are not looked through for
FAR = 1000  # rows behind its place that the longest one is looked for at most, where rows before it were dropped


@dataclass(frozen=True)
class Seen:
    """One split of the data of a run: what was counted and judged, and the rows that are shown."""

    recipe: Recipe
    start: Source
    split: Split
    facts: Facts
    checks: tuple[Check, ...]
    strips: tuple[Strip, ...]

    @property
    def labels(self) -> Labels:
        return self.facts.labels

    @property
    def decoder(self) -> Decoder:
        return self.facts.decoder

    def histogram(self, width: int) -> list[str]:
        """Return the lengths in bars of text, parts beside each other."""
        lengths = self.labels.lengths
        parts = {name: many for name, many in lengths.items() if name != "whole" or len(lengths) == 1}
        return list(terminal.histogram(parts, width))

    def words_sentence(self) -> str:
        """Return what the tokenizer's special tokens are, in words."""
        words, named = self.facts.words, self.decoder.name
        told = {"EOS": words.eos, "pad": words.pad, "BOS": words.bos}
        more = sorted(words.stops - {words.eos})
        stops = f"; generation stops at {', '.join(map(named, more))} too" if more else ""
        return ", ".join(f"{what} {'none' if token is None else named(token)}" for what, token in told.items()) + stops


def look(recipe: Recipe, config: Config, name: str, *, rows: int, row: int | None) -> Seen:
    """Prepare the data of a run and look at its split `name`: at row `row` from 1, or at `rows` rows of several kinds.

    Raises `UserError` where the run itself could not have the data, and for a split or a row that is not there.
    """
    words, start = alone.opened(recipe, config)
    args = Asked(config)
    of_run = wanted(recipe, config, args)
    asked = replace(of_run, limits=dict.fromkeys(SUSPICIONS, 1.0))  # what stops the run is shown here, not refused
    given = prepare.given(asked)
    if name not in given:
        raise UserError(f"--split {name}: this run has no such rows; known: {', '.join(given)}")
    prepared = prepare.tokenised(given, asked, words)
    split = prepared.train if name == "train" else prepared.eval
    assert split is not None
    kind, decoder = split.account["kind"], Decoder(words)
    collate = recipe.trainer_class().collator(words, args)
    tracer = Tracer(recipe, kind, words, asked.options, collate)
    picker = Picker(tracer, given[name], split, asked.seed)
    meaning = Words.of(words, alone.stops_of(start))
    facts = Facts(
        recipe, asked.options, labels.measure(split.rows, kind, meaning), split.report, meaning, decoder,
        faithful.judged(picker.sample, decoder), health.repeats_asked(split.account),
    )  # fmt: skip
    judged = checks(facts, [line for line in split.warnings if line not in split.account.get("suspicions", [])])
    if name == "train":
        judged += _refused(facts, of_run.limits, ", ".join(split.source_names()))
    strips = [picker.one(row)] if row else list(picker.several(rows))
    return Seen(recipe, start, split, facts, tuple(judged), tuple(strips))


def _refused(facts: Facts, limits: Mapping[str, float], where: str) -> list[Check]:
    """Return the line with which the run itself would refuse these rows, where it would."""
    try:
        health.judged(facts.report, limits, where, facts.repeats)
    except UserError as error:
        return [Check("NOT", "run", f"refuses these rows: {error}")]
    return []


class Picker:
    """Picks rows of a split to show, and renders a sample of them."""

    def __init__(self, tracer: Tracer, given: Given, split: Split, seed: int) -> None:
        self.tracer, self.given, self.split, self.seed = tracer, given.rows, split, seed
        self.origins = given.origins
        self.sample = [self._trace(place) for place in _spread(len(self.given), SAMPLE)]

    def _trace(self, place: int) -> Traced:
        return self.tracer.trace(place + 1, self.given[place])

    def one(self, number: int) -> Strip:
        """Return row `number`, counted from 1: of packed text the row of the run, else the one that was given."""
        shown: Dataset = self.split.rows if self.tracer.options.packing else self.given
        if not 1 <= number <= len(shown):
            raise UserError(f"--row {number}: there are rows 1 to {len(shown)}")
        if self.tracer.options.packing:
            return self._packed(number, "")
        return self._strip(self._trace(number - 1), "")

    def several(self, count: int) -> Iterator[Strip]:
        """Yield the first row, the longest, one of each kind that lost something, and then any, `count` in all."""
        if self.tracer.options.packing:
            places = [0, *self._drawn(len(self.split.rows))]
            for place in list(dict.fromkeys(places))[:count]:
                yield self._packed(place + 1, "first" if place == 0 else "drawn")
            return
        telling: dict[int, tuple[Traced, list[str]]] = {}
        for why, traced in self._telling():
            telling.setdefault(traced.number, (traced, []))[1].append(why)
        drawn = (place + 1 for place in self._drawn(len(self.given)))
        more = [number for number in drawn if number not in telling][: max(0, count - len(telling))]
        for traced, whys in list(telling.values())[:count]:
            yield self._strip(traced, ", ".join(whys))
        for number in more:
            yield self._strip(self._trace(number - 1), "drawn")

    def _telling(self) -> Iterator[tuple[str, Traced]]:
        """Yield rows with why they are shown."""
        yield "first", self._trace(0)
        if (longest := self._longest()) is not None:
            yield "longest", longest
        for why, tells in (
            ("cut", lambda one: one.report.cut),
            ("lost", lambda one: one.row is None),
            ("does not end", lambda one: one.report.unended),
            ("boundary", lambda one: one.report.prompt_shortened),
        ):
            if (found := next(filter(tells, self.sample), None)) is not None:
                yield why, found

    def _drawn(self, count: int) -> list[int]:
        import numpy as np

        return list(np.random.default_rng(self.seed).permutation(count).tolist())

    def _longest(self) -> Traced | None:
        """Return the longest row the run takes: at its place, or as many places behind it as rows were dropped."""
        place = int(row_tokens(self.split.rows).argmax())
        dropped = sum(self.split.report.dropped.values())
        kept = self.split.rows[place]
        for later in range(place, min(place + dropped, len(self.given) - 1, place + FAR) + 1):
            traced = self._trace(later)
            if traced.row is not None and all(kept[name] == value for name, value in traced.row.items()):
                return traced
        return None

    # --- as they are shown ---

    def _strip(self, traced: Traced, why: str) -> Strip:
        spans = tuple(self.tracer.spans(traced))
        said = _counted(spans) if traced.row is not None else f"dropped, {', '.join(traced.report.dropped)}"
        source = [] if self.origins is None else [f"from {self._source(traced.number)}"]
        under = (*source, *notes(traced, self.tracer))
        return Strip(_title(traced.number, len(self.given), why, said), spans, under)

    def _source(self, number: int) -> str:
        assert self.origins is not None
        return self.split.source_names()[self.origins.numbers[number - 1]]

    def _packed(self, number: int, why: str) -> Strip:
        rows = self.split.rows
        spans = tuple(self.tracer.packed(rows[number - 1]))
        said = f"{sum(len(span.ids) for span in spans):,} tokens of {len(spans):,} documents"
        eos = self.tracer.renderer.tokenizer.eos_token_id
        broken = ["begins"] if number > 1 and rows[number - 2]["input_ids"][-1] != eos else []
        broken += ["ends"] if spans[-1].ids[-1] != eos else []
        note = [f"the row {' and '.join(broken)} inside a document"] if broken else []
        return Strip(_title(number, len(rows), why, said), spans, tuple(note))


def _title(number: int, of: int, why: str, said: str) -> str:
    return f"row {number:,} of {of:,}{f' ({why})' if why else ''}: {said}"


def _counted(spans: Sequence[Span]) -> str:
    """Return the tokens of each part in words, and how many were cut off."""
    counts: Counter[str] = Counter()
    for span in spans:
        counts["cut off" if span.state == "cut off" else span.part] += len(span.ids)
    return "tokens: " + ", ".join(f"{part} {count:,}" for part, count in counts.items())


def _spread(count: int, most: int) -> Sequence[int]:
    import numpy as np

    return range(count) if count <= most else np.linspace(0, count - 1, most, dtype=int).tolist()

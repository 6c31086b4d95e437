"""The words of `align-kit data clean` and `stats`, and the plan they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from align_kit import cards
from align_kit.clean import language, parts, rules, screen, source
from align_kit.clean.chain import Plan
from align_kit.clean.overlap import Held, Overlap
from align_kit.clean.screen import Screen
from align_kit.clean.source import Source
from align_kit.data import read
from align_kit.data.shapes import Shape
from align_kit.errors import UserError, unknown

FILTERS = ("gopher", "c4", "fineweb", "answers")
DEDUP = ("exact", "near")
NONE = "none"
_HELD_OUT = ("test", "validation")

CHAIN = """the steps, in this order; a row is counted under the first that drops it:
  empty            rows without text, or without a completion
  screening        rows of another licence (--licences), of a blocked place (--blocklist), with a copyright notice
                   (--copyright drop)
  harmful          rows that hold a text of a list (--harmful)
  language         rows in another language (--language)
  quality          texts that break a rule of Gopher (Rae 2021), C4 (Raffel 2020) or FineWeb (Penedo 2024), and
                   completions stuck in a loop (--filters, --rules); with --filters c4_lines,gopher,c4,fineweb,answers
                   lines that C4 would cut are cut out of texts first
  pair             pairs whose chosen and rejected completion are the same, or nearly
  decontamination  rows that share a run of 13 words with evaluation data, short ones as a whole (--against)
  personal data    emails, IP addresses, phone numbers and keys are replaced by <email>, <ip>, <phone>, <key> (--pii)
  duplicates       rows that repeat an earlier one, whole rows and not prompts: exactly but for white space and Unicode
                   form, or nearly, each part of the row by a Jaccard similarity of 5-word runs of --threshold or more

Only kept rows make others duplicates, and the first of all is kept. Case, white space and Unicode form are changed for
comparing alone. The result does not depend on the number of workers.

Above one machine: clean each shard by itself with --dedup none, then all of them together with --filters none and
--pii keep, which gives the same set; of each row that takes part in the last step a few hundred bytes are in memory."""


class Words(argparse.ArgumentParser):
    """A parser whose mistakes are one line, and which guesses no abbreviations."""

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def clean_words() -> Words:
    """Return the parser of `align-kit data clean`."""
    parser = Words("align-kit data clean", "Write a clean copy of data sets, and a card that says how.", CHAIN)
    _common(parser)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FOLDER", help="where the set is written: a new or empty folder")
    add("--name", help="name of its card; default: the folder's")
    add("--overwrite", action="store_true", help="replace a set that was written there before")
    add("--keep-dropped", action="store_true", help="write dropped rows too, with their reasons, to dropped.jsonl")
    add("--keep-columns", default="", metavar="A,B", help="columns to keep beside those that are trained on, as url,id")
    return parser


def stats_words() -> Words:
    """Return the parser of `align-kit data stats`."""
    parser = Words("align-kit data stats", "Tell what is in data sets, and what cleaning would do to them.")
    _common(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def _common(parser: Words) -> None:
    add = parser.add_argument
    add("inputs", nargs="+", metavar="SOURCE", help="card:<name>, card:<name>[test], a file, a folder, file[:1000]")
    add("--filters", default=",".join(FILTERS), help=f"sets of quality rules, or none; default {','.join(FILTERS)}")
    add("--rules", metavar="FILE", help="YAML laid over the rules' thresholds, see align_kit/clean/rules.yaml")
    add("--dedup", default=",".join(DEDUP), help=f"default {','.join(DEDUP)}; or one of them, or none")
    add("--threshold", type=float, default=0.8, metavar="J", help="likeness of near duplicates, 0.3 to 1; default 0.8")
    add("--against", nargs="+", default=[], metavar="EVAL", help="evaluation data no row may overlap with; of a card "
        "its test split, else validation, else all of it")  # fmt: skip
    add("--harmful", nargs="+", default=[], metavar="LIST", help="card, file of prompts or one column, .txt of phrases")
    add("--blocklist", metavar="FILE", help="places a line, for the columns " + ", ".join(screen.SOURCE_COLUMNS))
    add("--licences", metavar="A,B", help="licences a row may name in its licence column; a row without goes")
    add("--copyright", choices=("keep", "drop"), default="keep", help="rows with a copyright notice; default keep")
    add("--language", metavar="CODE", help="ISO 639-1, as en; needs the extra 'language'; rules take its stop words")
    add("--pii", choices=("mask", "keep"), default="mask", help="personal data; default mask")
    add("--bad-rows", choices=("stop", "drop"), default="stop", help="rows that cannot be read; default stop")
    add("--format", help="of files whose columns do not tell: " + ", ".join(cards.FORMAT_KINDS))
    add("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="of files: prompt=question completion=answer")
    add("--workers", type=int, metavar="N", help="processes; default: one a core, one in all for small inputs")
    add("--seed", type=int, default=0, help="of the signatures that find near duplicates; default 0")


@dataclass(frozen=True)
class Asked:
    """What a command line asks for, checked: the sources, the plan, and whether exact twins are looked for."""

    sources: list[Source]
    plan: Plan
    exact: bool
    evaluations: tuple[str, ...]


def asked(given: argparse.Namespace, *, survey: bool = False) -> Asked:
    """Return what `given` asks for; raises UserError for each mistake in it."""
    dedup = _listed("--dedup", given.dedup, DEDUP)
    if not 0.3 <= given.threshold <= 1:
        raise UserError(f"--threshold {given.threshold} must be from 0.3 to 1; 0.8 is usual for near duplicates")
    if given.seed < 0:
        raise UserError(f"--seed {given.seed} must not be negative")
    sources = source.opened(given.inputs, given=_shape(given))
    filters = _sets(given)
    for name in rules.sources_named(given.rules):
        if name not in [one.name for one in sources]:
            raise unknown(f"source in {given.rules}, below 'for',", name, [one.name for one in sources])
    columns = tuple(filter(None, getattr(given, "keep_columns", "").split(",")))
    _check_there(columns, sources)
    plan = Plan(
        kind=source.one_kind(sources),
        rules=tuple(rules.load_rules(filters, given.rules, one.name) for one in sources),
        screen=_screen(given),
        harmful=tuple(_harmful(word) for word in given.harmful),
        against=tuple(_evaluation(word) for word in given.against),
        language=None if given.language is None else language.checked(given.language),
        mask=given.pii == "mask",
        near="near" in dedup,
        threshold=given.threshold,
        seed=given.seed,
        columns=columns,
        lenient=given.bad_rows == "drop",
        keep_dropped=getattr(given, "keep_dropped", False),
        survey=survey,
    )
    return Asked(sources, plan, "exact" in dedup, tuple(index.name for index in plan.against))


def _check_there(columns: Sequence[str], sources: Sequence[Source]) -> None:
    """Raise UserError for a column that none of the first rows has: a misspelt one would be lost without a word."""
    there = {name for one in sources for name in source.columns_of(one)} if columns else set()
    for column in columns:
        if column not in there:
            raise unknown(f"column of the first {source.BATCH_ROWS} rows, --keep-columns", column, there)


def _listed(option: str, words: str, known: Sequence[str]) -> list[str]:
    if words == NONE:
        return []
    found = [word for word in words.split(",") if word]
    for word in found:
        if word not in known:
            raise unknown(f"word of {option}", word, [*known, NONE])
    return found


def _sets(given: argparse.Namespace) -> list[str]:
    if given.filters == NONE:
        return []
    return [word for word in given.filters.split(",") if word]


def _shape(given: argparse.Namespace) -> Shape | None:
    columns = {}
    for word in given.columns:
        name, equals, column = word.partition("=")
        if not (name and equals and column):
            raise UserError(f"--columns {word}: write name=column, as prompt=question")
        columns[name] = column
    return source.named_shape(given.format, columns)


def _screen(given: argparse.Namespace) -> Screen:
    return Screen(
        screen.licences(given.licences) if given.licences is not None else None,
        screen.blocked(given.blocklist) if given.blocklist else frozenset(),
        given.copyright == "drop",
    )


# --- what rows are held against -----------------------------------------------------------------------------------


def _evaluation(word: str) -> Overlap:
    """Return the index of evaluation data: of a card without a split its test rows, else validation, else all."""
    splits = ["train"]
    if word.startswith("card:") and "[" not in word:
        there = cards.load_card(word.removeprefix("card:")).block.splits
        splits = [next((name for name in _HELD_OUT if name in there), "")]
        splits = splits if splits[0] else list(there)
        word_of = [f"{word}[{split}]" for split in splits]
    else:
        word_of = [word]
    sources = [one for named in word_of for one in source.opened([named])]
    return Overlap(", ".join(one.name for one in sources), (text for one in sources for text in _texts(one)))


def _harmful(word: str) -> Overlap:
    if word.endswith(".txt"):
        phrases = screen.listed(Path(word))
        return Overlap(word, (Held(text, f"{word}, {text!r}") for text in phrases), inside=True)
    sources = source.opened([word], given=_only_column(Path(word)))
    asked_for = (text for one in sources for text in _texts(one) if text.is_question)
    return Overlap(word, asked_for, inside=True)


def _only_column(file: Path) -> Shape | None:
    """Return how a list is read that has one column, whatever its name."""
    _, row = next(read.numbered_rows(file), (0, {})) if file.is_file() else (0, {})
    return Shape("prompt", {"prompt": next(iter(row))}) if len(row) == 1 else None


def _texts(one: Source) -> Iterator[Held]:
    for number, raw in one.rows():
        where = one.where(number)
        row = raw if isinstance(raw, dict) else read.parse_line(raw, where)
        kind, canonical = one.canonical(number, row)
        for place, text in enumerate(parts.parts(kind, canonical)):
            yield Held(text, where, parts.is_question(kind, place))

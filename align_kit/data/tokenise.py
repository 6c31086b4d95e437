"""Tokenise canonical rows once, keep the result by content, and report what truncation did.

Language rows: `{"input_ids", "loss_mask"}`; preference: `{"prompt_ids", "chosen_ids", "rejected_ids"}`; binary:
`{"prompt_ids", "completion_ids", "label"}`; prompt: `{"prompt_ids", "prompt", "answer"}`, the last two as they were
given (a string or messages; None where there is no answer). Lengths are tokens. Rows that were weighed have a `weight`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit.data import health, store, weights
from align_kit.data.digest import canonical_json, rows_digest, text_digest
from align_kit.data.origins import COLUMN, Origins, Spans
from align_kit.data.render import Ids, Renderer, Row
from align_kit.data.report import TokeniseOptions, TokeniseReport
from align_kit.data.rows import LANGUAGE_KINDS, ROW_MAKERS
from align_kit.errors import UserError, unknown

__all__ = ["TokeniseOptions", "TokeniseReport", "cache_key", "pack", "tokenise", "tokenizer_digest"]

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Part of every cache key: raise it whenever the same input may give other tokens or columns.
SCHEMA_VERSION = 5
BATCH_ROWS = 1000


def tokenise(
    dataset: Dataset,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    options: TokeniseOptions,
    cache_dir: str | Path,
    origins: Origins | None = None,
) -> tuple[Dataset, TokeniseReport]:
    """Return the tokenised rows of `dataset` (canonical rows of `kind`) and the report of how they came about.

    The result lies in one folder below `cache_dir`, named by the digest of the rows, the tokenizer, the options and
    this module's schema version; ranks and runs with the same key read the same file. With `origins` each row says
    which source it is of (`source_parts`), and the folder's name depends on that too. Raises UserError when no row is
    left, naming why.
    """
    if kind not in ROW_MAKERS:
        raise unknown("row kind", kind, ROW_MAKERS)
    _check_fit(kind, options)
    key = cache_key(dataset, kind, tokenizer, options)
    place = key if origins is None else origins.key(key)
    columns = _COLUMNS[kind] | ({} if origins is None else {COLUMN: "ids"})
    columns |= {weights.COLUMN: "number"} if weights.COLUMN in dataset.column_names else {}

    def build(write: Callable[[dict[str, list[Any]]], None]) -> dict[str, Any]:
        report = TokeniseReport(kind=kind, rows_in=len(dataset), digest=key, place=place)
        renderer = Renderer(tokenizer, options.chat_template, options.control_tokens)
        made = _made(dataset, kind, renderer, options, report, origins)
        _write_packed(made, options, report, write) if options.packing else _write_rows(made, write)
        if not report.rows_out:
            raise UserError(f"no row is left to train on: {report.sentence()}; raise max_length or add data")
        return asdict(report)

    rows, stored, cached = store.fetch(Path(cache_dir) / place, columns, build)
    return rows, TokeniseReport(**{**stored, "cached": cached})


def _check_fit(kind: str, options: TokeniseOptions) -> None:
    if options.packing and kind != "text":
        raise UserError(f"packing joins text rows, these are {kind} rows; set packing: false")
    if options.completion_only_loss and kind in ("text", "messages"):
        also = ", or assistant_only_loss" if kind == "messages" else ""
        raise UserError(f"completion_only_loss needs prompt and completion, these are {kind} rows; drop it{also}")


def pack(dataset: Dataset, max_length: int, eos: int) -> tuple[Dataset, TokeniseReport]:
    """Join tokenised language rows by `eos` and cut them into full rows of exactly `max_length`, all of it trained.

    A row that ends in `eos` gets no second one. The tail shorter than `max_length` is left out and counted.
    """
    from datasets import Dataset, Features, List, Value

    report = TokeniseReport(kind="text", rows_in=len(dataset))
    ended = (row if row and row[-1] == eos else [*row, eos] for row in dataset["input_ids"])
    rows = [row for batch in _full_rows(ended, max_length, report) for row in batch]
    features = Features({"input_ids": List(Value("int32")), "loss_mask": List(Value("int8"))})
    columns = {"input_ids": rows, "loss_mask": [[1] * max_length] * len(rows)}
    return Dataset.from_dict(columns, features=features), report


def cache_key(dataset: Dataset, kind: str, tokenizer: PreTrainedTokenizerBase, options: TokeniseOptions) -> str:
    """Return the content key (32 hexadecimal digits) of a tokenised data set."""
    return text_digest(
        f"align_kit tokenised v{SCHEMA_VERSION}", kind, rows_digest(dataset), tokenizer_digest(tokenizer),
        canonical_json(asdict(options)),
    )  # fmt: skip


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the digest of all that decides a tokenizer's output: vocabulary, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A call with padding or truncation leaves its setting in the serialised backend; it is no property of the words.
    words = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    words = {name: value for name, value in words.items() if name not in ("padding", "truncation")}
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    flags = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")}
    named = [type(tokenizer).__name__, special, flags, tokenizer.chat_template]
    return text_digest(canonical_json(words), canonical_json(named))


_COLUMNS: dict[str, dict[str, str]] = {
    **{kind: {"input_ids": "ids", "loss_mask": "mask"} for kind in LANGUAGE_KINDS},
    "preference": {"prompt_ids": "ids", "chosen_ids": "ids", "rejected_ids": "ids"},
    "binary": {"prompt_ids": "ids", "completion_ids": "ids", "label": "bool"},
    "prompt": {"prompt_ids": "ids", "prompt": "json", "answer": "json"},
}


def _made(
    dataset: Dataset,
    kind: str,
    renderer: Renderer,
    options: TokeniseOptions,
    report: TokeniseReport,
    origins: Origins | None,
) -> Iterator[list[Row]]:
    """Yield tokenised rows in batches; dropped rows are counted and left out."""
    make = ROW_MAKERS[kind]
    seen: health.Seen = {}
    for start in range(0, len(dataset), BATCH_ROWS):
        batch = dataset[start : start + BATCH_ROWS]
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        health.inspect(rows, kind, renderer, report, seen)
        renderer.count_control(rows, report)
        tokenised = make(rows, renderer, options, report)
        if weights.COLUMN in batch:
            tokenised = weights.attached(tokenised, batch[weights.COLUMN])
        yield [row for row in (origins.attached(tokenised, start) if origins else tokenised) if row is not None]


def _write_rows(made: Iterator[list[Row]], write: Callable[[dict[str, list[Any]]], None]) -> None:
    for rows in made:
        if rows:
            write({name: [row[name] for row in rows] for name in rows[0]})


def _write_packed(
    made: Iterator[list[Row]],
    options: TokeniseOptions,
    report: TokeniseReport,
    write: Callable[[dict[str, list[Any]]], None],
) -> None:
    assert options.max_length is not None
    mask = [1] * options.max_length
    spans = Spans()

    def documents() -> Iterator[Ids]:
        for rows in made:
            for row in rows:
                spans.add(row)
                yield row["input_ids"]

    for rows in _full_rows(documents(), options.max_length, report):
        sources = spans.columns(len(rows), options.max_length)
        write({"input_ids": rows, "loss_mask": [mask] * len(rows), **sources})


def _full_rows(documents: Iterator[Ids], length: int, report: TokeniseReport) -> Iterator[list[Ids]]:
    """Yield batches of full rows; counts them and the leftover tail in `report`."""
    buffer: Ids = []
    for document in documents:
        buffer += document
        full = len(buffer) // length
        if full:
            yield [buffer[place * length : (place + 1) * length] for place in range(full)]
            buffer = buffer[full * length :]
            report.rows_out += full
    report.tokens = report.trained_tokens = report.rows_out * length
    report.max_tokens = length if report.rows_out else 0
    report.leftover_tokens = len(buffer)

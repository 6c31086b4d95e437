"""`align-kit cards croissant`: a card as Croissant 1.0, the JSON-LD vocabulary for data sets of MLCommons.

https://docs.mlcommons.org/croissant/docs/croissant-spec.html. What a card does not know is left out, and named: nobody
is helped by a made-up creator or date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from align_kit import cards
from align_kit.card_commands import Parser
from align_kit.card_commands.rows import file_rows, is_here
from align_kit.cards import Card
from align_kit.cards.licences import address
from align_kit.data import weights
from align_kit.data.shapes import KIND_COLUMNS, Row
from align_kit.errors import UserError

CONFORMS_TO = "http://mlcommons.org/croissant/1.0"
# What every data set of Croissant 1.0 should have beside its context and type (specification, "Required").
REQUIRED = ("name", "description", "license", "url", "creator", "datePublished", "distribution")
# The context of the specification's appendix 1: words of Croissant's own, the rest are schema.org's.
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{word: f"cr:{word}" for word in (
        "citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet",
        "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet",
        "references", "regex", "repeated", "replace", "separator", "source", "subField", "transform",
    )},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
}  # fmt: skip
_MEDIA = {
    ".jsonl": "application/jsonlines",
    ".json": "application/json",
    ".csv": "text/csv",
    ".parquet": "application/x-parquet",
    ".txt": "text/plain",
}
_SAMPLE = 100  # rows that are looked at for the type of a field that is empty in the first
_TYPES = {bool: "sc:Boolean", int: "sc:Integer", float: "sc:Float"}  # all else is sc:Text
# For a card whose files are not here: what is no text, and the columns of formats that are shapes of files only.
_EXAMPLES: dict[str, Any] = {
    "label": True,
    "messages": [{"role": "", "content": ""}],
    "conversations": [{"from": "", "value": ""}],
}
_FILE_COLUMNS = {"alpaca": ("instruction", "input", "output"), "sharegpt": ("conversations",)}


def croissant_command(words: Sequence[str]) -> int:
    """Print a card as JSON-LD, or write it to `--output`, say what it lacks, and return 0."""
    parser = Parser("croissant")
    parser.add_argument("name")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(words)
    card = cards.load_card(options.name)
    made = croissant(card, cards.data_home())
    text = json.dumps(made, indent=2, ensure_ascii=False)
    if options.output is None:
        print(text)
    else:
        try:
            options.output.write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {options.output}: {error.strerror}") from None
        print(f"{card.name}: written to {options.output}")
    if missing := [name for name in REQUIRED if not made.get(name)]:
        print(f"{card.name}: Croissant asks for {', '.join(missing)}, which the card does not know", file=sys.stderr)
    return 0


def croissant(card: Card, home: Path | None) -> dict[str, Any]:
    """Return a card as a Croissant 1.0 data set; where its files are here, their first rows give the types of fields.

    A hub set whose files the card does not name, and a built-in one, which has none, are described without records.
    """
    body = card.sections()
    told = {
        "alternateName": card.pretty_name,
        "citeAs": card.front.get("citation"),
        "inLanguage": card.front.get("language"),
        "keywords": [*(card.front.get("tags") or ()), *card.block.phases],
        "url": _url(card),
    }
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": card.name,
        "description": "\n\n".join(filter(None, (body.get(name) for name in ("Motivation", "Composition")))),
        "license": [address(word) or {"@type": "sc:CreativeWork", "name": word} for word in card.licences],
        **{name: value for name, value in told.items() if value},
        "distribution": [_file(card, name) for name in dict.fromkeys(card.block.files().values())],
        "recordSet": [_records(card, split, home) for split in card.block.files()],
    }


def _url(card: Card) -> str | None:
    source = card.block.source
    return source.homepage or (f"https://huggingface.co/datasets/{source.path}" if source.kind == "hub" else None)


def _file(card: Card, name: str) -> dict[str, Any]:
    """Return a file of the card; its address is relative to the data home, or to the card that stands beside it."""
    source = card.block.source
    below = Path(source.path) / name if source.kind == "file" else Path(name)
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": Path(name).name,
        "contentUrl": below.as_posix(),
        "encodingFormat": _MEDIA.get(Path(name).suffix, "application/octet-stream"),
        **({"sha256": source.sha256[name]} if name in source.sha256 else {}),
    }


def _records(card: Card, split: str, home: Path | None) -> dict[str, Any]:
    file = card.block.files()[split]
    named = card.block.splits[split] if card.block.source.kind == "file" else card.block.source.local[split]
    rows = list(islice(file_rows(card, split, home), _SAMPLE)) if is_here(card, split, home) else []
    sliced = {"description": f"{named}: Croissant cannot say a slice, so this names the whole file."}
    return {
        "@type": "cr:RecordSet",
        "@id": split,
        "name": split,
        **(sliced if named != file else {}),
        "field": [_field(f"{split}/{name}", column, _value(rows, name, column), file)
                  for name, column in _columns(card, rows).items()],
    }  # fmt: skip


def _columns(card: Card, rows: Sequence[Row]) -> dict[str, str]:
    """Return field -> column: those the card names, else those of the file, else those of the format."""
    named = card.block.columns
    if set(named) - {weights.COLUMN}:
        return named
    kind = cards.FORMAT_KINDS[card.block.format][0]
    known = list(rows[0]) if rows else _FILE_COLUMNS.get(card.block.format, KIND_COLUMNS[kind])
    return {name: name for name in known if name not in named.values()} | named


def _value(rows: Sequence[Row], name: str, column: str) -> Any:
    """Return an example of what stands in a column; by the field's name where no row is here."""
    if not rows:
        return _EXAMPLES.get(name, "")
    first, *inner = column.split(".")
    value: Any = next((row[first] for row in rows if row.get(first) is not None), "")
    for part in inner:
        value = value[int(part)] if isinstance(value, list) else value.get(part, "")
    return value


def _field(place: str, column: str, value: Any, file: str) -> dict[str, Any]:
    """Return the field `place` (`train/prompt`) with the type of `value`; objects have fields of their own."""
    field: dict[str, Any] = {"@type": "cr:Field", "@id": place, "name": place.rpartition("/")[2]}
    if isinstance(value, list) or any(part.isdigit() for part in column.split(".")):
        field["repeated"] = True
    if isinstance(value, list):
        value = value[0] if value else ""
    if isinstance(value, dict):
        parts = [_field(f"{place}/{name}", f"{column}.{name}", item, file) for name, item in value.items()]
        return {**field, "source": _source(column, file), "subField": parts}
    return {**field, "dataType": _TYPES.get(type(value), "sc:Text"), "source": _source(column, file)}


def _source(column: str, file: str) -> dict[str, Any]:
    """Return where a field's values are: the column, and the way into it where it holds objects.

    A place in a list (`instances.0.input`) cannot be said: a transform goes over all items of a list.
    """
    first, *inner = [part for part in column.split(".") if not part.isdigit()]
    if file.endswith(".txt"):
        extract = {"fileProperty": "content"}
    elif file.endswith(".json"):
        extract = {"jsonPath": f"$[*].{first}" if first.isidentifier() else f"$[*]['{first}']"}
    else:
        extract = {"column": first}
    transform = {"transform": {"jsonPath": ".".join(inner)}} if inner else {}
    return {"fileObject": {"@id": file}, "extract": extract, **transform}

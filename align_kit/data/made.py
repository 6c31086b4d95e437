"""Write a data set that a command made: rows as JSON lines, digested on the way, and a card that says how.

A set so written is a folder that can be moved: its card's `source.path` is `.`, the card's own folder. It is used by
`datasets: [{path: <folder>/<name>.md}]`. The folder appears whole, by one rename, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from align_kit import __version__, cards
from align_kit.cards import Block, Filter, Made, Origin
from align_kit.cards.licences import on_the_hub
from align_kit.data import shapes
from align_kit.data.chains import chain_of
from align_kit.data.shapes import Row, Shape
from align_kit.errors import UserError

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"),
          (10**12, "100B<n<1T"))  # fmt: skip
_LARGEST = "n>1T"
_NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class MadeSet:
    """What is known of a set beside its rows; the card is written of it, after the last row.

    So `stats`, `filters`, `decontamination`, `pii`, `made` and `sections` may be filled in while rows are taken.
    `columns`, `prompt_template` and `checker` say how the rows are read, as in a card: empty for canonical rows;
    so does `reason_template`, for format `reason` where its marks are not the usual ones.
    `sections`: a datasheet heading (`cards.HEADINGS`) -> Markdown; what is missing is written from the rest.
    `stats`: name -> number, or split -> number; `rows` and `characters` are counted here.
    `filters`: {name, rule, threshold, dropped, cut}; `decontamination`: {against, n, dropped}; `pii`: kind -> replaced.
    `made`: {command: words, seed, from: [{card or file, split, digest, rows}]} and free facts of one value each.
    """

    name: str
    pretty_name: str
    licences: tuple[str, ...]
    phases: Sequence[str]
    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, Any] = field(default_factory=dict)
    filters: Sequence[Mapping[str, Any]] = ()
    decontamination: Sequence[Mapping[str, Any]] = ()
    pii: Mapping[str, int] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)
    prompt_template: str | None = None
    reason_template: str | None = None
    checker: str | None = None
    languages: Sequence[str] = ()


@dataclass(frozen=True)
class _Written:
    """One split on disk; `characters` are those of its canonical rows."""

    rows: int
    characters: int
    sha256: str


def write_made(
    folder: Path,
    made: MadeSet,
    splits: Mapping[str, Iterable[Row]],
    *,
    overwrite: bool = False,
    beside: Mapping[str, Path] | None = None,
) -> Path:
    """Write `splits` and their card into `folder` and return the card's file.

    Each split is streamed into `<split>.jsonl`, keys in order; each row must be one that the card's format can read.
    A split without a row is left out, and the card says so. `beside` moves files (name there -> file) into the folder
    before it appears, such as the rows that were dropped. Raises UserError for a folder that is not empty (`overwrite`
    replaces a set that was written here, nothing else), a row that does not fit, a value that JSON does not know, and
    where no row is left at all.
    """
    check_free(folder, overwrite=overwrite)
    _block(made, dict.fromkeys(splits, _Written(0, 0, _NO_DIGEST)))  # a mistake here must not wait for the last row
    shape = Shape(made.format, dict(made.columns), made.prompt_template, made.reason_template)
    with _appearing(folder.resolve()) as draft:
        written = {
            split: _write_split(draft / f"{split}.jsonl", rows, shape, folder) for split, rows in splits.items()
        }
        if not any(split.rows for split in written.values()):
            raise UserError(f"{folder}: no row is left to write; nothing was written")
        for split in [name for name, split in written.items() if not split.rows]:
            (draft / f"{split}.jsonl").unlink()
        for name, file in (beside or {}).items():
            shutil.move(file, draft / name)
        text = _card_text(made, written)
        cards.parse_card(text, folder / f"{made.name}.md")
        with _writing(folder):
            (draft / f"{made.name}.md").write_text(text, encoding="utf-8")
    return folder / f"{made.name}.md"


def check_free(folder: Path, *, overwrite: bool = False) -> None:
    """Raise UserError unless a set may be written into `folder`; a command asks before it starts to work.

    Free is a folder that is not there or empty; with `overwrite`, also one that holds nothing but a set that was
    written by `write_made`.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder to write to")
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    if not there:
        return
    if not overwrite:
        raise UserError(f"{folder} is not empty; name another folder, or replace the set in it with --overwrite")
    strange = [path.name for path in there if path.is_dir() or path.suffix not in (".jsonl", ".json", ".md")]
    if strange or not any(path.suffix == ".md" and _is_made(path) for path in there):
        seen = f"it holds {strange[0]}" if strange else "it holds no card of one"
        raise UserError(f"{folder} is not a data set that align-kit wrote ({seen}), and is not replaced; name another")


def check_name(name: str) -> None:
    """Raise UserError for a name that no card can have; a command asks before it starts to work."""
    if not re.fullmatch(r"\w[\w.-]*", name) or name == "README":
        raise UserError(f"cannot name a card {name!r}; use letters, digits, _, - and . (--name sets it)")


def _is_made(card: Path) -> bool:
    try:
        return cards.read_card(card).block.made is not None
    except UserError:
        return False


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Give a hidden folder to write into, and let it take the place of `folder` once all went well."""
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield draft
        if folder.exists() and any(folder.iterdir()):
            replaced = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            os.replace(folder, replaced)
            os.replace(draft, folder)
            shutil.rmtree(replaced)
        else:
            os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Say in one line that there is no room, or no right to write."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {place}: {error.strerror or error}; nothing was written") from None


def _write_split(file: Path, rows: Iterable[Row], shape: Shape, folder: Path) -> _Written:
    """Write the rows of one split into `file`, which is going to be in `folder`."""
    digest, count, characters = hashlib.sha256(), 0, 0

    with _writing(folder):
        stream = file.open("wb")

    def stored() -> Iterator[Row]:
        for number, row in enumerate(rows, start=1):
            line = _line(row, f"{file.stem}, row {number}")
            digest.update(line)
            with _writing(folder):
                stream.write(line)
            yield row

    try:
        for kind, row in shapes.converted(stored(), shape, file.stem):
            count += 1
            characters += characters_of(kind, row)
        with _writing(folder):
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        with suppress(OSError):  # it tries once more to write what could not be written, which has been said
            stream.close()
    return _Written(count, characters, digest.hexdigest())


def _line(row: Row, where: str) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: JSON cannot hold it ({error}); convert or drop that column") from None
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only spell
        return f"{json.dumps(row)}\n".encode()


def characters_of(kind: str, row: Row) -> int:
    """Return the characters of a canonical row's text: its strings, and what its messages think and say."""
    return sum(_characters(row[name]) for name in shapes.KIND_COLUMNS[kind])


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(map(_characters, value))
    if isinstance(value, dict):
        return _characters(value.get("content")) + len(chain_of(value) or "")
    return 0


def _block(made: MadeSet, written: Mapping[str, _Written]) -> Block:
    kept = {split: found for split, found in written.items() if found.rows or found.sha256 == _NO_DIGEST}
    given = {
        "schema_version": cards.SCHEMA_VERSION,
        "phases": list(made.phases),
        "source": {"kind": "file", "path": ".", "sha256": {f"{name}.jsonl": one.sha256 for name, one in kept.items()}},
        "format": made.format,
        "columns": dict(made.columns),
        "splits": {name: f"{name}.jsonl" for name in kept},
        "prompt_template": made.prompt_template,
        "reason_template": made.reason_template,
        "checker": made.checker,
        "verified": True,
        "stats": {**made.stats, **{name: {split: getattr(one, name) for split, one in kept.items()}
                                   for name in cards.PER_SPLIT}},
        "filters": [dict(row) for row in made.filters],
        "decontamination": [dict(row) for row in made.decontamination],
        "pii": dict(made.pii),
        "made": {"align_kit": __version__, **made.made},
    }  # fmt: skip
    for name in written:
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"cannot name a split {name!r}; use letters, digits, _ and -")
    check_name(made.name)
    if unknown := set(made.sections) - set(cards.HEADINGS):
        raise UserError(f"a card has no section {sorted(unknown)[0]!r}; it has {', '.join(cards.HEADINGS)}")
    try:
        return Block.model_validate(given)
    except ValidationError as error:
        raise UserError(f"the card of {made.name}: {cards.first_problem(error)}") from None


def _card_text(made: MadeSet, written: Mapping[str, _Written]) -> str:
    block = _block(made, written)
    rows = sum(split.rows for split in written.values())
    front = {
        "pretty_name": made.pretty_name,
        **_licence(made.licences),
        **({"language": list(made.languages)} if made.languages else {}),
        "size_categories": [size_category(rows)],
        "task_categories": ["text-generation"],
        "align_kit": _filled(block.model_dump(mode="json", by_alias=True, exclude_none=True)),
    }
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=120)
    sections = {**_sections(block, written, made.licences), **made.sections}
    body = "\n\n".join(f"## {heading}\n\n{sections[heading].strip()}" for heading in cards.HEADINGS)
    return f"---\n{header}---\n\n# {made.pretty_name}\n\n{body}\n"


def _licence(names: Sequence[str]) -> dict[str, Any]:
    """Return the front matter's licence fields: a name that the hub does not list goes beside `other`."""
    if len(names) != 1:
        return {"license": list(names) or "unknown"}
    return {"license": names[0]} if on_the_hub(names[0]) else {"license": "other", "license_name": names[0]}


def size_category(rows: int) -> str:
    """Return what the hub calls a set of so many rows: `1K<n<10K`."""
    return next((name for limit, name in _SIZES if rows < limit), _LARGEST)


def _filled(block: dict[str, Any]) -> dict[str, Any]:
    """Return a block without the mappings and lists that hold nothing."""
    kept = {name: _filled(value) if isinstance(value, dict) else value for name, value in block.items()}
    return {name: value for name, value in kept.items() if value not in ({}, [])}


def _sections(block: Block, written: Mapping[str, _Written], licences: Sequence[str]) -> dict[str, str]:
    """Return what can be said under each heading from what is known, and no more."""
    made = block.made
    assert made is not None
    command = f"`{' '.join(made.command)}`"
    return {
        "Motivation": f"Written by {command}; whoever ran it has not said here what for.",
        "Composition": _composition(block, written),
        "Collection": _collection(made),
        "Preprocessing": _preprocessing(block),
        "Uses": f"Made for {', '.join(block.phases)}. What its sources must not be used for holds here too.",
        "Distribution": f"Licence as found in its sources: {', '.join(licences) or 'none was named'}. "
        "This card knows of no place that publishes it.",
        "Maintenance": "Fixed by the digests above; made again by the same command "
        f"(align_kit {made.align_kit}{'' if made.seed is None else f', seed {made.seed}'}) from the same sources.",
    }


def _composition(block: Block, written: Mapping[str, _Written]) -> str:
    splits = [f"- `{name}`: {one.rows:,} rows, {one.characters:,} characters." if one.rows else
              f"- `{name}`: no row was left, so there is no such split." for name, one in written.items()]  # fmt: skip
    return "\n".join([f"Rows in the shape `{block.format}`, a JSON object a line.", "", *splits])


def _collection(made: Made) -> str:
    if not made.sources:
        return "Where the rows come from was not recorded."
    return "\n".join(["Rows of the following, whose own cards say how they were collected:", "",
                      *(f"- {_origin(source)}" for source in made.sources)])  # fmt: skip


def _origin(source: Origin) -> str:
    name = f"card `{source.card}`" if source.card else f"file `{source.file}`"
    said = [name + (f", split `{source.split}`" if source.split else "")]
    if source.rows is not None:
        said.append(f"{source.rows:,} rows")
    if source.digest:
        said.append(f"digest `{source.digest[:16]}`")
    return ", ".join(said)


def _done_by(row: Filter) -> str:
    return f"{row.dropped:,} rows dropped" if row.cut is None else f"{row.cut:,} lines cut out"


def _preprocessing(block: Block) -> str:
    said = [f"- {row.name}{f' ({row.rule})' if row.rule else ''}"
            f"{'' if row.threshold is None else f', threshold {row.threshold}'}: {_done_by(row)}."
            for row in block.filters]  # fmt: skip
    said += [f"- Runs of {row.n} words shared with {row.against}: {row.dropped:,} rows dropped."
             for row in block.decontamination]  # fmt: skip
    said += [f"- Personal data, {kind}: {count:,} places replaced." for kind, count in block.pii.items()]
    return "\n".join(said) or "None beyond what the command above says."

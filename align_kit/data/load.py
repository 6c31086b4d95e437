"""Load the data a configuration names: cards, files and hub ids become one data set of canonical rows, with a report.

Each entry of `datasets:` has TRL's shape plus our `weight`, `max_share`, `epochs`, `format`, `max_samples`, `revision`,
`prompt_template` and `reason_template`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit import cards
from align_kit.cards import Card
from align_kit.data import read, shapes, weights
from align_kit.data.digest import rows_digest
from align_kit.data.mix import mix, train_test
from align_kit.data.mixture import MIXTURE_KEYS, Asked, SourceReport, figures, resolve
from align_kit.data.reason import ReasonTemplate
from align_kit.data.shapes import Row, Shape
from align_kit.errors import UserError, unknown

__all__ = ["SPEC_KEYS", "Loaded", "SourceReport", "load", "mix", "to_dataset", "train_test"]

if TYPE_CHECKING:
    from datasets import Dataset

SPEC_KEYS = (
    "path", "name", "data_dir", "data_files", "split", "columns", "fraction",  # TRL's
    "weight", "max_share", "epochs", "format", "max_samples", "revision", "prompt_template",
    "reason_template",
)  # fmt: skip
_HUB_KEYS = ("name", "data_dir", "data_files", "revision")
_HOLD_TRACES = cards.FORMAT_KINDS["reason"]  # formats whose completions may be parted into chain and answer
_BUILDERS = ("json", "csv", "parquet", "text")  # names of load_dataset that mean "read data_files"


@dataclass(frozen=True)
class Loaded:
    """One data set of one `kind`, the report of each source in the order given, and the digest of the whole."""

    dataset: Dataset
    kind: str
    sources: tuple[SourceReport, ...]
    digest: str
    origins: tuple[int, ...]  # the number of each row's source

    @property
    def warnings(self) -> list[str]:
        """All sources' warnings, each once, in order."""
        return list(dict.fromkeys(text for source in self.sources for text in source.warnings))

    def as_dict(self) -> dict[str, Any]:
        """Return what the manifest keeps: plain values only."""
        return {"kind": self.kind, "rows": len(self.dataset), "digest": self.digest,
                "sources": [asdict(source) for source in self.sources]}  # fmt: skip

    def sentence(self) -> str:
        """Return one line: `7473 prompt_completion rows = 7473 of card:gsm8k[train]`."""
        parts = " + ".join(f"{source.rows} of {source.path}[{source.split}]" for source in self.sources)
        return f"{len(self.dataset)} {self.kind} rows = {parts}"


@dataclass
class Opened:
    """One source as it stands: where, its rows before they are canonical, and the shape they are read by."""

    where: str
    split: str
    rows: list[Row]
    shape: Shape | None
    licences: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    card_weight: float | None = None
    mixture: dict[str, float | None] = field(default_factory=dict)  # what the entry asks of it, by key
    facts: dict[str, str] = field(default_factory=dict)
    kind: str = ""
    place: Callable[[int], str] | None = None  # where a row of a number stands, if that is not its number

    def asked(self) -> Asked:
        return Asked(self.where, len(self.rows), card_weight=self.card_weight, **self.mixture)


def load(
    specs: Sequence[Mapping[str, Any]],
    *,
    phase: str,
    split_default: str = "train",
    seed: int = 0,
    data_home: str | Path | None = None,
    temperature: float | None = None,
) -> Loaded:
    """Return the rows that `specs` name, mixed, as one data set of a kind that `phase` can train on.

    Without `fraction` and `weight` the sources follow one another, whole. `fraction` is TRL's: shares are normalised,
    the mixture is the largest in which no source is repeated, and each source gives its first rows, one source after
    another. `weight` makes the same mixture, but each source gives a sample drawn with `seed` (in file order) and the
    sources are interleaved so that every stretch has the shares asked for; a missing weight is the card's, else 1.
    `temperature` T takes shares in proportion to rows^(1/T) instead of weights; `max_share` caps a source's share, and
    the others get what it leaves. `epochs` says how often a source's rows are there (2.5: twice, and half of them
    again): a mixture may take as many from it, every pass but the first shuffled anew; alone it takes just these.
    `max_samples` keeps a source's first rows, before mixing. `data_home` overrides `$ALIGN_KIT_DATA`.
    Raises UserError for every mistake in a spec or a file.
    """
    if phase not in cards.PHASE_KINDS:
        raise unknown("phase", phase, cards.PHASE_KINDS)
    if not specs:
        raise UserError(f"no data: name a source in datasets, e.g. path: card:{_advice(phase)}")
    sources = [opened(dict(spec), phase, split_default, cards.data_home(data_home)) for spec in specs]
    for source in sources:
        _canonical(source, phase)
    kind = _one_kind(sources)
    wanted = resolve([source.asked() for source in sources], temperature)
    counts = [len(source.rows) for source in sources]
    order = mix(counts, wanted.shares, seed=seed, interleave=wanted.interleave, epochs=wanted.epochs)
    rows = [sources[number].rows[row] for number, row in order]
    used = [sum(1 for number, _ in order if number == index) for index in range(len(sources))]
    shared = figures(wanted, counts, used)
    reports = tuple(_report(source, size, mine) for source, size, mine in zip(sources, used, shared, strict=True))
    return Loaded(to_dataset(kind, rows), kind, reports, rows_digest(rows), tuple(number for number, _ in order))


def to_dataset(kind: str, rows: Sequence[Row]) -> Dataset:
    """Return canonical rows as a `datasets.Dataset`: text as strings, messages and tools as JSON values.

    JSON keeps a message's keys as they were; an Arrow struct would give each message all keys of all messages.
    """
    from datasets import Dataset, Features, Json, Value

    names = list(shapes.KIND_COLUMNS[kind])
    beside = (*shapes.CARRIED, "answer", "reason_template", weights.COLUMN)
    names += [name for name in beside if any(name in row for row in rows)]
    numbers = {"label": Value("bool"), weights.COLUMN: Value("float64")}
    features = {}
    for name in names:
        texts = all(isinstance(row.get(name), (str, type(None))) for row in rows)
        features[name] = numbers.get(name) or (Value("string") if texts else Json())
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Dataset.from_dict(columns, features=Features(features))


def opened(spec: dict[str, Any], phase: str, split_default: str, home: Path | None) -> Opened:
    """Return the rows that one entry of `datasets` names, and their shape; raises `UserError` as `load` does."""
    for key in spec:
        if key not in SPEC_KEYS:
            raise unknown("key in datasets", str(key), SPEC_KEYS)
    spec = {key: value for key, value in spec.items() if value is not None}
    path = spec.get("path")
    if not isinstance(path, str) or not path:
        raise UserError("each entry of datasets needs a path: card:<name>, a file, or a hub id")
    split = str(spec.get("split", split_default))
    if path.startswith("card:") or path.endswith(".md"):
        source = _open_card(cards.load_card(path.removeprefix("card:")), spec, split, phase, home)
    elif path in _BUILDERS or "data_files" in spec or _is_local(path):
        source = _open_local(path, spec, split)
    else:
        source = _open_hub(path, spec, split, phase)
    return _settle(source, spec)


def _settle(source: Opened, spec: dict[str, Any]) -> Opened:
    """Apply what a spec says beyond where the rows are; it wins over the card."""
    columns = spec.get("columns")
    if isinstance(columns, (list, tuple)):
        source.rows = [_selected(row, columns, source.where) for row in source.rows]
    if not source.rows:
        raise UserError(f"{source.where}, split {source.split}: no rows; check the split and the file")
    shape = source.shape
    if "format" in spec:
        if spec["format"] not in cards.FORMAT_KINDS:
            raise unknown("format", str(spec["format"]), cards.FORMAT_KINDS)
        shape = _as_format(shape, spec["format"])
    named = columns if isinstance(columns, Mapping) else None
    shape = shape or (_named(named, source.rows[0]) if named else shapes.recognise(source.rows[0]))
    if named:
        shape = replace(shape, columns={**shape.columns, **named})
    if "prompt_template" in spec:
        if not cards.is_template(str(spec["prompt_template"])):
            raise UserError(
                f"prompt_template {spec['prompt_template']!r} must be 'chat' or a text that holds {{prompt}}"
            )
        shape = replace(shape, prompt_template=spec["prompt_template"])
    if "reason_template" in spec:
        shape = replace(shape, reason_template=_reason_template(str(spec["reason_template"]), shape, source.where))
    source.shape = shape
    source.rows = source.rows[: _positive(spec, "max_samples", int) or len(source.rows)]
    source.mixture = {key: _positive(spec, key, float) for key in MIXTURE_KEYS}
    return source


def _as_format(shape: Shape | None, name: str) -> Shape:
    """Return the shape of the format asked for, with what a card says of it; traces are other readings of a card's."""
    if shape is None or (shape.format != name and not (name == "reason" and shape.format in _HOLD_TRACES)):
        return Shape(name)
    return replace(shape, format=name)


def _reason_template(text: str, shape: Shape, where: str) -> str:
    if shape.format != "reason":
        raise UserError(f"{where}: reason_template is for format: reason, but its rows are read as {shape.format}; "
                        "give format: reason, or drop it")  # fmt: skip
    return ReasonTemplate(text).text


def _named(columns: Mapping[str, str], row: Row) -> Shape:
    """Recognise a shape by the canonical names given, beside the columns that keep their own name."""
    return shapes.recognise([*columns, *(set(row) - set(columns.values()))])


def _open_card(card: Card, spec: dict[str, Any], split: str, phase: str, home: Path | None) -> Opened:
    block = card.block
    _refuse(spec, ("data_files",) if block.source.kind == "hub" else _HUB_KEYS, f"card:{card.name}")
    ours = cards.parse_slice(split)[0]
    if ours not in block.splits and "split" not in spec:
        there = ", ".join(block.splits)
        raise UserError(f"card {card.name} has no split {ours!r}, the one read where none is named; name one: {there}")
    if ours not in block.splits:
        raise unknown(f"split of card {card.name}", ours, block.splits)
    theirs = block.splits[ours]
    where = f"card:{card.name}"
    shape = Shape.of(block)
    source = Opened(where, split, [], shape, card.licences, card.warnings(), card_weight=block.weight)
    if block.source.kind == "builtin":
        source.rows, source.facts = _builtin(block.source.path, theirs, split)
    else:
        source.rows = _card_rows(card, spec, split, phase, home)
    source.rows = source.rows[: block.max_samples or len(source.rows)] if "max_samples" not in spec else source.rows
    return source


def _builtin(name: str, theirs: str, split: str) -> tuple[list[Row], dict[str, str]]:
    from align_kit.data import embedded

    return read.cut(list(embedded.rows(name, theirs)), [split]), _builtin_facts(name)


@functools.cache
def _builtin_facts(name: str) -> dict[str, str]:
    from align_kit.data import embedded

    return embedded.facts(name)  # it hashes the whole set; once a process is enough


def _card_rows(card: Card, spec: dict[str, Any], split: str, phase: str, home: Path | None) -> list[Row]:
    origin, ours = card.block.source, cards.parse_slice(split)[0]
    # A spec that asks for another configuration of a hub set does not mean the files the card knows.
    file = None if any(key in spec for key in _HUB_KEYS) else cards.local_file(card, ours, home)
    theirs = card.block.splits[ours]
    if file is not None:
        local = theirs if origin.kind == "file" else origin.local[ours]
        return read.read_files([file], [local, split])
    if origin.kind == "file":
        place = f" from {origin.homepage}" if origin.homepage else ""
        needed = f"{origin.path}/{card.block.files()[ours]}"
        raise UserError(
            f"card:{card.name}: {needed} is not there; get it{place}, put it in a folder and set ALIGN_KIT_DATA to it; "
            f"without a download, use {_alternative(phase)}"
        )
    hub = {"name": origin.name, "data_dir": origin.data_dir, "revision": origin.revision}
    hub |= {key: spec[key] for key in hub if key in spec}
    try:
        return read.read_hub(origin.path, cards.parse_slice(theirs)[0], [theirs, split], **hub)
    except UserError as error:
        local = f", or set ALIGN_KIT_DATA to a folder with {origin.local[ours]}" if ours in origin.local else ""
        raise UserError(
            f"card:{card.name}: {error}; go online{local}; without a download, use {_alternative(phase)}"
        ) from None


def _open_hub(path: str, spec: dict[str, Any], split: str, phase: str) -> Opened:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        read.require_file(Path(path))
    hub = {key: spec.get(key) for key in ("name", "data_dir", "revision")}
    try:
        rows = read.read_hub(path, cards.parse_slice(split)[0], [split], **hub)
    except UserError as error:
        known = cards.card_names()
        hint = f"; did you mean card:{path}?" if path in known else ""
        raise UserError(f"{error}{hint}; without a download, use {_alternative(phase)}") from None
    return Opened(path, split, rows, None, (), [f"{path}: its licence is not known here; write a card to record it"])


def _is_local(path: str) -> bool:
    looks = path.startswith((".", "/", "~")) or Path(path).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt")
    return looks or Path(path).exists()


def _open_local(path: str, spec: dict[str, Any], split: str) -> Opened:
    files = _local_files(path, spec, split)
    numbered = all(file.suffix != ".txt" for file in files)
    place = functools.partial(read.place_of, files, [split]) if numbered else None
    return Opened(path, split, read.read_files(files, [split]), None, place=place)


def _local_files(path: str, spec: dict[str, Any], split: str) -> list[Path]:
    name = cards.parse_slice(split)[0]
    files = spec.get("data_files")
    if isinstance(files, Mapping):
        if name not in files:
            raise unknown(f"split of {path}", name, files)
        files = files[name]
    elif (files is not None or Path(path).is_file()) and name != "train" and "split" in spec:
        raise UserError(f"{path}: a single file has only the split 'train', not {name!r}; slice it: train[:90%]")
    base = Path(".") if path in _BUILDERS else Path(path).expanduser()
    if "data_dir" in spec:
        base = base / spec["data_dir"]
    if files is None:
        return read.files_of(base, name)
    listed = [files] if isinstance(files, str) else list(files)
    return [base / file for file in listed]


def _refuse(spec: dict[str, Any], keys: Sequence[str], where: str) -> None:
    for key in keys:
        if key in spec:
            raise UserError(f"{where}: {key} does not apply, the card says where its rows are; drop it")


def _selected(row: Row, columns: Sequence[str], where: str) -> Row:
    for name in columns:
        if name not in row:
            raise unknown(f"column of {where}", str(name), map(str, row))
    return {name: row[name] for name in columns}


def _positive(spec: dict[str, Any], key: str, kind: type[int] | type[float]) -> Any:
    value = spec.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
        raise UserError(f"datasets: {key} must be a positive {'whole ' if kind is int else ''}number, got {value!r}")
    return value


def _canonical(source: Opened, phase: str) -> None:
    assert source.shape is not None
    columns = list(source.rows[0]) if source.rows else []
    source.kind, source.rows = shapes.convert(source.rows, source.shape, source.place or source.where)
    shapes.usable(source.kind, phase, source.where, columns)
    source.kind, source.rows = shapes.adapt(source.kind, source.rows, phase, source.shape)


def _one_kind(sources: Sequence[Opened]) -> str:
    first = sources[0]
    for source in sources[1:]:
        if source.kind != first.kind:
            raise UserError(
                f"{first.where} has {first.kind} rows, {source.where} has {source.kind} rows; "
                "one run trains on one kind: drop one, or give a format that turns them alike"
            )
    return first.kind


def _report(source: Opened, used: int, shared: Mapping[str, Any]) -> SourceReport:
    assert source.shape is not None
    said = [] if used else [f"{source.where}: its share is less than one row, so none of its rows is used"]
    return SourceReport(
        path=source.where, split=source.split, kind=source.kind, format=source.shape.format, rows=used,
        rows_read=len(source.rows), licences=source.licences, digest=rows_digest(source.rows),
        warnings=(*source.warnings, *said), facts=source.facts, **shared,
    )  # fmt: skip


def _alternative(phase: str) -> str:
    return f"card:{_advice(phase)}"


def _advice(phase: str) -> str:
    names = cards.alternatives(phase)
    return names[0] if names else "<name>"

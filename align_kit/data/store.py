"""Keep tables of rows on disk by content, so that ranks and runs build each once and read the same file.

An entry is a folder with `rows.arrow` and, written last, `report.json` with the row file's size and digest. It is built
beside its place and renamed into it: it is whole or absent. A damaged entry is put aside and built again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit.data.digest import canonical_json
from align_kit.errors import UserError
from align_kit.run_folder import make_private

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Write = Callable[[dict[str, list[Any]]], None]
_ROWS, _REPORT = "rows.arrow", "report.json"


def fetch(
    entry: Path, columns: dict[str, str], build: Callable[[Write], dict[str, Any]]
) -> tuple[Dataset, dict[str, Any], bool]:
    """Return (rows, report, whether it was there already) of `entry`, building it where it is missing or damaged.

    `columns` maps names to `ids`, `mask`, `logps`, `bool`, `number` or `json`. `build` is given a function that appends
    a batch of columns and returns the report. Other processes on this machine wait for the one that builds; raises
    UserError when the folder cannot be written.
    """
    from filelock import FileLock

    found = read(entry)
    if found is not None:
        return (*found, True)
    try:
        make_private(entry.parent)
        with FileLock(entry.with_name(f".{entry.name}.lock")):
            found = read(entry)
            if found is not None:
                return (*found, True)
            _build(entry, columns, build)
    except OSError as error:
        raise UserError(f"cannot write tokenised data to {entry.parent}: {error.strerror or error}") from None
    found = read(entry)
    assert found is not None, f"{entry} was written and does not read back"
    return (*found, False)


def read(entry: Path) -> tuple[Dataset, dict[str, Any]] | None:
    """Return what `entry` holds, or None where it is absent or not what was written."""
    from datasets import Dataset

    try:
        kept = json.loads((entry / _REPORT).read_text(encoding="utf-8"))
        if _fingerprint(entry / _ROWS) != kept["rows_file"]:
            return None
        return Dataset.from_file(str(entry / _ROWS)), kept["report"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(entry: Path, columns: dict[str, str], build: Callable[[Write], dict[str, Any]]) -> None:
    import pyarrow as pa

    schema = _schema(columns)
    draft = entry.with_name(f".{entry.name}.{uuid.uuid4().hex[:8]}")
    draft.mkdir()  # not mkdtemp's private folder: whoever may read the cache may read its entries
    try:
        with pa.OSFile(str(draft / _ROWS), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

            def write(batch: dict[str, list[Any]]) -> None:
                columns_in_order = {name: _encoded(batch[name], columns[name]) for name in schema.names}
                writer.write_table(pa.table(columns_in_order, schema=schema))

            report = build(write)
        kept = {"report": report, "rows_file": _fingerprint(draft / _ROWS)}
        (draft / _REPORT).write_text(canonical_json(kept), encoding="utf-8")
        _place(draft, entry)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _place(draft: Path, entry: Path) -> None:
    """Rename `draft` to `entry`; a damaged folder in the way is removed, a good one from another machine kept."""
    if entry.exists() and read(entry) is None:
        doomed = Path(tempfile.mkdtemp(prefix=f".{entry.name}.damaged.", dir=entry.parent))
        os.rename(entry, doomed / "entry")
        shutil.rmtree(doomed, ignore_errors=True)
    try:
        os.rename(draft, entry)
    except OSError:
        if read(entry) is None:
            raise


def _schema(columns: dict[str, str]) -> pa.Schema:
    import pyarrow as pa
    from datasets import Features, Json, List, Value

    kinds = {
        "ids": List(Value("int32")),
        "mask": List(Value("int8")),
        "logps": List(Value("float32")),
        "bool": Value("bool"),
        "number": Value("float64"),
        "json": Json(),
    }
    schema = Features({name: kinds[kind] for name, kind in columns.items()}).arrow_schema
    assert isinstance(schema, pa.Schema)
    return schema


def _encoded(values: list[Any], kind: str) -> list[Any]:
    return [canonical_json(value) for value in values] if kind == "json" else values


def _fingerprint(path: Path) -> list[Any]:
    """Return [bytes, XXH3-128] of a file; read in pieces, 6 GiB/s."""
    import xxhash

    state = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 24):
            state.update(piece)
    return [path.stat().st_size, state.hexdigest()]

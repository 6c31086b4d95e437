"""Read rows from local files (jsonl, json, csv, parquet, txt) and from the hub; a fault names the file and the line."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from align_kit.cards import slice_bounds
from align_kit.errors import UserError

Row = dict[str, Any]


def read_files(paths: Sequence[Path], slices: Sequence[str] = ()) -> list[Row]:
    """Return the rows of `paths` in order, cut by each of `slices` (`train[10%:90%]`) in turn.

    A .txt file is one document: `{"text": <the file>}`. Its slices count lines, so that a single text can be divided
    into train and validation; a cut moves no character.
    """
    if any(path.suffix == ".txt" for path in paths):
        documents = ["".join(cut(_lines(path), slices)) for path in paths]
        return [{"text": document} for document in documents if document]
    return cut([row for path in paths for row in read_file(path)], slices)


def place_of(paths: Sequence[Path], slices: Sequence[str], number: int) -> str:
    """Return where the row stands that is number `number`, from 1, of `read_files(paths, slices)`: its file and line.

    It reads the files once more, which a message about a broken row is worth.
    """
    places = cut([(path, place) for path in paths for place in _places(path)], slices)
    path, place = places[number - 1]
    return f"{path}, {'line' if path.suffix == '.jsonl' else 'row'} {place}"


def _places(path: Path) -> Iterator[int]:
    if path.suffix == ".jsonl":
        return (number for number, _ in numbered_lines(path))
    return iter(range(1, len(read_file(path)) + 1))


def cut(rows: list[Any], slices: Sequence[str]) -> list[Any]:
    """Return what is left of `rows` after each slice in turn."""
    for split in slices:
        start, stop = slice_bounds(split, len(rows))
        rows = rows[start:stop]
    return rows


def read_file(path: Path) -> list[Row]:
    """Return the rows of one jsonl, json, csv or parquet file; raises UserError with file and line."""
    require_file(path)
    try:
        return _READERS[path.suffix](path)
    except KeyError:
        raise UserError(f"{path}: cannot read {path.suffix or 'a file without a suffix'}; known: {SUFFIXES}") from None


def require_file(path: Path) -> None:
    """Raise UserError with the nearest names of the folder when `path` is not a file."""
    if path.is_file():
        return
    if not path.parent.is_dir():
        raise UserError(f"no data file {path}: the folder {path.parent} does not exist")
    there = sorted(item.name for item in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5)
    data = [name for name in there if Path(name).suffix in _READERS or name.endswith(".txt")]
    listed = f"; near it: {', '.join(near)}" if near else f"; the folder has {', '.join(data[:8]) or 'no data files'}"
    raise UserError(f"no data file {path}{listed}")


def _lines(path: Path) -> list[str]:
    require_file(path)
    return list(io.StringIO(_decoded(path), newline="\n"))


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x})") from None


def _jsonl(path: Path) -> list[Row]:
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        rows.append(parse_line(line, f"{path}, line {number}"))
    return rows


def parse_line(line: str | bytes, where: str) -> Row:
    """Return the row that one line of JSON lines holds; raises UserError that begins with `where`."""
    try:
        row = json.loads(line if isinstance(line, str) else line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.object[error.start]:#04x})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        said = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise UserError(f"{where}: not JSON: {said}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    return row


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a JSON lines file that hold something, with their numbers from 1, one at a time."""
    require_file(path)
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, line


def numbered_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a file with their numbers from 1 (lines of JSON lines); Parquet is read batch by batch.

    Only .json and .csv are read whole, since they have no rows that could be found without reading all before.
    """
    if path.suffix == ".jsonl":
        for number, line in numbered_lines(path):
            yield number, parse_line(line, f"{path}, line {number}")
    elif path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
    else:
        yield from enumerate(read_files([path]), start=1)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    require_file(path)
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not Parquet: {error}") from None


def _json(path: Path) -> list[Row]:
    text = _decoded(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _jsonl(path)  # JSON lines under the name .json, which Hugging Face reads too
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    rows = value.get("data", [value]) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(f"{path} holds {type(rows).__name__} where rows belong; give a list of JSON objects")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: a row must be a JSON object, got {type(row).__name__}")
    return rows


def _csv(path: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # documents are longer than the default of 128 KiB
    reader = csv.DictReader(io.StringIO(_decoded(path), newline=""), restkey="\0more", strict=True)
    rows = []
    try:
        for row in reader:
            if "\0more" in row or None in row.values():
                raise UserError(f"{path}, line {reader.line_num}: not {len(reader.fieldnames or [])} columns")
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not Parquet: {error}") from None


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
SUFFIXES = ", ".join([*_READERS, ".txt"])


def files_of(path: Path, split: str, advice: str = "name one in data_files") -> list[Path]:
    """Return the files a path stands for: itself, or a folder's `<split>.<suffix>` or `<split>-*.<suffix>`.

    `advice` is how a file of another name can be given.
    """
    if not path.is_dir():
        return [path]
    data = sorted(item for item in path.iterdir() if item.suffix in _READERS or item.suffix == ".txt")
    found = [item for item in data if re.fullmatch(rf"{re.escape(split)}([-_.].*)?", item.stem)]
    if not found:
        listed = ", ".join(item.name for item in data[:8]) or "no data files"
        raise UserError(f"{path} has no file for the split {split!r}; it has {listed}; or {advice}")
    return found


def read_hub(path: str, split: str, slices: Sequence[str], **arguments: Any) -> list[Row]:
    """Return the rows of a hub data set's split (`datasets.load_dataset`), without its progress bars and warnings.

    Raises UserError with the first line of whatever the hub or the cache said.
    """
    import datasets

    given = {name: value for name, value in arguments.items() if value is not None}
    with quiet(), _offline_if_unreachable():
        try:
            rows = datasets.load_dataset(path, split=split, **given)
        except Exception as error:  # the hub client raises a dozen kinds; each is the user's to mend
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"cannot load {path!r} from the hub: {said}") from None
    start, stop = 0, len(rows)
    for text in slices:
        first, last = slice_bounds(text, stop - start)
        start, stop = start + first, start + last
    return rows.select(range(start, max(start, stop))).to_list()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and log lines of `datasets` and the hub client, and put them back."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    bars, level, hub_level = (
        datasets.are_progress_bars_disabled(),
        datasets.logging.get_verbosity(),
        hub_logging.get_verbosity(),
    )
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
        datasets.logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Use only the local cache while the hub's name does not resolve; the client alone would retry for 20 seconds."""
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _reachable(constants.ENDPOINT):
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = False, before


def _reachable(endpoint: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy resolves names; only the request itself can tell
    parts = urlsplit(endpoint)
    try:
        socket.getaddrinfo(parts.hostname, parts.port or 443)
    except OSError:
        return False
    return True

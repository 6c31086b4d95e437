"""CPython's own documentation as text: the standard library's docstrings and the topics of `help()`.

Docstrings are read with `ast` from the .py files of the running interpreter, nothing is imported. Where the standard
library is stripped, a frozen sample in the package (PSF-2.0, `LICENSE.sample.txt`) takes its place.
"""

from __future__ import annotations

import ast
import hashlib
import json
import lzma
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SAMPLE = Path(__file__).with_name("docs_sample.jsonl.xz")
SAMPLE_VERSION = "CPython 3.11.7"
# Tests, bundled wheels and installed packages are not CPython's documentation.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "ensurepip", "lib2to3"}
ENOUGH_CHARACTERS = 500_000  # of 2.1 million in a full CPython 3.11; less means stripped
SHORTEST = 40  # characters of a docstring that is worth reading

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Document:
    """One docstring or topic under its qualified name (`json.decoder.JSONDecoder.decode`, `topic:assignment`)."""

    name: str
    text: str


@cache
def library() -> tuple[Document, ...]:
    """Return the running interpreter's documents, sorted by name, each text once; the sample where it is stripped."""
    root = Path(sysconfig.get_path("stdlib"))
    found = unique(sorted((*docstrings(root), *topics()), key=lambda document: document.name))
    return found if sum(len(document.text) for document in found) >= ENOUGH_CHARACTERS else sample()


@cache
def sample() -> tuple[Document, ...]:
    """Return the frozen sample, the same on every machine."""
    lines = lzma.decompress(SAMPLE.read_bytes()).decode().splitlines()
    return tuple(Document(**json.loads(line)) for line in lines)


def docstrings(root: Path) -> Iterator[Document]:
    """Yield the docstrings of every module, class and function below `root`; a file that does not parse is left out."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.isdisjoint(parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue
            module = ".".join(part for part in parts if part != "__init__")
            yield from _documents(tree, module)


def topics() -> Iterator[Document]:
    """Yield the language reference that `help()` shows, one document per topic."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:  # stripped
        return
    for name in sorted(texts):
        yield Document(f"topic:{name}", texts[name].strip())


def unique(documents: Iterable[Document]) -> tuple[Document, ...]:
    """Return the documents without those whose body, white space aside, came before under another name."""
    seen: dict[str, Document] = {}
    for document in documents:
        body = document.text.partition("\n\n")[2] or document.text
        seen.setdefault(re.sub(r"\s+", " ", body), document)
    return tuple(seen.values())


def split_of(name: str) -> str:
    """Return the split of a document: 90 % train, 5 % validation, 5 % test, by the last part of its qualified name.

    The standard library repeats itself in methods of one name (`close`, `readline`), so these stay together.
    """
    share = hashlib.sha256(name.rpartition(".")[2].encode()).digest()[0] / 256
    return "train" if share < 0.9 else "validation" if share < 0.95 else "test"


def rows(documents: Sequence[Document], split: str) -> list[dict[str, str]]:
    """Return the `{"text"}` rows of one split, in the documents' order."""
    return [{"text": document.text} for document in documents if split_of(document.name) == split]


def digest(documents: Sequence[Document]) -> str:
    """Return the sha256 of names and texts in order."""
    state = hashlib.sha256()
    for document in documents:
        state.update(f"{document.name}\0{document.text}\0".encode())
    return state.hexdigest()


def write_sample(path: Path, *, characters: int = 300_000) -> int:
    """Freeze a sample of the running library in `path` and return its size in bytes; for maintainers.

    Documents are drawn in the order of their name's hash until `characters` are reached. Topics are left out but for
    the short ones: a few of 20,000 characters would be the sample.
    """
    drawn, total = [], 0
    for document in sorted(library(), key=lambda document: hashlib.sha256(document.name.encode()).digest()):
        if len(document.text) <= 4000 and total < characters:
            drawn.append(document)
            total += len(document.text)
    lines = [json.dumps(vars(document), ensure_ascii=False) for document in sorted(drawn, key=lambda d: d.name)]
    path.write_bytes(lzma.compress("\n".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    return path.stat().st_size


def _documents(node: ast.Module | Documented, name: str) -> Iterator[Document]:
    text = ast.get_docstring(node)
    if text and len(text) >= SHORTEST:
        yield Document(name, f"{_title(node, name)}\n\n{text.strip()}")
    for child in node.body:
        if isinstance(child, Documented):
            yield from _documents(child, f"{name}.{child.name}")


def _title(node: ast.Module | Documented, name: str) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{name}({ast.unparse(node.args)})"
    return f"class {name}" if isinstance(node, ast.ClassDef) else f"module {name}"

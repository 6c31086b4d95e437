"""The embedded default: data and a tiny model that need no download.

`rows("sums_sft", "train")` gives the rows of a built-in set; a data card refers to one by `source: {kind: builtin,
path: sums_sft}`. The text is CPython's own documentation, the task word problems generated from a seed.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_kit.data.embedded import docs, sums
from align_kit.errors import unknown

Row = dict[str, Any]

TINY = Path(__file__).with_name("tiny")
SPLITS = ("train", "validation", "test")
SUMS_VERSION = "1"  # raised whenever the generated rows change


@dataclass(frozen=True)
class Builtin:
    """A built-in set: what its rows are (`kind` is a row kind of the cards), their licence, and who makes them.

    `fixed`: the rows are the same wherever this version of align_kit runs.
    """

    kind: str
    licence: str
    make: Callable[[str], list[Row]]
    fixed: bool = True


def _generated(make: Callable[..., list[Row]], *, train: int, held_out: int) -> Callable[[str], list[Row]]:
    return lambda split: make(split, train if split == "train" else held_out)


BUILTIN: dict[str, Builtin] = {
    "cpython_docs": Builtin("text", "PSF-2.0", lambda split: docs.rows(docs.library(), split), fixed=False),
    "cpython_docs_sample": Builtin("text", "PSF-2.0", lambda split: docs.rows(docs.sample(), split)),
    "sums_text": Builtin("text", "Apache-2.0", _generated(sums.text, train=8000, held_out=400)),
    "sums_sft": Builtin("prompt_completion", "Apache-2.0", _generated(sums.sft, train=24000, held_out=512)),
    "sums_pairs": Builtin("preference", "Apache-2.0", _generated(sums.pairs, train=4096, held_out=256)),
    "sums_labels": Builtin("binary", "Apache-2.0", _generated(sums.labels, train=6144, held_out=384)),
    "sums_prompts": Builtin("prompt_completion", "Apache-2.0", _generated(sums.prompts, train=2048, held_out=512)),
}


def names() -> list[str]:
    """Return the names of the built-in sets, sorted."""
    return sorted(BUILTIN)


def is_fixed(name: str) -> bool:
    """Tell whether a built-in set has the same rows everywhere; `cpython_docs` are those of the Python that runs."""
    return BUILTIN[name].fixed


def rows(name: str, split: str) -> list[Row]:
    """Return the rows of one split (`train`, `validation` or `test`) of a built-in set, always in the same order.

    Columns are those of the set's kind; `sums_prompts` has `prompt` and `answer`. Raises `UserError` for a name or
    split that does not exist.
    """
    if name not in BUILTIN:
        raise unknown("built-in data set", name, BUILTIN)
    if split not in SPLITS:
        raise unknown(f"split of {name!r}", split, SPLITS)
    return BUILTIN[name].make(split)


def facts(name: str) -> dict[str, str]:
    """Return what stands behind a built-in set: `kind`, `licence`, `source`, `version` and `digest` (sha256).

    `cpython_docs` says here whether it was read from the running standard library or fell back to the frozen sample.
    Raises `UserError` for an unknown name.
    """
    if name not in BUILTIN:
        raise unknown("built-in data set", name, BUILTIN)
    known = {"kind": BUILTIN[name].kind, "licence": BUILTIN[name].licence}
    return {**known, **(_text_facts(name) if name.startswith("cpython") else _sums_facts(name))}


def _text_facts(name: str) -> dict[str, str]:
    frozen = docs.sample()
    documents = docs.library() if name == "cpython_docs" else frozen
    if documents is frozen:
        stripped = " (the standard library here is stripped)" if name == "cpython_docs" else ""
        source, version = f"frozen sample of CPython's documentation{stripped}", docs.SAMPLE_VERSION
    else:
        source, version = "the running standard library", platform.python_version()
    return {"source": source, "version": version, "digest": docs.digest(documents)}


def _sums_facts(name: str) -> dict[str, str]:
    state = hashlib.sha256()
    for split in SPLITS:
        for row in rows(name, split):
            state.update(json.dumps(row, sort_keys=True).encode())
    return {"source": "generated from a seed", "version": SUMS_VERSION, "digest": state.hexdigest()}

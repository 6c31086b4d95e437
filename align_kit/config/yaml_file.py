"""Read one YAML file of a run: where each key stands, `${VAR:-default}` filled in, every problem with file and line."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align_kit import resources
from align_kit.errors import UserError

VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


class Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `5e-7` is a number and `3:50:00` none."""


# YAML 1.1 wants a dot and a sign in the exponent; every learning rate in the wild is written without.
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
# Its numbers to the base 60 make 13800 of a time; YAML 1.2 has dropped them.
BASE_60 = ("tag:yaml.org,2002:str", re.compile(r"^[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?$"))
for opening in "-+0123456789":
    Loader.yaml_implicit_resolvers[opening].insert(0, BASE_60)


@dataclass(frozen=True)
class Layer:
    """The keys of one source, before types are checked, and where each of them stands (`recipes/dpo.yaml:12`)."""

    values: dict[str, Any]
    places: dict[str, str]


def find(name: str) -> Path:
    """Return the file that a word after `--config` names.

    A path as it is written comes first; then the packaged recipes folder, with or without `recipes/` and `.yaml`.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = resources.folder("recipes")
    short = name.removeprefix("recipes/")
    for candidate in (packaged / short, packaged / f"{short}.yaml"):
        if Path(short).name == short and candidate.is_file():
            return candidate
    raise UserError(_not_found(name, packaged))


def _not_found(name: str, packaged: Path) -> str:
    path = Path(name)
    if path.is_dir():
        return f"--config {name} is a folder; name one of its YAML files"
    around = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    shipped = [f"recipes/{p.name}" for p in packaged.glob("*.yaml")] if packaged.is_dir() else []
    near = difflib.get_close_matches(path.name, around, n=3) + difflib.get_close_matches(name, shipped, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"shipped: {', '.join(sorted(shipped)) or 'none'}"
    return f"no such configuration file: {name}; {hint}"


def read(path: Path) -> Layer:
    """Return the keys of a YAML file; raise `UserError` for one that is unreadable, no mapping, or says a key twice."""
    text, place = _text(path), _place(path)
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Layer({}, {})
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{place} holds no mapping at its top; write 'key: value' lines")
        _prepare(loader, node, place, "", set())
        values = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{place}{_line(error)} is not valid YAML: {_problem(error)}") from None
    return Layer(values, {str(key.value): f"{place}:{key.start_mark.line + 1}" for key, _ in node.value})


def _place(path: Path) -> str:
    """Return how messages name a file: relative to the working directory where it lies inside."""
    full = path.resolve()
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else str(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}") from None


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error)


def _prepare(loader: Loader, node: yaml.Node, place: str, key: str, seen: set[int]) -> None:
    """Refuse keys said twice and fill in `${VAR}` in a tree of nodes, while lines are still known.

    `seen` holds the nodes already done: an alias stands in the tree more than once.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        _expand(loader, node, place, key)
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _prepare(loader, item, place, f"{key}[{position}]", seen)
    elif isinstance(node, yaml.MappingNode):
        for name, value in _once(node, place):
            _prepare(loader, value, place, f"{key}.{name}" if key else name, seen)


def _once(node: yaml.MappingNode, place: str) -> Iterator[tuple[str, yaml.Node]]:
    seen: dict[str, int] = {}
    for name_node, value in node.value:
        name, line = str(name_node.value), name_node.start_mark.line + 1
        if name in seen and name != "<<":
            raise UserError(f"{place}:{line} sets {name!r} again (first in line {seen[name]}); keep one")
        seen[name] = line
        yield name, value


def _expand(loader: Loader, node: yaml.ScalarNode, place: str, key: str) -> None:
    """Fill in `${VAR}` and `${VAR:-default}`; an unquoted value is typed again after, so `${N:-8}` is a number."""

    def fill(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        value = os.environ.get(name) or default  # as in a shell: ':-' serves where unset or empty
        if value is None:
            line = node.start_mark.line + 1
            raise UserError(
                f"{place}:{line} {key}: environment variable {name} is not set; set it or write ${{{name}:-default}}"
            )
        return value

    filled = VARIABLE.sub(fill, node.value)
    if filled != node.value:
        node.value = filled
        if node.style is None:
            node.tag = loader.resolve(yaml.ScalarNode, filled, (True, False))


def assignments(text: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """Return `hidden_size=64,num_hidden_layers=2` as a mapping of YAML values; a mapping and None as they are."""
    if not isinstance(text, str):
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        raise UserError(f"config_overrides is {text!r}; expected k=v,k=v or a mapping")
    try:
        return {name.strip(): yaml.load(value, Loader) for name, _, value in pairs}
    except yaml.YAMLError as error:
        raise UserError(f"config_overrides is {text!r}: {_problem(error)}") from None

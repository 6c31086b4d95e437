"""Set values in a card's front matter and leave all else of the file as it is: comments, order, quotes, line ends.

YAML that is parsed and written again loses all of that. Here the parser only says where things stand in the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from align_kit.errors import UserError

_WIDTH = 110  # a mapping of values that is longer than this on one line gets a line for each


def put(text: str, path: Sequence[str], value: Any) -> str:
    """Return a card's text with the value at `path` of its front matter set: one value, or a mapping of such.

    What is there is replaced value by value, what is not is added at the end of the mapping it belongs to.
    """
    if isinstance(value, Mapping) and _find(text, path):
        for name, item in value.items():
            text = put(text, [*path, str(name)], item)
        return text
    there = _find(text, path)
    if there is not None:
        start, end = _span(there)
        same = yaml.safe_load(text[start:end]) == value
        return text if same else text[:start] + _scalar(value) + text[end:]
    depth = next(depth for depth in range(len(path) - 1, -1, -1) if _find(text, path[:depth]))
    holder = _find(text, path[:depth])
    for name in reversed(path[depth + 1 :]):
        value = {name: value}
    return _added(text, holder, path[depth], value)


def _find(text: str, path: Sequence[str]) -> Any:
    """Return the node at `path`, with marks that count from the start of `text`, or None."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    assert match, "a card is read before it is edited"
    # Spaces in place of the opening line, so that every mark is a place in the whole text.
    blank = re.sub(r"[^\r\n]", " ", text[: match.start(1)])
    node = yaml.compose(blank + match[1], Loader=yaml.SafeLoader)
    for name in path:
        if not isinstance(node, yaml.MappingNode):
            return None
        node = next((value for key, value in node.value if key.value == name), None)
    return node


def _span(node: Any) -> tuple[int, int]:
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"line {node.start_mark.line + 1} of the card holds several values where one belongs; mend it")
    return node.start_mark.index, node.end_mark.index


def _end(text: str, node: Any) -> int:
    """Return where a node's text ends; to the parser, the empty lines and comments below a block are part of it."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style:
        return len(text[: node.end_mark.index].rstrip())  # a text of several lines (|) would end on the next one
    last = node.value[-1]
    return _end(text, last[1] if isinstance(last, tuple) else last)


def _added(text: str, holder: Any, name: str, value: Any) -> str:
    """Return the text with `name: value` as the last entry of the mapping `holder`."""
    if not isinstance(holder, yaml.MappingNode):
        raise UserError(f"cannot add {name} to line {holder.start_mark.line + 1} of the card, which is not a mapping")
    entry = f"{_scalar(name)}: {_flow(value)}"
    if holder.flow_style:
        if not holder.value:
            at = holder.start_mark.index + 1
            return text[:at] + entry + text[at:]
        at = _end(text, holder.value[-1][1])
        return f"{text[:at]}, {entry}{text[at:]}"
    newline = "\r\n" if "\r\n" in text else "\n"
    at = re.compile(r"\r?\n").search(text, _end(text, holder)).start()  # type: ignore[union-attr]  # after its comment
    indent = holder.value[0][0].start_mark.column
    return text[:at] + newline + newline.join(_lines(name, value, indent)) + text[at:]


def _lines(name: str, value: Any, indent: int) -> list[str]:
    """Return `name: value` as lines; a mapping of single values stands on one line where it fits."""
    space = " " * indent
    flat = f"{space}{_scalar(name)}: {_flow(value)}"
    nested = isinstance(value, Mapping) and any(isinstance(item, Mapping) for item in value.values())
    if not isinstance(value, Mapping) or (not nested and len(flat) <= _WIDTH):
        return [flat]
    inner = (line for key, item in value.items() for line in _lines(str(key), item, indent + 2))
    return [f"{space}{_scalar(name)}:", *inner]


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    return _scalar(value)


def _scalar(value: Any) -> str:
    """Return one value as YAML writes it, with quotes where it needs them: a digest of digits alone, a {."""
    # As a list on one line, since what stands inside {} needs them more often.
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6).strip()[1:-1]

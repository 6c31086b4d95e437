"""The texts of a canonical row: what is asked and what is answered, by kind.

What a system says is left out: one long system prompt before every row would make all rows alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align_kit.data.chains import chain_of
from align_kit.data.digest import canonical_json
from align_kit.data.shapes import KIND_COLUMNS, Row

ANSWERS = {"prompt_completion": (1,), "binary": (1,), "messages": (1,), "preference": (1, 2)}  # which parts answer


def parts(kind: str, row: Row) -> tuple[str, ...]:
    """Return a row's texts: one for text and prompts, prompt and completion(s) for the others, in column order.

    Of `messages` the first part is what user and tools say, the second what the assistant says.
    """
    if kind == "messages":
        return said(row["messages"], _asks), said(row["messages"], _answers)
    return tuple(said(row[name], _speaks) for name in KIND_COLUMNS[kind] if name != "label")


def learnt(kind: str, row: Row, texts: tuple[str, ...]) -> str:
    """Return what a model learns to write: the text, or the completion; "" of a row that shows what not to write."""
    if kind == "binary" and not row["label"]:
        return ""
    return texts[ANSWERS.get(kind, (0,))[0]]


def is_question(kind: str, place: int) -> bool:
    """Tell whether the part at `place` is what is asked, or the text itself."""
    return place not in ANSWERS.get(kind, ())


def said(value: Any, speaks: Callable[[Row], bool]) -> str:
    """Return a string as it is, and of messages what those think and say that `speaks` accepts, one message a line."""
    if isinstance(value, str):
        return value
    return "\n".join(_content(message) for message in value if speaks(message))


def _content(message: Row) -> str:
    content = message.get("content")
    if isinstance(content, list):  # of a model that also sees: its texts
        content = "\n".join(str(item.get("text", "")) for item in content if isinstance(item, dict))
    calls = canonical_json(message["tool_calls"]) if message.get("tool_calls") else ""
    said = f"{content or ''}\n{calls}" if calls else str(content or "")
    chain = chain_of(message)
    return f"{chain}\n{said}" if chain else said


def _speaks(message: Row) -> bool:
    return message.get("role") != "system"


def _asks(message: Row) -> bool:
    return message.get("role") not in ("system", "assistant")


def _answers(message: Row) -> bool:
    return message.get("role") == "assistant"

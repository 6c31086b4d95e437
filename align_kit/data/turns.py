"""What stands in a cell of a data file: a text, a message or a list of them; each is checked and named as we name it.

Raises ValueError saying what is wrong with a value; whoever reads the row adds which row it is.
"""

from __future__ import annotations

import json
from typing import Any

from align_kit.errors import unknown

Row = dict[str, Any]

# Role names of the ShareGPT world -> the ones chat templates know.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
# The ones chat templates know. Any other would be trained on as whoever the template takes it for.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "documents")


def as_turns(value: Any, role: str) -> list[Row]:
    """Return a text as a conversation of one message that `role` says; messages as they are."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def turns_of(value: Any, name: str) -> Any:
    """Return a string as it is, and one message or a list of them as a list of messages."""
    if isinstance(value, str):
        return value
    return conversation([value] if isinstance(value, dict) else value, name)


def conversation(value: Any, name: str) -> list[Row]:
    """Return a list of messages with the roles and keys that chat templates know; `name` is the column."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"{name} must be a string or a list of messages, got {short(value)}")
    return [_message(turn, name) for turn in value]


def _message(turn: Row, name: str) -> Row:
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str):
        raise ValueError(f"a message in {name} has no role: {short(turn)}")
    content = _joined(turn["content"] if "content" in turn else turn.get("value"))
    rest = {key: item for key, item in turn.items() if key not in ("role", "from", "content", "value", "weight")}
    message = {"role": _ROLES.get(role, role), "content": content}
    if role == "function_call":
        message = {**message, "content": "", "tool_calls": _tool_calls(content)}
    elif message["role"] not in ROLES:
        raise ValueError(f"{unknown(f'role in {name}', role, ROLES)}; rename it")
    elif content is None and not rest.get("tool_calls"):
        raise ValueError(f"a {role} message in {name} has no content")
    elif not isinstance(content, str | list | None):
        raise ValueError(f"the content of a {role} message in {name} must be text, got {short(content)}")
    # Arrow fills absent keys with null; templates that ask "is defined" must not see them.
    return {**message, **{key: item for key, item in rest.items() if item is not None}}


def _joined(content: Any) -> Any:
    """Return parts that are all text as the one text that a chat template which knows parts makes of them.

    Most templates know none. Parts of another type are left to the template, and to whoever trains on what it says.
    """
    if not isinstance(content, list) or not content or not all(map(_is_text, content)):
        return content
    return "".join(part["text"] for part in content)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _tool_calls(content: Any) -> list[Row]:
    calls = decoded(content)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise ValueError(f"a function_call must hold {{name, arguments}}, got {short(content)}")
    return [{"type": "function", "function": call} for call in calls]


def decoded(value: Any) -> Any:
    """Return what a text of JSON says, and anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {short(value)} ({error.msg})") from None


def string(value: Any, name: str) -> str:
    """Return a text."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {short(value)}")
    return value


def boolean(value: Any) -> bool:
    """Return a label, which files also write as 0 and 1 or as words."""
    word = str(value).strip().lower()
    if word not in ("true", "false", "1", "0"):
        raise ValueError(f"label must be true or false, got {short(value)}")
    return word in ("true", "1")


def check_whole(row: Row) -> None:
    """Raise ValueError for a text with half of a character, which JSON can spell and no tokenizer or table can take."""
    for name, value in row.items():
        if (half := _half(value)) is not None:
            raise ValueError(
                f"{name} holds half a character (\\u{ord(half):04x}), as text that is cut within an emoji does; mend "
                "it, or remove the row as align-kit data clean --bad-rows drop does"
            )


def _half(value: Any) -> str | None:
    if isinstance(value, str):
        return _half_in(value)
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((half for one in inner if (half := _half(one)) is not None), None)


def _half_in(text: str) -> str | None:
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


def short(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

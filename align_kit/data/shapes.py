"""Recognise the shape of a file's rows and turn each into a canonical row.

Canonical rows (see `KIND_COLUMNS`) hold strings or lists of `{"role", "content", ...}` messages; alpaca and sharegpt
are shapes of files only. `tools` and `chat_template_kwargs` travel with a row where the file has them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from align_kit.cards import FORMAT_KINDS, PHASE_KINDS
from align_kit.errors import UserError, unknown

Row = dict[str, Any]

KIND_COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt": ("prompt",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "binary": ("prompt", "completion", "label"),
}
CARRIED = ("tools", "chat_template_kwargs")  # what rendering reads beside the kind's own columns

# Role names of the ShareGPT world -> the ones chat templates know.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
# The ones chat templates know. Any other would be trained on as whoever the template takes it for.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "documents")
_HH_TURN = "\n\nAssistant:"  # how Anthropic's transcripts begin an answer


@dataclass(frozen=True)
class Shape:
    """How to read one source: its format, canonical name -> column, and the template its string prompts get."""

    format: str
    columns: dict[str, str] = field(default_factory=dict)
    prompt_template: str | None = None


def recognise(columns: Iterable[str]) -> Shape:
    """Return the shape of rows that have `columns`; the first signature that fits wins.

    Raises UserError naming the columns found and the shapes that are known.
    """
    names = set(columns)
    for needed, name, renamed in _SIGNATURES:
        if set(needed) <= names:
            return Shape(name, dict(renamed))
    raise UserError(
        f"cannot recognise rows with the columns {', '.join(sorted(names))}; known are "
        + "; ".join(f"{name} ({', '.join(needed)})" for needed, name, _ in _SIGNATURES)
        + "; or name them: format: prompt_completion and columns: {prompt: <column>, completion: <column>}"
    )


_SIGNATURES: tuple[tuple[tuple[str, ...], str, dict[str, str]], ...] = (
    (("conversations",), "sharegpt", {}),
    (("instruction", "chosen", "rejected"), "alpaca", {}),
    (("chosen", "rejected"), "preference", {}),
    (("prompt", "completion", "label"), "binary", {}),
    (("prompt", "completion"), "prompt_completion", {}),
    (("messages",), "messages", {}),
    (("instruction", "output"), "alpaca", {}),
    (("question", "answer"), "prompt_completion", {"prompt": "question", "completion": "answer"}),
    (("text",), "text", {}),
    (("prompt",), "prompt", {}),
)


def convert(rows: Iterable[Row], shape: Shape, where: str) -> tuple[str, list[Row]]:
    """Return the kind and the canonical rows of `rows`, as `converted` gives them one by one."""
    pairs = list(converted(rows, shape, where))
    return (pairs[-1][0] if pairs else ""), [row for _, row in pairs]


def converted(rows: Iterable[Row], shape: Shape, where: str) -> Iterator[tuple[str, Row]]:
    """Yield each row's kind, which is one for all, and its canonical form; `where` names the source in messages.

    Raises UserError for a missing column (with the nearest), and for a row whose value has the wrong type (with its
    number, counted from 1).
    """
    reader = _READERS[shape.format]
    kind = ""
    for number, row in enumerate(rows, start=1):
        try:
            row_kind, canonical = reader(_Picker(row, shape.columns))
        except _Missing as missing:
            raise UserError(f"{where}, row {number}: {missing.text(row)}") from None
        except (UserError, ValueError) as error:
            raise UserError(f"{where}, row {number}: {error}") from None
        if kind and row_kind != kind:
            raise UserError(f"{where}, row {number}: a {row_kind} row in a {kind} file; split the file by kind")
        kind = row_kind
        yield kind, _templated(canonical, shape.prompt_template)


def usable(kind: str, phase: str, where: str, columns: Sequence[str] = ()) -> None:
    """Raise UserError when `phase` cannot train on rows of `kind`, saying what it can and who uses this kind.

    `columns` are those found: a misspelt one is the usual reason.
    """
    allowed = PHASE_KINDS[phase]
    if kind in allowed:
        return
    users = [name for name, kinds in PHASE_KINDS.items() if kind in kinds and name != "eval"]
    if phase == "pretrain" and kind in ("messages", "prompt_completion"):
        users.append("or write the text out into a 'text' column")
    found = f"; columns found: {', '.join(columns)}" if columns else ""
    missing = [name for name in KIND_COLUMNS[allowed[0]] if name not in columns]
    if found and len(missing) < len(KIND_COLUMNS[allowed[0]]):
        found += f", missing: {', '.join(missing)}"
    raise UserError(
        f"{where}: {kind} rows cannot be used by {phase}, which takes {' or '.join(allowed)}; "
        f"{kind} rows are for {', '.join(users)}{found}"
    )


def adapt(kind: str, rows: list[Row], phase: str) -> tuple[str, list[Row]]:
    """Turn rows of a kind that `phase` takes second into the kind it was made for.

    KTO gets both completions of a pair, the chosen one first; PPO gets the prompt, with the completion's text as
    `answer`.
    """
    if phase == "kto" and kind == "preference":
        rest = [{name: row[name] for name in row if name not in ("chosen", "rejected")} for row in rows]
        sides = (("chosen", True), ("rejected", False))
        return "binary", [
            {**other, "completion": row[side], "label": label}
            for row, other in zip(rows, rest, strict=True)
            for side, label in sides
        ]
    if phase == "ppo" and kind == "prompt_completion":
        return "prompt", [
            {**{name: row[name] for name in row if name != "completion"}, "answer": _last_text(row["completion"])}
            for row in rows
        ]
    return kind, rows


def _last_text(completion: Any) -> Any:
    """Return a completion's text: itself, or what its last message says."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


class _Missing(Exception):
    def __init__(self, column: str) -> None:
        super().__init__(column)
        self.column = column

    def text(self, row: Row) -> str:
        near = difflib.get_close_matches(self.column, list(row), n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"no column {self.column!r}; found {', '.join(map(str, row))}{hint}"


class _Picker:
    """Reads canonical names from a row through the source's column names; dots reach into lists and objects."""

    def __init__(self, row: Row, columns: dict[str, str]) -> None:
        self.row, self.columns = row, columns

    def __call__(self, name: str) -> Any:
        column = self.columns.get(name, name)
        value: Any = self.row
        for part in [column] if column in self.row else column.split("."):
            try:
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise _Missing(column) from None
        return value

    def get(self, name: str) -> Any:
        try:
            return self(name)
        except _Missing:
            return None

    def carried(self) -> Row:
        found = {name: self.get(name) for name in CARRIED}
        return {name: _decoded(value) for name, value in found.items() if value}

    def extra(self, name: str) -> Row:
        value = self.get(name)
        return {} if value is None else {name: value}


def _text(pick: _Picker) -> tuple[str, Row]:
    return "text", {"text": _string(pick("text"), "text")}


def _prompt(pick: _Picker) -> tuple[str, Row]:
    return "prompt", {"prompt": _turns(pick("prompt"), "prompt"), **pick.extra("answer"), **pick.carried()}


def _prompt_completion(pick: _Picker) -> tuple[str, Row]:
    prompt, completion = _matched(_turns(pick("prompt"), "prompt"), _turns(pick("completion"), "completion"))
    return "prompt_completion", {"prompt": prompt, "completion": completion, **pick.carried()}


def _messages(pick: _Picker) -> tuple[str, Row]:
    return "messages", {"messages": _conversation(pick("messages"), "messages"), **pick.carried()}


def _preference(pick: _Picker) -> tuple[str, Row]:
    prompt, pair = pick.get("prompt"), [_turns(pick(name), name) for name in ("chosen", "rejected")]
    if prompt is None and difflib.get_close_matches("prompt", list(pick.row), n=1, cutoff=0.75):
        raise _Missing("prompt")  # a misspelt column, not a prompt inside both sides
    if prompt is not None:
        prompt = _turns(prompt, "prompt")
    if prompt is None or (isinstance(prompt, str) and _holds_prompt(pair)):
        prompt, *pair = shared_prompt(*pair)
    else:
        chosen_prompt, chosen = _matched(prompt, pair[0])
        prompt, rejected = _matched(chosen_prompt, pair[1])
        pair = [chosen, rejected]
    return "preference", {"prompt": prompt, "chosen": pair[0], "rejected": pair[1], **pick.carried()}


def _binary(pick: _Picker) -> tuple[str, Row]:
    _, row = _prompt_completion(pick)
    return "binary", {**row, "label": _boolean(pick("label"))}


def _alpaca(pick: _Picker) -> tuple[str, Row]:
    instruction, given = _string(pick("instruction"), "instruction"), pick.get("input")
    prompt: Any = f"{instruction}\n{_string(given, 'input')}" if given else instruction
    past = [{"role": "system", "content": pick.get("system")}] if pick.get("system") else []
    for question, answer in pick.get("history") or []:
        past += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if past:
        prompt = [*past, {"role": "user", "content": prompt}]
    if pick.get("chosen") is not None:
        answers = [_turns(pick(name), name) for name in ("chosen", "rejected")]
        matched = [_matched(prompt, answer) for answer in answers]
        return "preference", {"prompt": matched[0][0], "chosen": matched[0][1], "rejected": matched[1][1]}
    prompt, completion = _matched(prompt, _turns(pick("output"), "output"))
    return "prompt_completion", {"prompt": prompt, "completion": completion}


def _sharegpt(pick: _Picker) -> tuple[str, Row]:
    turns = _conversation(pick("conversations"), "conversations")
    if pick.get("system") and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": pick("system")}, *turns]
    if pick.get("chosen") is None:
        return "messages", {"messages": turns, **pick.carried()}
    pair = [_as_turns(_turns(pick(name), name), "assistant") for name in ("chosen", "rejected")]
    return "preference", {"prompt": turns, "chosen": pair[0], "rejected": pair[1], **pick.carried()}


_READERS: dict[str, Callable[[_Picker], tuple[str, Row]]] = {
    "text": _text,
    "prompt": _prompt,
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "preference": _preference,
    "binary": _binary,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
assert set(_READERS) == set(FORMAT_KINDS)


def shared_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split two whole conversations (or transcripts) into their common prompt and what follows.

    Messages are compared turn by turn. Transcripts with Anthropic's turns part after the last `Assistant:` they share;
    other strings part at the first difference, one earlier if a space stands there (as TRL's extract_prompt does).
    """
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if isinstance(chosen, list):
        length = min(length, len(chosen) - 1, len(rejected) - 1)  # equal conversations still end in an answer
    elif _HH_TURN in chosen[:length]:
        length = chosen.rindex(_HH_TURN, 0, length) + len(_HH_TURN)
    elif length and chosen[length - 1] == " ":
        length -= 1
    return chosen[:length], chosen[length:], rejected[length:]


def _holds_prompt(pair: list[Any]) -> bool:
    """Tell whether both answers are whole conversations that begin with the user's side."""
    return all(isinstance(turns, list) and turns[0]["role"] != "assistant" for turns in pair)


def _matched(prompt: Any, answer: Any) -> tuple[Any, Any]:
    """Return both as strings or both as messages."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return prompt, answer
    return _as_turns(prompt, "user"), _as_turns(answer, "assistant")


def _as_turns(value: Any, role: str) -> list[Row]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _turns(value: Any, name: str) -> Any:
    """Return a string as it is, and one message or a list of them as a list of messages."""
    if isinstance(value, str):
        return value
    return _conversation([value] if isinstance(value, dict) else value, name)


def _conversation(value: Any, name: str) -> list[Row]:
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"{name} must be a string or a list of messages, got {_short(value)}")
    return [_message(turn, name) for turn in value]


def _message(turn: Row, name: str) -> Row:
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str):
        raise ValueError(f"a message in {name} has no role: {_short(turn)}")
    content = turn["content"] if "content" in turn else turn.get("value")
    rest = {key: item for key, item in turn.items() if key not in ("role", "from", "content", "value", "weight")}
    message = {"role": _ROLES.get(role, role), "content": content}
    if role == "function_call":
        message = {**message, "content": "", "tool_calls": _tool_calls(content)}
    elif message["role"] not in ROLES:
        raise ValueError(f"{unknown(f'role in {name}', role, ROLES)}; rename it")
    elif content is None and not rest.get("tool_calls"):
        raise ValueError(f"a {role} message in {name} has no content")
    elif not isinstance(content, str | list | None):
        raise ValueError(f"the content of a {role} message in {name} must be text, got {_short(content)}")
    # Arrow fills absent keys with null; templates that ask "is defined" must not see them.
    return {**message, **{key: item for key, item in rest.items() if item is not None}}


def _tool_calls(content: Any) -> list[Row]:
    calls = _decoded(content)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise ValueError(f"a function_call must hold {{name, arguments}}, got {_short(content)}")
    return [{"type": "function", "function": call} for call in calls]


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {_short(value)} ({error.msg})") from None


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {_short(value)}")
    return value


def _boolean(value: Any) -> bool:
    word = str(value).strip().lower()
    if word not in ("true", "false", "1", "0"):
        raise ValueError(f"label must be true or false, got {_short(value)}")
    return word in ("true", "1")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _templated(row: Row, template: str | None) -> Row:
    """Apply a source's prompt template: `chat` makes messages of strings, a text puts the prompt where {prompt} is."""
    if template is None or not isinstance(row.get("prompt"), str):
        return row
    if template != "chat":
        return {**row, "prompt": template.replace("{prompt}", row["prompt"])}
    answers: Row = {
        name: _as_turns(row[name], "assistant") for name in ("completion", "chosen", "rejected") if name in row
    }
    return {**row, "prompt": _as_turns(row["prompt"], "user"), **answers}

"""Recognise the shape of a file's rows and turn each into a canonical row.

Canonical rows (see `KIND_COLUMNS`) hold strings or lists of `{"role", "content", ...}` messages; alpaca, sharegpt and
reason are shapes of files only. `tools` and `chat_template_kwargs` travel with a row where the file has them.

A chain of thought (`reason`) is joined to its answer in a completion that is a string; in one of messages it stands
beside it as `reasoning_content`, and the row names the `reason_template` to join them by where it is not the usual one.
A pair or a labelled completion has its `weight` where `columns` names one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from align_kit.cards import FORMAT_KINDS, PHASE_KINDS, Block
from align_kit.data import weights
from align_kit.data.chains import completion_of, trace_of
from align_kit.data.reason import DEFAULT_TEMPLATE, ReasonTemplate, Trace
from align_kit.data.turns import as_turns, boolean, check_whole, conversation, decoded, string, turns_of
from align_kit.errors import UserError

Row = dict[str, Any]
Where = str | Callable[[int], str]  # a source's name, or the place of its row of a number

KIND_COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt": ("prompt",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "binary": ("prompt", "completion", "label"),
}
CARRIED = ("tools", "chat_template_kwargs")  # what rendering reads beside the kind's own columns

_TRACE_COLUMNS = ("reasoning", "answer", "chosen_reasoning", "rejected_reasoning")  # of traces that are not joined
_HH_TURN = "\n\nAssistant:"  # how Anthropic's transcripts begin an answer


@dataclass(frozen=True)
class Shape:
    """How to read one source: its format, canonical name -> column, and the template its string prompts get.

    `reason_template` says how chain of thought and answer stand in one text, for the format `reason`.
    """

    format: str
    columns: dict[str, str] = field(default_factory=dict)
    prompt_template: str | None = None
    reason_template: str | None = None

    @classmethod
    def of(cls, block: Block) -> Shape:
        """Return how a card says that its rows are read."""
        return cls(block.format, dict(block.columns), block.prompt_template, block.reason_template)

    @property
    def trace_template(self) -> ReasonTemplate:
        """How chain of thought and answer stand in one text; raises UserError for a text that cannot say it."""
        return ReasonTemplate(self.reason_template or DEFAULT_TEMPLATE)


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
    (("prompt", "chosen_reasoning", "chosen", "rejected_reasoning", "rejected"), "reason", {}),
    (("chosen", "rejected"), "preference", {}),
    (("prompt", "completion", "label"), "binary", {}),
    (("prompt", "completion"), "prompt_completion", {}),
    (("prompt", "reasoning", "answer"), "reason", {}),
    (("messages",), "messages", {}),
    (("instruction", "output"), "alpaca", {}),
    (("question", "answer"), "prompt_completion", {"prompt": "question", "completion": "answer"}),
    (("text",), "text", {}),
    (("prompt",), "prompt", {}),
)


def convert(rows: Iterable[Row], shape: Shape, where: Where) -> tuple[str, list[Row]]:
    """Return the kind and the canonical rows of `rows`, as `converted` gives them one by one."""
    pairs = list(converted(rows, shape, where))
    return (pairs[-1][0] if pairs else ""), [row for _, row in pairs]


def converted(rows: Iterable[Row], shape: Shape, where: Where) -> Iterator[tuple[str, Row]]:
    """Yield each row's kind, which is one for all, and its canonical form.

    Raises UserError for a missing column (with the nearest), and for a row whose value has the wrong type. `where`
    names the source in messages, which add the row's number, counted from 1; or it says the place of that number.
    """
    at = where if callable(where) else lambda number: f"{where}, row {number}"
    reader = _READERS[shape.format]
    reason = shape.trace_template
    kind = ""
    for number, row in enumerate(rows, start=1):
        try:
            picker = _Picker(row, shape, reason)
            row_kind, canonical = reader(picker)
            canonical |= _weight(picker, row_kind)
            check_whole(canonical)
        except (_Missing, UserError, ValueError) as error:
            said = error.text(row) if isinstance(error, _Missing) else error
            raise UserError(f"{at(number)}: {said}") from None
        if kind and row_kind != kind:
            raise UserError(f"{at(number)}: a {row_kind} row in a {kind} file; split the file by kind")
        kind = row_kind
        yield kind, _templated(canonical, shape.prompt_template)


def kept_apart(kind: str, sources: Sequence[Shape], beside: Iterable[str] = ()) -> dict[str, Any]:
    """Return the `format` that canonical rows of all `sources` are written in, its `reason_template` and `columns`.

    That is their kind. Where all are traces by one template they stay traces, for a canonical row is one, too, unless
    it is to keep columns `beside` its own that would be read as the parts of another trace.
    """
    weighed = any(weights.COLUMN in shape.columns for shape in sources)
    found: dict[str, Any] = {"columns": {weights.COLUMN: weights.COLUMN}} if weighed else {}
    templates = {shape.trace_template.text for shape in sources}
    all_traces = all(shape.format == "reason" for shape in sources) and not set(beside) & set(_TRACE_COLUMNS)
    if not all_traces or len(templates) > 1:
        return {"format": kind, **found}
    (text,) = templates
    return {**found, "format": "reason", "reason_template": None if text == DEFAULT_TEMPLATE else text}


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


def adapt(kind: str, rows: list[Row], phase: str, shape: Shape) -> tuple[str, list[Row]]:
    """Turn rows of a kind that `phase` takes second into the kind it was made for; `shape` is that they were read by.

    KTO gets both completions of a pair, the chosen one first; PPO gets the prompt, with the completion's text as
    `answer`, of a trace without the chain of thought.
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
            {**{name: row[name] for name in row if name != "completion"}, "answer": _answer(row["completion"], shape)}
            for row in rows
        ]
    return kind, rows


def _answer(completion: Any, shape: Shape) -> Any:
    """Return a completion's text: itself, or what its last message says; of a trace its answer."""
    if not isinstance(completion, str):
        return completion[-1]["content"]
    trace = shape.trace_template.part(completion) if shape.format == "reason" else None
    return trace.answer if trace else completion


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

    def __init__(self, row: Row, shape: Shape, reason: ReasonTemplate) -> None:
        self.row, self.columns, self.reason = row, shape.columns, reason
        self.chat = shape.prompt_template == "chat"

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
        return {name: decoded(value) for name, value in found.items() if value} | self._joined_by()

    def _joined_by(self) -> Row:
        """Return the row's own `reason_template`, which a set made from a set of traces has."""
        text = self.get("reason_template")
        return {"reason_template": ReasonTemplate(string(text, "reason_template")).text} if text else {}

    def extra(self, name: str) -> Row:
        value = self.get(name)
        return {} if value is None else {name: value}


def _weight(pick: _Picker, kind: str) -> Row:
    """Return the row's weight, where the source names a column for it."""
    if weights.COLUMN not in pick.columns:
        return {}
    if kind not in weights.KINDS:
        raise ValueError(f"columns names a weight, which rows of {' and '.join(weights.KINDS)} have, not of {kind}")
    return weights.weight_of(pick(weights.COLUMN))


def _text(pick: _Picker) -> tuple[str, Row]:
    return "text", {"text": string(pick("text"), "text")}


def _prompt(pick: _Picker) -> tuple[str, Row]:
    return "prompt", {"prompt": turns_of(pick("prompt"), "prompt"), **pick.extra("answer"), **pick.carried()}


def _prompt_completion(pick: _Picker) -> tuple[str, Row]:
    prompt, completion = _matched(turns_of(pick("prompt"), "prompt"), turns_of(pick("completion"), "completion"))
    return "prompt_completion", {"prompt": prompt, "completion": completion, **pick.carried()}


def _messages(pick: _Picker) -> tuple[str, Row]:
    return "messages", {"messages": conversation(pick("messages"), "messages"), **pick.carried()}


def _preference(pick: _Picker) -> tuple[str, Row]:
    prompt, pair = pick.get("prompt"), [turns_of(pick(name), name) for name in ("chosen", "rejected")]
    if prompt is None and difflib.get_close_matches("prompt", list(pick.row), n=1, cutoff=0.75):
        raise _Missing("prompt")  # a misspelt column, not a prompt inside both sides
    if prompt is not None:
        prompt = turns_of(prompt, "prompt")
    if prompt is None or (isinstance(prompt, str) and _holds_prompt(pair)):
        prompt, *pair = shared_prompt(*pair)
        if prompt == []:
            raise ValueError("chosen and rejected share no first message that could be their prompt; begin both with "
                             "the same one, give a prompt column, or remove the row")  # fmt: skip
    else:
        chosen_prompt, chosen = _matched(prompt, pair[0])
        prompt, rejected = _matched(chosen_prompt, pair[1])
        pair = [chosen, rejected]
    return "preference", {"prompt": prompt, "chosen": pair[0], "rejected": pair[1], **pick.carried()}


def _binary(pick: _Picker) -> tuple[str, Row]:
    _, row = _prompt_completion(pick)
    return "binary", {**row, "label": boolean(pick("label"))}


def _alpaca(pick: _Picker) -> tuple[str, Row]:
    instruction, given = string(pick("instruction"), "instruction"), pick.get("input")
    prompt: Any = f"{instruction}\n{string(given, 'input')}" if given else instruction
    past = [{"role": "system", "content": pick.get("system")}] if pick.get("system") else []
    for question, answer in pick.get("history") or []:
        past += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if past:
        prompt = [*past, {"role": "user", "content": prompt}]
    if pick.get("chosen") is not None:
        answers = [turns_of(pick(name), name) for name in ("chosen", "rejected")]
        matched = [_matched(prompt, answer) for answer in answers]
        return "preference", {"prompt": matched[0][0], "chosen": matched[0][1], "rejected": matched[1][1]}
    prompt, completion = _matched(prompt, turns_of(pick("output"), "output"))
    return "prompt_completion", {"prompt": prompt, "completion": completion}


def _sharegpt(pick: _Picker) -> tuple[str, Row]:
    turns = conversation(pick("conversations"), "conversations")
    if pick.get("system") and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": pick("system")}, *turns]
    if pick.get("chosen") is None:
        return "messages", {"messages": turns, **pick.carried()}
    pair = [as_turns(turns_of(pick(name), name), "assistant") for name in ("chosen", "rejected")]
    return "preference", {"prompt": turns, "chosen": pair[0], "rejected": pair[1], **pick.carried()}


def _reason(pick: _Picker) -> tuple[str, Row]:
    prompt = turns_of(pick("prompt"), "prompt")
    prompt = as_turns(prompt, "user") if pick.chat else prompt  # before chain and answer become one text
    if pick.get("chosen") is None and pick.get("rejected") is None:
        kind, traces = "prompt_completion", {"completion": _trace(pick, "reasoning", "answer", "completion")}
    else:
        sides = ("chosen", "rejected")
        kind, traces = "preference", {side: _trace(pick, f"{side}_reasoning", side, side) for side in sides}
    texts = {name: completion_of(prompt, trace, pick.reason) for name, trace in traces.items()}
    row = {"prompt": prompt, **texts, **pick.carried()}
    if not isinstance(prompt, str) and pick.reason.text != DEFAULT_TEMPLATE:
        row["reason_template"] = pick.reason.text
    return kind, row


def _trace(pick: _Picker, reasoning: str, answer: str, whole: str) -> Trace:
    """Return the trace in the columns `reasoning` and `answer`, else the one that the column `whole` holds."""
    if pick.get(reasoning) is None and pick.get(whole) is not None:
        trace = trace_of(pick(whole), whole, pick.reason)
    else:
        trace = Trace(string(pick(reasoning), reasoning), string(pick(answer), answer))
    if not pick.reason.holds(trace):
        raise ValueError(f"a mark of reason_template {pick.reason.text!r} stands in {reasoning} or {answer}, so that "
                         "they could not be told apart again; remove the row, or choose another mark")  # fmt: skip
    return trace


_READERS: dict[str, Callable[[_Picker], tuple[str, Row]]] = {
    "text": _text,
    "prompt": _prompt,
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "preference": _preference,
    "binary": _binary,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "reason": _reason,
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
    return as_turns(prompt, "user"), as_turns(answer, "assistant")


def _templated(row: Row, template: str | None) -> Row:
    """Apply a source's prompt template: `chat` makes messages of strings, a text puts the prompt where {prompt} is."""
    if template is None or not isinstance(row.get("prompt"), str):
        return row
    if template != "chat":
        return {**row, "prompt": template.replace("{prompt}", row["prompt"])}
    answers: Row = {
        name: as_turns(row[name], "assistant") for name in ("completion", "chosen", "rejected") if name in row
    }
    return {**row, "prompt": as_turns(row["prompt"], "user"), **answers}

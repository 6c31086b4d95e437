"""Chains of thought in messages: where one stands, and how a chat template is told of it.

Templates ignore what they do not know, so a message's `reasoning_content` is lost in most of them without a word. What
a template does with it is tried out, not read in its source: many only show it in some places, or with a variable set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align_kit.data.digest import canonical_json
from align_kit.data.reason import DEFAULT_TEMPLATE, NAMES, ReasonTemplate, Trace
from align_kit.data.turns import Row, short, turns_of

_PROBE = "chain-of-thought-7319"  # one word, which no template has a reason to cut or to change


def chain_of(message: Row) -> str | None:
    """Return an assistant's chain of thought, whatever the message calls it; None where it has none."""
    name = _called(message)
    return None if name is None else message[name]


def _called(message: Row) -> str | None:
    if message.get("role") != "assistant":
        return None
    return next((name for name in NAMES if isinstance(message.get(name), str)), None)


def trace_of(value: Any, name: str, template: ReasonTemplate) -> Trace:
    """Return the trace that a whole completion holds, an assistant's message or a text with the template's marks.

    Raises ValueError for one that holds none; `name` is its column.
    """
    said = turns_of(value, name)
    if not isinstance(said, str):
        message = said[-1]
        if len(said) != 1 or not isinstance(message["content"], str):
            raise ValueError(f"{name} must be a text or one assistant's message to hold a trace, got {short(value)}")
        if (chain := chain_of(message)) is not None:
            return Trace(chain, message["content"])
        said = message["content"]
    trace = template.part(said)
    if trace is None:
        raise ValueError(
            f"{name} does not have the shape of reason_template {template.text!r}: {short(value)}; give the template "
            "that it has, or remove the row"
        )
    return trace


def completion_of(prompt: Any, trace: Trace, template: ReasonTemplate) -> Any:
    """Return a trace as the completion of `prompt`: one text, or one message that keeps chain and answer apart."""
    if isinstance(prompt, str):
        return template.join(trace)
    return [{"role": "assistant", "content": trace.answer, NAMES[0]: trace.reasoning}]


class Chains:
    """Knows under which name a chat template shows a chain of thought.

    `render` tries the template on messages with the options given; it returns "" where the template refuses them.
    """

    def __init__(self, render: Callable[[list[Row], Row], str]) -> None:
        self._render = render
        self._names: dict[str, str | None] = {}

    def told(self, messages: list[Row], template: str | None, options: Row) -> list[Row]:
        """Return `messages` with each chain where the chat template shows it.

        Where it shows none, chain and content are joined by `template`, the text of a `ReasonTemplate`.
        """
        if all(chain_of(message) is None for message in messages):
            return messages
        return [self._one(message, template or DEFAULT_TEMPLATE, options) for message in messages]

    def _one(self, message: Row, template: str, options: Row) -> Row:
        called = _called(message)
        if called is None:
            return message
        rest = {name: value for name, value in message.items() if name != called}
        chain, name = message[called], self._name(options)
        if name is not None:
            return {**rest, name: chain}
        return {**rest, "content": _joined(chain, message.get("content"), ReasonTemplate(template))} if chain else rest

    def _name(self, options: Row) -> str | None:
        """Return the name under which a chain is shown with these options, None where it never is."""
        key = canonical_json(options)
        if key not in self._names:
            self._names[key] = next((name for name in NAMES if self._shows(name, options)), None)
        return self._names[key]

    def _shows(self, name: str, options: Row) -> bool:
        asked, answered = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!", name: _PROBE}
        return _PROBE in self._render([asked, answered], options)


def _joined(chain: str, content: Any, template: ReasonTemplate) -> Any:
    """Return a message's content with its chain in it; content of several parts gets parts before and behind."""
    if not isinstance(content, list):
        return template.join(Trace(chain, content or ""))
    around = (template.opening + chain + template.mark, template.ending)
    before, behind = ([{"type": "text", "text": text}] if text else [] for text in around)
    return [*before, *content, *behind]

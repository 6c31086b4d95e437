"""Keep a chain of thought apart from the answer it leads to, and both in one text that can be trained on.

A template says how the two stand there: `<think>\\n{reasoning}\\n</think>\\n\\n{answer}` where nothing else is given;
`{reasoning}\\n#### {answer}` in sets made as gsm8k is. Models whose prompt opens the chain take what follows that:
`{reasoning}\\n</think>\\n\\n{answer}`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from align_kit.cards import reason_fault
from align_kit.errors import UserError

DEFAULT_TEMPLATE = "<think>\n{reasoning}\n</think>\n\n{answer}"
# What the chain of a message is called: by most templates and servers, by some servers, by gpt-oss' template.
NAMES = ("reasoning_content", "reasoning", "thinking")
_CLOSING = re.compile(r"\s*[<\[]/")  # how a mark begins that closes what another one opened


class Trace(NamedTuple):
    """A chain of thought and the answer it leads to, without the marks between them."""

    reasoning: str
    answer: str


class ReasonTemplate:
    """How a chain of thought and its answer stand in one text; raises `UserError` for a text that cannot say it."""

    def __init__(self, text: str = DEFAULT_TEMPLATE) -> None:
        if fault := reason_fault(text):
            raise UserError(f"reason_template {text!r} {fault}")
        self.text = text
        self.opening, rest = text.split("{reasoning}")
        self.mark, self.ending = rest.split("{answer}")
        # A chain that was opened ends where it is first closed; what is no closing mark may stand in a chain as well,
        # and the answer is what comes last.
        self._first = bool(self.opening or _CLOSING.match(self.mark))

    def join(self, trace: Trace) -> str:
        """Return the one text; `part` gives the trace back unless a mark stands within it (see `holds`)."""
        return f"{self.opening}{trace.reasoning}{self.mark}{trace.answer}{self.ending}"

    def part(self, completion: str) -> Trace | None:
        """Return the trace that a text holds, None where it does not have the template's shape.

        A mark that stands there repeatedly parts at its first place where it closes a chain, else at its last. In
        either case joining the trace gives the text back, character for character.
        """
        if not (completion.startswith(self.opening) and completion.endswith(self.ending)):
            return None
        start, stop = len(self.opening), len(completion) - len(self.ending)
        find = completion.find if self._first else completion.rfind
        place = find(self.mark, start, stop)
        return None if place < 0 else Trace(completion[start:place], completion[place + len(self.mark) : stop])

    def holds(self, trace: Trace) -> bool:
        """Tell whether a trace can be parted again once it is joined: not where a mark stands within it."""
        return self.part(self.join(trace)) == trace

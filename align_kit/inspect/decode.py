"""From token ids to what a reader sees: text with its blanks, control tokens by name, nothing a terminal obeys."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from align_kit.data.control import ControlTokens

Ids = Sequence[int]
State = Literal["masked", "TRAINED", "read", "cut off"]

CONTEXT = 8  # tokens that a span is decoded behind: some tokenizers drop the blank at the start of a text
SPACE, NEWLINE = "·", "↵"  # marks of blanks that would not be seen
# Format characters that scripts need; all others of their category, such as those that turn a line around, are spelt.
_JOINERS = "\u200c\u200d"
_UNSEEN = ("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp")
_EDGE_SPACES = re.compile(r"^ +| +$| +(?=\r?\n)")


class Piece(NamedTuple):
    """Text of one look: as it is, a control token, a mark for a blank, a character spelt out, or what was left out."""

    text: str
    look: Literal["text", "token", "blank", "spelt", "elided"] = "text"


@dataclass(frozen=True)
class Span:
    """Tokens of one part of a row that fare alike."""

    part: str
    state: State
    ids: Ids
    before: Ids = ()  # the tokens in front, for decoding alone


class Decoder:
    """Decodes spans with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        names = ControlTokens(tokenizer).tokens
        ids = tokenizer.convert_tokens_to_ids(names)
        self.control: dict[int, str] = dict(zip(ids, map(one_line, names), strict=True))  # a name is someone's text too

    def pieces(self, span: Span) -> list[Piece]:
        """Return what is seen of a span."""
        found: list[Piece] = []
        start = 0
        for place, token in enumerate([*span.ids, None]):
            if token is not None and token not in self.control:
                continue
            if place > start:
                found += visible(self.text(span.ids[start:place], [*span.before, *span.ids[:start]]))
            if token is not None:
                found.append(Piece(self.control[token], "token"))
            start = place + 1
        return found

    def text(self, ids: Ids, before: Ids = ()) -> str:
        """Return the text of `ids` as it stands behind `before`."""
        context = list(before[-CONTEXT:])
        alone, both = self._decoded(context), self._decoded([*context, *ids])
        return both[len(alone) :] if both.startswith(alone) else self._decoded(list(ids))

    def name(self, token: int) -> str:
        """Return a control token's name, or what else a token stands for."""
        return self.control.get(token) or one_line(self._decoded([token]))

    def _decoded(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)


def visible(text: str) -> list[Piece]:
    """Return text in pieces: blanks at its edges and at the ends of lines marked, what cannot be seen spelt out.

    A newline is the piece `↵` with a line break behind; no other control character is left in any piece.
    """
    return list(_joined(_characters(text)))


def one_line(text: str) -> str:
    """Return text in one line, what cannot be seen spelt out."""
    return "".join(piece.text for piece in visible(text)).replace("\n", "")


def _characters(text: str) -> Iterator[Piece]:
    edges = {place for found in _EDGE_SPACES.finditer(text) for place in range(*found.span())}
    for place, char in enumerate(text):
        if char == "\n":
            yield Piece(f"{NEWLINE}\n", "blank")
        elif place in edges:
            yield Piece(SPACE, "blank")
        elif char not in _JOINERS and unicodedata.category(char) in _UNSEEN:
            yield Piece(_spelt(char), "spelt")
        else:
            yield Piece(char)


def _spelt(char: str) -> str:
    return char.encode("unicode_escape").decode() if ord(char) < 0xD800 or ord(char) > 0xDFFF else f"\\u{ord(char):04x}"


def _joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Yield pieces with neighbours of one look made one."""
    held: Piece | None = None
    for piece in pieces:
        if held is not None and held.look == piece.look:
            held = Piece(held.text + piece.text, held.look)
            continue
        if held is not None:
            yield held
        held = piece
    if held is not None:
        yield held


def shortened(pieces: Sequence[Piece], most: int) -> list[Piece]:
    """Return pieces of some `most` characters: the middle of a longer text is left out, and how much is said."""
    total = sum(len(piece.text) for piece in pieces)
    if total <= most:
        return list(pieces)
    head = list(_first(pieces, most * 2 // 3))
    back = [Piece(piece.text[::-1], piece.look) for piece in reversed(pieces)]
    tail = [Piece(piece.text[::-1], piece.look) for piece in reversed(list(_first(back, most // 3)))]
    left_out = total - sum(len(piece.text) for piece in (*head, *tail))
    return [*head, Piece(f" [… {left_out:,} characters …] ", "elided"), *tail]


def _first(pieces: Sequence[Piece], most: int) -> Iterator[Piece]:
    """Yield pieces up to `most` characters; a control token is shown whole or not at all."""
    for piece in pieces:
        if most <= 0 or (piece.look == "token" and len(piece.text) > most):
            return
        yield Piece(piece.text[:most], piece.look)
        most -= len(piece.text)

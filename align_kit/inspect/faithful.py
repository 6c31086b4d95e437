"""Do the tokens say what the rows say? Rendered whole, a sample of rows is decoded and looked through for its text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from align_kit.data.reason import NAMES
from align_kit.inspect.decode import Decoder, one_line
from align_kit.inspect.trace import Traced

SAID = ("content", *NAMES)  # what of a message is text
SHOWN = 60  # characters of what is missing
_BLANK = re.compile(r"\s+")

Row = dict[str, Any]


@dataclass(frozen=True)
class Faithful:
    """What a sample of `rows` rows showed: sentences on text that is not in its tokens, lengths before any cut, and
    whether the tokenizer puts BOS before plain text.
    """

    rows: int
    losses: tuple[str, ...]
    lengths: tuple[int, ...]
    adds_bos: bool

    def lengths_sentence(self) -> str:
        """Return how long rows are before they are cut; empty where that is not known."""
        import numpy as np

        if not self.lengths:
            return ""
        half, nearly, most = np.quantile(self.lengths, [0.5, 0.99, 1.0], method="higher").tolist()
        return f"uncut, half of {self.rows:,} sampled rows fit {half:,} tokens, 99% fit {nearly:,}, all fit {most:,}"


def judged(sample: Sequence[Traced], decoder: Decoder) -> Faithful:
    """Return what a sample of rows shows."""
    missing: dict[str, list[tuple[int, str]]] = {}
    lengths = []
    for traced in sample:
        if traced.whole is None:
            continue
        rendered = _squeezed(" ".join(decoder.text(ids) for ids in _ids(traced.whole)))
        lengths.append(_length(traced.whole))
        for part, text in _texts(traced.given):
            if _squeezed(text) not in rendered:
                missing.setdefault(part, []).append((traced.number, text))
    adds = decoder.tokenizer.bos_token_id
    begins = decoder.tokenizer("a")["input_ids"]
    return Faithful(
        rows=len(sample),
        losses=tuple(_sentence(part, places, len(sample)) for part, places in missing.items()),
        lengths=tuple(lengths),
        adds_bos=adds is not None and begins[:1] == [adds],
    )


def _sentence(part: str, places: Sequence[tuple[int, str]], rows: int) -> str:
    number, text = places[0]
    count = len({number for number, _ in places})
    said = one_line(text.strip()[:SHOWN])
    who = "the chat template drops or changes" if part.startswith("the ") else "the tokenizer changes"
    return f"{who} {part} in {count:,} of {rows:,} sampled rows (row {number}: “{said}”)"


def _ids(row: Row) -> Iterator[list[int]]:
    """Yield the token ids of each sequence in a tokenised row."""
    if "input_ids" in row:
        yield row["input_ids"]
        return
    sides = [name for name in row if name.endswith("_ids") and name != "prompt_ids"]
    yield from ([*row["prompt_ids"], *row[side]] for side in sides)
    if not sides:
        yield row["prompt_ids"]


def _length(row: Row) -> int:
    return max(map(len, _ids(row)))


def _texts(row: Row) -> Iterator[tuple[str, str]]:
    """Yield what a canonical row says, with what it is: a column, or what a role says in it."""
    for column in ("text", "messages", "prompt", "completion", "chosen", "rejected"):
        value = row.get(column)
        if isinstance(value, str):
            yield column, value
        elif isinstance(value, list):
            yield from _messages(value)


def _messages(messages: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for message in messages:
        for name in SAID:
            if isinstance(text := message.get(name), str):
                whose = f"the {message.get('role')}'s"
                yield f"{whose} {'message' if name == 'content' else name}", text


def _squeezed(text: str) -> str:
    """Return text without blanks, in one spelling of what Unicode spells in several ways."""
    return _BLANK.sub("", unicodedata.normalize("NFKC", text))

"""Texts that must not be in the training data: what an evaluation asks and answers, or a list of harmful ones.

Runs of 13 words in common, as GPT-3 was checked (Brown 2020, app. C). Shorter texts are compared whole, with their
punctuation; a list of phrases is also found inside longer texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align_kit.clean.signatures import runs
from align_kit.clean.words import tokens, words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RUN = 13


@dataclass(frozen=True)
class Held:
    """One text to look for: where it stands, and whether a short one may be found (a short answer is everywhere)."""

    text: str
    where: str
    is_question: bool = True


@dataclass(frozen=True)
class _Runs:
    """Hashes in order, and for each the number of the text that it is of."""

    length: int
    hashes: NDArray[np.uint64]
    owners: NDArray[np.intp]

    def hits(self, texts: Sequence[Sequence[str]]) -> Iterator[tuple[int, int, int]]:
        """Yield each run that is here: the number of its text, its place in the text, the number of its owner."""
        import numpy as np

        hashes, text_of = runs(texts, self.length)
        slot = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        hit = np.flatnonzero(self.hashes[slot] == hashes)
        place = hit - np.searchsorted(text_of, text_of[hit])
        yield from zip(text_of[hit].tolist(), place.tolist(), self.owners[slot[hit]].tolist(), strict=True)


class Overlap:
    """An index of texts; `find` tells of many texts at once which of those each has in common with it.

    `inside` also finds a text of fewer than 13 words within a longer one: for phrases, not for questions, whose
    ordinary words would be found everywhere.
    """

    def __init__(self, name: str, held: Iterable[Held], *, inside: bool = False) -> None:
        self.name = name
        self.wheres: list[str] = []
        self._whole: dict[str, int] = {}
        by_length: dict[int, tuple[list[list[str]], list[int]]] = {}
        for one in held:
            owner, its_words = len(self.wheres), words(one.text)
            length = min(RUN, len(its_words)) if inside else RUN
            if length and len(its_words) >= length:
                texts, owners = by_length.setdefault(length, ([], []))
                texts.append(its_words)
                owners.append(owner)
            elif one.is_question and one.text.strip():
                self._whole.setdefault(" ".join(tokens(one.text)), owner)
            else:
                continue
            self.wheres.append(one.where)
        self._runs = [_indexed(length, *found) for length, found in sorted(by_length.items())]

    def __len__(self) -> int:
        return len(self.wheres)

    def find(self, texts: Sequence[str]) -> list[str | None]:
        """Return for each text what it has in common with the index, and with which text there; None for nothing."""
        split = [words(text) for text in texts]
        found: list[str | None] = [None] * len(texts)
        for index in self._runs:
            for number, place, owner in index.hits(split):
                if found[number] is None:
                    run = split[number][place : place + index.length]
                    found[number] = f"{self.wheres[owner]}: {' '.join(run)}"
        if self._whole:
            for number, text in enumerate(texts):
                if found[number] is None and len(split[number]) < RUN:
                    whole = " ".join(tokens(text))
                    found[number] = f"{self.wheres[self._whole[whole]]}: {whole}" if whole in self._whole else None
        return found


def _indexed(length: int, texts: Sequence[Sequence[str]], owners: Sequence[int]) -> _Runs:
    import numpy as np

    hashes, text_of = runs(texts, length)
    hashes, first = np.unique(hashes, return_index=True)
    return _Runs(length, hashes, np.asarray(owners)[text_of[first]])

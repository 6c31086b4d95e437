"""A file of JSON lines as a sequence of rows, of which only the places are in memory: 8 bytes a row."""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from align_kit.cards import slice_bounds
from align_kit.data.read import parse_line, require_file
from align_kit.errors import UserError

Row = dict[str, Any]


class JsonLines:
    """The rows of a .jsonl file by their numbers, from 0; blank lines are none.

    `slices` (`train[10%:90%]`) cut what is there in turn, and `most` keeps the first of that. A row is read anew each
    time it is asked for; raises UserError with file and line for one that is not a JSON object in UTF-8.
    """

    def __init__(self, path: Path, slices: Sequence[str] = (), most: int | None = None) -> None:
        require_file(path)
        self.path = path
        self._stream = path.open("rb")
        places, place = array("q"), 0
        for line in self._stream:
            if line.strip():
                places.append(place)
            place += len(line)
        for split in slices:
            start, stop = slice_bounds(split, len(places))
            places = places[start:stop]
        self._places = places[:most]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Row:
        place = self._places[number]
        self._stream.seek(place)
        line = self._stream.readline()
        line = line.removeprefix(codecs.BOM_UTF8) if place == 0 else line
        try:
            return parse_line(line, "")
        except UserError:
            return parse_line(line, self.where(number))  # raises, and says where

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    def where(self, number: int) -> str:
        """Return how messages name a row: by the file and its line."""
        return f"{self.path}, line {self._number_of(self._places[number])}"

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _number_of(self, place: int) -> int:
        """Return the number of the line that begins at byte `place`, from 1."""
        self._stream.seek(0)
        number = 1
        while self._stream.tell() < place:
            self._stream.readline()
            number += 1
        return number

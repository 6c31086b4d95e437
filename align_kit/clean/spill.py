"""Rows kept on disk between the two passes: a file without a name, which vanishes however the process ends."""

from __future__ import annotations

import os
import tempfile
from array import array
from pathlib import Path


class Spill:
    """Byte strings by number, appended and then read in any order; of each only its place is in memory; `close` it."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._ends = array("Q", [0])
        self._flushed = True

    def close(self) -> None:
        """Close the file, and with it lose what it held."""
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, data: bytes) -> None:
        """Add the next one."""
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        self._flushed = False

    def __getitem__(self, number: int) -> bytes:
        if not self._flushed:
            self._file.flush()
            self._flushed = True
        start, end = self._ends[number], self._ends[number + 1]
        return os.pread(self._file.fileno(), end - start, start)

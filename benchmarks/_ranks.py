"""Ranks for a benchmark, warm and let go of whatever happens."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align_kit import log
from tests.harness import Ranks


@contextmanager
def ranks_in_a_folder() -> Iterator[tuple[Ranks, Path]]:
    """Hold warm ranks and a folder for what they read and write; both are gone afterwards."""
    log.quiet()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(Path(folder))
        try:
            yield ranks, Path(folder)
        finally:
            ranks.close()

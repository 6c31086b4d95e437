"""Benchmarks and the soak on the warm ranks of the session: to warm their own would take longer than a tiny run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import ROOT, Ranks


def run_benchmark(name: str, words: tuple[str, ...], ranks: Ranks, folder: Path) -> int:
    """Do what `python -m <name> <words>` does, in this process, and return the exit code; files go to `folder`."""
    module = importlib.import_module(name)

    @contextmanager
    def ranks_in_a_folder() -> Iterator[tuple[Ranks, Path]]:
        yield ranks, folder

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [name, *words])
        patch.setattr(module, "ranks_in_a_folder", ranks_in_a_folder)
        try:
            return int(module.main() or 0)
        except SystemExit as end:
            return int(end.code or 0)

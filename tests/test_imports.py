"""What is imported for good is no work for the garbage collector, then or later."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator

import pytest

from align_kit import imports


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    yield
    gc.enable()


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget a module, so that the next import of it is the first."""
    import colorsys  # noqa: F401

    monkeypatch.delitem(sys.modules, "colorsys")


def test_what_was_imported_is_not_looked_at_again(unknown: None) -> None:
    frozen = gc.get_freeze_count()
    with imports.uncollected():
        assert not gc.isenabled()
        importlib.import_module("colorsys")
        brought: list[list[object]] = [[] for _ in range(1000)]
    assert gc.isenabled() and gc.get_freeze_count() >= frozen + len(brought)


def test_what_a_run_makes_stays_the_collectors() -> None:
    """Nothing is imported the second time: what stands by then is a model, perhaps, and not to be kept for ever."""
    frozen = gc.get_freeze_count()
    with imports.uncollected():
        importlib.import_module("gc")
    made: list[object] = []
    made.append(made)
    del made
    assert gc.get_freeze_count() == frozen and gc.collect() > 0


def test_one_inside_another() -> None:
    with imports.uncollected():
        with imports.uncollected():
            pass
        assert not gc.isenabled(), "the outer one is not done"
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with imports.uncollected():
        pass
    assert not gc.isenabled()


def test_an_import_that_fails() -> None:
    with pytest.raises(ImportError), imports.uncollected():
        raise ImportError("no such thing")
    assert gc.isenabled()

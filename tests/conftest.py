"""Fixtures shared by all tests: the warm ranks, the built-in tiny model on disk, the folder of real data."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.harness import ROOT, Ranks

# The same examples every time, so that a change is judged by what it changed; HYPOTHESIS=random looks for new ones.
settings.register_profile("fixed", database=None, deadline=None, derandomize=True)
settings.register_profile("random", database=None, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS", "fixed"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Leave what a file's tests imported out of every later collection, which would walk all of it each time."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests compute out of the user's cache, and what killed processes leave out of /tmp."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setenv("ALIGN_KIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """One warm process for the session, from which every run forks its ranks."""
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; the test skips where there is none."""
    place = Path(os.environ.get("ALIGN_KIT_DATA") or ROOT.parent / "shared" / "data")
    if not place.is_dir():
        pytest.skip(f"no real data at {place}; set ALIGN_KIT_DATA")
    return place

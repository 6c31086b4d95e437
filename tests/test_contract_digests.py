"""Digests of models are computed once for the same files, and again for files that may have changed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from align_kit.models import remembered as module
from align_kit.models import source
from align_kit.models.remembered import SETTLED, remembered
from tests.small import write_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the files of a test count as written a while ago: their time of change cannot be set back."""
    real = time.time
    monkeypatch.setattr(module.time, "time", lambda: real() + 10 * SETTLED)


class Counted:
    """The bytes of a file, and how often they were read."""

    def __init__(self, path: Path) -> None:
        self.path, self.times = path, 0

    def __call__(self) -> str:
        self.times += 1
        return self.path.read_text()

    def asked(self, more: str = "") -> str:
        return remembered("text", [self.path], more, self)


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    (tmp_path / "file").write_text("abc")
    return Counted(tmp_path / "file")


def test_a_file_is_read_once(counted: Counted, later: None) -> None:
    assert [counted.asked(), counted.asked(), counted.asked()] == ["abc"] * 3 and counted.times == 1
    assert counted.asked("beside another base") == "abc" and counted.times == 2


def test_a_changed_byte_of_the_same_size_is_found(counted: Counted, later: None) -> None:
    assert counted.asked() == "abc"
    counted.path.write_text("abd")
    assert counted.asked() == "abd"


def test_a_write_that_hides_its_time_is_found(counted: Counted, later: None) -> None:
    assert counted.asked() == "abc"
    before = counted.path.stat()
    with counted.path.open("r+") as stream:
        stream.write("abd")
    os.utime(counted.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = counted.path.stat()
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (before.st_mtime_ns, before.st_size, before.st_ino)
    assert counted.asked() == "abd"


def test_a_file_in_its_place_is_found(counted: Counted, later: None) -> None:
    assert counted.asked() == "abc"
    before = counted.path.stat()
    (counted.path.parent / "new").write_text("abd")
    os.utime(counted.path.parent / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(counted.path.parent / "new", counted.path)
    assert counted.asked() == "abd"


def test_a_fresh_file_is_read_each_time(counted: Counted, cache: Path) -> None:
    assert [counted.asked(), counted.asked()] == ["abc"] * 2 and counted.times == 2
    assert not cache.exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(counted: Counted, cache: Path, later: None) -> None:
    def changing() -> str:
        text = counted()
        counted.path.write_text("changed")
        return text

    assert remembered("text", [counted.path], "", changing) == "abc" and not cache.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"identity": 1}'])
def test_a_damaged_entry_is_none(damage: str, counted: Counted, cache: Path, later: None) -> None:
    counted.asked()
    (entry,) = cache.iterdir()
    entry.write_text(damage)
    assert counted.asked() == "abc" and counted.times == 2
    assert json.loads(entry.read_text())["result"] == "abc", "and written anew"


def test_without_a_cache_it_is_computed(counted: Counted, cache: Path, later: None) -> None:
    cache.parent.write_text("a file where the folder would be")
    assert [counted.asked(), counted.asked()] == ["abc"] * 2 and counted.times == 2


def test_models_and_adapters_are_remembered(tmp_path: Path, cache: Path, later: None) -> None:
    """An adapter's digest follows its base's, whichever of the two is remembered."""
    base = write_model(tmp_path / "base")
    adapter = write_model(tmp_path / "adapter", seed=1)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    where = source.resolve(str(adapter))
    first = source.digest(where)
    assert len(list(cache.iterdir())) == 2 and source.digest(where) == first
    write_model(base, seed=2)
    assert source.digest(where) != first

"""Sizes, times and places of the options about saving: read as people write them, refused in a line at load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align_kit import registry
from align_kit.config import Config, load
from align_kit.config.quantities import parse_bytes, parse_duration, shown_bytes
from align_kit.config.values import Misfit
from align_kit.errors import UserError

SIZES = {"1": 1, "200GB": 200 * 10**9, "1.5TiB": 3 * 2**39, "3 kb": 3000, ".5MiB": 2**19, "7 gb ": 7 * 10**9}
TIMES = {"3:50:00": 13800, "0:00:01": 1, "1-12:00:00": 129600, "45:30": 2730, "90": 5400, "0.1": 6, "0:08": 8}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "seconds"), TIMES.items())
def test_times(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "GB", "0", "-5GB", "3 bananas", "1e9", "0.1B", "5 G B"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(Misfit, match="expected a size above 0 such as 200GB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "soon", "0", "0:00:00", "3:99", "1:60:00", "-5", "1:2:3:4", "4h"])
def test_no_times(text: str) -> None:
    with pytest.raises(Misfit, match="expected a time above 0 such as 3:50:00"):
        parse_duration(text)


def test_sizes_in_messages() -> None:
    counts = (12, 999, 1000, 123_456, 999_999, 2_000_000, 1_234_567_890, 5 * 10**15)
    assert [shown_bytes(n) for n in counts] == [
        *("12 B", "999 B", "1 kB", "123 kB", "1 MB", "2 MB", "1.23 GB", "5 PB"),
    ]


def loaded(*words: str) -> Config:
    return load(registry.get("sft"), list(words))


REFUSED = {
    ("--save_before", "soon"): "save_before (command line) is 'soon'; expected a time",
    ("--save_bytes_limit", "much"): "save_bytes_limit (command line) is 'much'; expected a size",
    ("--save_minutes", "0"): "save_minutes (command line) is 0; expected above 0",
    ("--save_milestone_steps", "0"): "save_milestone_steps (command line) is 0; expected 1 or more",
    ("--full_disk", "ignore"): "allowed: stop, go_on",
    ("--save_copy_to", "runs/sft/copies"): "save_copy_to (command line) is 'runs/sft/copies', which lies in output_dir",
    ("--save_copy_to", "nowhere://x"): "fsspec knows no nowhere://",
}


@pytest.mark.parametrize(("words", "expected"), REFUSED.items())
def test_what_is_refused_at_load(words: tuple[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGN_KIT_RUNS", raising=False)
    with pytest.raises(UserError) as refused:
        loaded(*words)
    assert expected in str(refused.value)


def test_a_password_stays_out_of_the_recorded_configuration() -> None:
    config = loaded("--save_copy_to", "ftp://anna:hunter2secret@host/x")
    assert config.run.save_copy_to == "ftp://anna:hunter2secret@host/x"
    assert "hunter2" not in str(config.as_dict()) and "host/x" in config.as_dict()["save_copy_to"]


@pytest.mark.parametrize(("written", "read"), [("3:50:00", "3:50:00"), ("45:30", "45:30"), ("90", "90")])
def test_a_time_in_yaml_is_a_time(tmp_path: Path, written: str, read: Any) -> None:
    """YAML 1.1 makes 13800 of 3:50:00, which would be minutes."""
    (tmp_path / "a.yaml").write_text(f"save_before: {written}\nsave_bytes_limit: 200GB\nseed: 10\n")
    config = loaded("--config", str(tmp_path / "a.yaml"))
    assert config.run.save_before == read and config.value("seed") == 10

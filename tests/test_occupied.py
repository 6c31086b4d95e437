"""A run's folder has one process at a time, and what a command starts ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from align_kit import occupied
from align_kit.errors import UserError
from align_kit.run_folder import open_folder
from tests.harness import ROOT, Ranks
from tests.small import Lab, lab_of

HOLDS = (
    "import sys, time; from pathlib import Path; from align_kit import occupied;"
    "print(occupied.hold(Path(sys.argv[1])) or 'held', flush=True)"
)
STARTS = (
    "import subprocess, sys, time; from align_kit import supervised;"
    "child = subprocess.Popen(['sleep', '60'], preexec_fn=supervised.dying_with_us()); print(child.pid, flush=True);"
    "time.sleep(60)"
)


@contextmanager
def another(code: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """Run `code` in a process of its own, which has said a first line and is killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def soon(holds: Callable[[], bool]) -> bool:
    """Tell whether something comes true within some seconds."""
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


@pytest.mark.slow
@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_folder_in_use_is_refused_until_its_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str | None
) -> None:
    monkeypatch.setattr(occupied, "WAIT", 0.2)
    with another(f"{HOLDS}; time.sleep(60)", tmp_path) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        said = f"process {process.pid} trains in output_dir {tmp_path}; wait for it or end it, or name another"
        with pytest.raises(UserError, match=said):
            open_folder(str(tmp_path), resume=resume, overwrite=False)
        open_folder(str(tmp_path), resume=resume, overwrite=False, first=False)  # its other ranks do not look
        process.send_signal(signal.SIGKILL)
        process.wait()
        open_folder(str(tmp_path), resume=resume, overwrite=False)
    assert list(tmp_path.iterdir()) == [], "the lock leaves nothing behind"
    with another(HOLDS, tmp_path) as process:
        assert process.stdout and process.stdout.readline() == f"process {os.getpid()}\n", "now it is ours"
    occupied.release(tmp_path)
    with another(HOLDS, tmp_path) as process:
        assert process.stdout and process.stdout.readline() == "held\n"


def test_it_waits_for_one_that_is_about_to_end(tmp_path: Path) -> None:
    with another(f"{HOLDS}; time.sleep(1)", tmp_path) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        assert occupied.hold(tmp_path) is None
        assert occupied.hold(tmp_path) is None, "it is ours already"
    occupied.release(tmp_path)


@pytest.mark.slow
def test_a_child_ends_with_the_process_that_started_it() -> None:
    with another(STARTS) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        os.kill(child, 0)
    assert soon(lambda: not Path(f"/proc/{child}").exists())


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


@pytest.mark.slow
def test_a_second_run_leaves_the_first_ones_folder_as_it_is(lab: Lab, tmp_path: Path) -> None:
    place = tmp_path / "run"
    lab.start("sft", place).result.ok()
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    occupied.hold(place)
    try:
        for how in ({"overwrite": True}, {"resume": True}):
            refused = lab.start("sft", place, **how).result
            assert set(refused.codes) == {2} and f"trains in output_dir {place}" in refused.text
            assert "Traceback" not in refused.text
    finally:
        occupied.release(place)
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before
    lab.start("sft", place, overwrite=True).result.ok()

"""Which checkpoints stay: by number, milestone, metric and bytes, always the newest that verifies and those read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align_kit import run_folder
from align_kit.checkpoint import keep, manifest
from align_kit.checkpoint import reading as reader
from align_kit.checkpoint.keep import Rule
from align_kit.checkpoint.reading import is_read, reading, reading_all
from align_kit.errors import UserError
from align_kit.run_folder import checkpoints
from tests.harness import ROOT, Ranks
from tests.small import lab_of
from tests.when_work import train

PAYLOAD = 1000  # bytes of weights in a checkpoint made here


def make(run: Path, step: int, best: int | None = None, payload: int = PAYLOAD) -> Path:
    """Commit a small checkpoint."""
    place = run / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "weights").write_bytes(os.urandom(payload))
    state = {"best_model_checkpoint": str(run / f"checkpoint-{best}") if best else None}
    (place / "trainer_state.json").write_text(json.dumps(state))
    manifest.seal(place, {"step": step})
    return place


def damage(checkpoint: Path) -> None:
    """Flip a byte of the weights."""
    data = bytearray((checkpoint / "weights").read_bytes())
    data[7] ^= 1
    (checkpoint / "weights").write_bytes(data)


def steps(places: list[Path]) -> list[int]:
    return [run_folder.step_of(place) for place in places]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints at 10, 20, … 60."""
    for step in range(10, 70, 10):
        make(tmp_path, step)
    return tmp_path


ROOM = 1400  # bytes: enough for one of these checkpoints, not for two

# What the rule says, the best step, and what goes of 10, 20, … 60.
TABLE = [
    (Rule(), None, []),
    (Rule(last=2), None, [10, 20, 30, 40]),
    (Rule(last=1), 20, [10, 30, 40, 50]),
    (Rule(last=2, milestone_steps=30), None, [10, 20, 40]),
    (Rule(last=9, milestone_steps=30), None, []),
    (Rule(bytes_limit=3 * ROOM), None, [10, 20, 30]),
    (Rule(last=2, milestone_steps=30, bytes_limit=2 * ROOM), None, [10, 20, 30, 40]),
    (Rule(last=2, milestone_steps=30, bytes_limit=ROOM), 10, [20, 30, 40, 50]),
    (Rule(last=3, milestone_steps=20, bytes_limit=3 * ROOM), None, [10, 20, 30]),
]


@pytest.mark.parametrize(("rule", "best", "gone"), TABLE)
def test_the_rule(run: Path, rule: Rule, best: int | None, gone: list[int]) -> None:
    found = keep.surplus(run, rule, best=run / f"checkpoint-{best}" if best else None, committed=run / "checkpoint-60")
    assert steps(found) == gone


def test_a_lost_milestone_and_a_limit_too_small_are_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = Rule(last=2, milestone_steps=30, bytes_limit=ROOM)
    keep.surplus(run, rule, best=run / "checkpoint-10", committed=run / "checkpoint-60")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warning: save_bytes_limit 1.4 kB: no room for checkpoint-30, which would have stayed for good"
    assert said[1].startswith("warning: save_bytes_limit 1.4 kB: the checkpoints that must stay take 2.")


def test_without_need_nothing_is_read_back(run: Path) -> None:
    """Verifying costs a pass over the bytes: only where something may go."""
    (run / "checkpoint-60" / "weights").unlink()
    assert keep.surplus(run, Rule(last=6), best=None, committed=run / "checkpoint-60") == []


def test_the_newest_that_verifies_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one just committed is broken, the one before too: the last whole one is not given up for them."""
    damage(run / "checkpoint-60")
    damage(run / "checkpoint-50")
    found = keep.surplus(run, Rule(last=1), best=None, committed=run / "checkpoint-60")
    assert steps(found) == [10, 20, 30, 50]
    assert "checkpoint-60 does not verify (weights has other bytes than were committed)" in capsys.readouterr().err


def test_where_none_verifies_all_stay(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in checkpoints(run):
        damage(place)
    assert keep.surplus(run, Rule(last=1), best=None, committed=run / "checkpoint-60") == []
    assert "nothing is deleted" in capsys.readouterr().err


def test_a_folder_without_manifest_is_none_of_ours(run: Path) -> None:
    (run / "checkpoint-10" / manifest.NAME).unlink()
    assert steps(keep.surplus(run, Rule(last=1), best=None, committed=run / "checkpoint-60")) == [20, 30, 40, 50]


def test_what_was_committed_stays_though_newer_ones_stand(run: Path) -> None:
    """A run that went back to an older checkpoint commits below the newest step."""
    assert 30 not in steps(keep.surplus(run, Rule(last=1), best=None, committed=run / "checkpoint-30"))


def test_retention_goes_by_the_best_that_the_checkpoint_knows(run: Path) -> None:
    make(run, 70, best=20)
    assert keep.best_of(run / "checkpoint-60") is None
    best = keep.best_of(run / "checkpoint-70")
    keep.retain(run, Rule(last=1), best=best, committed=run / "checkpoint-70")
    assert steps(checkpoints(run)) == [20, 70]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of eight steps and different sizes, made once."""
    home = tmp_path_factory.mktemp("shelf")
    for step in range(1, 9):
        make(home, step, payload=200 * step)
    return home


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    present=st.sets(st.integers(1, 8), min_size=1),
    broken=st.sets(st.integers(1, 8), max_size=4),
    read=st.sets(st.integers(1, 8), max_size=2),
    best=st.none() | st.integers(1, 8),
    last=st.none() | st.integers(1, 4),
    milestone=st.none() | st.integers(1, 4),
    limit=st.none() | st.integers(1, 20_000),
)
def test_what_is_never_given_up(
    shelf: Path,
    tmp_path_factory: pytest.TempPathFactory,
    present: set[int],
    broken: set[int],
    read: set[int],
    best: int | None,
    last: int | None,
    milestone: int | None,
    limit: int | None,
) -> None:
    """Whatever the rule: the newest whole one, the best, those read and the one just committed stay; bytes are kept."""
    run = tmp_path_factory.mktemp("run")
    for step in present:
        shutil.copytree(shelf / f"checkpoint-{step}", run / f"checkpoint-{step}")
    for step in present & broken:
        damage(run / f"checkpoint-{step}")
    rule, committed = Rule(last, milestone, limit), run / f"checkpoint-{max(present)}"
    with ExitStack() as readers:
        for step in present & read:
            readers.enter_context(reading(run / f"checkpoint-{step}"))
        keep.retain(run, rule, best=run / f"checkpoint-{best}" if best else None, committed=committed)
    left = set(steps(checkpoints(run)))
    whole = present - broken
    assert not whole or max(whole) in left, "the newest that verifies"
    assert (read | {best, max(present)}) & present <= left
    total = sum(manifest.total_bytes(place) for place in checkpoints(run))
    must = (read | {best, max(present)} | ({max(whole)} if whole else set())) & present
    if limit is not None and whole and left - must:
        assert total <= limit, "more was kept than had to be, and there was no room for it"
    if limit is None and whole:
        newest = present if last is None else set(sorted(present)[-last:])
        kept_for_good = {step for step in present if milestone and step % milestone == 0}
        assert left == newest | kept_for_good | must
    shutil.rmtree(run)


# --- who reads ------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_read_stays(run: Path) -> None:
    place = run / "checkpoint-10"
    with reading(place), reading(place):
        assert is_read(place)
        assert 10 not in steps(keep.surplus(run, Rule(last=1), best=None, committed=run / "checkpoint-60"))
        assert not keep.remove(place) and not manifest.problems(place)
    assert not is_read(place) and keep.remove(place) and not place.exists()


@pytest.fixture
def other_user(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run seen by a user who may not write its files, from inside its folder: those around it are private."""
    monkeypatch.chdir(run)
    me = os.geteuid()
    run.chmod(0o755)
    for place in checkpoints(run):
        (place / manifest.NAME).chmod(0o444)
    try:
        if me == 0:
            os.seteuid(65534)
        yield Path()
    finally:
        os.seteuid(me)


def test_a_reader_is_seen_by_who_may_not_write(other_user: Path) -> None:
    place = other_user / "checkpoint-10"
    with pytest.raises(PermissionError):
        (place / manifest.NAME).open("r+b")
    with reading(place):
        assert is_read(place)
    assert not is_read(place)


def test_what_cannot_be_opened_may_be_read_by_others(run: Path) -> None:
    """Only a manifest that is gone says that nobody reads."""
    (run / "checkpoint-10" / "below").symlink_to("weights")
    assert is_read(run / "checkpoint-10" / "below") and not is_read(run / "checkpoint-999")


def test_what_is_read_since_the_rule_was_asked_stays(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    surplus = keep.surplus
    with ExitStack() as readers:

        def then_read(*given: Any, **named: Any) -> list[Path]:
            found = surplus(*given, **named)
            readers.enter_context(reading(run / "checkpoint-20"))
            return found

        monkeypatch.setattr(keep, "surplus", then_read)
        keep.retain(run, Rule(last=1), best=None, committed=run / "checkpoint-60")
    assert steps(checkpoints(run)) == [20, 60]
    assert capsys.readouterr().err == "warning: checkpoint-20 stays until another is committed: it is being read\n"


def test_another_process_reads_until_it_dies(run: Path) -> None:
    """The lock is the system's: kill -9 lets go of it."""
    place = run / "checkpoint-10"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom align_kit.checkpoint.reading import reading\n"
        "with reading(Path(sys.argv[1])):\n    print('reading', flush=True)\n    time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(place)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout and other.stdout.readline() == "reading\n"
        assert is_read(place) and not keep.remove(place)
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert not is_read(place) and keep.remove(place)


def test_reading_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as a checkpoint"), reading(tmp_path):
        pass
    with reading_all([tmp_path, None, tmp_path / "nothing"]):  # a model from elsewhere needs no lock
        pass


def test_deleted_between_opening_and_locking(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is on a file that is gone: who reads is told, and does not read a checkpoint on its way out."""
    lock, place = reader._lock, run / "checkpoint-10"

    def delete_first(handle: int, how: int) -> bool:
        monkeypatch.setattr(reader, "_lock", lock)
        assert keep.remove(place)
        return lock(handle, how)

    monkeypatch.setattr(reader, "_lock", delete_first)
    with pytest.raises(UserError, match="was deleted a moment ago"), reading(place):
        pass


def test_all_that_a_run_is_made_from_is_held(run: Path) -> None:
    with reading_all([run / "checkpoint-10", run / "checkpoint-30"]):
        assert [step for step in range(10, 70, 10) if is_read(run / f"checkpoint-{step}")] == [10, 30]


@pytest.mark.slow
def test_a_run_holds_the_checkpoint_it_starts_from(ranks: Ranks, tmp_path: Path) -> None:
    """Another run's retention passes it by while this one trains, and no longer."""
    lab, note = lab_of(ranks), tmp_path / "note"
    first = train(lab, tmp_path / "first", save_strategy="steps")
    start = first.folder / "checkpoint-1"
    asked = {"model_name_or_path": start, "world_size": 1}
    train(lab, tmp_path / "second", [[0, 1, "note_removal", str(start), str(note)]], **asked).result.ok()
    assert note.read_text() == "False" and not manifest.problems(start)
    assert keep.remove(start)


@pytest.mark.slow
def test_a_run_keeps_what_its_rule_says(ranks: Ranks, tmp_path: Path) -> None:
    """The newest two, every third step for good, the best of the evaluations."""
    lab = lab_of(ranks)
    asked = {
        **{"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "save_milestone_steps": 3},
        **{"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True},
    }
    run = train(lab, tmp_path / "run", eval_datasets=[{"path": lab.held_out["prompt_completion"]}], **asked)
    run.result.ok()
    worst = max(range(1, 7), key=lambda step: run.logged("eval_loss")[step - 1])
    assert set(steps(checkpoints(run.folder))) == {3, 5, 6, worst}


# --- how they go ----------------------------------------------------------------------------------------------


def test_killed_while_deleting_leaves_nothing_like_a_checkpoint(run: Path) -> None:
    """After each single system call that deletes, a kill leaves whole checkpoints and a hidden folder at most."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom align_kit.checkpoint import keep\n"
        "def after(call, number=[int(sys.argv[2])]):\n"
        "    def counted(*given, **named):\n"
        "        call(*given, **named)\n"
        "        number[0] -= 1\n"
        "        if not number[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return counted\n"
        "for name in ('rename', 'unlink', 'rmdir'): setattr(os, name, after(getattr(os, name)))\n"
        "keep.remove(Path(sys.argv[1]))\n"
    )
    for count, step in enumerate(range(10, 50, 10), 1):
        keep.clean(run)
        words = [sys.executable, "-c", code, str(run / f"checkpoint-{step}"), str(count)]
        done = subprocess.run(words, cwd=ROOT, check=False)
        assert done.returncode == -signal.SIGKILL
        assert not (run / f"checkpoint-{step}").exists() and list(run.glob(f"{keep.BEING_DELETED}*"))
        assert all(not manifest.problems(place) for place in checkpoints(run))
    assert keep.remove(run / "checkpoint-50")
    assert sorted(place.name for place in run.iterdir()) == ["checkpoint-60"]

"""A checkpoint verifies or does not exist: manifests, commits, the background writer, and which one is found."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align_kit.checkpoint import commit, find, manifest
from align_kit.checkpoint.saver import Saver
from align_kit.checkpoint.snapshot import HostCopies
from align_kit.errors import Fault

FILES = {"model.safetensors": b"weights" * 50, "global_step3/rank_0.pt": b"shard" * 30, "latest": b"global_step3"}


def write(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    for name, data in (files or FILES).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def committed(run: Path, step: int) -> Path:
    """Commit a checkpoint of `FILES` in the run."""
    place = write(run / f"checkpoint-{step}")
    manifest.seal(place, {"step": step})
    return place


# --- the manifest ---------------------------------------------------------------------------------------------


def test_a_sealed_folder_verifies(tmp_path: Path) -> None:
    place = committed(tmp_path, 3)
    said = manifest.read(place)
    assert said is not None and said["step"] == 3 and set(said["files"]) == set(FILES)
    assert manifest.problems(place) == []
    assert manifest.total_bytes(place) > sum(map(len, FILES.values()))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """One bit of any byte of any file, the manifest's own included."""
    place = committed(tmp_path_factory.mktemp("run"), 3)
    name = data.draw(st.sampled_from([*FILES, manifest.NAME]))
    content = bytearray((place / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    (place / name).write_bytes(content)
    assert manifest.problems(place)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda place: (place / "latest").unlink(), "latest is missing"),
        (lambda place: (place / "latest").write_bytes(b"global"), "latest has 6 bytes, 12 were committed"),
        (lambda place: (place / "latest").write_bytes(b"global_step9"), "latest has other bytes than were committed"),
        (lambda place: (place / "more.pt").write_bytes(b"x"), "more.pt is not in its manifest"),
        (lambda place: (place / manifest.NAME).unlink(), "no manifest: never committed"),
        (lambda place: (place / manifest.NAME).write_text('{"format": 1'), "its manifest was changed or cut"),
    ],
)
def test_what_is_wrong_is_named(harm: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    place = committed(tmp_path, 3)
    harm(place)
    assert manifest.problems(place) == [says]


def test_the_parts_of_all_ranks_are_the_whole(tmp_path: Path) -> None:
    """Whichever file is harmed, one of the ranks that share the reading finds it."""
    for name in FILES:
        place = committed(tmp_path / name.replace("/", "-"), 1)
        (place / name).write_bytes(b"z" * len(FILES[name]))
        found = [manifest.problems(place, part=part, parts=3) for part in range(3)]
        assert sum(map(len, found)) == 1


# --- which one is found ---------------------------------------------------------------------------------------


def alone(mine: Any) -> list[Any]:
    return [mine]


def test_the_newest_that_verifies_is_found_and_torn_ones_are_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 9, 10, 11):
        committed(tmp_path, step)
    (tmp_path / "checkpoint-11" / manifest.NAME).unlink()
    (tmp_path / "checkpoint-10" / "latest").write_bytes(b"?" * 12)
    assert find.newest_verified(tmp_path, 0, alone) == tmp_path / "checkpoint-9"
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "warning: checkpoint-11 does not verify (no manifest: never committed): moved to torn/checkpoint-11",
        "warning: checkpoint-10 does not verify (latest has other bytes than were committed): moved to "
        "torn/checkpoint-10",
    ]
    assert (tmp_path / "torn" / "checkpoint-10" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_nothing_is_found_where_nothing_verifies(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-4")
    assert find.newest_verified(tmp_path, 0, alone) is None
    write(tmp_path / "checkpoint-4")
    assert find.newest_verified(tmp_path, 0, alone) is None
    assert sorted(path.name for path in (tmp_path / "torn").iterdir()) == ["checkpoint-4", "checkpoint-4.1"]


def test_a_save_that_lacked_its_name_only_is_committed(tmp_path: Path) -> None:
    whole, cut = tmp_path / ".saving-checkpoint-6", tmp_path / ".saving-checkpoint-8"
    manifest.seal(write(whole), {"step": 6})
    write(cut)
    assert find.newest_verified(tmp_path, 0, alone) == tmp_path / "checkpoint-6"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "torn"]


# --- the writer -----------------------------------------------------------------------------------------------


def save(saver: Saver, step: int, files: dict[str, Callable[[Path], None]]) -> None:
    with saver.saving(step, lambda: {"step": step}) as folder:
        (folder / "small.json").write_text("{}")
        for name, writes in files.items():
            saver.hand_over(folder / name, writes)


def puts(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


@pytest.mark.parametrize("background", [False, True])
def test_what_is_handed_over_is_committed(tmp_path: Path, background: bool) -> None:
    saver = Saver(tmp_path, 0, 1, background=background)
    save(saver, 5, {"big.bin": puts(b"x" * 1000)})
    saver.join()
    assert manifest.problems(tmp_path / "checkpoint-5") == []
    assert set(manifest.read(tmp_path / "checkpoint-5")["files"]) == {"big.bin", "small.json"}  # type: ignore[index]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"] and saver.committed == 5


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """`saving` returns before the write is allowed to end; the next save waits for it."""
    may_end, saver = threading.Event(), Saver(tmp_path, 0, 1)

    def slow(path: Path) -> None:
        assert may_end.wait(30)
        path.write_bytes(b"late")

    save(saver, 1, {"big.bin": slow})
    assert not (tmp_path / "checkpoint-1").exists()
    may_end.set()
    save(saver, 2, {"big.bin": puts(b"next")})
    assert (tmp_path / "checkpoint-1" / "big.bin").read_bytes() == b"late"
    saver.join()
    assert len(saver.held) == 2


def test_two_ranks_commit_once_both_have_written(tmp_path: Path) -> None:
    first, second = Saver(tmp_path, 0, 2), Saver(tmp_path, 1, 2)
    with first.saving(3, lambda: {"step": 3}) as folder:
        first.hand_over(folder / "0.bin", puts(b"zero"))
    assert not (tmp_path / "checkpoint-3").exists()
    with second.saving(3, dict) as folder:
        second.hand_over(folder / "1.bin", puts(b"one"))
    first.join(), second.join()
    assert set(manifest.read(tmp_path / "checkpoint-3")["files"]) == {"0.bin", "1.bin"}  # type: ignore[index]


def test_a_writer_that_fails_is_reported_and_the_last_checkpoint_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = Saver(tmp_path, 0, 1)
    save(saver, 1, {"big.bin": puts(b"x")})

    def broken(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    save(saver, 2, {"big.bin": broken})
    saver.join()
    assert capsys.readouterr().err == (
        "warning: checkpoint-2 was not committed (rank 0: [Errno 5] Input/output error); checkpoint-1 stands\n"
    )
    save(saver, 3, {"big.bin": puts(b"y")})
    saver.join()
    assert manifest.problems(tmp_path / "checkpoint-1") == manifest.problems(tmp_path / "checkpoint-3") == []
    assert not (tmp_path / "checkpoint-2").exists()


def test_another_rank_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver = Saver(tmp_path, 0, 2)
    with saver.saving(3, dict) as folder:
        commit.hand_over(folder, 1, {}, failure="no space left on the disk")
    with pytest.raises(Fault, match="checkpoint-3 was not committed .rank 1: no space left on the disk.; .*make room"):
        saver.join()
    assert "no checkpoint stands yet" in capsys.readouterr().err


def test_a_full_disk_may_be_lived_with(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver = Saver(tmp_path, 0, 1, stop_when_full=False)
    save(saver, 1, {"big.bin": full})
    saver.join()
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_rank_that_leaves_does_not_wait_for_one_that_died(tmp_path: Path) -> None:
    saver = Saver(tmp_path, 0, 2)
    with saver.saving(3, dict):
        pass
    saver.patience = 0.05
    saver.leave()
    assert not (tmp_path / "checkpoint-3").exists() and (tmp_path / ".saving-checkpoint-3").exists()


def test_a_step_that_is_saved_again_replaces_what_stood_there(tmp_path: Path) -> None:
    old, saver = committed(tmp_path, 4), Saver(tmp_path, 0, 1)
    save(saver, 4, {"big.bin": puts(b"new")})
    saver.join()
    assert (old / "big.bin").read_bytes() == b"new" and manifest.problems(old) == []


def test_what_follows_a_commit_does_not_undo_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(checkpoint: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    saver = Saver(tmp_path, 0, 1, after_commit=broken)
    save(saver, 1, {"big.bin": puts(b"x")})
    saver.join()
    assert manifest.problems(tmp_path / "checkpoint-1") == []
    assert "checkpoint-1 is committed, but not all that follows was done" in capsys.readouterr().err


# --- the copy in memory ---------------------------------------------------------------------------------------


def test_a_snapshot_is_of_the_moment_it_was_taken() -> None:
    flat = torch.arange(12.0)
    state = OrderedDict(views=[flat[2:5], flat[5:9]], step=3, nested={"m": (flat[:2], None)})
    copied = HostCopies().copy(state, "state")
    flat.mul_(-1)
    assert type(copied) is OrderedDict and copied["step"] == 3 and copied["nested"]["m"][1] is None
    assert copied["views"][1].tolist() == [5, 6, 7, 8] and copied["views"][1].untyped_storage().nbytes() == 16


def test_the_next_snapshot_takes_the_same_memory() -> None:
    copies = HostCopies()
    first = copies.copy({"a": torch.ones(5)}, "state")["a"]
    place = first.data_ptr()
    again = copies.copy({"a": torch.zeros(5)}, "state")["a"]
    assert again.data_ptr() == place and again.sum() == 0
    assert copies.copy({"a": torch.zeros(6)}, "state")["a"].shape == (6,)


def test_a_manifest_is_plain_json(tmp_path: Path) -> None:
    place = committed(tmp_path, 1)
    assert json.loads((place / manifest.NAME).read_text())["format"] == manifest.FORMAT

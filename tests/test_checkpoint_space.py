"""A disk that is, or gets, full: said before it is written to, and the checkpoint before stands whatever happens."""

from __future__ import annotations

import errno
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from align_kit.check import check
from align_kit.checkpoint import manifest, space
from align_kit.errors import Fault, UserError
from align_kit.planner import planner
from align_kit.run_folder import checkpoints
from tests.harness import Ranks
from tests.small import Lab, lab_of, words
from tests.when_work import train


def alone(mine: Any) -> list[Any]:
    return [mine]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Make a real file system of so many KiB, as often as asked; the test skips where none may be mounted."""
    made: list[Path] = []

    def make(kib: int) -> Path:
        place = tmp_path / f"disk{len(made)}"
        place.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
        made.append(place)
        return place

    yield make
    for place in made:
        subprocess.run(["umount", "-l", str(place)], check=True)


# --- before a save --------------------------------------------------------------------------------------------


def test_room_is_measured_where_the_checkpoint_will_lie(disk: Callable[[int], Path]) -> None:
    place = disk(1024)
    assert space.free_bytes(place / "not" / "yet") == 1024 * 1024
    assert space.check(place / "checkpoint-30", 900_000) is None
    line = space.check(place / "checkpoint-30", 2_000_000)
    assert line == f"checkpoint-30 needs 2.04 MB, 1.05 MB are free in {place}: 991 kB missing"


def test_too_little_room_stops_or_goes_on(disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]) -> None:
    place = disk(64) / "checkpoint-3"
    assert space.room(place, 1000, stop=True, rank=0, gather=alone) and not capsys.readouterr().err
    with pytest.raises(Fault, match="no space: checkpoint-3 needs 1.02 MB, 65.5 kB are free .* --full_disk go_on"):
        space.room(place, 10**6, stop=True, rank=0, gather=alone)
    assert not space.room(place, 10**6, stop=False, rank=0, gather=alone)
    assert capsys.readouterr().err.startswith("warning: no space: checkpoint-3 needs")


def test_the_other_ranks_do_as_rank_0_finds(tmp_path: Path) -> None:
    """Each rank's disk may look different, the answer must not."""
    assert not space.room(tmp_path / "checkpoint-3", 1, stop=False, rank=1, gather=lambda mine: ["full there", mine])
    assert space.room(tmp_path / "checkpoint-3", 1 << 60, stop=True, rank=1, gather=lambda mine: [None, mine])


def test_the_last_checkpoint_tells_what_the_next_takes(tmp_path: Path) -> None:
    assert space.coming(tmp_path, 123) == 123
    for step, size in ((5, 100), (10, 5000)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(bytes(size))
        manifest.seal(tmp_path / f"checkpoint-{step}", {"step": step})
    (tmp_path / "checkpoint-15").mkdir()  # never committed
    assert 5000 < space.coming(tmp_path, 123) < 5600


@pytest.mark.parametrize("states, twice", [
    ("zero_pp_rank_0_mp_rank_00_model_states.pt", True), ("bf16_zero_pp_rank_0_mp_rank_00_model_states.pt", True),
    ("mp_rank_00_model_states.pt", False),
])  # fmt: skip
def test_whole_weights_that_are_joined_from_shards_are_written_twice(tmp_path: Path, states: str, twice: bool) -> None:
    place = tmp_path / "checkpoint-5"
    (place / "global_step5").mkdir(parents=True)
    (place / "global_step5" / states).write_bytes(bytes(3000))
    (place / "model-00001-of-00002.safetensors").write_bytes(bytes(2000))
    (place / "model-00002-of-00002.safetensors").write_bytes(bytes(1000))
    manifest.seal(place, {"step": 5})
    assert space.coming(tmp_path, 123) == manifest.total_bytes(place) + (3000 if twice else 0)


# --- what a full disk looks like ------------------------------------------------------------------------------


def _torch_by_path(place: Path) -> None:
    import torch

    torch.save(torch.zeros(100_000), place)


def _torch_by_stream(place: Path) -> None:
    import torch

    with place.open("wb") as stream:
        torch.save(torch.zeros(100_000), stream)


def _safetensors(place: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(100_000)}, place)


def _bytes(place: Path) -> None:
    place.write_bytes(bytes(400_000))


@pytest.mark.parametrize("write", [_torch_by_path, _torch_by_stream, _safetensors, _bytes])
def test_a_full_disk_is_known_by_every_writer(disk: Callable[[int], Path], write: Callable[[Path], None]) -> None:
    """`torch.save` to a path says neither "space" nor a number."""
    place = disk(64)
    with pytest.raises(Fault, match=f"no space left in {place}; make room"), space.naming_a_full_disk(place):
        write(place / "file")


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), RuntimeError("no"), PermissionError(errno.EACCES, "x")]
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert not space.is_full(error)
    with pytest.raises(type(error)), space.naming_a_full_disk(Path()):
        raise error


def test_a_quota_is_a_full_disk_too() -> None:
    assert space.is_full(RuntimeError("basic_ios::clear: iostream error")), "torch's other words"
    assert space.is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))


# --- real runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}


def stand(out: Path) -> list[str]:
    """Return the checkpoints that verify; fail where one does not, or where a save has left something."""
    assert not list(out.glob(".saving-*")) and all(not manifest.problems(place) for place in checkpoints(out))
    return [place.name for place in checkpoints(out)]


@pytest.mark.slow
@pytest.mark.parametrize("full_disk", ["stop", "go_on"])
def test_a_disk_too_small_for_the_third_checkpoint(lab: Lab, disk: Callable[[int], Path], full_disk: str) -> None:
    """Found before anything is written: one line says how much is missing, and the run stops or goes on."""
    out = disk(1536) / "out"
    run = train(lab, out, full_disk=full_disk, force=full_disk == "stop", **SAVING)
    result = run.result
    assert (": saves without room are left out" in result.text) == (full_disk == "go_on")
    said = [line for line in result.text.splitlines() if "no space: checkpoint-3 needs " in line]
    assert len(said) == 1 and "missing" in said[0], result.text
    assert "Traceback" not in result.text and stand(out) == ["checkpoint-1", "checkpoint-2"]
    assert set(result.codes) == ({0} if full_disk == "go_on" else {3}), result.text
    assert run.manifest["status"] == ("finished" if full_disk == "go_on" else "failed")


@pytest.mark.slow
@pytest.mark.parametrize("full_disk", ["stop", "go_on"])
def test_a_disk_that_fills_up_in_the_middle_of_a_save(lab: Lab, disk: Callable[[int], Path], full_disk: str) -> None:
    """Another process takes the room while files are written; where the run goes on, it saves again once there is."""
    place = disk(1600)
    out, filler = place / "out", str(place / "filler")
    written_behind_the_loop = [str(out / ".saving-checkpoint-2"), "**/*optim_states.pt"]
    acts = [[1, 2, "fill", filler, *written_behind_the_loop], [1, 4, "unlink", filler]]
    result = train(lab, out, acts, full_disk=full_disk, force=True, **SAVING).result
    assert "checkpoint-2 was not committed (" in result.text and "no space left" in result.text, result.text
    assert "checkpoint-1 stands" in result.text and "Traceback" not in result.text
    if full_disk == "stop":
        assert 3 in result.codes and stand(out) == ["checkpoint-1"]
    else:
        result.ok()
        assert stand(out) == ["checkpoint-1", "checkpoint-4"]


# --- before the first step ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kib, changes, line", [
    (1536, SAVING,
     r"sft of \S+ lays up to 2\.\d+ MB on the disk \(each checkpoint 4\d+ kB, one more while it is written, the final "
     r"model 11\d kB\), and 1\.5\d MB are free in \S+; keep fewer \(--save_total_limit 1\), make room, let those "
     r"without room be left out \(--full_disk go_on\), or go on as it is with --force$"),
    (64, {}, r"lays up to 1\d+ kB on the disk \(the final model 11\d kB\), and 65\.5 kB are free in \S+; make room, or "
             r"name a folder elsewhere with --output_dir, or go on as it is with --force$"),
    (64, {**SAVING, "full_disk": "go_on"}, r"make room, or name a folder elsewhere"),
])  # fmt: skip
def test_a_run_whose_disk_is_too_small_is_refused(
    lab: Lab, disk: Callable[[int], Path], kib: int, changes: dict[str, Any], line: str
) -> None:
    """Neither checkpoints nor a final model that find no room are found out after hours."""
    out = disk(kib) / "out"
    result = lab.start("sft", out, **changes).result
    assert re.search(line, result.error()), result.error()
    assert set(result.codes) == {2} and not list(out.iterdir())


@pytest.mark.slow
def test_what_a_run_replaces_or_goes_on_from_is_room(lab: Lab, disk: Callable[[int], Path]) -> None:
    """A disk that holds the run once is large enough to run it again, and for its checkpoints to be gone on from."""
    out, saving = disk(1800) / "out", {**SAVING, "save_total_limit": 1}
    lab.start("sft", out, **saving).result.ok()
    lab.start("sft", out, overwrite=True, **saving).result.ok()
    (out.parent / "filler").write_bytes(bytes(space.free_bytes(out) - 100_000))
    done = lab.start("sft", out, resume="auto", allow_change="max_steps", **{**saving, "max_steps": 5}).result
    assert "a save may find no room" in done.text and "error: no space: checkpoint-5 needs" in done.text
    assert stand(out) == ["checkpoint-4"]


@pytest.mark.slow
def test_other_commands_tell_of_the_disk_too(
    lab: Lab, disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["sft", *words(lab.options("sft", output_dir=disk(1536) / "out", **SAVING))]
    with pytest.raises(UserError, match="sft would stop at plan"):
        check(asked)
    assert "lays up to" in capsys.readouterr().out
    with pytest.raises(UserError, match="lays up to"):
        planner(asked)
    assert planner([*asked, "--force"]) == 0 and planner([*asked, "--gpu", "h200"]) == 0, "that disk is elsewhere"


def test_a_file_system_without_a_size_has_room() -> None:
    assert space.free_bytes(Path("/proc/out")) > 1 << 60

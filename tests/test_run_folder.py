"""The folder of a run: the one rule for folders that are not empty, its manifest, its checkpoints, who comes before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align_kit import run_folder
from align_kit.errors import UserError
from align_kit.run_folder import RunFolder, open_folder, read_manifest


def finished(folder: Path, phase: str, status: str = run_folder.FINISHED) -> Path:
    RunFolder(folder, {}).write(phase=phase, status=status)
    return folder


def checkpoint(folder: Path, step: int) -> Path:
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "trainer_state.json").write_text("{}")
    return place


# --- opening ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [False, True])
def test_a_new_or_empty_folder_is_opened(make: bool, tmp_path: Path) -> None:
    place = tmp_path / "deep" / "out"
    if make:
        place.mkdir(parents=True)
    home = open_folder(str(place), resume=None, overwrite=False)
    assert (home.path, home.manifest, home.resume_from) == (place, {}, None) and place.is_dir()


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    finished(tmp_path, "sft")
    with pytest.raises(UserError, match="is not empty; go on with --resume, replace it with --overwrite, or name"):
        open_folder(str(tmp_path), resume=None, overwrite=False)
    assert (tmp_path / "manifest.json").is_file()


def test_overwrite_replaces_a_run_whole_and_late(tmp_path: Path) -> None:
    """Nothing goes while the new run may still fail for a typo; then all of it goes."""
    checkpoint(finished(tmp_path / "out", "sft"), 3)
    home = open_folder(str(tmp_path / "out"), resume=None, overwrite=True)
    assert home.manifest == {} and home.replaces and read_manifest(home.path) is not None
    home.clear()
    assert list(home.path.iterdir()) == [] and not home.replaces


def test_overwrite_through_a_link_empties_the_folder_behind_it(tmp_path: Path) -> None:
    finished(tmp_path / "real", "sft")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    open_folder(str(tmp_path / "link"), resume=None, overwrite=True).clear()
    assert (tmp_path / "link").is_symlink() and list((tmp_path / "real").iterdir()) == []


def test_overwrite_spares_what_the_new_run_is_made_from(tmp_path: Path) -> None:
    finished(tmp_path / "out", "sft")
    home = open_folder(str(tmp_path / "out"), resume=None, overwrite=True)
    home.refuse_inside("data", tmp_path / "other.jsonl")
    with pytest.raises(UserError, match="--overwrite would delete the data .*rows.jsonl in output_dir"):
        home.refuse_inside("data", tmp_path / "out" / "rows.jsonl")


def test_a_failed_run_with_checkpoints_is_not_nothing(tmp_path: Path) -> None:
    home = finished(tmp_path / "out", "sft")
    manifest = {**(read_manifest(home) or {}), "status": "failed"}
    (home / "manifest.json").write_text(json.dumps(manifest))
    assert open_folder(str(home), resume=None, overwrite=False).replaces  # nothing stored: it may be started again
    checkpoint(home, 3)
    with pytest.raises(UserError, match="is not empty"):
        open_folder(str(home), resume=None, overwrite=False)


def test_resume_stays_in_its_own_run(tmp_path: Path) -> None:
    checkpoint(finished(tmp_path / "one", "dpo"), 2)
    finished(tmp_path / "two", "dpo")
    with pytest.raises(UserError, match="is a checkpoint of another run than output_dir .*two; .* --output_dir .*one"):
        open_folder(str(tmp_path / "two"), resume=str(tmp_path / "one" / "checkpoint-2"), overwrite=False)


def test_a_checkpoint_is_cut_for_a_number_of_ranks(tmp_path: Path) -> None:
    home = RunFolder(tmp_path, {}, resume_from=tmp_path / "checkpoint-2")
    home.check_cut(2, 2)
    home.check_cut(None, 2)
    home.check_cut(2, 1, may_cut=True)
    with pytest.raises(UserError, match="is cut for a world_size of 2, now 1; .* --allow_change world_size"):
        home.check_cut(2, 1)


def test_only_a_run_that_has_begun_is_said_to_have_failed(tmp_path: Path) -> None:
    """A run that is refused leaves the manifest of the one it would have gone on with."""
    finished(tmp_path, "dpo")
    home = open_folder(str(tmp_path), resume="auto", overwrite=False)
    before = read_manifest(tmp_path)
    for status in ("finished", "failed"):
        with pytest.raises(UserError, match="no"), home.telling_failure():
            raise UserError("no")
        assert (read_manifest(tmp_path) or {})["status"] == status
        assert status == "failed" or read_manifest(tmp_path) == before
        home.write(status="running")


def test_overwrite_spares_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds no run of align_kit; remove it yourself"):
        open_folder(str(tmp_path), resume=None, overwrite=True)
    assert (tmp_path / "thesis.tex").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_folder(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    for place in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(UserError, match="cannot be written .*; name another with --output_dir"):
            open_folder(str(place), resume=None, overwrite=overwrite)


def test_ranks_that_are_not_the_first_only_look_on(tmp_path: Path) -> None:
    finished(tmp_path, "sft")
    home = open_folder(str(tmp_path), resume=None, overwrite=True, first=False)
    assert home.manifest == {} and (tmp_path / "manifest.json").is_file()


# --- resuming ---------------------------------------------------------------------------------------------


def test_checkpoints_are_listed_by_number(tmp_path: Path) -> None:
    finished(tmp_path, "dpo", "running")
    for step in (9, 10, 100, 20):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-old").mkdir()
    home = open_folder(str(tmp_path), resume="auto", overwrite=False)
    assert home.resume_from is None and home.manifest["phase"] == "dpo"  # which one is found by what is in them
    assert [path.name for path in run_folder.checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (9, 10, 20, 100)]


def test_resume_takes_the_checkpoint_named(tmp_path: Path) -> None:
    early = checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    assert open_folder(str(tmp_path), resume=str(early), overwrite=False).resume_from == early


def test_resume_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    for name, message in (("checkpoint-3", "no checkpoint there"), ("best", "no checkpoint's name")):
        with pytest.raises(UserError, match=message):
            open_folder(str(tmp_path), resume=name, overwrite=False)


# --- the manifest -----------------------------------------------------------------------------------------


def test_a_manifest_is_laid_over_and_stored_whole(tmp_path: Path) -> None:
    home = RunFolder(tmp_path / "out", {})
    home.write(phase="sft", path=Path("x"))
    home.write(status="finished")
    assert run_folder.read_manifest(home.path) == {"phase": "sft", "path": "x", "status": "finished"}
    assert [path.name for path in home.path.iterdir()] == ["manifest.json"], "no temporary file is left"
    assert (home.path / "manifest.json").stat().st_mode & 0o777 == 0o644


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    home = RunFolder(tmp_path, {})
    home.write(phase="sft")
    with pytest.raises(TypeError):
        home.write(**{"entry": {(1, 2): 3}})
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"phase": "sft"}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"], "nor a half-written one"


@pytest.mark.parametrize("text", [None, "", "{", "[1]"])
def test_a_manifest_that_cannot_be_read_is_none(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    assert run_folder.read_manifest(tmp_path) is None


# --- who comes before, where the cache is -----------------------------------------------------------------


def test_the_predecessor_is_the_first_finished_phase_of_choice(tmp_path: Path) -> None:
    output, choices = tmp_path / "dpo", ("sft", "pretrain")
    assert run_folder.predecessor(output, choices) is None
    pretrain = finished(tmp_path / "pretrain", "pretrain")
    finished(tmp_path / "sft", "sft", "running")
    assert run_folder.predecessor(output, choices) == (pretrain, "pretrain"), "a run that runs is not finished"
    sft = finished(tmp_path / "sft", "sft")
    assert run_folder.predecessor(output, choices) == (sft, "sft")


def test_a_run_is_not_its_own_predecessor(tmp_path: Path) -> None:
    finished(tmp_path / "pretrain", "pretrain")
    assert run_folder.predecessor(tmp_path / "pretrain", ("pretrain",)) is None


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({"ALIGN_KIT_CACHE": "/fast", "XDG_CACHE_HOME": "/xdg"}, Path("/fast")),
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/align_kit")),
        ({}, Path.home() / ".cache" / "align_kit"),
    ],
)
def test_where_the_cache_is(environ: dict[str, str], place: Path) -> None:
    assert run_folder.cache_folder(environ) == place

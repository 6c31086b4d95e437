"""The second place: copied with the manifest last, read back, kept by the rule, fetched when the first is gone."""

from __future__ import annotations

import contextlib
import errno
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from align_kit.checkpoint import manifest, mirror
from align_kit.checkpoint.keep import Rule
from align_kit.checkpoint.mirror import Copies, NotThere, Place, pull, push, retain
from align_kit.checkpoint.reading import is_read
from align_kit.config import places
from align_kit.errors import UserError
from align_kit.run_folder import checkpoints
from tests.harness import Ranks
from tests.small import Lab, lab_of
from tests.test_checkpoint_keep import damage, make
from tests.when_work import train


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints at 10, 20 and 30, and its own manifest."""
    home = tmp_path / "run"
    for step in (10, 20, 30):
        place = make(home, step)
        (place / "global_step").mkdir()
        (place / "global_step" / "shard").write_bytes(bytes(100))
        (place / manifest.NAME).unlink()
        manifest.seal(place, {"step": step})
    (home / "manifest.json").write_text('{"phase": "sft"}')
    return home


@pytest.fixture(params=["folder", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A second place: a plain folder, a file:// URL with a blank, an object store in memory."""
    there = {"folder": str(tmp_path / "there"), "file": f"file://{tmp_path}/the re", "memory": "memory://there/x"}
    yield there[request.param]
    fsspec.filesystem("memory").store.clear()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def spoil(url: str, *names: str) -> None:
    """Change one byte of a file there, its size unchanged."""
    place = Place(url)
    data = bytearray(place.fs.cat_file(place.at(*names)))
    data[-1] ^= 1
    place.fs.pipe_file(place.at(*names), bytes(data))


def newest(url: str) -> str | None:
    """Return the newest checkpoint that verifies there, `None` for none."""
    place = Place(url)
    for name in place.names():
        with contextlib.suppress(NotThere, OSError):
            place.check(name, place.manifest(name)["files"])
            return name
    return None


# --- there and back -------------------------------------------------------------------------------------------


def test_a_copy_comes_back_as_it_was(run: Path, url: str, tmp_path: Path) -> None:
    for place in checkpoints(run):
        push(place, url)
    assert newest(url) == "checkpoint-30" and Place(url).unfinished() == []
    fetched = pull(url, tmp_path / "new")
    assert fetched == tmp_path / "new" / "checkpoint-30" and tree(fetched) == tree(run / "checkpoint-30")
    assert (tmp_path / "new" / "manifest.json").read_bytes() == (run / "manifest.json").read_bytes()
    assert sorted(path.name for path in fetched.parent.iterdir()) == ["checkpoint-30", "manifest.json"]


def test_nothing_there(url: str, tmp_path: Path) -> None:
    assert newest(url) is None and pull(url, tmp_path / "new") is None and list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("file", ["weights", "global_step/shard", manifest.NAME])
def test_a_byte_flipped_there_is_found(
    run: Path, url: str, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest copy is spoilt: it is named, and the one before is taken."""
    push(run / "checkpoint-20", url)
    push(run / "checkpoint-30", url)
    spoil(url, "checkpoint-30", file)
    assert newest(url) == "checkpoint-20"
    fetched = pull(url, tmp_path / "new")
    assert fetched is not None and fetched.name == "checkpoint-20" and not manifest.problems(fetched)
    assert capsys.readouterr().err.count("warning: checkpoint-30 at ") == 1
    assert not (tmp_path / "new" / "checkpoint-30").exists() and not list((tmp_path / "new").glob(".*"))


def test_a_file_missing_there_is_found(run: Path, url: str, tmp_path: Path) -> None:
    push(run / "checkpoint-30", url)
    place = Place(url)
    place.fs.rm_file(place.at("checkpoint-30", "weights"))
    assert newest(url) is None and pull(url, tmp_path / "new") is None


def test_a_copy_that_was_cut_short_is_none(run: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest comes last: whatever file the copy ends at, there is no checkpoint there, and no older one's."""
    files, original = 3, Place.put
    for end in range(files + 1):
        push(run / "checkpoint-30", url)
        left = [end]

        def put(place: Place, source: Path, *names: str, left: list[int] = left) -> None:
            if not left[0]:
                raise OSError(errno.ECONNRESET, "the line went dead")
            left[0] -= 1
            original(place, source, *names)

        with monkeypatch.context() as patched:
            patched.setattr(Place, "put", put)
            with pytest.raises(OSError, match="dead"):
                push(run / "checkpoint-30", url)
        assert newest(url) is None and Place(url).unfinished() == ["checkpoint-30"]
    push(run / "checkpoint-30", url)
    assert newest(url) == "checkpoint-30"


def test_what_arrives_changed_is_no_checkpoint(run: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that changes a byte on the way: found by reading back, before the manifest makes it a checkpoint."""
    original = Place.put

    def put(place: Place, source: Path, *names: str) -> None:
        original(place, source, *names)
        if names[-1] == "weights":
            spoil(url, *names)

    monkeypatch.setattr(Place, "put", put)
    with pytest.raises(NotThere, match="weights has other bytes there than here"):
        push(run / "checkpoint-30", url)
    assert newest(url) is None


def test_a_checkpoint_is_held_while_it_is_copied(run: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = Place.put

    def put(place: Place, source: Path, *names: str) -> None:
        seen.append(is_read(run / "checkpoint-30"))
        original(place, source, *names)

    monkeypatch.setattr(Place, "put", put)
    push(run / "checkpoint-30", url)
    assert seen and all(seen) and not is_read(run / "checkpoint-30")


def test_a_manifest_that_names_files_elsewhere_is_refused(
    run: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever may write there could else write anywhere here."""
    evil = tmp_path / "evil" / "checkpoint-99"
    shutil.copytree(run / "checkpoint-30", evil)
    (evil / manifest.NAME).unlink()
    manifest.seal(evil, {}, {"../../../stolen": manifest.entry(evil / "weights")})
    place = Place(url)
    place.put(evil / manifest.NAME, "checkpoint-99", manifest.NAME)
    place.put(evil / "weights", "stolen")
    assert pull(url, tmp_path / "new" / "deep") is None and newest(url) is None
    assert capsys.readouterr().err.count("names '../../../stolen', outside the checkpoint") == 1


def test_what_stands_in_the_way_is_set_aside(run: Path, url: str) -> None:
    """The first place holds the checkpoint torn, the second whole."""
    push(run / "checkpoint-30", url)
    damage(run / "checkpoint-30")
    fetched = pull(url, run)
    assert fetched == run / "checkpoint-30" and not manifest.problems(fetched)
    assert manifest.problems(run / "torn" / "checkpoint-30")


# --- what stays there -----------------------------------------------------------------------------------------


def test_the_rule_holds_there_too(run: Path, url: str) -> None:
    for place in checkpoints(run):
        push(place, url)
    for rule, best in ((Rule(last=1), "checkpoint-10"), (Rule(last=1, milestone_steps=5), None)):
        retain(url, rule, best=best, newest="checkpoint-30")
        assert Place(url).names() == ["checkpoint-30", "checkpoint-10"]
    retain(url, Rule(last=1), best=None, newest="checkpoint-30")
    assert Place(url).names() == ["checkpoint-30"]


def test_copies_cut_short_go_and_strangers_stay(run: Path, url: str) -> None:
    push(run / "checkpoint-30", url)
    place = Place(url)
    place.mark("checkpoint-20")
    place.put(run / "checkpoint-10" / "weights", "checkpoint-7", "theirs")
    retain(url, Rule(last=1), best=None, newest="checkpoint-30")
    assert place.fs.exists(place.at("checkpoint-7", "theirs")) and not place.fs.exists(place.at("checkpoint-20"))


def test_a_new_run_clears_what_it_replaces(run: Path, url: str) -> None:
    push(run / "checkpoint-30", url)
    mirror.clear(url)
    assert Place(url).names() == []


# --- in the background ----------------------------------------------------------------------------------------


def test_copies_are_made_one_by_one_and_the_newest_first(
    run: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While one is copied the next waits; a third overtakes it."""
    begun, go_on, original = threading.Event(), threading.Event(), Place.put

    def put(place: Place, *given: Any) -> None:
        begun.set()
        go_on.wait(20)
        original(place, *given)

    monkeypatch.setattr(Place, "put", put)
    copies = Copies(url, Rule(last=2))
    copies.later(run / "checkpoint-10", None)
    assert begun.wait(20)
    copies.later(run / "checkpoint-20", None)
    copies.later(run / "checkpoint-30", run / "checkpoint-10")
    go_on.set()
    copies.close()
    assert Place(url).names() == ["checkpoint-30", "checkpoint-10"]
    assert capsys.readouterr().err == "warning: checkpoint-20 is not copied: checkpoint-30 is newer\n"


def test_a_copy_that_fails_is_a_warning(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a file").write_text("")
    copies = Copies(str(tmp_path / "a file" / "below"), Rule())
    copies.later(run / "checkpoint-30", None)
    copies.close()
    said = capsys.readouterr().err
    assert said.startswith("warning: checkpoint-30 was not copied to ") and "the run goes on" in said
    assert said.count("\n") == 1


# --- what opens a place ---------------------------------------------------------------------------------------

SECRET = "ftp://anna:hunter2secret@127.0.0.1:1/x?token=abc123def"


def test_a_password_is_never_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copies = Copies(SECRET, Rule())
    copies.later(run / "checkpoint-30", None)
    copies.close()
    said = capsys.readouterr().err
    with pytest.raises(UserError) as refused:
        pull(SECRET, tmp_path / "new")
    for text in (said, str(refused.value), places.public(SECRET), places.scrubbed(f"no {SECRET} for anna", SECRET)):
        assert "127.0.0.1" in text or "anna" not in text
        assert "hunter2" not in text and "abc123def" not in text, text


def test_what_a_backend_says_is_cleared_of_passwords() -> None:
    place = Place("memory://anna:hunter2secret@host/x")
    with pytest.raises(UserError) as refused, place.naming_errors():
        raise ValueError("530 login of anna with hunter2secret failed\nand more")
    said = str(refused.value)
    assert "hunter2" not in said and "530 login" in said and "and more" not in said


def test_places_that_are_none() -> None:
    assert "Install s3fs" in str(places.problem("s3://bucket/x", "runs/sft"))
    assert "fsspec knows no nowhere://" in str(places.problem("nowhere://x", "runs/sft"))
    assert "Install s3fs" in str(places.problem("simplecache::s3://bucket/x", "runs/sft"))
    assert "lies in output_dir runs/sft" in str(places.problem("runs/sft/copies", "runs/sft"))
    assert "lies in output_dir" in str(places.problem(f"file://{Path.cwd()}/runs/sft", "runs/sft"))
    assert [places.problem(url, "runs/sft") for url in ("/tmp/x", "memory://x", "runs/sft-copies")] == [None] * 3


# --- real runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


@pytest.mark.slow
def test_a_run_goes_on_from_the_second_place(lab: Lab, tmp_path: Path) -> None:
    """The first place is gone, all of it: the run ends with the bytes it would have had."""
    there = tmp_path / "there"
    asked = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "save_copy_to": there}
    whole = train(lab, tmp_path / "whole", **asked)
    whole.result.ok()
    assert [place.name for place in checkpoints(there)] == ["checkpoint-4"]
    assert not manifest.problems(there / "checkpoint-4")
    other = train(lab, tmp_path / "other", **asked)
    assert f"save_copy_to {there} holds checkpoint-4 of an earlier run" in other.result.error()
    cut = train(lab, tmp_path / "cut", [[1, 2, "send", "SIGTERM"]], **asked, overwrite=True)
    assert set(cut.result.codes) == {75} and [place.name for place in checkpoints(there)] == ["checkpoint-2"]
    shutil.rmtree(cut.folder)
    more = train(lab, tmp_path / "cut", **asked, resume="auto")
    more.result.ok()
    assert "checkpoint-2 was fetched from" in more.result.text and more.manifest["status"] == "finished"
    assert all(torch.equal(more.weights[name], tensor) for name, tensor in whole.weights.items())
    assert more.losses == whole.losses

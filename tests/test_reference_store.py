"""The store of reference log-probabilities: whole or absent, by content, filled by any ranks and after any death."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_kit.data.collate import BinaryCollator, PreferenceCollator
from align_kit.errors import UserError
from align_kit.frozen import chunks
from align_kit.frozen.columns import DatasetRows, cached_columns, columns_for
from align_kit.frozen.store import ReferenceStore, Row, StoreKey, World
from tests.harness import ROOT, Ranks
from tests.small import write_model
from tests.store_work import KEY, Counted, fill, logps_of, make_rows

WORK = "tests.store_work"


def same(found: list[Any], wanted: list[Any]) -> bool:
    """Whether two lists of arrays are equal, byte for byte."""
    return [bytes(row) for row in found] == [bytes(row) for row in wanted]


def chunk_files(place: Path) -> list[Path]:
    return sorted(place.glob("*/*.arrow"))


# --- one process ------------------------------------------------------------------------------------------


def test_gives_what_was_computed(tmp_path: Path) -> None:
    rows = make_rows(11)
    store, filled = fill(tmp_path, rows, Counted())
    assert (filled.rows, filled.distinct, filled.computed, filled.damaged) == (11, 11, 11, 0)
    assert same(store.lookup(rows[::-1]), [logps_of(row) for row in rows[::-1]])
    assert {row.dtype for row in store.lookup(rows)} == {np.dtype("float32")}
    assert store.missing([*rows, Row([1], [2]), Row([1], [3]), Row([1], [2])]) == [11, 12]


def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    rows = make_rows(11)
    fill(tmp_path, rows, Counted())
    again = Counted()
    store, filled = fill(tmp_path, rows, again)
    assert (again.batches, filled.computed) == ([], 0)
    assert filled.sentence() == "11 sequences: 11 found, 0 computed"
    assert same(store.lookup(rows), [logps_of(row) for row in rows])


def test_equal_rows_are_computed_once(tmp_path: Path) -> None:
    rows = make_rows(5)
    compute = Counted()
    store, filled = fill(tmp_path, [*rows, *rows[::-1]], compute)
    assert (filled.rows, filled.distinct, compute.rows) == (10, 5, 5)
    assert same(store.lookup([rows[0], rows[0]]), [logps_of(rows[0])] * 2)


def test_where_the_prompt_ends_counts() -> None:
    assert Row([1, 2], [3]).digest != Row([1], [2, 3]).digest
    assert Row([1, 2], [3]).digest == Row(np.array([1, 2]), np.array([3], dtype=np.int64)).digest


def test_longest_first_in_batches_of_like_length(tmp_path: Path) -> None:
    compute = Counted()
    fill(tmp_path, make_rows(20), compute)
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for batch in compute.batches for row in batch]
    assert lengths == sorted(lengths, reverse=True)
    other_order = Counted()
    fill(tmp_path / "again", make_rows(20)[::-1], other_order)
    assert other_order.batches == compute.batches


def test_rows_without_a_completion_and_no_rows_at_all(tmp_path: Path) -> None:
    store, _ = fill(tmp_path, [Row([5, 6], [])], Counted())
    assert [len(row) for row in store.lookup([Row([5, 6], [])])] == [0]
    assert fill(tmp_path / "none", [], Counted())[1].computed == 0
    assert store.verify([], Counted(), count=4, tolerance=0.0, batch_rows=2) == 0.0


def test_progress_counts_the_rows_of_all(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    fill(tmp_path, make_rows(5), Counted(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)


@settings(max_examples=60)
@given(
    parts=st.lists(st.lists(st.tuples(ids, ids), max_size=12), min_size=1, max_size=4),
    strangers=st.lists(st.tuples(ids, ids), max_size=5),
    batch_rows=st.integers(1, 5),
    chunk_rows=st.integers(1, 9),
)
def test_any_rows_are_found_again(
    tmp_path_factory: pytest.TempPathFactory, parts: Any, strangers: Any, batch_rows: int, chunk_rows: int
) -> None:
    place = tmp_path_factory.mktemp("any")
    known = [[Row(*pair) for pair in part] for part in parts]
    for part in known:
        store, _ = fill(place, part, Counted(), batch_rows=batch_rows, chunk_rows=chunk_rows)
    everything = [row for part in known for row in part]
    assert same(store.lookup(everything), [logps_of(row) for row in everything])
    stored = {(tuple(row.prompt_ids), tuple(row.completion_ids)) for row in everything}
    asked = [Row(*pair) for pair in strangers]
    new = {(tuple(row.prompt_ids), tuple(row.completion_ids)) for row in asked} - stored
    missing = [asked[index] for index in store.missing(asked)]
    assert len(missing) == len(new) and {(tuple(row.prompt_ids), tuple(row.completion_ids)) for row in missing} == new


# --- what makes another store -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"weights": "w2"}, {"tokenizer": "t2"}, {"precision": "bf16"}, {"forward": {}}, {"schema": KEY.schema + 1}],
    ids=str,
)
def test_another_key_never_reuses_a_row(tmp_path: Path, change: dict[str, Any]) -> None:
    rows = make_rows(3)
    first, _ = fill(tmp_path, rows, Counted())
    other = ReferenceStore(tmp_path, dataclasses.replace(KEY, **change))
    assert other.path != first.path and other.missing(rows) == [0, 1, 2]
    assert ReferenceStore(tmp_path, dataclasses.replace(KEY)).missing(rows) == []


def test_the_folder_says_what_it_holds(tmp_path: Path) -> None:
    store, _ = fill(tmp_path, make_rows(1), Counted())
    told = json.loads((store.path / "key.json").read_text())
    assert StoreKey(**told).digest == store.path.name == KEY.digest


# --- damage -----------------------------------------------------------------------------------------------


def harmed(place: Path, harm: Any) -> tuple[int, Counted]:
    """Fill, harm one chunk's bytes, fill again; return the chunks found damaged and what was computed again."""
    rows = make_rows(10)
    fill(place, rows, Counted())
    victim = chunk_files(place)[1]
    victim.write_bytes(harm(victim.read_bytes()))
    compute = Counted()
    store, filled = fill(place, rows, compute)
    assert same(store.lookup(rows), [logps_of(row) for row in rows])
    assert not victim.exists() and ReferenceStore(place, KEY).missing(rows) == []
    return filled.damaged, compute


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, share: float, capsys: Any) -> None:
    def flip(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[int(share * len(data))] ^= 1
        return bytes(changed)

    damaged, compute = harmed(tmp_path, flip)
    assert damaged == 1 and compute.rows in (2, 4)
    assert "1 damaged files" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_torn_chunk_is_found(tmp_path: Path, kept: float) -> None:
    damaged, compute = harmed(tmp_path, lambda data: data[: int(kept * len(data))])
    assert damaged == 1 and compute.rows in (2, 4)


def test_a_draft_is_no_chunk_and_an_old_one_is_swept(tmp_path: Path) -> None:
    store, _ = fill(tmp_path, make_rows(3), Counted())
    old, new = store.path / ".draft-old", store.path / ".draft-new"
    for draft in (old, new):
        draft.write_bytes(b"half a chu")
    os.utime(old, (0, 0))
    assert fill(tmp_path, make_rows(3), Counted())[1].damaged == 0
    assert new.exists() and not old.exists()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunks.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; free or change"):
        fill(tmp_path, make_rows(3), Counted())
    assert [path.name for path in (tmp_path / KEY.digest).iterdir()] == ["key.json"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep log-probabilities in .*Not a directory"):
        fill(tmp_path / "file", make_rows(3), Counted())


def test_what_is_not_finite_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="log-probability of nan in a completion"):
        fill(tmp_path, make_rows(3), lambda rows: [logps_of(row) * float("nan") for row in rows])
    assert chunk_files(tmp_path) == []


# --- verifying --------------------------------------------------------------------------------------------


def test_verify_finds_another_models_numbers(tmp_path: Path) -> None:
    rows = make_rows(30)
    store, _ = fill(tmp_path, rows, Counted(shift=0.25))
    with pytest.raises(UserError, match=r"6 rows computed again differ by up to 0\.25 \(allowed 0\.001\); remove"):
        store.verify(rows, Counted(), count=6, tolerance=1e-3, batch_rows=4)
    assert store.verify(rows, Counted(), count=6, tolerance=0.3, batch_rows=4) == pytest.approx(0.25)
    assert store.verify(rows, Counted(shift=0.25), count=6, tolerance=0.0, batch_rows=4) == 0.0


def test_verify_takes_the_same_rows_each_time_from_longest_to_shortest(tmp_path: Path) -> None:
    rows = make_rows(30)
    store, _ = fill(tmp_path, rows, Counted())
    asked = []
    for order in (rows, rows[::-1]):
        compute = Counted()
        store.verify(order, compute, count=5, tolerance=0.0, batch_rows=2)
        asked.append([row for batch in compute.batches for row in batch])
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
    taken = [len(row.prompt_ids) + len(row.completion_ids) for row in asked[0]]
    assert asked[0] == asked[1] and len(taken) == 5
    assert (taken[0], taken[-1]) == (max(lengths), min(lengths))


# --- agreeing ---------------------------------------------------------------------------------------------


def beside(other: Any) -> World:
    """Return rank 0 of two; `other` makes rank 1's word of rank 0's where they say what they lack."""
    return World(0, 2, lambda value: [value, other(*value) if isinstance(value, tuple) else value])


def test_what_any_rank_lacks_all_compute(tmp_path: Path) -> None:
    """Another run may have added chunks between the moments at which two ranks looked."""
    fill(tmp_path, make_rows(9), Counted())
    compute = Counted()
    lacks_all = beside(lambda rows, lacking, damaged: (rows, b"\xff" * len(lacking), damaged))
    _, filled = fill(tmp_path, make_rows(9), compute, world=lacks_all)
    assert (filled.computed, len(compute.batches)) == (9, 3)


def test_ranks_with_different_rows_do_not_start(tmp_path: Path) -> None:
    other_rows = beside(lambda rows, lacking, damaged: ("others", lacking, damaged))
    with pytest.raises(AssertionError, match="the ranks hold different rows"):
        fill(tmp_path, make_rows(9), Counted(), world=other_rows)


# --- killed -----------------------------------------------------------------------------------------------


def wait_for(place: Path, count: int, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Yield once `count` chunks lie in `place`; fail when the process ends before, or after a minute."""
    deadline = time.monotonic() + 60
    while len(chunk_files(place)) < count:
        assert process.poll() is None and time.monotonic() < deadline, "the filling ended before it was killed"
        time.sleep(0.005)
    yield


@pytest.mark.slow
def test_a_killed_filling_goes_on_where_it_was(tmp_path: Path) -> None:
    rows = make_rows(200)
    place = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", WORK, str(place), "200"], cwd=ROOT)
    for _ in wait_for(place, 3, process):
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stored = 200 - len(ReferenceStore(place, KEY).missing(rows))
    assert 12 <= stored < 200 and stored % 4 == 0
    compute = Counted()
    store, filled = fill(place, rows, compute)
    assert compute.rows == filled.computed == 200 - stored and filled.damaged == 0
    whole, _ = fill(tmp_path / "whole", rows, Counted())
    assert same(store.lookup(rows), whole.lookup(rows))


# --- ranks ------------------------------------------------------------------------------------------------


def notes(place: Path) -> list[dict[str, int]]:
    return [json.loads(Path(f"{place}.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "calls"), [(0, 0), (1, 1), (9, 3), (16, 4)])
def test_two_ranks_are_one(ranks: Ranks, tmp_path: Path, count: int, calls: int) -> None:
    place = tmp_path / "two"
    ranks.run(function=f"{WORK}:together", place=str(place), count=count).ok()
    assert [note["calls"] for note in notes(place)] == [calls, calls]
    assert [note["computed"] for note in notes(place)] == [count, count]
    alone, _ = fill(tmp_path / "one", make_rows(count), Counted())
    found = ReferenceStore(place, KEY).lookup(make_rows(count))
    assert same(found, alone.lookup(make_rows(count)))
    stored = [digest for path in chunk_files(place) for digest in chunks.digests_of(path)]
    assert len(stored) == len(set(stored)) == count  # what ran for the other rank's sake is not kept


@pytest.mark.slow
def test_a_killed_rank_costs_its_last_chunk(ranks: Ranks, tmp_path: Path) -> None:
    place = tmp_path / "killed"
    broken = ranks.run(function=f"{WORK}:together", place=str(place), count=40, dies_at=6)
    assert broken.codes[1] == -signal.SIGKILL
    lacking = len(ReferenceStore(place, KEY).missing(make_rows(40)))
    assert 0 < lacking < 40
    ranks.run(function=f"{WORK}:together", place=str(place), count=40).ok()
    assert [note["computed"] for note in notes(place)] == [lacking, lacking]
    assert sum(note["rows"] for note in notes(place)) <= lacking + 2  # one batch at most is a repeat


@pytest.mark.slow
def test_two_runs_may_fill_one_store(ranks: Ranks, tmp_path: Path) -> None:
    place = tmp_path / "shared"
    ranks.run(function=f"{WORK}:together", place=str(place), count=60, alone=True).ok()
    store = ReferenceStore(place, KEY)
    assert same(store.lookup(make_rows(60)), [logps_of(row) for row in make_rows(60)]) and not store.damaged


@pytest.mark.slow
def test_ranks_without_a_common_folder_are_told(ranks: Ranks, tmp_path: Path) -> None:
    result = ranks.run(function=f"{WORK}:together", place=str(tmp_path), count=9, apart=True)
    assert result.codes == [2, 2]
    assert result.text.count("rank 1 does not see what rank 0 writes to") == 2
    assert chunk_files(tmp_path) == []


@pytest.mark.slow
def test_verify_on_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    fill(tmp_path, make_rows(9), Counted())
    arguments = {"function": f"{WORK}:together", "place": str(tmp_path), "count": 9, "verify": True}
    ranks.run(**arguments).ok()
    other = ranks.run(**arguments, shift=0.5)
    assert other.codes == [2, 2] and other.text.count("differ by up to 0.5 ") == 2


@pytest.mark.slow
def test_under_zero3_with_a_real_model(ranks: Ranks, tmp_path: Path) -> None:
    """Five batches for two ranks: no hang, the bytes of one rank, the model's own numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    model, rows = write_model(tmp_path / "model"), make_rows(9)
    found = []
    for world_size in (1, 2):
        place = tmp_path / f"on {world_size}"
        ranks.run(
            function=f"{WORK}:with_engine", world_size=world_size, place=str(place), model=str(model), count=9
        ).ok()
        found.append(ReferenceStore(place, KEY).lookup(rows))
    assert same(*found)
    plain = AutoModelForCausalLM.from_pretrained(model).double()
    for row, stored in zip(rows, found[0], strict=True):
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        with torch.no_grad():
            logps_TV = plain(ids).logits[0, :-1].log_softmax(-1)
        wanted = logps_TV.gather(-1, ids[0, 1:, None])[len(row.prompt_ids) - 1 :, 0]
        assert np.abs(stored - wanted.numpy()).max() < 1e-5


# --- columns ----------------------------------------------------------------------------------------------


def pairs(count: int) -> dict[str, list[list[int]]]:
    rows = make_rows(2 * count)
    return {
        "prompt_ids": [list(row.prompt_ids) for row in rows[:count]],
        "chosen_ids": [list(row.completion_ids) for row in rows[:count]],
        "rejected_ids": [list(row.completion_ids) for row in rows[count:]],
    }


def dataset_of(kind: str, columns: dict[str, Any], place: Path) -> Any:
    """Return `columns` as a data set in memory, from a file, or of a file's rows in another order."""
    from datasets import Dataset, Features, List, Value

    if kind == "memory":
        return Dataset.from_dict(columns)
    features = Features({name: List(Value("int32")) for name in columns})
    Dataset.from_dict(columns, features=features).save_to_disk(place)
    dataset = Dataset.load_from_disk(place)
    return dataset if kind == "file" else dataset.select([7, 2, 10, 0, 3])


@pytest.mark.parametrize("kind", ["memory", "file", "shuffled"])
def test_columns_of_pairs(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align_kit.frozen.columns.BATCH_ROWS", 4)
    dataset = dataset_of(kind, pairs(11), tmp_path / "rows")
    columns = columns_for(dataset)
    assert list(columns) == ["reference_chosen", "reference_rejected"]
    rows = DatasetRows(dataset, columns)
    assert [row.digest for row in rows] == [rows[index].digest for index in range(len(rows))]
    store, _ = fill(tmp_path / "store", rows, Counted())
    files = sorted(tmp_path.glob("rows/*"))
    made = cached_columns(dataset, store, columns)
    assert sorted(tmp_path.glob("rows/*")) == files  # nothing is added to where the rows come from
    assert len(made) == len(dataset) and made.column_names == [*dataset.column_names, *columns]
    for before, row in zip(dataset, made, strict=True):
        for side in ("chosen", "rejected"):
            assert row["prompt_ids"] == before["prompt_ids"] and row[f"{side}_ids"] == before[f"{side}_ids"]
            wanted = logps_of(Row(row["prompt_ids"], row[f"{side}_ids"]))
            assert row[f"reference_{side}"] == wanted.tolist()
    batch = PreferenceCollator(0)([made[0], made[1]])
    assert batch["reference_logps"].sum().item() == pytest.approx(
        sum(sum(made[place][name]) for place in (0, 1) for name in columns), rel=1e-6
    )


def test_columns_of_labelled_completions(tmp_path: Path) -> None:
    columns = pairs(6)
    binary = {"prompt_ids": columns["prompt_ids"], "completion_ids": columns["chosen_ids"]}
    binary["kl_completion_ids"] = [*binary["completion_ids"][1:], binary["completion_ids"][0]]
    dataset = dataset_of("memory", binary, tmp_path).add_column("label", [True, False] * 3)
    rows = DatasetRows(dataset, columns_for(dataset))
    store, _ = fill(tmp_path, rows, Counted())
    made = cached_columns(dataset, store, columns_for(dataset))
    for row in made:
        assert row["reference_kl"] == logps_of(Row(row["prompt_ids"], row["kl_completion_ids"])).tolist()
    batch = BinaryCollator(0)(list(made))
    assert batch["reference_logps"].shape[0] == 6 and "kl_reference_logps" in batch


def test_columns_are_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_of("memory", pairs(3), tmp_path)
    store, _ = fill(tmp_path, DatasetRows(dataset, columns_for(dataset)), Counted())
    first = cached_columns(dataset, store, columns_for(dataset))
    monkeypatch.setattr(ReferenceStore, "lookup", None)
    again = cached_columns(dataset, store, columns_for(dataset))
    assert again[:] == first[:]

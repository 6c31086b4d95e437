"""Mixtures: shares, caps, temperature and epochs hold, the order is a function of the seed, and nothing is silent."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_kit.data import mixture, prepare
from align_kit.data.digest import text_digest
from align_kit.data.load import load
from align_kit.data.mix import Stream, capacities_of, mix, mixed, passes, shares_of, sizes_of, tempered
from align_kit.data.mixture import Asked, resolve
from align_kit.data.report import TokeniseOptions
from align_kit.errors import UserError
from tests.data_rows import ROOT, chat_tokenizer

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def rows(path: Path, count: int) -> str:
    """Write `count` questions that name their file, and return its path."""
    lines = [json.dumps({"question": f"{path.stem} {number}", "answer": str(number)}) for number in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """Three files of 100, 40 and 10 rows."""
    return [rows(tmp_path / f"{name}.jsonl", count) for name, count in (("a", 100), ("b", 40), ("c", 10))]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_mixtures_made_before_are_the_same() -> None:
    order = mix([50, 70, 9], [0.5, 0.3, 0.2], seed=3, interleave=True)
    assert text_digest(json.dumps(order)) == "a472e46eb66e777379bc0c7568304201"  # of the first version


@given(st.data(), st.integers(0, 9))
@settings(max_examples=60)
def test_repeats_are_whole_passes_in_an_order_of_their_own(data: st.DataObject, seed: int) -> None:
    counts = data.draw(COUNTS)
    epochs = [data.draw(st.floats(0.1, 4)) for _ in counts]
    order = mix(counts, None, seed=seed, interleave=True, epochs=epochs)
    assert order == mix(counts, None, seed=seed, interleave=True, epochs=epochs)
    for source, (count, size) in enumerate(zip(counts, capacities_of(counts, epochs), strict=True)):
        mine = [row for place, row in order if place == source]
        assert len(mine) == size
        whole = [mine[start : start + count] for start in range(0, size, count)]
        assert all(len(set(one)) == len(one) for one in whole)  # no row comes again before all have been
        assert whole[0] == sorted(whole[0])


def test_every_pass_is_shuffled_anew_and_by_the_seed() -> None:
    order = mix([50], None, seed=1, interleave=True, epochs=[3])
    first, second, third = order[:50], order[50:100], order[100:]
    assert first != second != third != first
    assert mix([50], None, seed=2, interleave=True, epochs=[3])[50:100] != second


@given(st.data())
@settings(max_examples=60)
def test_epochs_and_shares_take_no_more_than_there_is_and_use_one_source_up(data: st.DataObject) -> None:
    counts = data.draw(COUNTS)
    epochs = [data.draw(st.floats(0.5, 4)) for _ in counts]
    parts = [data.draw(st.floats(0.1, 1)) for _ in counts]
    shares = shares_of(parts, [1.0] * len(parts))
    capacities = capacities_of(counts, epochs)
    used = Counter(source for source, _ in mix(counts, shares, seed=0, interleave=True, epochs=epochs))
    assert all(used[place] <= capacity for place, capacity in enumerate(capacities))
    assert any(used[place] == capacity for place, capacity in enumerate(capacities))
    total = min(capacity / share for capacity, share in zip(capacities, shares, strict=True))
    assert all(abs(used[place] - share * total) <= 0.5 + 1e-6 for place, share in enumerate(shares))


@given(st.data())
@settings(max_examples=100)
def test_caps_hold_and_the_others_share_what_they_leave(data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
    caps = [data.draw(st.floats(0.01, 1)) for _ in parts]
    if sum(caps) < 1 - 1e-9:  # as far as sums of shares are exact
        with pytest.raises(UserError, match="max_share of all sources adds up to"):
            shares_of(parts, caps)
        return
    shares = shares_of(parts, caps)
    assert sum(shares) == pytest.approx(1)
    assert all(share <= cap * (1 + 1e-9) for share, cap in zip(shares, caps, strict=True))
    free = [share / part for share, part, cap in zip(shares, parts, caps, strict=True) if share < cap * (1 - 1e-6)]
    assert all(one == pytest.approx(free[0]) for one in free)  # in proportion, as without caps
    for share, part in zip(shares, parts, strict=True):  # who is capped would have more
        assert not free or share / part <= free[0] * (1 + 1e-6)


def test_a_temperature_flattens_sizes() -> None:
    assert shares_of(tempered([900, 100], 1), [1, 1]) == pytest.approx([0.9, 0.1])
    assert shares_of(tempered([900, 100], 2), [1, 1]) == pytest.approx([0.75, 0.25])  # 30 to 10
    assert shares_of(tempered([900, 100], 1 / 0.7), [1, 1]) == pytest.approx([9**0.7 / (9**0.7 + 1), 1 / (9**0.7 + 1)])
    assert shares_of(tempered([900, 100], float("inf")), [1, 1]) == [0.5, 0.5]


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(1, 500))
def test_sizes_for_a_number_of_rows_add_up(parts: list[float], total: int) -> None:
    shares = shares_of(parts, [1.0] * len(parts))
    sizes = sizes_of([1] * len(parts), shares, total)
    assert sum(sizes) == total
    assert all(abs(size - share * total) < 1 for size, share in zip(sizes, shares, strict=True))


# --- streams ----------------------------------------------------------------------------------------------------------


def numbered(source: int) -> Stream[tuple[int, int]]:
    """Return a stream that never ends, of pairs that name the source and the item."""
    return lambda start: ((source, number) for number in itertools.count(start))


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(0, 300))
@settings(max_examples=100)
def test_a_mixture_of_streams_goes_on_where_it_was_left(shares: list[float], position: int) -> None:
    streams = [numbered(source) for source in range(len(shares))]
    whole = list(itertools.islice(mixed(streams, shares), position + 20))
    assert list(itertools.islice(mixed(streams, shares, position=position), 20)) == whole[position:]
    for stop in (1, position + 20):  # every beginning has the shares
        used = Counter(source for source, _ in whole[:stop])
        wanted = [share / sum(shares) * stop for share in shares]
        assert all(abs(used[place] - one) <= len(shares) / 2 + 1 for place, one in enumerate(wanted))


@given(st.data(), st.integers(0, 9))
@settings(max_examples=60)
def test_streams_are_mixed_as_rows_in_memory_are(data: st.DataObject, seed: int) -> None:
    counts = data.draw(COUNTS)
    epochs = [data.draw(st.floats(0.3, 3)) for _ in counts]
    sizes = capacities_of(counts, epochs)

    def stream(source: int) -> Stream[int]:
        size = sizes[source]
        return lambda start: itertools.chain.from_iterable(
            part.tolist() for part in passes(counts[source], size, seed=seed, source=source, start=start)
        )

    order = mix(counts, None, seed=seed, interleave=True, epochs=epochs)
    streams = [stream(source) for source in range(len(counts))]
    assert list(mixed(streams, sizes)) == order
    position = data.draw(st.integers(0, len(order)))
    assert list(mixed(streams, sizes, position=position)) == order[position:]


def test_a_stream_that_ends_ends_the_mixture_and_a_share_of_nothing_is_never_taken() -> None:
    streams = [numbered(0), lambda start: iter(range(start, 3)), numbered(2)]
    found = list(mixed(streams, [0.5, 0.5, 0.0]))
    assert [source for source, _ in found] == [0, 1, 0, 1, 0, 1, 0]


# --- entries of datasets ----------------------------------------------------------------------------------------------


def of_sources(loaded: object) -> list[tuple[int, float, float, int, bool]]:
    """Return what the reports say of a mixture."""
    return [
        (one.rows, round(one.realised, 3), round(one.epochs, 3), one.unseen, one.used_up)
        for one in loaded.sources  # type: ignore[attr-defined]
    ]


def test_epochs_alone_take_just_as_many_rows(three: list[str]) -> None:
    a, b, c = three
    loaded = load([{"path": a, "epochs": 0.5}, {"path": b}, {"path": c, "epochs": 2.5}], phase="sft")
    assert of_sources(loaded) == [(50, 0.435, 0.5, 50, False), (40, 0.348, 1, 0, False), (25, 0.217, 2.5, 0, False)]
    assert Counter(loaded.dataset["prompt"])["c 0"] in (2, 3)
    (alone,) = load([{"path": c, "epochs": 2.5}], phase="sft").sources
    assert (alone.rows, alone.epochs) == (25, 2.5)


def test_epochs_let_a_small_source_keep_up(three: list[str]) -> None:
    a, _, c = three
    once = load([{"path": a, "weight": 0.7}, {"path": c, "weight": 0.3}], phase="sft")
    assert of_sources(once) == [(23, 0.697, 0.23, 77, False), (10, 0.303, 1, 0, True)]
    often = load([{"path": a, "weight": 0.7}, {"path": c, "weight": 0.3, "epochs": 4}], phase="sft")
    assert of_sources(often) == [(93, 0.699, 0.93, 7, False), (40, 0.301, 4, 0, True)]
    assert often.dataset["prompt"] == load(
        [{"path": a, "weight": 7}, {"path": c, "weight": 3, "epochs": 4}], phase="sft"
    ).dataset["prompt"]  # fmt: skip


def test_temperature_and_caps_decide_the_shares(three: list[str]) -> None:
    specs = [{"path": path} for path in three]
    loaded = load(specs, phase="sft", temperature=2)
    assert [one.share for one in loaded.sources] == pytest.approx(shares_of([10, 40**0.5, 10**0.5], [1, 1, 1]))
    capped = load([{**specs[0], "max_share": 0.4}, *specs[1:]], phase="sft")
    assert [one.share for one in capped.sources] == pytest.approx([0.4, 0.48, 0.12])  # by size, but for the cap
    assert of_sources(capped) == [(33, 0.398, 0.33, 67, False), (40, 0.482, 1, 0, True), (10, 0.12, 1, 0, True)]


def test_a_cards_weight_gives_way_to_a_temperature() -> None:
    asked = [Asked("card:a", 900, card_weight=5.0), Asked("b", 100)]
    assert resolve(asked).shares == pytest.approx([5 / 6, 1 / 6])
    assert resolve(asked, 1.0).shares == pytest.approx([0.9, 0.1])


def test_a_source_of_which_nothing_is_taken_is_said(three: list[str]) -> None:
    a, _, c = three
    loaded = load([{"path": a, "weight": 1}, {"path": c, "weight": 0.001}], phase="sft")
    assert loaded.sources[1].rows == 0 and loaded.sources[1].unseen == 10
    assert loaded.warnings == [f"{c}: its share is less than one row, so none of its rows is used"]


CONTRADICTIONS = [
    ([{"fraction": 0.5, "epochs": 2}, {"fraction": 0.5}], None, "fraction, which repeats and caps nothing, and epochs"),
    ([{"fraction": 0.5}, {"fraction": 0.5}], 2.0, "and mixture_temperature were given; take weight"),
    ([{"weight": 1}, {}], 2.0, "a weight and a temperature of the mixture were both given"),
    ([{}, {}], -1.0, "the temperature of the mixture is -1.0; give a number above 0"),
    ([{"max_share": 0.5}, {"max_share": 0.4}], None, "adds up to 0.9, so 0.1 of the mixture would be nobody's"),
    ([{"max_share": 50}, {}], None, "max_share is 50; give a share of the mixture, above 0 to 1"),
    ([{"max_share": 0}, {}], None, "max_share must be a positive number"),
    ([{"epochs": "2"}, {}], None, "epochs must be a positive number, got '2'"),
]  # fmt: skip


@pytest.mark.parametrize("entries, temperature, said", CONTRADICTIONS, ids=[said[:30] for _, _, said in CONTRADICTIONS])
def test_contradictions_are_one_line(
    three: list[str], entries: list[dict], temperature: float | None, said: str
) -> None:
    specs = [{"path": path, **entry} for path, entry in zip(three, entries, strict=False)]
    with pytest.raises(UserError, match=said) as caught:
        load(specs, phase="sft", temperature=temperature)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_order_is_the_same_whatever_the_ranks_and_the_process(three: list[str]) -> None:
    specs = [{"path": path, "epochs": 1.5} for path in three]
    mine = load(specs, phase="sft", seed=5, temperature=3)
    code = f"from align_kit.data.load import load; print(load({specs!r}, phase='sft', seed=5, temperature=3).digest)"
    for ranks in ("1", "8"):
        world = {**os.environ, "WORLD_SIZE": ranks, "RANK": "0", "LOCAL_RANK": "0", "PYTHONHASHSEED": ranks}
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=world)
        assert said.stdout.strip() == mine.digest
    assert load(specs, phase="sft", seed=6, temperature=3).digest != mine.digest


# --- what a run says --------------------------------------------------------------------------------------------------


def wanted(specs: list[dict], cache: Path, **more: object) -> prepare.Wanted:
    options = TokeniseOptions(max_length=64)
    given = {"phase": "sft", "train": specs, "eval": [], "test_split_size": None, "evaluate": False, "seed": 0,
             "options": options, "cache": cache, **more}  # fmt: skip
    return prepare.Wanted(**given)


def test_the_header_says_what_was_asked_and_what_came_of_it(three: list[str], tmp_path: Path) -> None:
    a, _, c = three
    specs = [{"path": a, "weight": 0.7}, {"path": c, "weight": 0.3, "epochs": 2}]
    made = prepare.prepare(wanted(specs, tmp_path), chat_tokenizer(None))
    assert made.train.mixture() == [
        f"{a} train: 47 rows, 70.1% of all (70.0% asked), 53 of its 100 never seen",
        f"{c} train: 20 rows, 29.9% of all (30.0% asked), 2 epochs, used up: the mixture ends with it",
    ]
    assert json.loads(json.dumps(made.train.account))["sources"][1]["epochs"] == 2
    assert mixture.lines(load([{"path": a}], phase="sft").as_dict()["sources"]) == []


def test_a_temperature_reaches_the_rows_to_train_on(three: list[str], tmp_path: Path) -> None:
    specs = [{"path": path} for path in three]
    flat = prepare.prepare(wanted(specs, tmp_path, temperature=1e9), chat_tokenizer(None))
    assert [one["rows"] for one in flat.train.account["sources"]] == [10, 10, 10]


def test_repeated_rows_are_not_held_out(three: list[str], tmp_path: Path) -> None:
    asked = wanted([{"path": three[0], "epochs": 2}], tmp_path, test_split_size=0.1)
    with pytest.raises(UserError, match="epochs repeats its rows, so test_split_size would hold out rows"):
        prepare.prepare(asked, chat_tokenizer(None))

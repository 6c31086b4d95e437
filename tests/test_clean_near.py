"""Near duplicates: signatures that estimate, bands that find, likeness that is verified, and decisions that hold."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_kit.clean import near, signatures
from align_kit.clean.overlap import Held, Overlap
from align_kit.clean.signatures import SHINGLE, bands, jaccard, padded, runs, shingles, signed
from align_kit.clean.words import is_spaceless, row_digest, tokens, words

FEW = st.lists(st.sampled_from("abc"), max_size=30)  # few words, so that runs repeat


def noisy(drawn: random.Random, words_: list[str], share: float) -> list[str]:
    return [f"n{drawn.randrange(10**9)}" if drawn.random() < share else word for word in words_]


def many(drawn: random.Random, length: int = 150) -> list[str]:
    return [f"w{drawn.randrange(10**6)}" for _ in range(length)]


# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, found",
    [
        ("It's 2 + 2, no?", ["it", "'", "s", "2", "+", "2", ",", "no", "?"]),
        ("ＦＵＬＬ width", ["full", "width"]),
        ("cafe\u0301 CAFÉ", ["café", "café"]),
        ("我喜欢 rice飯", ["我", "喜", "欢", "rice", "飯"]),
        ("ภาษา", ["ภ", "า", "ษ", "า"]),
        ("", []),
    ],
)
def test_tokens_are_folded_for_comparing(text: str, found: list[str]) -> None:
    assert tokens(text) == found
    assert words(text) == [token for token in found if token not in "'+,?"]


def test_scripts_without_spaces_are_told() -> None:
    assert is_spaceless("这是一个没有空格的句子。") and not is_spaceless("Ein Satz über Grün") and not is_spaceless("")


def test_rows_are_one_whatever_their_white_space_and_unicode_form() -> None:
    row = {"messages": [{"role": "user", "content": "Café  au\nlait"}], "tools": None}
    same = {"tools": None, "messages": [{"content": " Cafe\u0301 au lait", "role": "user"}]}
    assert row_digest(row) == row_digest(same)
    assert row_digest(row) != row_digest({**row, "messages": [{"role": "user", "content": "café au lait"}]})


# --- runs and signatures ------------------------------------------------------------------------------------------


@given(st.lists(FEW, max_size=6), st.integers(1, 6))
def test_runs_are_those_of_each_text_alone(texts: list[list[str]], length: int) -> None:
    hashes, text_of = runs(texts, length)
    alone = [runs([text], length)[0].tolist() for text in texts]
    assert hashes.tolist() == list(itertools.chain.from_iterable(alone))
    assert text_of.tolist() == [number for number, found in enumerate(alone) for _ in found]
    seen: dict[int, tuple[str, ...]] = {}
    for text, found in zip(texts, alone, strict=True):
        for place, value in enumerate(found):
            assert seen.setdefault(value, tuple(text[place : place + length])) == tuple(text[place : place + length])


@given(FEW, FEW)
def test_jaccard_is_that_of_the_sets(one: list[str], other: list[str]) -> None:
    mine, its = shingles(one), shingles(other)
    expected = len(mine & its) / len(mine | its)
    assert jaccard(mine, its) == jaccard(its, mine) == expected
    assert jaccard(mine, mine) == 1.0
    assert mine == {tuple(padded(one)[at : at + SHINGLE]) for at in range(max(1, len(one) - SHINGLE + 1))}


def test_least_hashes_estimate_jaccard() -> None:
    """The share of equal minima has the expectation J and the deviation sqrt(J (1 - J) / 128) (Broder 1997)."""
    drawn = random.Random(0)
    errors = []
    for _ in range(150):
        one = many(drawn)
        other = noisy(drawn, one, drawn.choice((0.01, 0.03, 0.1)))
        found, row_of = runs([one, other], SHINGLE)
        least = signatures._minima(found, np.array([0, int((row_of == 0).sum())]), seed=3)
        true = jaccard(shingles(one), shingles(other))
        deviation = max(true * (1 - true) / signatures.PERMUTATIONS, 1e-9) ** 0.5
        errors.append(((least[0] == least[1]).mean() - true) / deviation)
    assert abs(np.mean(errors)) < 0.3 and 0.7 < np.std(errors) < 1.3


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    number, rows = bands(threshold)
    assert 1 - (1 - threshold**rows) ** number >= signatures.RECALL and number * rows <= signatures.PERMUTATIONS
    drawn, met, asked = random.Random(1), 0, 0
    first, second, alike = [], [], []
    for _ in range(600):
        one = many(drawn)
        other = noisy(drawn, one, drawn.uniform(0, 0.15))
        first.append([one])
        second.append([other])
        alike.append(jaccard(shingles(one), shingles(other)))
    ours, theirs = (signed(side, [0] * 600, threshold) for side in (first, second))
    for row, value in enumerate(alike):
        if value >= threshold:
            asked += 1
            met += bool((ours[row] == theirs[row]).any())
    assert asked > 40 and met / asked > 0.98


def test_parts_and_tags_tell_rows_apart() -> None:
    one, other = many(random.Random(0)), many(random.Random(1))
    keys = signed([[one, other], [other, one], [one, other], [one, other]], [0, 0, 0, 1], 0.8)
    assert (keys[0] == keys[2]).all()
    assert not (keys[0] == keys[1]).any() and not (keys[0] == keys[3]).any()


def test_signatures_are_the_same_in_every_process() -> None:
    code = (
        "from align_kit.clean.signatures import signed\n"
        "print(signed([['a b c d e f g'.split()], [['x']]], [0, 0], 0.8, seed=5).tolist())"
    )
    asked = {"capture_output": True, "text": True, "check": True}
    said = {subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, **asked).stdout for seed in "12"}
    assert len(said) == 1 and said.pop().startswith("[[")


# --- decisions ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), max_size=30))
def test_exact_twins_are_all_but_the_first(values: list[int]) -> None:
    digests = np.array([[value, 7] for value in values], np.uint64).reshape(-1, 2)
    expected = {row: values.index(value) for row, value in enumerate(values) if values.index(value) < row}
    assert near.exact_twins(digests) == expected


@settings(max_examples=60)
@given(st.lists(FEW, min_size=1, max_size=25), st.sampled_from([0.5, 0.8, 1.0]), st.data())
def test_near_twins_are_what_comparing_all_with_all_gives(
    texts: list[list[str]], threshold: float, data: st.DataObject
) -> None:
    """A row goes where a kept earlier row is alike, and only there, among all that met in a band."""
    dropped = set(data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=3)))
    keys = signed([[text] for text in texts], [0] * len(texts), threshold)
    sets = [shingles(text) for text in texts]

    def likeness(one: int, other: int) -> float:
        return jaccard(sets[one], sets[other])

    found = near.near_twins(keys, dropped, likeness, threshold)
    kept: list[int] = []
    for row in range(len(texts)):
        if row in dropped:
            assert row not in found
            continue
        met = [one for one in kept if (keys[row] == keys[one]).any() and likeness(row, one) >= threshold]
        assert (row in found) == bool(met)
        if met:
            twin, alike = found[row]
            assert twin in met and alike == likeness(row, twin)
        else:
            kept.append(row)


def test_of_a_chain_both_ends_stay() -> None:
    base = many(random.Random(0), 100)
    chain = [base, [*base[10:], *many(random.Random(1), 10)], [*base[20:], *many(random.Random(1), 20)]]
    sets = [shingles(text) for text in chain]
    assert jaccard(sets[0], sets[1]) > 0.75 < jaccard(sets[1], sets[2]) and jaccard(sets[0], sets[2]) < 0.75
    keys = signed([[text] for text in chain], [0] * 3, 0.75)
    found = near.near_twins(keys, set(), lambda one, other: jaccard(sets[one], sets[other]), 0.75)
    assert list(found) == [1] and found[1][0] == 0


def test_a_crowd_in_one_band_stays_linear() -> None:
    rows = 5000
    asked = 0

    def likeness(one: int, other: int) -> float:
        nonlocal asked
        asked += 1
        return 0.1

    keys = np.zeros((rows, 1), np.uint64)
    assert near.near_twins(keys, set(), likeness, 0.8) == {}
    assert asked <= rows * near.TRIED


# --- overlap ------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abcd"), min_size=13, max_size=40), st.lists(st.sampled_from("abcd"), max_size=60))
def test_overlap_is_a_run_of_thirteen_words(held: list[str], text: list[str]) -> None:
    known = {tuple(held[at : at + 13]) for at in range(len(held) - 12)}
    mine = [tuple(text[at : at + 13]) for at in range(len(text) - 12)]
    before = "other words before it " * 5
    nothing, found = Overlap("test", [Held(" ".join(held), "row 1")]).find([before, " ".join(text)])
    assert nothing is None
    first = next((run for run in mine if run in known), None)
    assert found == (None if first is None else f"row 1: {' '.join(first)}")


def test_the_last_words_of_an_index_do_not_run_over() -> None:
    index = Overlap("test", [])
    assert index.find(["any text"]) == [None] and len(index) == 0
    assert Overlap("test", [Held("a b", "here", is_question=False)]).find(["a b"]) == [None]

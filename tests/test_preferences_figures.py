"""Figures of preferences against their definitions: alpha, flips, similarity, intervals, correlations."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_kit.errors import UserError
from align_kit.preferences import alpha as reliability
from align_kit.preferences import flips
from align_kit.preferences.alpha import Scale, Tally, alpha
from align_kit.preferences.measures import pair_key, point_biserial, ranked_right, similarity, wilson, words

# Krippendorff 2011, section C: four observers, twelve units, * for a missing vote; his alphas are 0.743, 0.815, 0.849.
PUBLISHED = """1 2 3 3 2 1 4 1 2 * * *
1 2 3 3 2 2 4 1 2 5 * 3
* 3 3 3 2 3 4 2 2 5 1 *
1 2 3 3 2 4 4 1 2 5 1 *"""
UNITS = [[vote for vote in unit if vote != "*"] for unit in zip(*map(str.split, PUBLISHED.splitlines()), strict=True)]
votes = st.lists(st.lists(st.sampled_from("12345"), min_size=0, max_size=5), min_size=1, max_size=12)


def defined(units: list[list[str]], level: str) -> float | None:
    """Return alpha by its definition: mean distance within units, over that of any two votes of pairable units."""
    units = [unit for unit in units if len(unit) > 1]
    every = [int(vote) for unit in units for vote in unit]
    count = Counter(every)

    def distance(a: int, b: int) -> float:
        if level == "nominal":
            return float(a != b)
        if level == "interval":
            return float(a - b) ** 2
        low, high = sorted((a, b))
        return (sum(count[value] for value in range(low, high + 1)) - (count[low] + count[high]) / 2) ** 2

    if not every:
        return None
    observed = sum(
        sum(distance(int(a), int(b)) for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units
    ) / len(every)
    expected = sum(distance(a, b) for a, b in itertools.permutations(every, 2)) / (len(every) * (len(every) - 1))
    return None if expected == 0 else 1 - observed / expected


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_as_published(level: str, published: float) -> None:
    found = alpha(Tally.of(UNITS), Scale(level))
    assert found.alpha == pytest.approx(published, abs=5e-4)
    assert found.units == 11 and found.votes == 40  # one unit has a single vote
    assert found.low < found.alpha < found.high


@given(votes, st.sampled_from(reliability.LEVELS))
def test_alpha_is_what_its_definition_says(units: list[list[str]], level: str) -> None:
    found, expected = alpha(Tally.of(units), Scale(level)), defined(units, level)
    assert (found.alpha is None) == (expected is None)
    assert expected is None or found.alpha == pytest.approx(expected, abs=1e-9)
    assert (found.alpha is None) == bool(found.why)


@settings(max_examples=40)
@given(votes, st.sampled_from(reliability.LEVELS), st.randoms(use_true_random=False))
def test_alpha_does_not_see_who_voted_nor_the_order_of_rows(
    units: list[list[str]], level: str, draw: random.Random
) -> None:
    before = alpha(Tally.of(units), Scale(level)).alpha
    mixed = [draw.sample(unit, len(unit)) for unit in draw.sample(units, len(units))]
    assert alpha(Tally.of(mixed), Scale(level)).alpha == (None if before is None else pytest.approx(before, abs=1e-9))


@settings(max_examples=40)
@given(st.lists(st.sampled_from("abc"), min_size=2), st.integers(2, 4))
def test_perfect_agreement_is_one(values: list[str], annotators: int) -> None:
    found = alpha(Tally.of([value] * annotators for value in values))
    assert found.alpha == (1 if len(set(values)) > 1 else None)
    assert found.unanimous == found.units == len(values)


def test_the_interval_covers_the_truth() -> None:
    """Two annotators of one coin, right with 0.9, labels even: alpha is 1 - 0.18 / 0.5."""
    draw, covered = random.Random(0), 0
    for trial in range(40):
        units = []
        for _ in range(200):
            truth = draw.random() < 0.5
            units.append([str(truth != (draw.random() < 0.1)) for _ in range(2)])
        found = alpha(Tally.of(units), seed=trial)
        covered += found.low <= 1 - 0.18 / 0.5 <= found.high
    assert covered >= 34  # 38 expected; fewer than 34 with probability 0.01


def test_alpha_of_real_annotators(real_data: Path) -> None:
    text = (real_data / "xstest/completions_human_labelled.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    pairs = [(row["annotation_1"], row["annotation_2"]) for row in rows]
    found = alpha(Tally.of(pairs))
    assert round(found.alpha, 3) == 0.937  # of the three labels as they are
    assert round(alpha(Tally.of([(a[0] == "1", b[0] == "1") for a, b in pairs])).alpha, 3) == 0.957  # refused or not
    assert found.unanimous == sum(row["agreement"] == "TRUE" for row in rows) == 2169


def test_alpha_has_no_interval_of_a_few_rows() -> None:
    few = alpha(Tally.of([["a", "b"], ["a", "a"]] * 2))
    assert few.alpha is not None and few.low is few.high is None


SCALES = [
    ({"level": "cardinal"}, [["1", "2"]], "unknown level of measurement 'cardinal'.*did you mean 'ordinal'"),
    ({"level": "interval"}, [["low", "high"]], "the vote 'high' is no number, which level interval needs, or use"),
    ({"level": "interval"}, [["1", "inf"]], "the vote 'inf' is no number"),
    ({"level": "ordinal"}, [["low", "high"]], "'high' is no number.*ordinal:low,middle,high"),
    ({"level": "ordinal", "order": ("low", "high")}, [["low", "mid"]], "unknown value on the ordinal scale 'mid'"),
    ({"level": "ordinal", "order": ("low", "low")}, [["low", "low"]], "names a value twice"),
    ({"level": "nominal", "order": ("low", "high")}, [["low", "low"]], "has no order of values"),
    ({}, [[f"text {n}", f"other {n}"] for n in range(100)], "hold 200 different values.*more than the 128"),
]


@pytest.mark.parametrize(("scale", "units", "message"), SCALES)
def test_values_that_do_not_fit_the_scale(scale: dict, units: list[list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        alpha(Tally.of(units), Scale(**scale))


def test_words_in_order_are_ranks() -> None:
    units = [["low", "middle"], ["middle", "high"], ["low", "low"], ["high", "high"]]
    ranks = {"low": "1", "middle": "2", "high": "3"}
    spelt = alpha(Tally.of(units), Scale("ordinal", ("low", "middle", "high")))
    numbered = alpha(Tally.of([[ranks[vote] for vote in unit] for unit in units]), Scale("ordinal"))
    assert spelt.alpha == numbered.alpha and spelt.values == ("low", "middle", "high")


# --- flips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [2, 3, 5])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_the_error_of_a_vote_is_found_from_disagreement(labels: int, rate: float) -> None:
    agree = (1 - rate) ** 2 + rate**2 / (labels - 1)
    assert flips.vote_error(1 - agree, labels) == pytest.approx(rate)
    covered = 0
    for seed in range(20):
        draw = random.Random(seed)
        rows = [
            [str((truth + (draw.randrange(1, labels) if draw.random() < rate else 0)) % labels) for _ in range(3)]
            for truth in draw.choices(range(labels), k=400)
        ]
        found = flips.from_votes(Tally.of(rows), "a vote", "")
        covered += found.low <= rate <= found.high
        assert found.rows == 400 and found.high - found.low < 0.2
    assert covered >= 17  # 19 expected; the interval is a little too wide


def test_disagreement_beyond_chance_is_chance() -> None:
    assert flips.vote_error(0.9, 2) == 0.5 and flips.vote_error(1.0, 4) == 0.75
    assert flips.from_votes(Tally.of([["a", "a"]] * 9), "a vote", "") is None  # one label: nothing to be wrong for


@given(st.floats(0, 0.5), st.integers(1, 9))
def test_the_error_of_a_majority(rate: float, voters: int) -> None:
    whole = 0.0
    for wrong in itertools.product([False, True], repeat=voters):
        chance = math.prod(rate if one else 1 - rate for one in wrong)
        whole += chance * (0.5 if 2 * sum(wrong) == voters else 2 * sum(wrong) > voters)
    assert flips.majority_error(rate, voters) == pytest.approx(whole)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25])
def test_planted_flips_are_found_from_margins(rate: float) -> None:
    """Labels drawn as Bradley and Terry say of a quality gap, then flipped; the scores are the gap on another scale."""
    covered = 0
    for seed in range(8):
        draw = np.random.default_rng(seed)
        gap = draw.normal(0, 3, 2000)
        right = draw.random(2000) < 1 / (1 + np.exp(-gap))
        label = right ^ (draw.random(2000) < rate)
        found = flips.from_margins(7 * np.where(label, gap, -gap))
        covered += found.low <= rate <= found.high
        assert abs(found.rate - rate) < 0.06
    assert covered >= 6  # nearly 8 expected; fewer than 6 with probability 0.006


def test_margins_that_say_nothing_have_no_estimate() -> None:
    assert flips.from_margins([]) is None and flips.from_margins([0.0, 0.0, 0.0]) is None
    blind = flips.from_margins(np.random.default_rng(0).normal(0, 1, 500))
    assert blind.high == 0.5  # scores by chance cannot rule out that labels are by chance


# --- measures ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abd"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_similarity_is_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    rows = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, j in itertools.product(range(len(one)), range(len(other))):
        rows[i + 1][j + 1] = rows[i][j] + 1 if one[i] == other[j] else max(rows[i][j + 1], rows[i + 1][j])
    expected = 2 * rows[-1][-1] / (len(one) + len(other)) if one or other else 1.0
    assert similarity(one, other) == similarity(other, one) == expected


def test_words_of_scripts_with_and_without_spaces() -> None:
    assert words("It's 3.5, ok?") == ["It", "'", "s", "3", ".", "5", ",", "ok", "?"]
    assert words("東京は\tTokyo です") == ["東", "京", "は", "Tokyo", "で", "す"]


def test_a_pair_is_known_in_both_orders() -> None:
    key, reverse = pair_key("q", ["b", "a"])
    assert pair_key(" q\r\n", ["a\n", "b"]) == (key, not reverse)
    assert pair_key("q", ["a", "  b"])[0] == key
    assert pair_key("q", ["a", "x\n  b"])[0] != pair_key("q", ["a", "x\nb"])[0]
    assert pair_key("qa", ["b", "c"])[0] != pair_key("q", ["ab", "c"])[0]


def test_the_interval_of_a_share() -> None:
    """Both ends solve Wilson's equation, (p - share)^2 = z^2 p (1 - p) / n."""
    for part, whole in ((0, 10), (3, 10), (500, 1000), (10, 10)):
        share = part / whole
        for end in wilson(share, whole):
            assert (end - share) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / whole, abs=1e-12)
    assert wilson(0.0, 0) == (0.0, 1.0)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_correlation_and_ranks_by_their_definitions(yes: list[int], no: list[int]) -> None:
    arrays = np.array(yes, dtype=float), np.array(no, dtype=float)
    better = sum((a > b) + (a == b) / 2 for a, b in itertools.product(yes, no)) / (len(yes) * len(no))
    assert ranked_right(*arrays) == pytest.approx(better)
    found = point_biserial(*arrays)
    if len({*yes, *no}) == 1:
        assert found is None
    else:
        assert found == pytest.approx(np.corrcoef([*yes, *no], [1] * len(yes) + [0] * len(no))[0, 1])

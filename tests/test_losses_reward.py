"""The Bradley-Terry loss and what is said of a reward model, against the papers' equations in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align_kit.losses import CALIBRATION_BINS, calibration_error, calibration_tallies, reward_loss, reward_metrics

score = st.floats(-100, 100, allow_nan=False, width=32)
pairs = st.lists(st.tuples(score, score), min_size=1, max_size=30)


def sides(found: list[tuple[float, float]], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    chosen_B, rejected_B = torch.tensor(found, dtype=dtype).unbind(1)
    return chosen_B, rejected_B


def means(found: list[tuple[float, float]]) -> dict[str, float]:
    return {name: float(tally.mean) for name, tally in reward_metrics(*sides(found)).items()}


def measured_error(found: list[tuple[float, float]]) -> float:
    """Return the calibration error as a run computes it: sums over batches, then the sum over bins."""
    return calibration_error({name: float(t.mean) for name, t in calibration_tallies(*sides(found)).items()})


# --- the loss ---------------------------------------------------------------------------------------------


@given(pairs, st.sampled_from([0.0, 0.01, 1.0]))
def test_loss_is_the_papers(found: list[tuple[float, float]], center: float) -> None:
    """-log of e^c / (e^c + e^r), the form of Bradley and Terry, computed with Python's own floats."""
    expected = 0.0
    for chosen, rejected in found:
        high = max(chosen, rejected)
        expected += high + math.log(math.exp(chosen - high) + math.exp(rejected - high)) - chosen
        expected += center * (chosen + rejected) ** 2
    loss_B = reward_loss(*sides(found), center=center)
    assert float(loss_B.sum()) == pytest.approx(expected, rel=1e-9, abs=1e-9) and len(loss_B) == len(found)


def test_equal_scores_are_a_coin() -> None:
    loss_B = reward_loss(torch.zeros(3), torch.zeros(3), center=5.0)
    assert loss_B.tolist() == pytest.approx([math.log(2)] * 3)


@given(st.floats(-1e4, 1e4), st.sampled_from([0.0, 0.01]))
def test_gradient_is_the_papers_and_finite(margin: float, center: float) -> None:
    """d loss / d chosen = -sigmoid(-margin) + 2 center (chosen + rejected), whatever the margin, in fp32."""
    chosen_B = torch.tensor([margin], requires_grad=True)
    rejected_B = torch.zeros(1, requires_grad=True)
    reward_loss(chosen_B, rejected_B, center=center).sum().backward()
    wrong = 1 / (1 + math.exp(min(margin, 700)))
    for side_B, sign in ((chosen_B, -1), (rejected_B, 1)):
        assert float(side_B.grad) == pytest.approx(sign * wrong + 2 * center * margin, rel=1e-4, abs=1e-6)  # type: ignore[arg-type]


def test_centring_fixes_the_constant_and_nothing_else() -> None:
    """Scores moved by a constant cost the same without it; with it, least where their sum is 0."""
    chosen_B, rejected_B = torch.tensor([1.0]), torch.tensor([-1.0])
    moved = [float(reward_loss(chosen_B + by, rejected_B + by, center=0.1).sum()) for by in (-2.0, 0.0, 2.0)]
    plain = [float(reward_loss(chosen_B + by, rejected_B + by).sum()) for by in (-2.0, 0.0, 2.0)]
    assert plain == pytest.approx([plain[0]] * 3) and moved[1] == min(moved) == pytest.approx(plain[0])


def test_half_precision_scores_are_widened() -> None:
    chosen_B, rejected_B = sides([(1000.0, 999.0)], torch.bfloat16)
    assert reward_loss(chosen_B, rejected_B).sum().dtype == torch.float32


def test_a_batch_of_repeats_gives_zeros_and_a_gradient() -> None:
    """Nothing that counts: the graph must still reach the model, which runs for the other ranks' sake."""
    chosen_B = torch.ones(2, requires_grad=True)
    total = reward_loss(chosen_B[:0], torch.ones(0), center=0.1).sum()
    total.backward()
    assert total.item() == 0 and chosen_B.grad is not None and not chosen_B.grad.any()
    tallies = {**reward_metrics(chosen_B[:0], torch.ones(0)), **calibration_tallies(chosen_B[:0], torch.ones(0))}
    assert all(total == 0 and count == 0 for total, count in tallies.values())


# --- what is said of it -----------------------------------------------------------------------------------


def test_metrics_of_a_hand_worked_case() -> None:
    found = means([(2.0, 0.0), (1.0, 3.0), (0.5, 0.5), (3.0, 1.0)])
    right, wrong = 1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(2.0))
    assert found == pytest.approx({
        "accuracy": 0.5, "margin": 0.5, "mean_reward": 11 / 8, "rewards/chosen": 6.5 / 4, "rewards/rejected": 4.5 / 4,
        "brier_score": (2 * (1 - right) ** 2 + (1 - wrong) ** 2 + 0.25) / 4,
    })  # fmt: skip


@given(pairs)
def test_calibration_error_is_the_papers(found: list[tuple[float, float]]) -> None:
    """Guo 2017, eq. 3, bin by bin: its share of the pairs times |accuracy - mean confidence|."""
    binned: list[list[tuple[float, float]]] = [[] for _ in CALIBRATION_BINS]
    for chosen, rejected in found:
        confidence = 1 / (1 + math.exp(-abs(chosen - rejected)))
        right = 0.5 if chosen == rejected else float(chosen > rejected)
        place = min(int((2 * confidence - 1) * len(binned)), len(binned) - 1)
        binned[place].append((right, confidence))
    expected = sum(
        len(bin) / len(found) * abs(sum(r for r, _ in bin) / len(bin) - sum(c for _, c in bin) / len(bin))
        for bin in binned if bin
    )  # fmt: skip
    assert measured_error(found) == pytest.approx(expected, abs=1e-9) and 0 <= expected <= 1


def test_calibration_of_honest_and_of_boastful_scores() -> None:
    """Right three times in four: a margin of ln 3 says so, one of 20 says it is certain; ties say nothing."""
    honest = [(math.log(3), 0.0)] * 3 + [(0.0, math.log(3))]
    boastful = [(20.0, 0.0)] * 3 + [(0.0, 20.0)]
    assert measured_error(honest) == pytest.approx(0, abs=1e-12)
    assert measured_error(boastful) == pytest.approx(0.25, abs=1e-6)
    assert measured_error([(1.0, 1.0)] * 4) == 0


@given(pairs, st.integers(0, 30))
def test_batches_add_up(found: list[tuple[float, float]], cut: int) -> None:
    """Sums over two batches are those of one: nothing is a mean of means."""
    whole = {**reward_metrics(*sides(found)), **calibration_tallies(*sides(found))}
    chosen_B, rejected_B = sides(found)
    parts = [
        {**reward_metrics(c, r), **calibration_tallies(c, r)}
        for c, r in ((chosen_B[:cut], rejected_B[:cut]), (chosen_B[cut:], rejected_B[cut:]))
    ]
    for name, (total, count) in whole.items():
        assert float(parts[0][name].total + parts[1][name].total) == pytest.approx(float(total), rel=1e-9, abs=1e-9)
        assert parts[0][name].items + parts[1][name].items == count


def test_a_broken_score_shows() -> None:
    chosen_B = torch.tensor([float("nan"), 1.0])
    assert math.isnan(float(reward_loss(chosen_B, torch.zeros(2)).sum()))
    gaps = {name: float(tally.mean) for name, tally in calibration_tallies(chosen_B, torch.zeros(2)).items()}
    assert math.isnan(calibration_error(gaps))

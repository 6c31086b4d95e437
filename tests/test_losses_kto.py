"""KTO's losses by the paper's equations in float64, at extremes, and without one of the classes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align_kit.losses import UnpairedOutput, baseline_of, class_weights, kto_loss, kto_metrics

LABELS = torch.tensor([True, False, False, True, False])
POLICY = torch.tensor([-10.0, -7.0, -31.0, -5.5, -12.0], dtype=torch.float64)
REFERENCE = torch.tensor([-12.0, -6.5, -30.0, -9.0, -17.0], dtype=torch.float64)


def loss(policy_B: Tensor, reference_B: Tensor, label_B: Tensor, **options: Any) -> UnpairedOutput:
    given = {"baseline": 0.7, "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5, **options}
    return kto_loss(policy_B, reference_B, label_B, **given)


def test_the_papers_equations() -> None:
    def value(ratio: float, good: bool) -> float:
        gain = ratio - 0.7 if good else 0.7 - ratio
        return (1.5 if good else 0.5) / (1 + math.exp(-0.3 * gain))

    ratios = (POLICY - REFERENCE).tolist()
    expected = [
        (1.5 if good else 0.5) - value(ratio, good) for ratio, good in zip(ratios, LABELS.tolist(), strict=True)
    ]
    assert loss(POLICY, REFERENCE, LABELS).loss_B.tolist() == pytest.approx(expected, rel=1e-12)


def test_where_policy_and_reference_are_one() -> None:
    """Half of each row's weight, and a gradient that pulls the classes apart: a quarter of beta times the weight."""
    policy_B = POLICY.clone().requires_grad_()
    output = loss(policy_B, POLICY, LABELS, baseline=0.0)
    assert output.loss_B.tolist() == pytest.approx([0.75, 0.25, 0.25, 0.75, 0.25])
    output.loss_B.sum().backward()
    assert policy_B.grad is not None
    assert policy_B.grad.tolist() == pytest.approx([0.3 / 4 * w for w in (-1.5, 0.5, 0.5, -1.5, 0.5)])


@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.booleans()), min_size=1, max_size=6), st.floats(0, 1e4))
def test_finite_and_bounded_at_extremes(rows: list[tuple[float, bool]], baseline: float) -> None:
    """In fp32 every loss lies between 0 and its weight, and no gradient is larger than a quarter of beta times it."""
    policy_B = torch.tensor([ratio for ratio, _ in rows], dtype=torch.float32).requires_grad_()
    label_B = torch.tensor([label for _, label in rows])
    output = loss(policy_B, torch.zeros(len(rows)), label_B, baseline=torch.tensor(baseline))
    weight_B = torch.where(label_B, 1.5, 0.5)
    assert ((output.loss_B >= 0) & (output.loss_B <= weight_B)).all()
    output.loss_B.sum().backward()
    assert policy_B.grad is not None and (policy_B.grad.abs() <= weight_B * 0.3 / 4 * 1.001).all()


def test_the_baseline() -> None:
    assert baseline_of(torch.tensor(6.0), torch.tensor(4.0)) == 1.5
    assert baseline_of(torch.tensor(-6.0), torch.tensor(4.0)) == 0, "a divergence is never negative"
    assert baseline_of(torch.tensor(0.0), torch.tensor(0.0)) == 0
    summed = torch.tensor(3.0, requires_grad=True)
    assert not baseline_of(summed, torch.tensor(2.0)).requires_grad


def test_metrics_of_each_class() -> None:
    tallies = kto_metrics(loss(POLICY, REFERENCE, LABELS))
    assert tallies["rewards/chosen"].mean == pytest.approx(0.3 * (2 + 3.5) / 2)
    assert tallies["rewards/rejected"].mean == pytest.approx(0.3 * (-0.5 - 1 + 5) / 3)
    assert tallies["logps/chosen"].total == -15.5 and tallies["logps/rejected"].items == 3


@pytest.mark.parametrize("label", [True, False])
def test_one_class_alone(label: bool) -> None:
    policy_B = POLICY.clone().requires_grad_()
    output = loss(policy_B, REFERENCE, torch.full((5,), label))
    output.loss_B.mean().backward()
    assert policy_B.grad is not None and torch.isfinite(policy_B.grad).all() and policy_B.grad.ne(0).all()
    absent = kto_metrics(output)["rewards/rejected" if label else "rewards/chosen"]
    assert (float(absent.total), int(absent.items)) == (0.0, 0)


def test_a_batch_of_repeats_adds_nothing() -> None:
    policy_B = POLICY.clone().requires_grad_()
    output = loss(policy_B[:0], REFERENCE[:0], LABELS[:0])
    output.loss_B.sum().backward()
    assert policy_B.grad is not None and not policy_B.grad.any()
    assert all((float(total), int(items)) == (0.0, 0) for total, items in kto_metrics(output).values())


@pytest.mark.parametrize(
    ("counts", "weights"),
    [((3000, 1300), (1.0, 3000 / 1300)), ((1, 4), (4.0, 1.0)), ((5, 5), (1.0, 1.0)), ((0, 9), (1.0, 1.0)),
     ((9, 0), (1.0, 1.0))],
)  # fmt: skip
def test_class_weights(counts: tuple[int, int], weights: tuple[float, float]) -> None:
    assert class_weights(*counts) == pytest.approx(weights)
    if all(counts):  # inside the range the paper advises
        assert 1 - 1e-12 <= weights[0] * counts[0] / (weights[1] * counts[1]) <= 4 / 3

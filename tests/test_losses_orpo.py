"""ORPO's loss by the paper's equations in float64, against TRL's own code, and where probabilities are 0 and 1."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from align_kit.losses import OddsOutput, orpo_loss, orpo_metrics
from align_kit.losses.orpo import CERTAIN, log1mexp, log_odds

Sides = tuple[Tensor, Tensor, Tensor, Tensor]


def ragged(rows: int = 6, *, dtype: torch.dtype = torch.float64) -> Sides:
    """Return log-probabilities and masks of chosen (up to 7 tokens) and rejected completions (up to 9)."""
    generator = torch.Generator().manual_seed(0)

    def side(width: int) -> tuple[Tensor, Tensor]:
        logps_BT = -torch.rand(rows, width, generator=generator, dtype=torch.float64) * 3
        length = torch.randint(1, width + 1, (rows, 1), generator=generator)
        return logps_BT.to(dtype).requires_grad_(), (torch.arange(width) < length).long()

    return (*side(7), *side(9))


def one_token(chosen: list[float], rejected: list[float]) -> Sides:
    """Return fp32 pairs of one token a side with these log-probabilities."""
    sides = (torch.tensor(values)[:, None].requires_grad_() for values in (chosen, rejected))
    ones = torch.ones(len(chosen), 1, dtype=torch.long)
    chosen_BT, rejected_BT = sides
    return chosen_BT, ones, rejected_BT, ones


def loss(sides: Sides, beta: float = 0.1, tokens_per_pair: float = 1.0) -> OddsOutput:
    return orpo_loss(*sides, beta=beta, tokens_per_pair=tokens_per_pair)


def test_the_papers_equations() -> None:
    """Pair by pair in plain floats: eq. 6 with the likelihood a mean over the tokens of all pairs."""
    sides, beta = ragged(), 0.3
    values = [
        ([x for x, m in zip(chosen, c_mask, strict=True) if m], [x for x, m in zip(rejected, r_mask, strict=True) if m])
        for chosen, c_mask, rejected, r_mask in zip(*(side.tolist() for side in sides), strict=True)
    ]
    tokens, nll, odds_term = 0, 0.0, 0.0
    for chosen, rejected in values:
        p_w, p_l = (math.exp(sum(side) / len(side)) for side in (chosen, rejected))  # eq. 3
        ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))  # eqs. 4, 5
        odds_term += -math.log(1 / (1 + math.exp(-math.log(ratio))))  # eq. 7
        nll, tokens = nll - sum(chosen), tokens + len(chosen)
    expected = nll / tokens + beta * odds_term / len(values)  # eq. 6
    mean = loss(sides, beta, tokens / len(values)).loss_B.mean()
    assert float(mean.detach()) == pytest.approx(expected, rel=1e-12)


@pytest.fixture(autouse=True)
def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL warns wherever its experimental trainers are imported."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def trl_odds(chosen_B: Tensor, rejected_B: Tensor, beta: float) -> Any:
    """Call TRL's own method, which reads nothing of the trainer but beta and the device."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    return ORPOTrainer.odds_ratio_loss(trainer, chosen_B, rejected_B)


def test_the_odds_term_and_metrics_are_trls() -> None:
    sides = ragged(dtype=torch.float32)
    chosen_B, rejected_B = (
        (logps * mask).sum(1) / mask.sum(1) for logps, mask in (sides[:2], sides[2:])
    )
    terms, chosen_rewards, rejected_rewards, log_odds_ratio, log_odds_chosen = trl_odds(chosen_B, rejected_B, 0.2)
    theirs = torch.autograd.grad(-terms.mean(), [sides[0], sides[2]])
    with_odds, without = loss(sides, 0.2), loss(sides, 0.0)
    mine = torch.autograd.grad((with_odds.loss_B - without.loss_B).mean(), [sides[0], sides[2]])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        expected = {
            "log_odds_ratio": log_odds_ratio,
            "log_odds_chosen": log_odds_chosen,
            "rewards/chosen": chosen_rewards.mean(),
            "rewards/rejected": rejected_rewards.mean(),
            "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float().mean(),
            "logps/chosen": chosen_B.mean(),
            "logps/rejected": rejected_B.mean(),
            "nll_loss": -(sides[0] * sides[1]).sum() / sides[1].sum(),
        }
    found = {name: float(tally.mean) for name, tally in orpo_metrics(with_odds).items()}
    assert found == pytest.approx({name: float(value.detach()) for name, value in expected.items()}, rel=1e-4)


EXTREMES = [0.0, -1e-9, -1e-7, -CERTAIN, -1e-5, -0.3, -math.log(2), -1.0, -20.0, -1e3, -1e5]


@pytest.mark.parametrize("chosen", EXTREMES)
@pytest.mark.parametrize("rejected", EXTREMES)
def test_finite_at_every_probability(chosen: float, rejected: float) -> None:
    """Value and gradient, at 0 exactly too, where TRL's formula has neither."""
    sides = one_token([chosen], [rejected])
    output = loss(sides)
    gradients = torch.autograd.grad(output.loss_B.sum(), [sides[0], sides[2]])
    assert all(torch.isfinite(tensor).all() for tensor in (output.loss_B, output.log_odds_B, *gradients))
    assert gradients[0] <= 0 <= gradients[1], "the chosen side is pushed up, the rejected one down"


def test_trls_formula_has_no_gradient_there() -> None:
    """If this fails, TRL has mended it: the floor here may then be compared with theirs."""
    chosen_B = torch.zeros(1, requires_grad=True)
    terms, *_ = trl_odds(chosen_B, torch.tensor([-1.0]), 0.1)
    assert not torch.isfinite(torch.autograd.grad(terms.sum(), chosen_B)[0]).all()


@given(st.floats(-60, -2 * CERTAIN))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_log_odds_in_fp32(logp: float) -> None:
    """Against the exact value in float64 for what fp32 holds of the log-probability."""
    held = float(torch.tensor(logp))
    exact = held - (math.log(-math.expm1(held)) if held > -math.log(2) else math.log1p(-math.exp(held)))
    assert float(log_odds(torch.tensor([logp]))) == pytest.approx(exact, rel=2e-6, abs=2e-6)


def test_log1mexp_is_exact_in_float64() -> None:
    logps_B = torch.tensor([-1e-5, -0.1, -0.6931, -0.6932, -5.0, -40.0], dtype=torch.float64)
    expected = [math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x)) for x in logps_B.tolist()]
    torch.testing.assert_close(log1mexp(logps_B), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("side", ["chosen", "rejected", "both"])
def test_a_side_without_tokens_has_no_odds(side: str) -> None:
    """Padding holds NaN: nothing of it reaches the loss, and the other pairs are as without that pair."""
    sides = [tensor.detach().clone() for tensor in ragged()]
    for name, place in (("chosen", 0), ("rejected", 2)):
        if side in (name, "both"):
            sides[place + 1][2] = 0
            sides[place][2] = float("nan")
    for place in (0, 2):
        sides[place].requires_grad_()
    output = loss((sides[0], sides[1], sides[2], sides[3]), tokens_per_pair=2.0)
    expected = 0.0 if side != "rejected" else float(output.nll_B[2] / 2)
    assert float(output.loss_B[2].detach()) == pytest.approx(expected) and output.log_odds_B[2] == 0
    output.loss_B.sum().backward()
    assert all(torch.isfinite(sides[place].grad).all() for place in (0, 2))  # type: ignore[arg-type]
    whole = loss(ragged(), tokens_per_pair=2.0).loss_B
    torch.testing.assert_close(output.loss_B[3:], whole[3:])


def test_a_batch_of_repeats_adds_nothing() -> None:
    """Zero pairs: a sum of zero with a gradient of zero, and metrics of zero out of zero."""
    sides = ragged()
    none = loss((sides[0][:0], sides[1][:0], sides[2][:0], sides[3][:0]))
    none.loss_B.sum().backward()
    assert sides[0].grad is not None and not sides[0].grad.any()
    assert all((float(total), int(items)) == (0.0, 0) for total, items in orpo_metrics(none).values())


def test_the_sum_does_not_depend_on_the_cut() -> None:
    sides = ragged()
    tokens_per_pair = float(sides[1].sum() / len(sides[1]))
    whole = loss(sides, tokens_per_pair=tokens_per_pair).loss_B.sum()
    parts = [
        loss((sides[0][a:b], sides[1][a:b], sides[2][a:b], sides[3][a:b]), tokens_per_pair=tokens_per_pair)
        for a, b in ((0, 1), (1, 4), (4, 6))
    ]
    torch.testing.assert_close(sum(part.loss_B.sum() for part in parts), whole)

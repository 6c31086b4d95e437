"""The pieces of PPO by hand, against plain loops written from the papers, and at their extremes."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from align_kit.errors import UserError
from align_kit.losses import (
    KL_ESTIMATORS,
    AdaptiveKL,
    FixedKL,
    RunningMoments,
    explained_variance,
    gae,
    policy_loss,
    shaped_rewards,
    token_kl,
    value_loss,
    whiten,
)

NAN = float("nan")
Rows = list[list[float]]

# ---- ragged rows: what stands in the masked places is NaN, so whoever reads it shows


class Ragged(NamedTuple):
    """Rows of valid tokens and how far each is shifted right; `padded` sets any other numbers in the same places."""

    rows: Rows
    left: list[int]
    width: int

    def padded(self, rows: Rows | None = None, fill: float = NAN, dtype: torch.dtype = torch.float64) -> Tensor:
        table = torch.full((len(self.rows), self.width), fill, dtype=dtype)
        for b, (row, start) in enumerate(zip(self.rows if rows is None else rows, self.left, strict=True)):
            table[b, start : start + len(row)] = torch.tensor(row, dtype=dtype)
        return table

    @property
    def mask(self) -> Tensor:
        return ~self.padded([[0.0] * len(row) for row in self.rows]).isnan()

    def like(self, seed: int, scale: float = 1.0) -> Rows:
        """Return random numbers in the shape of the rows."""
        random = np.random.default_rng(seed)
        return [(scale * random.standard_normal(len(row))).tolist() for row in self.rows]


@st.composite
def ragged(draw: st.DrawFn, largest: float = 50.0) -> Ragged:
    """One to four rows of 0 to 5 valid tokens, with 0 to 3 masked places on either side."""
    number = st.floats(-largest, largest, allow_subnormal=False)
    rows = draw(st.lists(st.lists(number, max_size=5), min_size=1, max_size=4))
    left = [draw(st.integers(0, 3)) for _ in rows]
    needed = max(start + len(row) for start, row in zip(left, rows, strict=True))
    return Ragged(rows, left, needed + draw(st.integers(0, 3)))


def valid(table: Tensor, mask: Tensor) -> Rows:
    """Return the valid tokens of each row, after checking that nothing but 0 stands elsewhere."""
    assert (table[~mask] == 0).all()
    return [row[keep].tolist() for row, keep in zip(table, mask, strict=True)]


def close(ours: Rows, theirs: Rows, relative: float = 1e-9, absolute: float = 1e-9) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(reference, rel=relative, abs=absolute)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


# ---- the penalty


def test_kl_estimators_by_hand() -> None:
    logps, reference = row(-1.0, -2.0, -3.0), row(-1.0, -3.0, -2.5)
    assert token_kl(logps, reference, "k1").tolist() == [[0.0, 1.0, -0.5]]
    expected = [0.0, math.exp(-1) - 1 + 1, math.exp(0.5) - 1 - 0.5]
    assert token_kl(logps, reference, "k3")[0].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_both_estimators_are_unbiased(estimator: str) -> None:
    """Weighed by p over a whole vocabulary, either gives sum p log(p / q)."""
    p, q = (torch.randn(1, 50, generator=torch.Generator().manual_seed(seed)).double().softmax(1) for seed in (0, 1))
    estimate = (p * token_kl(p.log(), q.log(), estimator)).sum().item()
    assert estimate == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-12)


@given(st.floats(-50, 50, width=32))
@example(float(np.float32(1e-4)))
@example(float(np.float32(-1e-6)))
def test_k3_in_fp32_keeps_its_digits_and_its_sign(log_ratio: float) -> None:
    """Near 0 it is half the square of the log-ratio, which exp(x) - 1 - x would bury in rounding."""
    value = token_kl(torch.tensor([[log_ratio]]), torch.zeros(1, 1), "k3").item()
    assert value >= 0
    last_digit = 1.2e-7 * abs(log_ratio)  # of expm1, from which the log-ratio is taken
    assert value == pytest.approx(math.expm1(-log_ratio) + log_ratio, rel=1e-5, abs=last_digit)


def test_k3_does_not_overflow() -> None:
    assert token_kl(torch.tensor([[-500.0]]), torch.tensor([[0.0]]), "k3").isfinite().all()


def test_an_unknown_estimator_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"kl_estimator 'k4'; known: k1, k3"):
        token_kl(row(0.0), row(0.0), "k4")


# ---- its coefficient


def test_adaptive_kl_by_hand() -> None:
    control = AdaptiveKL(target=6.0, horizon=10_000, beta=0.2)
    assert control.update(6.6, 512) == pytest.approx(0.2 * (1 + 0.1 * 512 / 10_000), rel=1e-12)
    assert control.beta == pytest.approx(0.201024, rel=1e-12)
    assert control.update(0.0, 512) == pytest.approx(0.201024 * (1 - 0.2 * 0.0512), rel=1e-12)  # clipped from -1
    assert control.update(1e9, 512) == pytest.approx(0.201024 * (1 - 0.01024) * (1 + 0.01024), rel=1e-12)


@given(st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 10**9), st.floats(1e-3, 1e3))
def test_adaptive_kl_moves_towards_its_target_and_at_most_a_fifth(kl: float, n: int, target: float) -> None:
    control = AdaptiveKL(target, 1000.0, 0.05)
    after = control.update(kl, n)
    assert after == control.beta and 0.05 * 0.8 * (1 - 1e-12) <= after <= 0.05 * 1.2 * (1 + 1e-12)
    if n == 0 or math.isnan(kl):
        assert after == 0.05
    elif kl > target:
        assert after >= 0.05
    else:
        assert after <= 0.05


def test_adaptive_kl_survives_a_resume_and_a_fixed_one_is_configured() -> None:
    control = AdaptiveKL(6.0, 100, 0.1)
    control.update(60.0, 50)
    resumed = AdaptiveKL(6.0, 100, 0.1)
    resumed.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert resumed == control and resumed.beta != 0.1
    fixed = FixedKL(0.3)
    fixed.load_state_dict(control.state_dict())
    assert fixed.update(60.0, 50) == fixed.beta == 0.3
    resumed.load_state_dict(fixed.state_dict())
    assert resumed.beta == control.beta


@pytest.mark.parametrize("name", ["target", "horizon", "beta"])
def test_adaptive_kl_refuses_what_it_could_never_leave(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} is 0; it must be above 0"):
        AdaptiveKL(**{"target": 6.0, "horizon": 100, "beta": 0.1, name: 0})


# ---- rewards


def shaped_by_loop(scores: list[float], kl: Rows, coefficient: float) -> Rows:
    rewards = [[-coefficient * each for each in row] for row in kl]
    for row_, score in zip(rewards, scores, strict=True):
        if row_:
            row_[-1] += score
    return rewards


def test_the_score_lands_on_the_last_valid_token() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    kl = torch.tensor([[9.0, 1, 2, 9], [1, 2, 3, 4], [9, 9, 5, 9], [9, 9, 9, 9]]).double()
    rewards = shaped_rewards(torch.tensor([1.0, -2, 3, 7]).double(), kl, mask, 0.5)
    assert rewards.tolist() == [[0, -0.5, 0, 0], [-0.5, -1, -1.5, -4], [0, 0, 0.5, 0], [0, 0, 0, 0]]


@given(ragged(), st.floats(0, 10), st.floats(-1e30, 1e30))
def test_shaped_rewards_against_a_loop(kl: Ragged, coefficient: float, score: float) -> None:
    scores = [score * (b + 1) if kl.rows[b] else NAN for b in range(len(kl.rows))]
    ours = shaped_rewards(torch.tensor(scores, dtype=torch.float64), kl.padded(), kl.mask, coefficient)
    close(valid(ours, kl.mask), shaped_by_loop(scores, kl.rows, coefficient))


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=7), max_size=6))
def test_running_moments_in_chunks_equal_numpy_over_all(chunks: Rows) -> None:
    moments = RunningMoments()
    for chunk in chunks:
        moments.update(torch.tensor(chunk, dtype=torch.float64))
        moments = restored(moments)  # a resume after every batch changes nothing
    everything = [score for chunk in chunks for score in chunk]
    mean, variance = (np.mean(everything), np.var(everything)) if everything else (0.0, 0.0)
    largest = max(map(abs, everything), default=0.0)
    assert moments.count == len(everything)
    assert moments.mean == pytest.approx(mean, rel=1e-12, abs=1e-14 * largest)
    assert moments.variance == pytest.approx(variance, rel=1e-9, abs=1e-14 * largest**2)


def restored(moments: RunningMoments) -> RunningMoments:
    other = RunningMoments()
    other.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    assert other == moments
    return other


def test_running_moments_do_not_cancel_far_from_zero() -> None:
    moments = RunningMoments()
    for _ in range(50):
        moments.update(torch.tensor([1e9 - 1, 1e9 + 1], dtype=torch.float64))
    assert (moments.mean, moments.variance) == (pytest.approx(1e9, rel=1e-15), pytest.approx(1.0, rel=1e-9))


def test_scores_are_normalised_by_what_was_seen_so_far() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([7.0]))
    assert moments.normalised(torch.tensor([7.0])).tolist() == [0.0]  # one score has no deviation
    moments.update(torch.tensor([3.0]))
    moments.update(torch.tensor([[1.0, 1.0], [5.0, 1.0]]))
    assert (moments.mean, moments.std) == (3.0, pytest.approx(math.sqrt(16 + 0 + 4 + 4 + 4 + 4) / math.sqrt(6)))
    normalised = moments.normalised(torch.tensor([3.0, 3.0 + moments.std]))
    assert normalised.dtype is torch.float32 and normalised.tolist() == [0.0, pytest.approx(1.0)]


# ---- advantages


def gae_by_definition(rewards: Rows, values: Rows, gamma: float, lam: float) -> Rows:
    """Return eq. 16 as it is printed: for each t the sum over l of (gamma lam)^l delta_(t+l)."""
    result = []
    for r, v in zip(rewards, values, strict=True):
        v = [*v, 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        result.append([sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, len(r))) for t in range(len(r))])
    return result


def test_gae_of_three_tokens_by_hand() -> None:
    """Rewards 0, 0, 1; values 0.5, 0.6, 0.8; gamma 0.9, lambda 0.5, so gamma lambda = 0.45."""
    advantages, returns = gae(row(0, 0, 1), row(0.5, 0.6, 0.8), torch.ones(1, 3), 0.9, 0.5)
    third = 1 - 0.8  # delta 0.2
    second = 0.9 * 0.8 - 0.6 + 0.45 * third  # delta 0.12, so 0.21
    first = 0.9 * 0.6 - 0.5 + 0.45 * second  # delta 0.04, so 0.1345
    assert (first, second) == (pytest.approx(0.1345), pytest.approx(0.21))
    assert advantages[0].tolist() == pytest.approx([first, second, third], rel=1e-12)
    assert returns[0].tolist() == pytest.approx([0.6345, 0.81, 1.0], rel=1e-12)


UNIT = st.floats(0, 1)


@given(ragged(), UNIT, UNIT, st.integers(0, 99))
def test_gae_against_its_definition_wherever_the_row_stands(
    rewards: Ragged, gamma: float, lam: float, seed: int
) -> None:
    values = rewards.like(seed, scale=5.0)
    advantages, returns = gae(rewards.padded(), rewards.padded(values), rewards.mask, gamma, lam)
    expected = gae_by_definition(rewards.rows, values, gamma, lam)
    close(valid(advantages, rewards.mask), expected)
    pairs = zip(expected, values, strict=True)
    close(valid(returns, rewards.mask), [[a + v for a, v in zip(*pair, strict=True)] for pair in pairs])


def test_gae_at_lambda_one_is_the_discounted_sum_and_at_zero_the_td_error() -> None:
    rewards, values, ones = row(1, 2, 4), row(0.5, 0.25, 8), torch.ones(1, 3)
    assert gae(rewards, values, ones, 0.5, 1.0)[1].tolist() == [[1 + 1 + 1, 2 + 2, 4]]  # returns know no value
    assert gae(rewards, values, ones, 0.5, 0.0)[1].tolist() == [[1 + 0.125, 2 + 4, 4]]


def test_gae_steps_over_a_hole_and_takes_no_column_at_all() -> None:
    """A token that was not sampled, such as a tool's answer, lies between two that were."""
    holed = gae(row(1, NAN, 2, 3), row(4, NAN, 5, 6), torch.tensor([[1, 0, 1, 1]]), 0.9, 0.8)
    whole = gae(row(1, 2, 3), row(4, 5, 6), torch.ones(1, 3), 0.9, 0.8)
    for with_hole, without in zip(holed, whole, strict=True):
        assert with_hole[0, [0, 2, 3]].tolist() == without[0].tolist() and with_hole[0, 1] == 0
    assert gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0))[0].shape == (2, 0)


def test_gae_at_huge_rewards_stays_finite_in_fp32() -> None:
    rewards, values = torch.full((1, 2000), 1e30), torch.zeros(1, 2000)
    advantages, returns = gae(rewards, values, torch.ones(1, 2000), 1.0, 1.0)
    assert returns[0, 0].item() == pytest.approx(2e33, rel=1e-4) and advantages.dtype is torch.float32


def flat(rows: Rows) -> list[float]:
    return [each for row_ in rows for each in row_]


@given(ragged(largest=1e6), st.booleans())
def test_whiten_against_numpy(values: Ragged, shift_mean: bool) -> None:
    ours = flat(valid(whiten(values.padded(), values.mask, shift_mean), values.mask))
    x = np.array(flat(values.rows) or [0.0])
    expected = (x - x.mean()) / np.sqrt(x.var() + 1e-8) + (0.0 if shift_mean else x.mean())
    # a mean is right to an ulp, which a deviation below it, down to the square root of epsilon, makes larger
    slack = 1e-9 + 1e-14 * np.abs(x).max() / np.sqrt(x.var() + 1e-8)
    assert ours == pytest.approx(expected.tolist()[: len(ours)], rel=1e-9, abs=slack)


def test_whitening_by_hand_uses_the_population_variance() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    values = torch.tensor([[1.0, 3.0, NAN], [NAN, 1.0, 3.0]])
    assert whiten(values, mask).tolist() == [[-1, 1, 0], [0, -1, 1]]
    assert whiten(values, mask, shift_mean=False).tolist() == [[1, 3, 0], [0, 1, 3]]


@pytest.mark.parametrize("constant", [0.1, -3.7, 1e6 + 0.5, 1e30])
@pytest.mark.parametrize("tokens", [0, 1, 7, 4099])
def test_whitening_equal_values_gives_their_mean_not_noise(constant: float, tokens: int) -> None:
    values, mask = torch.full((3, 5000), constant), torch.zeros(3, 5000)
    mask[1, 10 : 10 + tokens] = 1
    assert (whiten(values, mask) == 0).all()
    assert (whiten(values, mask, shift_mean=False) == values * mask).all()


def test_whitening_all_ranks_together_is_whitening_the_whole() -> None:
    """Two ranks pad to different widths; cut anywhere, a rank gets its rows of the whole back, and not its own."""
    rows = Ragged([[3.0, -1.0, 7.0], [], [2.0], [40.0, 5.0, 6.0, -9.0, 8.0]], [0, 0, 2, 1], 7)
    whole = whiten(rows.padded(), rows.mask)
    for cut in range(5):
        order = list(range(cut, 4)) + list(range(cut))  # the ranks in another order
        gathered = Ragged([rows.rows[b] for b in order], [2] * 4, 9)  # and other padding
        together = valid(whiten(gathered.padded(), gathered.mask), gathered.mask)
        close([together[order.index(b)] for b in range(4)], valid(whole, rows.mask), relative=1e-12)
    alone = whiten(rows.padded()[:2], rows.mask[:2])
    assert not torch.allclose(alone, whole[:2], atol=0.1)


@given(ragged(largest=1e4), st.integers(0, 9))
def test_explained_variance_against_numpy(returns: Ragged, seed: int) -> None:
    values = returns.like(seed, scale=100.0)
    ours = explained_variance(returns.padded(values), returns.padded(), returns.mask).item()
    r, v = np.array(flat(returns.rows) or [0.0]), np.array(flat(values) or [0.0])
    assert ours <= 1  # and so not NaN
    if np.var(r) > 1e-6:  # else the rounding of a mean may be all that varies
        assert ours == pytest.approx(1 - np.var(r - v) / np.var(r), rel=1e-6, abs=1e-6)


def test_explained_variance_of_what_is_known() -> None:
    returns, mask = row(1, 2, 3, NAN), torch.tensor([[1, 1, 1, 0]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(returns + 5, returns, mask) == pytest.approx(1)  # an offset is no lack of variance
    assert explained_variance(row(2, 2, 2, 9), returns, mask) == 0
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert explained_variance(returns, row(4, 4, 4, 9), mask) == 0  # nothing to explain
    assert explained_variance(returns, returns, torch.zeros(1, 4)) == 0


# ---- the policy's loss


def policy_by_loop(logps: Rows, old: Rows, advantages: Rows, epsilon: float) -> tuple[float, Rows, dict[str, float]]:
    """Return eq. 7 summed, its derivative for each log-probability by the two cases of figure 1, and the tallies."""
    total, gradient = 0.0, []
    sums = dict.fromkeys(["policy/clip_fraction", "policy/ratio", "policy/approx_kl", "policy/approx_kl_k2"], 0.0)
    for row_, old_row, advantage_row in zip(logps, old, advantages, strict=True):
        gradient.append([])
        for logp, before, advantage in zip(row_, old_row, advantage_row, strict=True):
            ratio = math.exp(logp - before)
            total -= min(ratio * advantage, min(max(ratio, 1 - epsilon), 1 + epsilon) * advantage)
            stopped = (advantage > 0 and ratio > 1 + epsilon) or (advantage < 0 and ratio < 1 - epsilon)
            gradient[-1].append(0.0 if stopped else -advantage * ratio)
            sums["policy/clip_fraction"] += stopped
            sums["policy/ratio"] += ratio
            sums["policy/approx_kl"] += math.expm1(logp - before) - (logp - before)
            sums["policy/approx_kl_k2"] += (logp - before) ** 2 / 2
    return total, gradient, sums


def policy_case(shift: Ragged, seed: int, dtype: torch.dtype) -> tuple[Rows, Rows, Rows]:
    """Return log-probabilities, old ones and advantages whose log-ratios are `shift`, rounded as `dtype` has them."""
    rounded = [
        [torch.tensor(row_, dtype=dtype).tolist() for row_ in rows]
        for rows in (shift.like(seed, 5.0), shift.like(seed + 1, 3.0))
    ]
    old, advantages = rounded
    pairs = zip(old, shift.rows, strict=True)
    logps = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
    return [torch.tensor(row_, dtype=dtype).tolist() for row_ in logps], old, advantages


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@given(shift=ragged(), seed=st.integers(0, 99), epsilon=st.floats(0.01, 0.5))
def test_policy_loss_against_a_loop(
    dtype: torch.dtype, relative: float, shift: Ragged, seed: int, epsilon: float
) -> None:
    """Log-ratios up to +-50: the loss, its gradient, its tallies, and nothing from the NaN of masked places."""
    logps, old, advantages = policy_case(shift, seed, dtype)
    leaf = shift.padded(logps, dtype=dtype).requires_grad_()
    total, tallies = policy_loss(
        leaf, shift.padded(old, dtype=dtype), shift.padded(advantages, dtype=dtype), shift.mask, epsilon
    )
    total.backward()
    expected, gradient, sums = policy_by_loop(logps, old, advantages, epsilon)
    size = sum(map(abs, flat(gradient))) + sum(map(abs, flat(advantages)))  # terms of both signs cancel
    assert total.item() == pytest.approx(expected, rel=relative, abs=relative * size)
    assert leaf.grad is not None
    close(valid(leaf.grad, shift.mask), gradient, relative, 1e-30)
    assert tallies.keys() == sums.keys()
    for name, tally in tallies.items():
        assert not tally.total.requires_grad and tally.items == len(flat(shift.rows))
        assert tally.total.item() == pytest.approx(sums[name], rel=relative, abs=2e-5), name


def test_policy_loss_by_hand() -> None:
    """Ratios 1, 2, 1/2 with advantages 3, -1, 1: nothing is clipped, though two ratios are out of range."""
    old, ratio = row(-1, -2, -3), row(1.0, 2.0, 0.5)
    total, tallies = policy_loss(old + ratio.log(), old, row(3, -1, 1), torch.ones(1, 3), 0.2)
    assert total.item() == pytest.approx(-3 + 2 - 0.5, rel=1e-12)
    assert tallies["policy/clip_fraction"].mean == 0 and tallies["policy/ratio"].mean == pytest.approx(3.5 / 3)
    total, tallies = policy_loss(old + ratio.log(), old, row(-3, 1, -1), torch.ones(1, 3), 0.2)
    assert total.item() == pytest.approx(3 - 1.2 + 0.8, rel=1e-12)
    assert tallies["policy/clip_fraction"].mean == pytest.approx(2 / 3)


@pytest.mark.parametrize("log_ratio", [0.3, 50.0, 500.0])
def test_a_token_clipped_against_its_advantage_gets_no_gradient_at_all(log_ratio: float) -> None:
    leaf = torch.tensor([[log_ratio, -log_ratio, log_ratio, -log_ratio]]).requires_grad_()
    total, tallies = policy_loss(leaf, torch.zeros(1, 4), torch.tensor([[1.0, -1, -1, 1]]), torch.ones(1, 4), 0.2)
    total.backward()
    assert leaf.grad is not None and leaf.grad[0, :2].tolist() == [0, 0] and total.isfinite()
    assert tallies["policy/clip_fraction"].total == 2
    if log_ratio < 80:  # the others are pushed back towards the old policy
        assert leaf.grad[0, 2:].tolist() == pytest.approx([math.exp(log_ratio), -math.exp(-log_ratio)], rel=1e-4)
    assert leaf.grad.isfinite().all()


def test_the_first_update_is_the_plain_policy_gradient() -> None:
    """At ratio 1 the derivative is -A for every token, with no share lost to the tie of the two branches."""
    leaf = row(-1, -2, -3).requires_grad_()
    total, tallies = policy_loss(leaf, leaf, row(2, -5, 0), torch.ones(1, 3))
    total.backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [[-2, 5, 0]] and total.item() == 3
    means = {name: tally.mean.item() for name, tally in tallies.items()}
    assert means == {
        "policy/clip_fraction": 0,
        "policy/ratio": 1,
        "policy/approx_kl": 0,
        "policy/approx_kl_k2": 0,
    }


# ---- the value's loss


def value_by_loop(values: Rows, old: Rows, returns: Rows, clip: float | None) -> tuple[float, Rows, int]:
    total, gradient, clipped = 0.0, [], 0
    for row_, old_row, return_row in zip(values, old, returns, strict=True):
        gradient.append([])
        for value, before, target in zip(row_, old_row, return_row, strict=True):
            near = value if not clip else min(max(value, before - clip), before + clip)
            binds = (near - target) ** 2 > (value - target) ** 2
            total += 0.5 * max((near - target) ** 2, (value - target) ** 2)
            gradient[-1].append(0.0 if binds else value - target)
            clipped += binds
    return total, gradient, clipped


@given(st.one_of(ragged(), ragged(largest=1e6)), st.integers(0, 99), st.sampled_from([None, 0, 0.2, 20.0]))
def test_value_loss_against_a_loop(values: Ragged, seed: int, clip: float | None) -> None:
    old, returns = values.like(seed, 30.0), values.like(seed + 1, 60.0)
    leaf = values.padded().requires_grad_()
    total, tallies = value_loss(leaf, values.padded(old), values.padded(returns), values.mask, clip)
    total.backward()
    expected, gradient, clipped = value_by_loop(values.rows, old, returns, clip)
    assert total.item() == pytest.approx(expected, rel=1e-9)
    assert leaf.grad is not None
    close(valid(leaf.grad, values.mask), gradient)
    assert tallies.keys() == {"value/clip_fraction"}
    assert tallies["value/clip_fraction"] == (clipped, len(flat(values.rows)))


def test_value_loss_by_hand() -> None:
    """Old value 0, clip 0.2. Returns 1: a value of 0.5 counts as 0.2; returns -1: it counts as itself."""
    leaf = row(0.5, 0.5, 0.1).requires_grad_()
    total, tallies = value_loss(leaf, row(0, 0, 0), row(1, -1, 1), torch.ones(1, 3), 0.2)
    total.backward()
    assert total.item() == pytest.approx(0.5 * (0.8**2 + 1.5**2 + 0.9**2), rel=1e-12)
    assert leaf.grad is not None and leaf.grad[0].tolist() == pytest.approx([0, 1.5, -0.9])
    assert tallies["value/clip_fraction"].mean == pytest.approx(1 / 3)
    for off in (None, 0, 0.0):
        total, tallies = value_loss(leaf, row(0, 0, 0), row(1, -1, 1), torch.ones(1, 3), off)
        assert total.item() == pytest.approx(0.5 * (0.5**2 + 1.5**2 + 0.9**2), rel=1e-12)
        assert tallies["value/clip_fraction"].mean == 0


def test_a_value_within_its_range_is_never_counted_as_clipped() -> None:
    """In fp32 old + (value - old) is not value; an error a digit larger must not pass for a clipped one."""
    generator = torch.Generator().manual_seed(0)
    values, old, returns = (scale * torch.randn(1, 4096, generator=generator) for scale in (0.1, 0.1, 1e3))
    assert value_loss(values, old, returns, torch.ones(1, 4096), 10.0).tallies["value/clip_fraction"].total == 0


def test_huge_returns_leave_the_value_gradient_finite() -> None:
    leaf = torch.tensor([[1e15, 0.0]]).requires_grad_()
    total, _ = value_loss(leaf, torch.zeros(1, 2), torch.tensor([[-1e15, 1e15]]), torch.ones(1, 2), None)
    total.backward()
    assert (
        leaf.grad is not None
        and total.isfinite()
        and leaf.grad.tolist() == [[pytest.approx(2e15), pytest.approx(-1e15)]]
    )


# ---- both


def losses_of(case: dict[str, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of both losses and its gradient for the log-probabilities and the values, side by side."""
    logps, values = case["logps"].clone().requires_grad_(), case["values"].clone().requires_grad_()
    policy = policy_loss(logps, case["old"], case["advantages"], mask).total
    total = policy + value_loss(values, case["old_values"], case["returns"], mask).total
    return total, torch.cat(torch.autograd.grad(total, [logps, values]))


@pytest.mark.parametrize("left", [0, 1, 4])
def test_a_padded_row_learns_exactly_what_the_short_one_does(left: int) -> None:
    names = ["logps", "old", "advantages", "values", "old_values", "returns"]
    tables = torch.randn(6, 1, 5, generator=torch.Generator().manual_seed(3)).double()
    short = dict(zip(names, tables, strict=True))
    place = Ragged([[0.0] * 5], [left], 9)
    long = {name: place.padded(table.tolist()) for name, table in short.items()}
    total, gradient = losses_of(long, place.mask)
    expected, unmasked = losses_of(short, torch.ones(1, 5))
    assert total.item() == pytest.approx(expected.item(), rel=1e-14)
    assert (gradient[:, place.mask[0]] == unmasked).all() and (gradient[:, ~place.mask[0]] == 0).all()


def test_sums_and_tallies_add_up_over_any_cut() -> None:
    tables = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(5)).double()
    mask = torch.arange(6) < torch.tensor([[6], [0], [1], [4]])
    whole = [policy_loss(*tables, mask), value_loss(*tables, mask)]
    for cut in (1, 2, 3):
        for loss, complete in zip((policy_loss, value_loss), whole, strict=True):
            parts = [loss(*tables[:, rows], mask[rows]) for rows in (slice(cut), slice(cut, 4))]
            assert sum(part.total for part in parts) == pytest.approx(complete.total.item(), rel=1e-12)
            for name, (total, items) in complete.tallies.items():
                assert sum(part.tallies[name].total for part in parts) == pytest.approx(total.item(), rel=1e-12)
                assert sum(part.tallies[name].items for part in parts) == items == 11


def test_a_batch_without_a_token_gives_zero_and_zero_gradient() -> None:
    poison, mask = torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)
    leaf = poison.clone().requires_grad_()
    total = policy_loss(leaf, poison, poison, mask).total + value_loss(leaf, poison, poison, mask).total
    total.backward()
    assert total.item() == 0 and leaf.grad is not None and (leaf.grad == 0).all()


def test_half_precision_is_computed_in_single() -> None:
    half = torch.zeros(1, 4, dtype=torch.bfloat16)
    ones = torch.ones(1, 4)
    assert policy_loss(half, half, half, ones).total.dtype is torch.float32
    assert value_loss(half, half, half, ones).total.dtype is torch.float32
    for result in (
        *gae(half, half, ones),
        whiten(half, ones),
        token_kl(half, half),
        shaped_rewards(half[:, 0], half, ones, 1),
    ):
        assert result.dtype is torch.float32

"""The losses by hand, in float64, at their limits, and at the point where the policy equals the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align_kit.errors import UserError
from align_kit.losses import (
    BATCH_COUPLED,
    DPO_LOSSES,
    F_DIVERGENCES,
    LANGUAGE_LOSSES,
    Pairs,
    Tally,
    check_dpo_options,
    dft_loss,
    dpo_loss,
    language_loss,
    log_sum_sq_probs,
    preference_metrics,
    sequence_logps,
)
from align_kit.losses.pairwise import TAKES_DIVERGENCE

LN2 = math.log(2)
EPSILON = 0.1  # the label smoothing wherever one is given


def pairs_of(chosen: list[float], rejected: list[float], *, dtype: torch.dtype = torch.float64) -> Pairs:
    """Pairs of one token each whose log-ratios of policy to reference are the numbers given."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype)[:, None]

    zero, ones = column([0.0] * len(chosen)), torch.ones(len(chosen), 1, dtype=torch.long)
    return Pairs(column(chosen).requires_grad_(), column(rejected).requires_grad_(), zero, zero, ones, ones)


def random_pairs(rows: int = 5, *, seed: int = 0, same: bool = False) -> Pairs:
    """Ragged float64 pairs, chosen up to 7 tokens and rejected up to 9; with `same`, policy equals reference."""
    generator = torch.Generator().manual_seed(seed)

    def side(width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        policy, reference = (-torch.rand(rows, width, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
        length = torch.randint(1, width + 1, (rows, 1), generator=generator)
        squares = -torch.rand(rows, width, generator=generator, dtype=torch.float64)
        return policy.requires_grad_(), policy.detach() if same else reference, torch.arange(width) < length, squares

    (pc, rc, mc, sc), (pr, rr, mr, sr) = side(7), side(9)
    return Pairs(pc, pr, rc, rr, mc, mr, sc, sr)


def rows_of(pairs: Pairs, rows: slice) -> Pairs:
    return Pairs(**{name: value[rows] for name, value in vars(pairs).items()})


def one(chosen: float, rejected: float, **options: Any) -> float:
    return dpo_loss(pairs_of([chosen], [rejected]), **options).loss_B.item()


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---- token losses


LOGPS = torch.tensor([[-1.0, -2.0, -4.0], [-0.5, -8.0, -16.0]], dtype=torch.float64)
MASK = torch.tensor([[0, 1, 1], [1, 0, 0]])


def test_language_loss_sums_the_trained_tokens_and_counts_them() -> None:
    total, items = language_loss(LOGPS, MASK)
    assert (total.item(), items.item()) == (6.5, 3)


def test_dft_weighs_each_token_by_its_probability_without_gradient() -> None:
    logps = LOGPS.clone().requires_grad_()
    total, items = dft_loss(logps, MASK)
    total.backward()
    probability = LOGPS.exp() * MASK
    assert total.item() == pytest.approx(2 * math.exp(-2) + 4 * math.exp(-4) + 0.5 * math.exp(-0.5), rel=1e-12)
    assert items.item() == 3
    torch.testing.assert_close(logps.grad, -probability)  # not -(1 + log p) p, the gradient of p log p


@pytest.mark.parametrize("name", LANGUAGE_LOSSES)
def test_token_losses_ignore_what_stands_in_padding_and_survive_an_empty_batch(name: str) -> None:
    poisoned = LOGPS.masked_fill(MASK == 0, float("nan")).requires_grad_()
    total = LANGUAGE_LOSSES[name](poisoned, MASK).total
    total.backward()
    assert total.item() == LANGUAGE_LOSSES[name](LOGPS, MASK).total.item()
    assert poisoned.grad.isfinite().all() and (poisoned.grad[MASK == 0] == 0).all()
    empty = LANGUAGE_LOSSES[name](poisoned, torch.zeros_like(MASK))
    assert empty.mean.item() == 0.0


def test_language_tallies_add_up_over_any_split() -> None:
    whole = language_loss(LOGPS, MASK)
    parts = [language_loss(LOGPS[i : i + 1], MASK[i : i + 1]) for i in range(2)]
    assert Tally(sum(p.total for p in parts), sum(p.items for p in parts)).mean == whole.mean


def test_half_precision_is_summed_in_single() -> None:
    logps = torch.full((1, 4096), -0.01, dtype=torch.bfloat16)
    total, _ = language_loss(logps, torch.ones(1, 4096, dtype=torch.bool))
    assert total.dtype is torch.float32
    assert total.item() == pytest.approx(4096 * -logps[0, 0].item(), rel=1e-5)


def test_sequence_logps_desensitises_what_lies_beyond_the_shared_length() -> None:
    assert sequence_logps(LOGPS, MASK).tolist() == [-6.0, -0.5]
    shared = torch.tensor([1, 1])
    assert sequence_logps(LOGPS, MASK, ld_alpha=0.25, shared_B=shared).tolist() == [-2.0 - 1.0, -0.5]
    assert sequence_logps(LOGPS, MASK, ld_alpha=0.0, shared_B=shared).tolist() == [-2.0, -0.5]


# ---- each preference loss, by hand: log-ratios 2 and -1, beta 0.5, so rewards 1 and -0.5 and margin 1.5

BY_HAND: dict[str, float] = {
    "sigmoid": -math.log(sigma(1.5)),
    "hinge": 0.0,
    "ipo": (3.0 - 1.0) ** 2,
    "exo_pair": sigma(1.5) * math.log(sigma(1.5) / 0.9) + sigma(-1.5) * math.log(sigma(-1.5) / 0.1),
    "nca_pair": -math.log(sigma(1)) - 0.5 * math.log(sigma(-1)) - 0.5 * math.log(sigma(0.5)),
    "robust": (-0.9 * math.log(sigma(1.5)) + 0.1 * math.log(sigma(-1.5))) / 0.8,
    "bco_pair": -math.log(sigma(1)) - math.log(sigma(0.5)),
    "sppo_hard": (2 - 1) ** 2 + (-1 + 1) ** 2,
    "aot": -0.9 * math.log(sigma(1.5)) - 0.1 * math.log(sigma(-1.5)),
    "aot_unpaired": -0.9 * math.log(sigma(1.5)) - 0.1 * math.log(sigma(-1.5)),
    "apo_zero": 1 - sigma(1) + sigma(-0.5),
    "apo_down": sigma(1) + 1 - sigma(1.5),
    "discopop": -math.log(sigma(1.5)) * (1 - sigma(1.5 / 0.5)) + math.exp(-1.5) * sigma(1.5 / 0.5),
    "sft": -2.0,
    "sigmoid_norm": -math.log(sigma(1.5)),
}


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_a_pair_by_hand(name: str) -> None:
    value = one(2.0, -1.0, loss_type=[name], beta=0.5, label_smoothing=EPSILON, discopop_tau=0.5)
    assert value == pytest.approx(BY_HAND[name], rel=1e-12, abs=1e-12)


# Policy equal to reference, beta 0.1: what a run must show before its first update.
AT_START: dict[str, float] = {
    "sigmoid": LN2,
    "hinge": 1.0,
    "ipo": 25.0,
    "exo_pair": 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
    "nca_pair": 2 * LN2,
    "robust": LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 50.0,
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LN2 + 0.5,
    "sigmoid_norm": LN2,
}


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("name", AT_START)
def test_policy_equal_to_reference_gives_the_known_constant(name: str, divergence: str) -> None:
    if name not in TAKES_DIVERGENCE:
        divergence = "reverse_kl"
    output = dpo_loss(
        random_pairs(same=True), loss_type=name, label_smoothing=EPSILON, f_divergence_type=divergence, ld_alpha=0.3
    )
    torch.testing.assert_close(output.loss_B, torch.full_like(output.loss_B, AT_START[name]), rtol=1e-12, atol=1e-12)
    assert output.chosen_rewards_B.abs().max() == 0


def test_every_loss_has_its_constant_and_its_value_by_hand() -> None:
    assert BY_HAND.keys() == DPO_LOSSES.keys() == AT_START.keys() | {"sft"}


# ---- limits


@pytest.mark.parametrize("margin", [3e3, -3e3])
@pytest.mark.parametrize("name", DPO_LOSSES)
def test_huge_margins_stay_finite_in_single_precision(name: str, margin: float) -> None:
    pairs = pairs_of([margin, 0.0], [-margin, 0.0], dtype=torch.float32)
    loss_B = dpo_loss(pairs, loss_type=name, beta=1.0, label_smoothing=EPSILON).loss_B
    sides = (pairs.policy_chosen_BT, pairs.policy_rejected_BT)
    grads = torch.autograd.grad(loss_B.mean(), sides, allow_unused=True, materialize_grads=True)  # sft reads one side
    assert loss_B.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("ratio", [3e3, -3e3])
@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_huge_log_ratios_stay_finite_in_every_divergence(divergence: str, ratio: float, alpha: float) -> None:
    pairs = pairs_of([ratio], [-ratio], dtype=torch.float32)
    output = dpo_loss(pairs, beta=0.1, f_divergence_type=divergence, f_alpha_divergence_coef=alpha)
    output.loss_B.sum().backward()
    assert output.loss_B.isfinite().all() and pairs.policy_chosen_BT.grad.isfinite().all()


@pytest.mark.parametrize("name", ["sigmoid", "robust", "nca_pair", "bco_pair", "aot", "aot_unpaired", "sigmoid_norm"])
def test_a_wrong_pair_still_teaches_however_wrong_it_is(name: str) -> None:
    """-log(sigmoid(x)) computed as written has gradient zero or NaN at x = -3000; the true one is -beta."""
    pairs = pairs_of([-3e3], [3e3], dtype=torch.float32)
    dpo_loss(pairs, loss_type=name, beta=0.1).loss_B.sum().backward()
    assert pairs.policy_chosen_BT.grad.item() <= -0.1 + 1e-6


def test_discopop_tends_to_zero_and_to_the_logistic_loss() -> None:
    assert one(500.0, 0.0, loss_type="discopop", beta=1.0) < 1e-200
    assert one(-500.0, 0.0, loss_type="discopop", beta=1.0) == pytest.approx(500.0, rel=1e-12)


def test_gradients_are_those_of_the_values() -> None:
    """Central differences in float64, through every loss that is smooth, f-divergences and ld_alpha included."""
    pairs = random_pairs(3, seed=4)
    fixed = {name: value for name, value in vars(pairs).items() if not name.startswith("policy")}
    for name in DPO_LOSSES.keys() - {"hinge"}:  # has a kink
        for divergence in F_DIVERGENCES if name in ("sigmoid", "ipo", "discopop") else ["reverse_kl"]:

            def loss(chosen: Tensor, rejected: Tensor, name: str = name, divergence: str = divergence) -> Tensor:
                some = Pairs(policy_chosen_BT=chosen, policy_rejected_BT=rejected, **fixed)
                options = {"label_smoothing": EPSILON, "f_divergence_type": divergence, "discopop_tau": 1.5}
                return dpo_loss(some, loss_type=name, ld_alpha=0.4, **options).loss_B.sum()

            assert torch.autograd.gradcheck(loss, (pairs.policy_chosen_BT, pairs.policy_rejected_BT))


# ---- f-divergences


def test_divergences_are_the_derivatives_of_f() -> None:
    t = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    expected = {
        ("reverse_kl", 0.5): t.log(),
        ("forward_kl", 0.5): 1 - 1 / t,
        ("js_divergence", 0.5): (2 * t / (1 + t)).log(),
        ("alpha_divergence", 0.5): (t**-0.5 - 1) / -0.5,
        ("alpha_divergence", 0.0): 1 - 1 / t,
        ("alpha_divergence", 1.0): t.log(),
        ("alpha_divergence", 1 + 1e-5): t.log(),
        ("alpha_divergence", 3.0): (t**2 - 1) / 2,
    }
    for (name, alpha), score in expected.items():
        torch.testing.assert_close(F_DIVERGENCES[name](t.log(), alpha), score, rtol=2e-5, atol=1e-9)


# ---- pairs, weights, mixtures


def test_padding_never_reaches_a_loss() -> None:
    clean, dirty = random_pairs(), random_pairs()
    values = {name: getattr(dirty, name).detach().clone() for name in vars(dirty)}
    for name, value in values.items():
        if "mask" not in name:
            value[~values["chosen_mask_BT" if "chosen" in name else "rejected_mask_BT"]] = float("nan")
    values["policy_chosen_BT"].requires_grad_()
    for name in DPO_LOSSES:
        options: dict[str, Any] = {"loss_type": name, "label_smoothing": EPSILON, "ld_alpha": 0.5}
        options["use_weighting"] = name not in BATCH_COUPLED
        got = dpo_loss(Pairs(**values), **options).loss_B
        torch.testing.assert_close(got, dpo_loss(clean, **options).loss_B, rtol=0, atol=0)
        (grad,) = torch.autograd.grad(got.sum(), values["policy_chosen_BT"])
        assert grad.isfinite().all()


def test_no_gradient_reaches_the_reference() -> None:
    fields = vars(random_pairs()) | {"reference_chosen_BT": torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)}
    fields["reference_rejected_BT"] = torch.zeros(5, 9, dtype=torch.float64, requires_grad=True)
    dpo_loss(Pairs(**fields), loss_type=["sigmoid", "aot"]).loss_B.sum().backward()
    assert fields["policy_chosen_BT"].grad.norm() > 0
    assert fields["reference_chosen_BT"].grad is None and fields["reference_rejected_BT"].grad is None


def test_ld_alpha_weighs_only_the_longer_completion() -> None:
    chosen, rejected = torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[-8.0, 0.0]])
    mask, short = torch.tensor([[1, 1, 1]]), torch.tensor([[1, 0]])
    pairs = Pairs(chosen, rejected, 0 * chosen, 0 * rejected, mask, short)
    output = dpo_loss(pairs, loss_type="ipo", beta=0.5, ld_alpha=0.5)
    assert (output.chosen_logps_B.item(), output.rejected_logps_B.item()) == (-4.0, -8.0)
    assert output.loss_B.item() == pytest.approx((-4 / 3 + 8 / 1 - 1) ** 2)  # divided by the full lengths, as TRL
    torch.testing.assert_close(dpo_loss(pairs, ld_alpha=1.0).loss_B, dpo_loss(pairs).loss_B)
    assert dpo_loss(pairs, loss_type="sft", ld_alpha=0.0).loss_B.item() == pytest.approx(7 / 3)


def test_weighting_multiplies_by_the_aligned_mean_probability_without_gradient() -> None:
    pairs = random_pairs()
    plain, weighed = dpo_loss(pairs), dpo_loss(pairs, use_weighting=True)

    def mean(side: str) -> Tensor:
        aligned = getattr(pairs, f"policy_{side}_BT") - getattr(pairs, f"{side}_log_sum_sq_BT")
        mask = getattr(pairs, f"{side}_mask_BT")
        return torch.stack([row[keep].mean() for row, keep in zip(aligned, mask, strict=True)]).detach()

    weight_B = (mean("chosen") + mean("rejected")).exp()
    torch.testing.assert_close(weighed.loss_B, plain.loss_B * weight_B)
    (plain_grad,) = torch.autograd.grad(plain.loss_B.sum(), pairs.policy_chosen_BT)
    (weighed_grad,) = torch.autograd.grad(weighed.loss_B.sum(), pairs.policy_chosen_BT)
    torch.testing.assert_close(weighed_grad, plain_grad * weight_B[:, None])


def test_log_sum_sq_probs_of_a_uniform_and_of_a_certain_policy() -> None:
    logits = torch.tensor([[[0.0] * 8], [[500.0] + [0.0] * 7]])
    torch.testing.assert_close(log_sum_sq_probs(logits), torch.tensor([[-math.log(8)], [0.0]]))


def test_a_mixture_is_the_weighted_sum_of_its_parts() -> None:
    pairs = random_pairs()
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    mixed = dpo_loss(pairs, loss_type=names, loss_weights=weights).loss_B
    parts = [dpo_loss(pairs, loss_type=name).loss_B for name in names]
    torch.testing.assert_close(mixed, sum(w * part for w, part in zip(weights, parts, strict=True)))
    torch.testing.assert_close(dpo_loss(pairs, loss_type=names).loss_B, sum(parts))  # weights default to 1


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_a_batch_is_the_sum_of_its_parts_exactly_where_the_table_says_so(name: str) -> None:
    pairs = random_pairs(6, seed=1)
    halves = [rows_of(pairs, slice(0, 3)), rows_of(pairs, slice(3, 6))]
    whole = dpo_loss(pairs, loss_type=name, label_smoothing=EPSILON).loss_B.sum()
    parts = sum(dpo_loss(half, loss_type=name, label_smoothing=EPSILON).loss_B.sum() for half in halves)
    assert (abs(whole - parts).item() > 1e-3) == (name in BATCH_COUPLED)


def test_sft_with_the_tokens_of_the_step_is_the_mean_over_its_tokens() -> None:
    pairs = random_pairs(6, seed=1)
    halves = [rows_of(pairs, slice(0, 2)), rows_of(pairs, slice(2, 6))]
    mean = pairs.chosen_mask_BT.sum() / 6
    parts = sum(dpo_loss(half, loss_type="sft", tokens_per_pair=mean).loss_B.sum() for half in halves)
    tokens = language_loss(pairs.policy_chosen_BT, pairs.chosen_mask_BT)
    torch.testing.assert_close(parts / 6, tokens.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(dpo_loss(pairs, loss_type="sft").loss_B.mean(), tokens.mean)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_aot_does_not_depend_on_the_order_of_the_pairs(ratios: list[float], random: Any) -> None:
    shuffled = random.sample(ratios, len(ratios))
    for name in ("aot", "aot_unpaired"):
        a = dpo_loss(pairs_of(ratios, ratios[::-1]), loss_type=name).loss_B
        b = dpo_loss(pairs_of(shuffled, [ratios[::-1][ratios.index(r)] for r in shuffled]), loss_type=name).loss_B
        torch.testing.assert_close(a, b)


def test_metrics_are_tallies_under_the_names_of_trl() -> None:
    metrics = preference_metrics(dpo_loss(pairs_of([2.0, 1.0, -1.0], [1.0, 1.0, 3.0]), beta=0.5))
    assert {name: (tally.total.item(), tally.items.item()) for name, tally in metrics.items()} == {
        "rewards/chosen": (1.0, 3),
        "rewards/rejected": (2.5, 3),
        "rewards/accuracies": (1.0, 3),  # a tie is not a win
        "rewards/margins": (-1.5, 3),
        "logps/chosen": (2.0, 3),
        "logps/rejected": (5.0, 3),
    }
    assert not any(tally.total.requires_grad for tally in metrics.values())


# ---- options

REFUSED = [
    ({"loss_type": "sigmoidd"}, "unknown loss_type 'sigmoidd'; .*did you mean 'sigmoid'"),
    ({"loss_type": []}, "loss_type is empty"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 loss_weights for 2 loss types"),
    ({"loss_type": "sigmoid", "f_divergence_type": "kl"}, "unknown f_divergence_type 'kl'"),
    ({"loss_type": ["sigmoid", "nca_pair"], "f_divergence_type": "forward_kl"}, "no meaning for loss_type nca_pair"),
    ({"loss_type": "sigmoid", "beta": 0.0}, "beta is 0.0; it must be above 0"),
    ({"loss_type": "exo_pair"}, "label_smoothing is 0.0; it must be above 0 for exo_pair"),
    ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing is 0.5; it must be below 0.5 for robust"),
    ({"loss_type": "sigmoid", "label_smoothing": 1.0}, r"it must be in \[0, 1\)"),
    ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau is 0.0"),
    ({"loss_type": "sigmoid", "ld_alpha": 1.5}, r"ld_alpha is 1.5; it must be in \[0, 1\]"),
    ({"loss_type": ["sigmoid", "aot"], "use_weighting": True}, "use_weighting weighs each pair, but loss_type aot"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_contradictions_are_refused_at_load_and_at_use(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_dpo_options(**options)
    with pytest.raises(UserError, match=message):
        dpo_loss(random_pairs(), **options)

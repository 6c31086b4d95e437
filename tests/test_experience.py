"""What an iteration is learnt from: the same rows for any number of ranks, advantages that a loop gives too."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness import Ranks

if TYPE_CHECKING:
    from align_kit.trainers.experience import Columns


def columns(prompts: list[int], completions: list[int], seed: int = 0, extra: int = 0) -> Columns:
    """Return rows of these lengths with random numbers, padded by `extra` columns more than needed."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    width = max(p + c for p, c in zip(prompts, completions, strict=True)) + extra
    count = len(prompts)
    rows: Columns = {name: torch.zeros(count, width, dtype=torch.long) for name in ("input_ids", "attention_mask",
                                                                                    "loss_mask")}  # fmt: skip
    rows |= {name: torch.zeros(count, width - 1) for name in ("logps", "writer_logps", "reference_logps", "values")}
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = prompt + completion
        rows["input_ids"][row, :end] = torch.randint(1, 99, (end,), generator=draw)
        rows["attention_mask"][row, :end] = 1
        rows["loss_mask"][row, prompt:end] = 1
        for name in ("logps", "writer_logps", "reference_logps"):
            rows[name][row, prompt - 1 : end - 1] = -torch.rand(completion, generator=draw) * 4
        rows["values"][row, prompt - 1 : end - 1] = torch.randn(completion, generator=draw)
    rows["scores"] = torch.randn(count, generator=draw)
    return rows


lengths = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=7)


# --- which row is learnt from where -----------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_an_epoch_meets_every_row_once_on_any_number_of_ranks(
    mini_batches: int, rows_per_rank: int, steps: int, per_prompt: int, seed: int
) -> None:
    """Of each mini-batch, ranks together see the same rows whether they are 1, 2 or 4; each rank as many batches."""
    from align_kit.trainers.experience import micro_batches, order

    size = 4 * rows_per_rank * steps
    rows = columns(*random_lengths(size * mini_batches, per_prompt, seed))
    places = order(size * mini_batches, seed=seed, iteration=1, epoch=0)
    assert sorted(places) == list(range(size * mini_batches))
    for part in range(mini_batches):
        chosen = places[part * size : (part + 1) * size]
        for world in (1, 2, 4):
            per_rank = 4 * rows_per_rank // world
            dealt = [micro_batches(rows, chosen, per_prompt, per_rank, rank, world) for rank in range(world)]
            assert [[len(batch) for batch in batches] for batches in dealt] == [[per_rank] * steps] * world
            assert sorted(place for batches in dealt for batch in batches for place in batch) == sorted(chosen)


def random_lengths(count: int, per_prompt: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the lengths of prompts, the same for `per_prompt` rows that follow one another, and of completions."""
    draw = random.Random(seed)
    prompts = [draw.randint(1, 30) for _ in range(-(-count // per_prompt))]
    return [prompts[row // per_prompt] for row in range(count)], [draw.randint(1, 30) for _ in range(count)]


def test_completions_of_a_prompt_meet_and_micro_batches_are_near_equal() -> None:
    """Half an iteration's rows, drawn at random: what is there of a prompt is in one micro-batch, but for a few."""
    from align_kit.trainers.experience import micro_batches

    world, per_rank, per_prompt = 2, 8, 4
    prompts, completions = random_lengths(256, per_prompt, seed=0)
    chosen = random.Random(1).sample(range(256), 128)
    rows = columns(prompts, completions, extra=3)
    dealt = [micro_batches(rows, chosen, per_prompt, per_rank, rank, world) for rank in range(world)]
    met = [{place // per_prompt for place in batch} for batches in dealt for batch in batches]
    drawn = {place // per_prompt for place in chosen}
    assert sum(map(len, met)) <= len(drawn) + 2, "more than two prompts were parted"
    own = [sum(completions[place] for place in batch) for batches in dealt for batch in batches]
    once = [sum(prompts[group * per_prompt] for group in groups) for groups in met]
    work = [tokens + prompt for tokens, prompt in zip(own, once, strict=True)]
    assert max(work) < 1.15 * sum(work) / len(work)


def test_the_order_is_new_in_each_epoch_and_iteration_and_nothing_else() -> None:
    from align_kit.trainers.experience import order

    kinds = [(seed, iteration, epoch) for seed in (0, 1) for iteration in (0, 1) for epoch in (0, 1)]
    found = [tuple(order(12, seed=s, iteration=i, epoch=e)) for s, i, e in kinds]
    assert len(set(found)) == len(kinds)
    assert found == [tuple(order(12, seed=s, iteration=i, epoch=e)) for s, i, e in kinds]
    assert all(type(place) is int for place in found[0])


@given(lengths, st.integers(0, 3), st.randoms())
def test_a_selected_batch_is_its_rows_without_needless_padding(
    sizes: list[tuple[int, int]], extra: int, draw: Any
) -> None:
    from align_kit.trainers.experience import select

    rows = columns(*map(list, zip(*sizes, strict=True)), extra=extra)  # type: ignore[arg-type]
    rows |= {name: rows["values"] + number for number, name in enumerate(("advantages", "returns"), 1)}
    places = draw.sample(range(len(sizes)), draw.randint(1, len(sizes)))
    batch = select(rows, places)
    longest = max(sum(sizes[place]) for place in places)
    assert batch["keep"] == len(places) and batch["input_ids"].shape == (len(places), longest)
    for at, place in enumerate(places):
        length = sum(sizes[place])
        for name, shift in (("input_ids", 0), ("attention_mask", 0), ("loss_mask", 0), ("logps", 1), ("values", 1),
                            ("reference_logps", 1), ("advantages", 1), ("returns", 1)):  # fmt: skip
            assert (batch[name][at, : length - shift] == rows[name][place, : length - shift]).all(), name
        assert not batch["attention_mask"][at, length:].any() and not batch["loss_mask"][at, length:].any()


def test_stacked_parts_are_one_batch() -> None:
    """Parts of different widths join as if they had been padded together; no sum changes."""
    import torch

    from align_kit.trainers.experience import stacked

    whole = columns([2, 3, 1, 4], [5, 1, 2, 6])
    parts = [cut(whole, slice(0, 2), 7), cut(whole, slice(2, 4), 10)]
    joined = stacked(parts)
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], values) for name, values in whole.items())


SEQUENCE_LIKE = ("input_ids", "attention_mask", "loss_mask")


def cut(rows: Columns, which: slice, width: int) -> Columns:
    """Return some rows with `width` columns of tokens."""
    widths = {name: width - (name not in SEQUENCE_LIKE) for name, values in rows.items() if values.dim() > 1}
    return {
        name: values[which, : widths[name]] if name in widths else values[which] for name, values in rows.items()
    }


# --- what is learnt ---------------------------------------------------------------------------------------


def by_hand(
    rows: Columns, scores: list[float], coef: float, estimator: str, gamma: float, lam: float,
    whiten_rewards: bool, whiten_advantages: bool,
) -> tuple[list[list[float]], list[list[float]], float]:  # fmt: skip
    """Return advantages and returns of the completions' tokens, row by row, and the mean KL: loops in float64."""
    log_ratios, rewards, values = [], [], []
    for row, score in enumerate(scores):
        places = [t for t in range(rows["loss_mask"].shape[1] - 1) if rows["loss_mask"][row, t + 1]]
        ratios = [float(rows["logps"][row, t]) - float(rows["reference_logps"][row, t]) for t in places]
        log_ratios.append([x if estimator == "k1" else math.exp(-x) - 1 + x for x in ratios])
        rewards.append([-coef * kl for kl in log_ratios[-1]])
        rewards[-1][-1] += score
        values.append([float(rows["values"][row, t]) for t in places])
    if whiten_rewards:
        mean, deviation = moments(rewards)
        rewards = [[(r - mean) / deviation + mean for r in row] for row in rewards]
    advantages, returns = [], []
    for reward, value in zip(rewards, values, strict=True):
        ahead, following, found = 0.0, 0.0, []
        for r, v in zip(reversed(reward), reversed(value), strict=True):
            ahead = r + gamma * following - v + gamma * lam * ahead
            following = v
            found.append(ahead)
        advantages.append(found[::-1])
        returns.append([a + v for a, v in zip(found[::-1], value, strict=True)])
    if whiten_advantages:
        mean, deviation = moments(advantages)
        advantages = [[(a - mean) / deviation for a in row] for row in advantages]
    return advantages, returns, sum(map(sum, log_ratios)) / len(scores)


def moments(rows: list[list[float]]) -> tuple[float, float]:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8)


@given(
    lengths, st.integers(0, 999), st.integers(0, 4), st.sampled_from(["k1", "k3"]), st.booleans(), st.booleans(),
    st.sampled_from([(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)]), st.sampled_from([0.0, 0.05, 2.0]),
)  # fmt: skip
@settings(max_examples=60)
def test_advantages_are_those_of_a_loop(
    sizes: list[tuple[int, int]], seed: int, extra: int, estimator: str, rewards: bool, advantages: bool,
    discount: tuple[float, float], coef: float,
) -> None:  # fmt: skip
    """The score on a row's last token, the KL on each, whitened over all tokens; however wide rows are padded."""
    from align_kit.trainers.experience import Shaping, learn_from

    rows = columns(*map(list, zip(*sizes, strict=True)), seed=seed, extra=extra)  # type: ignore[arg-type]
    expected, targets, kl = by_hand(rows, rows["scores"].tolist(), coef, estimator, *discount, rewards, advantages)
    found = learn_from(rows, rows["scores"], coef, Shaping(*discount, estimator, rewards, advantages))
    assert found["kl"] == pytest.approx(kl, abs=1e-4)
    mask = rows["loss_mask"][:, 1:].bool()
    tolerance = {"rel": 2e-3, "abs": 2e-3} if rewards or advantages else {"abs": 1e-4}  # whitening divides by a spread
    for name, theirs in (("advantages", expected), ("returns", targets)):
        for row in range(len(sizes)):
            assert rows[name][row][mask[row]].tolist() == pytest.approx(theirs[row], **tolerance), name
        assert not rows[name][~mask].any(), "a masked position has an advantage"


def test_the_explained_variance_of_perfect_and_blind_values() -> None:
    import torch

    from align_kit.trainers.experience import Shaping, learn_from

    rows = columns([2, 2, 2], [1, 1, 1])
    scores, shaping = torch.tensor([1.0, -2.0, 4.0]), Shaping(1.0, 0.95, "k1", False, False)
    rows["values"][:, 1] = scores
    assert learn_from(rows, scores, 0.0, shaping)["value/explained_variance"] == pytest.approx(1.0)
    rows["values"].zero_()
    assert learn_from(rows, scores, 0.0, shaping)["value/explained_variance"] == pytest.approx(0.0)


def test_the_share_of_different_completions() -> None:
    """Counted among the completions of one prompt; padding and what it is filled with do not matter."""
    import torch

    from align_kit.trainers.experience import distinct_share

    ids = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 8, 9], [5, 8, 1]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]])
    rows = {"input_ids": ids, "attention_mask": mask}
    assert distinct_share(rows, 2) == pytest.approx(0.5)
    assert distinct_share(rows, 4) == pytest.approx(0.5)
    assert distinct_share({"input_ids": ids, "attention_mask": torch.ones_like(mask)}, 2) == pytest.approx(0.75)
    assert distinct_share(rows, 1) == 1.0


# --- two ranks --------------------------------------------------------------------------------------------


def shared_rows(place: str) -> int:
    """Share a rank's own rows with the other's and store what it then has; the second rank's are longer."""
    import torch
    from accelerate import Accelerator

    from align_kit.trainers.experience import share

    accelerator = Accelerator(cpu=True)
    mine = rows_of(accelerator.process_index)
    torch.save(share(mine, accelerator), f"{place}.{accelerator.process_index}")
    return 0


def rows_of(rank: int) -> Columns:
    import torch

    rows = columns([2, 3], [4, 1], seed=1) if rank == 0 else columns([1, 4], [3, 5], seed=2)
    rows["ended"] = torch.tensor([True, False])
    rows["each_score"] = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + 10 * rank
    return rows


@pytest.mark.slow
def test_ranks_share_all_rows_in_their_order(ranks: Ranks, tmp_path: Path) -> None:
    import torch

    from align_kit.trainers.experience import stacked

    ranks.run(function="tests.test_experience:shared_rows", place=str(tmp_path / "rows")).ok()
    expected = stacked([rows_of(0), rows_of(1)])
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rows.{rank}")
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.equal(found[name], values) and found[name].dtype == values.dtype, name

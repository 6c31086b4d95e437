"""Rollouts: sampling by quantiles, completions that no batch or rank changes, and a copy that costs what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, make_rows, make_tokenizer, write_model

if TYPE_CHECKING:
    from align_kit.trainers.rollout import LocalWriter, Written

ENDS, PAD, LENGTH = (0, 3), 1, 12
PLACEMENTS = ("gathered", "copied")


# --- quantiles --------------------------------------------------------------------------------------------


def drawn(logits: list[float], draws: list[float], temperature: float = 1.0) -> tuple[list[int], list[float]]:
    """Return the token `Quantiles` takes from one distribution at each draw, and its log-probability."""
    import torch

    from align_kit.models.quantiles import Quantiles

    quantiles = Quantiles(torch.tensor(draws, dtype=torch.float64)[:, None], 3, temperature)
    left = quantiles(torch.zeros(len(draws), 3, dtype=torch.long), torch.tensor([logits] * len(draws)))
    assert ((left == 0).sum(1) == 1).all() and (left.isneginf().sum(1) == len(logits) - 1).all()
    return left.argmax(1).tolist(), quantiles.logps[0].tolist()


def probabilities(logits: list[float], temperature: float = 1.0) -> Any:
    """Return the distribution in float64."""
    scaled = np.array(logits, dtype=np.float32).astype(np.float64) / temperature
    mass = np.exp(scaled - scaled.max())
    return mass / mass.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_spread_evenly_give_the_distribution(temperature: float) -> None:
    """At 4,000 evenly spaced quantiles every token comes as often as its probability says, to one count."""
    logits, count = [0.3, float("-inf"), -1.0, 2.0, float("-inf"), 1.9, -6.0], 4000
    tokens, logps = drawn(logits, [(draw + 0.5) / count for draw in range(count)], temperature)
    expected = probabilities(logits, temperature)
    seen = np.bincount(tokens, minlength=len(logits))
    assert np.abs(seen - expected * count).max() <= 1 + 1e-3
    assert seen[1] == seen[4] == 0, "a token of probability 0 was drawn"
    assert logps == pytest.approx(np.log(expected[tokens]).tolist(), abs=1e-5)
    assert tokens == sorted(tokens), "a greater quantile is a later token"


@pytest.mark.parametrize(("logits", "first", "last"), [
    ([float("-inf"), 0.0, 0.0, float("-inf")], 1, 2),
    ([0.0, 0.0], 0, 1),
    ([0.0] * 50_000 + [float("-inf")] * 50_000, 0, 49_999),
    ([float("-inf"), 5.0], 1, 1),
])  # fmt: skip
def test_the_ends_of_the_unit_interval(logits: list[float], first: int, last: int) -> None:
    assert drawn(logits, [0.0, float(np.nextafter(1.0, 0.0))])[0] == [first, last]


@given(
    st.lists(st.floats(-60, 60, width=32) | st.just(float("-inf")), min_size=1, max_size=20).filter(
        lambda row: max(row) > float("-inf")
    ),
    st.floats(0, 1, exclude_max=True),
    st.floats(0.1, 5),
)
@example([0.0, float("-inf")], float(np.nextafter(1.0, 0.0)), 1.0)
def test_the_token_at_a_quantile(logits: list[float], draw: float, temperature: float) -> None:
    """The mass before it is at most the draw, the mass with it at least; never one that has none."""
    (token,), _ = drawn(logits, [draw], temperature)
    mass = probabilities(logits, temperature)
    assert mass[token] > 0
    assert mass[:token].sum() <= draw + 1e-5 and draw <= mass[: token + 1].sum() + 1e-5


def test_draws_are_those_of_the_row_alone() -> None:
    from align_kit.trainers.rollout import draws_for

    all_rows = draws_for(range(6), 40, seed=1, iteration=2)
    assert (draws_for([4, 1], 40, seed=1, iteration=2) == all_rows[[4, 1]]).all()
    assert 0 <= all_rows.min() < 0.1 and 0.9 < all_rows.max() < 1
    others = [draws_for([0], 40, seed=s, iteration=i) for s, i in ((1, 3), (2, 2), (1, 1 << 30))]
    rows = np.concatenate([all_rows, *others])
    assert len(np.unique(rows)) == rows.size, "two rows share a draw"


# --- the writer -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("rollout") / "model")


def policy(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def writer(model: Any, *, temperature: float = 1.0, batch: int = 4, placement: str = "gathered") -> LocalWriter:
    from align_kit.trainers.rollout import LocalWriter, Sampling

    return LocalWriter(model, Sampling(LENGTH, temperature, ENDS, PAD, batch), placement)


def prompts(count: int = 9) -> list[list[int]]:
    """Return prompts of 1 to many tokens."""
    tokenizer = make_tokenizer()
    rows = [list(tokenizer(row["prompt"])["input_ids"]) for row in make_rows("prompt", count - 1, seed=3)]
    return [[7], *rows]


def draws(count: int) -> Any:
    from align_kit.trainers.rollout import draws_for

    return draws_for(range(count), LENGTH, seed=5, iteration=0)


def tokens(written: list[Written]) -> list[list[int]]:
    return [one.ids for one in written]


def test_completions_depend_on_nothing_but_prompt_and_draws(model_folder: Path) -> None:
    """Neither the batch size, nor the order, nor which rank writes them changes a token."""
    model, asked = policy(model_folder), prompts()
    chance = draws(len(asked))
    whole = writer(model).write(asked, chance)
    assert len({tuple(ids) for ids in tokens(whole)}) == len(asked), "all completions are alike"
    for batch in (1, 3, 64):
        assert tokens(writer(model, batch=batch).write(asked, chance)) == tokens(whole)
    backwards = writer(model).write(asked[::-1], chance[::-1])
    assert tokens(backwards) == tokens(whole)[::-1]
    halves = [writer(model).write(asked[part], chance[part]) for part in (slice(0, 5), slice(5, None))]
    assert tokens([one for half in halves for one in half]) == tokens(whole)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_models(model_folder: Path, temperature: float) -> None:
    """Of each token, the one that ends a completion too: what a plain forward over prompt and completion gives."""
    import torch

    model, asked = policy(model_folder), prompts()
    for prompt, one in zip(asked, writer(model, temperature=temperature).write(asked, draws(len(asked))), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + one.ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None]).squeeze(1)
        assert one.logps == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_completion_stops_at_its_end(model_folder: Path) -> None:
    """With draws that hit an end: it is the last token, kept, and the row says so; others are cut at the length."""
    found = [one for seed in range(8) for one in _many(model_folder, seed)]
    ended = [one for one in found if one.ended]
    assert 3 < len(ended) < len(found)
    for one in found:
        assert len(one.ids) == len(one.logps)
        assert [token in ENDS for token in one.ids] == [False] * (len(one.ids) - 1) + [one.ended]
        assert one.ended or len(one.ids) == LENGTH
    assert {one.ids[-1] for one in ended} == set(ENDS), "both ends must be met"


def _many(folder: Path, seed: int) -> list[Written]:
    from align_kit.trainers.rollout import draws_for

    model, asked = policy(folder), prompts()
    with_ends = model.lm_head.weight.data  # tied: ends become likely words
    with_ends[list(ENDS)] *= 2.5
    return writer(model).write(asked, draws_for(range(len(asked)), LENGTH, seed=seed, iteration=0))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_without_chance_it_is_greedy_generation(model_folder: Path, placement: str) -> None:
    """At a temperature that leaves only the most probable token: what transformers' own `generate` writes."""
    import torch

    model, asked = policy(model_folder), prompts()
    cold = writer(model, temperature=1e-4, placement=placement).write(asked, draws(len(asked)))
    for prompt, one in zip(asked, cold, strict=True):
        stock = model.generate(
            torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False, eos_token_id=list(ENDS), pad_token_id=PAD
        )
        assert one.ids == stock[0, len(prompt) :].tolist()


def test_what_a_model_brings_for_chatting_does_not_bend_the_distribution(model_folder: Path) -> None:
    """Penalties, forced and forbidden words of its generation configuration are no part of the policy."""
    asked = prompts()
    plain = writer(policy(model_folder)).write(asked, draws(len(asked)))
    chatty = policy(model_folder)
    chatty.generation_config.update(
        repetition_penalty=1.8, no_repeat_ngram_size=2, do_sample=True, temperature=0.2, top_k=3, top_p=0.5,
        suppress_tokens=[plain[1].ids[0]], begin_suppress_tokens=[plain[2].ids[0]], min_new_tokens=LENGTH,
        max_length=20,
    )  # fmt: skip
    bent = writer(chatty).write(asked, draws(len(asked)))
    assert tokens(bent) == tokens(plain)
    assert [one.logps for one in bent] == [one.logps for one in plain]


# --- the hollow copy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_hollow_copy_keeps_ties_and_holds_nothing(tmp_path: Path, tied: bool) -> None:
    from align_kit.trainers.rollout import hollow

    model = policy(write_model(tmp_path / "model", tie_word_embeddings=tied))
    copied, pairs = hollow(model)
    assert (copied.lm_head.weight is copied.model.embed_tokens.weight) is tied
    assert all(p.numel() == 0 and not p.requires_grad for p in copied.parameters())
    assert len(pairs) == len(list(model.parameters())) and {id(live) for _, live in pairs} == set(
        map(id, model.parameters())
    )
    assert all(p.requires_grad and p.numel() for p in model.parameters()), "the policy itself is untouched"
    buffers = dict(model.named_buffers())
    assert all((value == buffers[name]).all() for name, value in copied.named_buffers()) and buffers


def test_gathered_weights_are_let_go(model_folder: Path) -> None:
    model = policy(model_folder)
    borrowed = writer(model)
    borrowed.write(prompts(3), draws(3))
    assert all(p.numel() == 0 for p in borrowed.model.parameters())
    with pytest.raises(IndexError):  # a failure half way leaves nothing behind either
        borrowed.write([[10_000]], draws(1))
    assert all(p.numel() == 0 for p in borrowed.model.parameters())


def test_a_kept_copy_is_its_own_and_is_refreshed(model_folder: Path) -> None:
    import torch

    model = policy(model_folder)
    keeping, borrowing, asked = writer(model, placement="copied"), writer(model), prompts()
    before = keeping.write(asked, draws(len(asked)))
    assert tokens(before) == tokens(borrowing.write(asked, draws(len(asked))))
    theirs = {p.data_ptr() for p in model.parameters()}
    places = [p.data_ptr() for p in keeping.model.parameters()]
    assert all(places) and not theirs & set(places)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = keeping.write(asked, draws(len(asked)))
    assert tokens(after) == tokens(borrowing.write(asked, draws(len(asked)))) != tokens(before)
    assert [p.data_ptr() for p in keeping.model.parameters()] == places, "the copy is written into, not made anew"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_of_several_adapters_the_trained_one_writes(model_folder: Path, placement: str) -> None:
    """A value adapter and a frozen reference beside it take no memory in the copy and change no token."""
    import torch

    from align_kit.models import lora
    from align_kit.models.policy_and_value import shared

    model = adapted(model_folder)
    alone = writer(model, placement=placement).write(prompts(), draws(9))
    both = shared(model)
    lora.add_adapter_like(model, lora.TRAINED, "reference")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".value." in name or ".reference." in name:
                parameter.normal_()
    beside = writer(both.policy, placement=placement)
    assert tokens(beside.write(prompts(), draws(9))) == tokens(alone)
    assert tokens(alone) != tokens(writer(policy(model_folder)).write(prompts(), draws(9))), "the adapter does nothing"
    others = [p for n, p in beside.model.named_parameters() if ".value." in n or ".reference." in n]
    assert others and not any(p.numel() for p in others)


def adapted(folder: Path) -> Any:
    """Return the small model with a LoRA adapter that changes what it says."""
    import torch

    from align_kit.models import lora
    from tests.test_policy_and_value import lora_fields

    torch.manual_seed(0)
    model = lora.add_lora(policy(folder), lora_fields())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    return model.eval()


def test_the_size_that_is_announced(model_folder: Path) -> None:
    from align_kit.trainers.rollout import copy_bytes

    model = policy(model_folder)
    assert copy_bytes(model) == 4 * sum(p.numel() for p in model.parameters())


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
@settings(max_examples=30)
def test_chunks_are_whole_and_bounded(sizes: list[int]) -> None:
    """Every parameter once, in order; no run goes on once it holds `CHUNK` elements."""
    import torch

    from align_kit.trainers import rollout

    pairs = [(torch.nn.Parameter(torch.empty(0)), torch.nn.Parameter(torch.zeros(size))) for size in sizes]
    limit, rollout.CHUNK = rollout.CHUNK, 64
    try:
        found = list(rollout.chunks(pairs))
    finally:
        rollout.CHUNK = limit
    assert [id(live) for some in found for _, live in some] == [id(live) for _, live in pairs]
    assert all(sum(live.numel() for _, live in some[:-1]) < 64 for some in found)


# --- under ZeRO-3, two ranks ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def two_iterations(lab: Lab, form: str, placement: str, world_size: int = 2) -> Run:
    """Return a run that writes, is updated, and writes again."""
    return lab.train(
        "ppo", world_size, max_steps=4, num_ppo_epochs=2, use_peft=form == "lora" or None, learning_rate=1e-2,
        per_device_train_batch_size=8 // world_size, rollout_placement=placement, num_sample_completions=4,
        lr_scheduler_type="constant", **({"deepspeed": lab.sharded} if world_size > 1 else {}),
    )  # fmt: skip


def shown(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().split("\n") if line]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["full", "lora"])
def test_the_writer_is_the_policy_before_and_after_an_update(lab: Lab, form: str) -> None:
    """Sharded over two ranks, either placement writes with the weights the engine has, and the same tokens."""
    gathered, copied = (two_iterations(lab, form, placement) for placement in PLACEMENTS)
    for run in (gathered, copied):
        gaps = run.logged("rollout/logp_gap")
        assert len(gaps) == 2 and max(gaps) < 1e-4
        assert run.logged("policy/approx_kl")[1] > 1e-3, "the update must have moved the policy"
    assert shown(copied) == shown(gathered)
    assert copied.losses == gathered.losses


@pytest.mark.slow
def test_one_rank_writes_what_two_write(lab: Lab) -> None:
    one, two = two_iterations(lab, "full", "gathered", 1), two_iterations(lab, "full", "gathered")
    pairs = list(zip(shown(one), shown(two), strict=True))
    assert len(pairs) == 8 and all(mine["completion"] == theirs["completion"] for mine, theirs in pairs)
    for name in ("reward", "kl", "policy/entropy", "completions/length", "completions/distinct"):
        assert one.logged(name) == pytest.approx(two.logged(name), rel=1e-4, abs=1e-6), name

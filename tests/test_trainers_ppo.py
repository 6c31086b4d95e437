"""PPO beyond one plain run: that it learns and what from, its options one by one, resuming, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align_kit.config import load
from align_kit.errors import UserError
from align_kit.registry import get
from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, make_rows, read_weights
from tests.test_recipes import interrupted

pytestmark = pytest.mark.slow

LENGTH_REWARD = "tests.rank_work:length"


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def ppo(lab: Lab, world_size: int = 2, **changes: Any) -> Run:
    """Return a finished run with 8 completions an iteration and one update on them; sharded on two ranks."""
    return lab.train("ppo", world_size, **options(lab, world_size, **changes))


def options(lab: Lab, world_size: int = 2, **changes: Any) -> dict[str, Any]:
    shards = {"deepspeed": lab.sharded} if world_size > 1 else {}
    given = {"per_device_train_batch_size": 8 // world_size, "num_ppo_epochs": 1, "lr_scheduler_type": "constant"}
    return {**shards, **given, **changes}


def shown(run: Run) -> list[dict[str, Any]]:
    """Return the entries of `samples.jsonl`."""
    text = (run.folder / "samples.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


# --- that it learns ---------------------------------------------------------------------------------------

MARGIN = 0.2  # measured: 0.29 with the reward, 0.002 with the same rewards dealt out at random


@pytest.mark.parametrize(("reward", "learns"), [("odd_tokens", True), ("shuffled_odd_tokens", False)])
def test_the_mean_reward_rises_by_merit_alone(lab: Lab, reward: str, learns: bool) -> None:
    """From chance, 0.5: on two ranks, every parameter sharded, 24 steps on 32 completions each."""
    run = ppo(
        lab, max_steps=24, per_device_train_batch_size=16, num_generations=4, num_ppo_epochs=2, learning_rate=2e-2,
        reward_funcs=[f"tests.rank_work:{reward}"],
    )  # fmt: skip
    rewards = run.logged("reward")
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert first == pytest.approx(0.5, abs=0.05)
    assert last - first > MARGIN if learns else abs(last - first) < MARGIN / 2
    assert run.logged("kl")[-1] > 1 and run.result.seconds < 90


# --- the first loss, by hand ------------------------------------------------------------------------------


def by_hand(lab: Lab, **changes: Any) -> Run:
    """Return one update without whitening and discount: values and KL are still 0, so an advantage is the score."""
    return ppo(
        lab, 1, per_device_train_batch_size=64, num_sample_completions=64, whiten_advantages=False, lam=1.0,
        reward_funcs=[LENGTH_REWARD], **changes,
    )  # fmt: skip


@pytest.mark.parametrize("changes", [
    {}, {"missing_eos_penalty": 0.7}, {"normalise_rewards": True},
    {"missing_eos_penalty": 0.7, "normalise_rewards": True, "vf_coef": 0.5}, {"entropy_coef": 0.3},
    {"cliprange_value": None, "missing_eos_penalty": 0.7},
], ids=lambda changes: "-".join(changes) or "plain")  # fmt: skip
def test_the_first_loss_is_the_scores(lab: Lab, changes: dict[str, Any]) -> None:
    """A token's advantage is its completion's score: normalised, then charged where the completion does not end."""
    run = by_hand(lab, **changes)
    rows = shown(run)
    lengths = [round(4 * row["reward"]) for row in rows]
    scores = [row["reward"] for row in rows]
    if changes.get("normalise_rewards"):
        mean = sum(scores) / len(scores)
        deviation = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
        scores = [(score - mean) / deviation for score in scores]
    penalty = changes.get("missing_eos_penalty", 0.0)
    scores = [score - penalty * (not row["ended"]) for score, row in zip(scores, rows, strict=True)]
    tokens = sum(lengths)
    policy = -sum(score * length for score, length in zip(scores, lengths, strict=True)) / tokens
    value = sum(0.5 * score**2 * length for score, length in zip(scores, lengths, strict=True)) / tokens
    assert len(rows) == 64 and 0 < sum(row["ended"] for row in rows) < 64
    assert run.logged("loss/policy") == pytest.approx([policy], rel=1e-4, abs=1e-6)
    assert run.logged("loss/value") == pytest.approx([value], rel=1e-4)
    entropy = changes.get("entropy_coef", 0.0) * run.logged("policy/entropy")[0]
    assert run.losses == pytest.approx([policy + changes.get("vf_coef", 0.1) * value - entropy], rel=1e-4, abs=1e-6)
    assert run.logged("reward") == pytest.approx([sum(lengths) / 4 / 64], rel=1e-6), "the reward itself, as given"
    assert run.logged("completions/length") == pytest.approx([tokens / 64], rel=1e-6)


# --- options, one by one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["full", "lora"])
def test_the_value_functions_learning_rate_is_its_own(lab: Lab, form: str) -> None:
    """At 0 it foresees nothing and the policy moves; where the policy's is 0 it learns and the policy stays."""
    both = {"max_steps": 3, "use_peft": form == "lora" or None, "vf_coef": 1.0}
    blind = ppo(lab, learning_rate=1e-2, value_learning_rate=0.0, **both)
    assert blind.logged("value/explained_variance") == [0.0] * 3 and blind.logged("learning_rate") == [1e-2] * 3
    still = ppo(lab, learning_rate=0.0, value_learning_rate=1e-2, **both)
    assert all(abs(found) > 1e-3 for found in still.logged("value/explained_variance")[1:])
    assert still.logged("kl") == pytest.approx([0.0] * 3, abs=1e-4)
    start = {} if form == "lora" else read_weights(lab.model)
    moved = {run.folder: _moved(run, start) for run in (blind, still)}
    assert moved[blind.folder] > 1e-3 and moved[still.folder] == 0


def _moved(run: Run, start: dict[str, Any]) -> float:
    """Return how far the stored weights are from `start`; an adapter starts at 0 in its second factor."""
    return max(
        float((tensor - start.get(name, 0.0)).abs().max())
        for name, tensor in run.weights.items()
        if start or ".lora_B." in name
    )


def test_an_adaptive_coefficient_follows_the_kl(lab: Lab) -> None:
    """Under the target at first (the KL is 0), then over it: a fifth of n / horizon down, then up."""
    run = ppo(lab, max_steps=4, kl_target=1e-6, kl_horizon=16, kl_coef=0.05, kl_estimator="k3")
    assert run.logged("kl_coef") == pytest.approx([0.05, 0.05 * 0.9, 0.05 * 0.9 * 1.1, 0.05 * 0.9 * 1.1**2])


def test_values_are_held_where_they_were_unless_told_not_to(lab: Lab) -> None:
    moving = {"max_steps": 6, "num_ppo_epochs": 3, "value_learning_rate": 1e-2}
    held = ppo(lab, cliprange_value=1e-4, **moving).logged("value/clip_fraction")
    free = ppo(lab, cliprange_value="null", **moving).logged("value/clip_fraction")
    assert held[0] == held[3] == 0, "nothing has moved at an iteration's first update"
    assert max(held) > 0.1 and free == [0.0] * 6


def test_rewards_add_up_by_their_weights(lab: Lab) -> None:
    """A model and two functions, models first; each stands in the metrics."""
    run = ppo(
        lab, max_steps=2, reward_model_name_or_path=str(lab.scorer), reward_weights=[0.5, 2.0, -1.0],
        reward_funcs=["tests.rank_work:odd_tokens", LENGTH_REWARD],
    )  # fmt: skip
    each = [run.logged(f"reward/{name}") for name in ("model", "odd_tokens", "length")]
    assert all(len(values) == 2 and any(values) for values in each)
    expected = [0.5 * model + 2 * odd - length for model, odd, length in zip(*each, strict=True)]
    assert run.logged("reward") == pytest.approx(expected, rel=1e-4)
    assert list(run.manifest["frozen"]) == ["reference", "reward"]


def test_a_value_model_of_its_own_start(lab: Lab) -> None:
    """A reward model's trunk and head foresee something before any update."""
    run = ppo(lab, value_model_name_or_path=str(lab.scorer))
    assert abs(run.logged("value/explained_variance")[0]) > 1e-3


def test_an_epoch_writes_to_every_prompt(lab: Lab) -> None:
    """12 prompts, 2 completions each, 8 an iteration: three iterations of three updates; each prompt is met once."""
    run = ppo(lab, 1, max_steps=None, num_train_epochs=1, num_ppo_epochs=3, num_sample_completions=8)
    assert run.manifest["steps"] == 9 and run.logged("iteration") == [1, 2, 3]
    rows = shown(run)
    assert Counter(row["prompt"] for row in rows) == {row["prompt"]: 2 for row in make_rows("prompt", 12)}
    assert [row["iteration"] for row in rows] == [1] * 8 + [2] * 8 + [3] * 8
    assert [row["step"] for row in rows] == [0] * 8 + [3] * 8 + [6] * 8


def test_samples_are_whole(lab: Lab) -> None:
    rows = shown(ppo(lab, max_steps=2, num_sample_completions=3))
    assert len(rows) == 6
    for row in rows:
        assert list(row) == ["step", "iteration", "prompt", "completion", "ended", "reward", "kl"]
        assert isinstance(row["completion"], str) and isinstance(row["ended"], bool) and 0 <= row["reward"] <= 1
    assert not (ppo(lab, num_sample_completions=0).folder / "samples.jsonl").read_text()


# --- the end of an iteration ------------------------------------------------------------------------------

STOPPING = {"num_ppo_epochs": 3, "max_steps": 6, "early_stop_kl": 1e-9}


def test_an_iteration_ends_where_the_policy_has_moved_too_far(lab: Lab) -> None:
    """Its first update measures a KL of 0, its second one above any limit: two of three updates, then new rows."""
    run = ppo(lab, **STOPPING)
    assert run.manifest["steps"] == 6 and [row["step"] for row in shown(run)[::2]] == [0, 2, 4]
    assert run.logged("policy/stopped_early") == [0, 1, 0, 1, 0, 1]
    assert run.logged("iteration") == [1, 2, 3] and run.logged("policy/ratio")[::2] == pytest.approx([1] * 3, abs=1e-5)
    never, without = (ppo(lab, **{**STOPPING, "early_stop_kl": limit}) for limit in (1e9, None))
    assert never.losses == without.losses and never.logged("iteration") == [1, 2]


def evaluated(lab: Lab, every: int = 1) -> dict[str, Any]:
    return {
        "eval_strategy": "steps", "eval_steps": every, "eval_datasets": [{"path": lab.held_out["prompt"]}],
    }  # fmt: skip


def steps_with(run: Run, name: str) -> list[int]:
    return [line["step"] for line in run.metrics if name in line]


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_run_goes_on_bit_for_bit_from_the_end_of_an_iteration(lab: Lab, tmp_path: Path, form: str) -> None:
    """A save at step 3 waits for step 4, where the iteration ends early; all that adapts is what it was."""
    asked = options(
        lab, **STOPPING, use_peft=form == "lora" or None, save_strategy="steps", save_steps=3, kl_target=0.1,
        kl_horizon=16, normalise_rewards=True, learning_rate=1e-2, value_learning_rate=3e-2, logging_steps=1,
        lr_scheduler_type="linear",
    )  # fmt: skip
    done = lab.train("ppo", **asked)
    assert sorted(place.name for place in done.folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    state = json.loads((done.folder / "checkpoint-4" / "align_kit_state.json").read_text())
    assert state["iteration"] == 2 and state["moments"]["count"] == 16 and state["kl_coef"]["beta"] != 0.05
    again = lab.start("ppo", interrupted(done.folder, tmp_path / "again"), resume="auto", **asked)
    again.result.ok()
    assert all((again.weights[name] == tensor).all() for name, tensor in done.weights.items())
    for name in ("loss", "reward", "kl", "kl_coef", "value/explained_variance", "policy/stopped_early"):
        expected = [line[name] for line in done.metrics if name in line and line["step"] > 4]
        assert again.logged(name)[-len(expected) :] == expected and expected, name


def test_evaluation_is_the_same_every_time(lab: Lab) -> None:
    """The draws are: a policy that does not move says the same, on one rank or two, and training goes on unmoved."""
    same = {"max_steps": 3, "learning_rate": 0.0, "eval_on_start": True}
    two, one = (ppo(lab, ranks, **same, **evaluated(lab)) for ranks in (2, 1))
    for name in ("eval_reward", "eval_kl", "eval_length", "eval_eos_rate"):
        assert len(set(two.logged(name))) == 1 and len(two.logged(name)) == 4
        assert two.logged(name) == pytest.approx(one.logged(name), rel=1e-5, abs=1e-5)
    plain, watched = ppo(lab, max_steps=3), ppo(lab, max_steps=3, **evaluated(lab))
    assert watched.losses == plain.losses
    assert "eval reward 0." in two.result.output[0] and "eval_reward 0." in two.result.output[0]


def test_the_best_is_stored_where_it_was_evaluated(lab: Lab) -> None:
    """Both wait for the end of an iteration; the best by its reward is what the run leaves."""
    run = ppo(
        lab, max_steps=9, num_ppo_epochs=3, learning_rate=3e-2, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, **evaluated(lab),
    )  # fmt: skip
    assert steps_with(run, "eval_reward") == [3, 6, 9]
    rewards = run.logged("eval_reward")
    best = 3 * (1 + rewards.index(max(rewards)))
    state = json.loads((run.folder / "checkpoint-9" / "trainer_state.json").read_text())
    assert state["best_global_step"] == best and state["best_metric"] == max(rewards)
    stored = read_weights(run.folder / f"checkpoint-{best}")
    assert all((run.weights[name] == tensor).all() for name, tensor in stored.items())


def test_a_run_without_a_better_evaluation_stops(lab: Lab) -> None:
    run = ppo(lab, max_steps=9, learning_rate=0.0, early_stopping_patience=2, **evaluated(lab))
    assert run.manifest["steps"] == 3


# --- what is refused --------------------------------------------------------------------------------------


def mistake(lab: Lab, place: Path, world_size: int = 1, **changes: Any) -> str:
    """Return the one line of a run that cannot be; no rank is left waiting."""
    result = lab.start("ppo", place, world_size, **options(lab, world_size, **changes)).result
    assert set(result.codes) == {2} and result.seconds < 60, result.codes
    return result.error()


def test_sizes_that_do_not_divide(lab: Lab, tmp_path: Path) -> None:
    line = mistake(lab, tmp_path / "run", num_generations=3)
    assert "an iteration writes 8 completions" in line and "no multiple of num_generations 3" in line


def test_completions_that_leave_no_room(lab: Lab, tmp_path: Path) -> None:
    assert "response_length 48 leaves no room" in mistake(lab, tmp_path / "run", response_length=48)


@pytest.mark.parametrize(("changes", "words"), [
    ({"reward_funcs": None}, "no reward: give reward_model_name_or_path, or reward_funcs"),
    ({"reward_funcs": ["checker"]}, "no card of the data names one"),
    ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for 1 rewards (odd_tokens); give one each"),
    ({"kl_target": 1.0, "kl_coef": 0.0}, "and kl_coef is 0; give it a number above 0"),
    ({"use_peft": True, "value_model_name_or_path": "somewhere"}, "value_model_name_or_path and use_peft"),
], ids=lambda case: "-".join(case) if isinstance(case, dict) else "")  # fmt: skip
def test_one_line_for_what_cannot_be(lab: Lab, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in mistake(lab, tmp_path / "run", **changes)


def test_a_reward_that_is_no_number_on_one_rank_ends_both(lab: Lab, tmp_path: Path) -> None:
    line = mistake(lab, tmp_path / "run", 2, reward_funcs=["tests.rank_work:nan_on_the_last_rank"])
    assert "the reward function nan_on_the_last_rank gave nan" in line


def test_a_reference_that_is_not_the_start(lab: Lab, tmp_path: Path) -> None:
    line = mistake(lab, tmp_path / "run", 2, harm="shift_reference")
    assert "step-0 identity failed" in line and "is not what the policy starts from" in line
    assert str(lab.model) in line and "reference_differs: true" in line


def test_dropout_that_was_asked_for(lab: Lab, tmp_path: Path) -> None:
    """The ratio to what wrote would not be 1 before any update."""
    dropping = {"use_peft": True, "lora_dropout": 0.5}
    stored = ppo(lab, max_steps=3, learning_rate=1e-2, **dropping)
    line = mistake(lab, tmp_path / "run", model_name_or_path=str(stored.folder), disable_dropout=False, **dropping)
    assert "step-0 identity failed" in line and "disable_dropout: true" in line


@pytest.mark.parametrize("option", [
    "--num_generations 0", "--response_length 0", "--rollout_batch_size 0", "--num_ppo_epochs 0",
    "--num_mini_batches 0", "--temperature 0", "--cliprange 0", "--cliprange_value -1", "--gamma 1.1", "--lam -0.1",
    "--kl_coef -1", "--kl_target 0", "--kl_horizon 0", "--early_stop_kl 0", "--vf_coef -1", "--value_learning_rate -1",
])  # fmt: skip
def test_numbers_out_of_range(option: str) -> None:
    name = option.split()[0].removeprefix("--")
    with pytest.raises(UserError, match=rf"{name} \(command line\) is .*; expected"):
        load(get("ppo"), option.split())


@pytest.mark.parametrize(("option", "words"), [
    ("--kl_estimator k2", "k1"), ("--rollout_placement server", "gathered"), ("--reward_placement cached", "shared"),
])  # fmt: skip
def test_words_that_are_not_known(option: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(get("ppo"), option.split())


def test_a_checkpoint_holds_the_trained_adapter_alone(lab: Lab) -> None:
    """The value function's adapter and a reference's copy are the engine's affair, not a model to load."""
    run = lab.train("ppo", 2, use_peft=True, max_steps=3, save_strategy="steps", save_steps=3)
    folder = run.folder / "checkpoint-3"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not list(folder.glob("*/adapter_model.safetensors"))
    assert {name.rpartition(".lora_")[2][0] for name in read_weights(folder)} == {"A", "B"}


def test_an_optimizer_of_the_engine_cannot_have_two_rates(lab: Lab, tmp_path: Path) -> None:
    engine = json.loads(lab.sharded.read_text()) | {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    result = lab.start("ppo", tmp_path / "run", 1, deepspeed=engine, value_learning_rate=1e-3).result
    assert "value_learning_rate" in result.error()

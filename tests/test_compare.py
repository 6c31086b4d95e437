"""The comparison's arithmetic and rules: intervals, the walk over learning rates, arms, fairness, what is written."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align_kit.compare import arms, fair, interval, judges, measures, measuring, options, reading, sweep, table
from align_kit.compare.reading import Point, Ran
from align_kit.errors import UserError

# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "value"),  # published: the two-sided 95 % points of Student's t
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_the_published_ones(freedom: int, value: float) -> None:
    assert interval.quantile(0.975, freedom) == pytest.approx(value, abs=5e-4)


@given(st.floats(0, 50), st.integers(1, 40))
def test_distribution_is_the_integral_of_its_density(value: float, freedom: int) -> None:
    """Against the density, integrated: the sums are by another route than the gamma functions."""
    x = torch.linspace(0, value, 20_001, dtype=torch.float64)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert interval.distribution(value, freedom) == pytest.approx(0.5 + float(torch.trapezoid(density, x)), abs=1e-5)


def test_interval_of_three_seeds() -> None:
    found = interval.over([1.0, 2.0, 3.0])  # s = 1, standard error 1 / sqrt 3, t(2) = 4.3027
    assert found.mean == 2 and found.half == pytest.approx(4.30265 / math.sqrt(3), abs=1e-5)
    assert found.low < 0 < found.high
    alone = interval.over([5.0])
    assert alone.mean == 5 and math.isnan(alone.low)


def test_pairing_takes_out_what_seeds_share() -> None:
    before, after = [1.0, 5.0, 9.0], [1.5, 5.4, 9.6]
    found = interval.paired(before, after)
    assert found.mean == pytest.approx(0.5) and found.half < 0.3 and found.low > 0
    assert interval.over(after).half > 5  # unpaired, the seeds would hide it
    with pytest.raises(ValueError):
        interval.paired(before, after[:2])


# --- the walk ---------------------------------------------------------------------------------------------------------


def walked(at: float, start: float) -> dict[float, float]:
    """Return what a walk tries where the loss is lowest at the rate `at`."""
    losses: dict[float, float] = {}
    while (rate := sweep.following(losses, start)) is not None:
        losses[rate] = (math.log10(rate) - math.log10(at)) ** 2
    return losses


@given(st.floats(-1.4, 1.4))
def test_the_best_lies_between_two_that_are_worse(decades: float) -> None:
    at = 1e-3 * 10**decades
    found = sweep.found(walked(at, 1e-3))
    assert found.edge == "" and 10**-0.27 < found.rate / at < 10**0.27  # half a step of the grid, and its rounding
    assert found.estimate == pytest.approx(at, rel=0.05)
    assert len(found.losses) <= sweep.MOST


def test_two_steps_of_the_grid_are_ten_times() -> None:
    assert sweep.grid(2e-3, 2) == 2e-2 and sweep.grid(2e-3, -2) == 2e-4


def test_a_walk_ends_and_says_that_it_found_no_bottom() -> None:
    losses: dict[float, float] = {}
    while (rate := sweep.following(losses, 1e-3)) is not None:
        losses[rate] = -math.log(rate)  # the more the better
    found = sweep.found(losses)
    assert len(losses) == sweep.MOST and found.edge == "highest" and found.estimate is None


def test_a_rate_that_diverged_is_worse_than_any() -> None:
    losses = {1e-3: 2.0, 3.2e-3: math.inf, 3.2e-4: 2.5}
    assert sweep.following(losses, 1e-3) is None and sweep.best(losses) == 1e-3
    assert sweep.found(losses).estimate is None and sweep.best({1e-3: math.nan, 1e-2: 3.0}) == 1e-2


# --- the command line -------------------------------------------------------------------------------------------------


def test_words_of_the_runs_are_passed_on() -> None:
    found = options.parse(["dpo", "--config", "a.yaml", "b.yaml", "--beta", "0.1", "--seeds", "5", "--bf16"])
    assert found.recipe == "dpo" and found.configs == ("a.yaml", "b.yaml") and not found.default
    assert found.words == ("--beta", "0.1", "--bf16") and found.seeds == 5
    assert options.parse([]).default and options.parse(["--seeds", "2"]).recipe == "sft"
    assert options.parse(["--learning_rates", "1e-3,1e-2"]).rates == (1e-3, 1e-2)
    assert options.parse(["--forgetting", "none"]).forgetting == ("none",)
    assert options.parse(["--overwrite"]).overwrite and not options.parse(["--overwrite", "no"]).overwrite


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dp0", "unknown recipe 'dp0'"),
        ("sft --seeds 0", "--seeds 0: give a whole number"),
        ("sft --seed 3", "--seed is not for compare"),
        ("sft --learning_rates 1e-3,x", "--learning_rates x: give a number"),
        ("sft --learning_rates 2", "give rates between 0 and 1"),
        ("sft --learning_rate 1e-3 --learning_rates 1e-3", "were both given"),
        ("sft --vary lora_r=8,16 --arms a b", "both say what differs"),
        ("sft --vary learning_rate=1e-3,1e-2 --learning_rates 1e-3", "makes each an arm"),
        ("sft --ranks two", "--ranks two: give a whole number"),
        ("sft --overwrite maybe", "--overwrite maybe: give true or false"),
    ],
)
def test_bad_words(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        options.parse(words.split())


# --- arms -------------------------------------------------------------------------------------------------------------


def named(words: str) -> list[arms.Arm]:
    return arms.arms_of(options.parse(words.split()))


def test_arms_of_a_varied_key() -> None:
    found = named("sft --vary lora_r=8,32,128")
    assert [arm.name for arm in found] == ["lora_r=8", "lora_r=32", "lora_r=128"]
    assert found[1].words[-2:] == ("--lora_r", "32")
    lists = named('sft --vary lora_target_modules=["q_proj","v_proj"],all-linear')
    assert [arm.words[-1] for arm in lists] == ['["q_proj","v_proj"]', "all-linear"]
    assert lists[0].name == "lora_target_modules=q_proj-v_proj"


def test_long_values_that_begin_alike_are_arms_of_their_own() -> None:
    beginning = "/models/" + "deep/" * 10
    found = named(f"--vary model_name_or_path={beginning}a,{beginning}b")
    assert len({arm.name for arm in found}) == 2 and found[1].words[-1] == f"{beginning}b"


def test_a_varied_key_of_the_adapter_brings_the_adapter() -> None:
    assert named("sft --vary lora_r=8,32")[0].below == ("recipes/lora.yaml",)
    assert named("sft --vary load_in_4bit=false,true")[1].words == ("--use_peft", "true", "--load_in_4bit", "true")
    assert named("sft --vary use_peft=false,true")[1].words == ("--use_peft", "true")
    assert named("dpo --vary beta=0.1,0.5")[0].below == ()


def test_full_against_lora_by_default() -> None:
    full, lora = named("sft")
    assert full.words == ("--use_peft", "false") and lora.below == ("recipes/lora.yaml",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sft --vary lora_r=8", "two or more different values"),
        ("sft --vary lora_r=8,8", "two or more different values"),
        ("sft --vary lora_r", "two or more different values"),
        ("sft --vary seed=1,2", "--vary seed: each run has its own"),
        ("sft --arms one", "two or more arms"),
        ("sft --arms a= b=x.yaml", "write name=overlay.yaml"),
        ("sft --arms sft b=x.yaml", "--arms sft: a folder of that name"),
    ],
)
def test_bad_arms(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        named(words)


def test_one_factor_and_no_more() -> None:
    one, other = {"beta": 0.1, "max_steps": 5, "use_peft": False}, {"beta": 0.1, "max_steps": 5, "use_peft": True}
    assert arms.factor({"a": one, "b": other | {"lora_r": 8}}) == ["lora_r", "use_peft"]
    assert arms.factor({"a": one, "b": one | {"beta": 0.5}}) == ["beta"]
    with pytest.raises(UserError, match=r"a and b differ in 2 keys \(max_steps\)"):
        arms.factor({"a": one, "b": other | {"max_steps": 6}})
    with pytest.raises(UserError, match="the same configuration"):
        arms.factor({"a": one, "b": one | {"learning_rate": 1.0}})
    assert arms.factor({"a": one, "b": one | {"learning_rate": 1.0}}, "learning_rate") == ["learning_rate"]
    two = {**one, "beta": 0.5}
    with pytest.raises(UserError, match="the arms b and c are the same configuration"):
        arms.factor({"a": one, "b": two, "c": dict(two)})


# --- fairness ---------------------------------------------------------------------------------------------------------

MANIFEST: dict[str, Any] = {
    "phase": "sft",
    "policy": {"digest": "p", "name": "start"},
    "frozen": {},
    "data": {"train": {"digest": "d", "tokenised": {"digest": "t"}}},
    "batch": {"per_device": 4, "world_size": 2, "accumulation": 1},
    "steps": 2,
    "asked_engine": {},
    "precision": "fp32",
    "world_size": 2,
    "versions": {"torch": "2"},
    "git": None,
    "result": {"bytes": 1},
}
LINES = [{"step": 1, "loss": 2.0, "tokens": 10.0}, {"step": 2, "loss": 1.0, "tokens": 30.0}]


def ran(arm: str = "a", seed: int = 1, lines: list[dict[str, Any]] = LINES, found: Any = None, **changes: Any) -> Ran:
    return Ran(arm, 1e-3, seed, Path(arm), {**MANIFEST, **changes}, lines, found or {})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"policy": {"digest": "q"}}, r"differ in start \(p, q\)"),
        ({"data": {"train": {"digest": "d", "tokenised": {"digest": "u"}}}}, "differ in data "),
        ({"batch": {"per_device": 8, "world_size": 2, "accumulation": 1}}, r"differ in batch \(per_device: 4, 8\)"),
        ({"steps": 3}, "differ in steps"),
        ({"asked_engine": {"zero_optimization": {"stage": 2}}}, "differ in engine"),
        ({"precision": "bf16"}, "differ in precision"),
        ({"world_size": 4}, "differ in world size"),
        ({"versions": {"torch": "3"}}, r"differ in versions \(torch: 2, 3\)"),
        ({"git": "abc"}, "differ in git revision"),
        ({"frozen": {"reference": {"digest": "r"}}}, "differ in frozen models"),
        ({"lines": [*LINES[:1], {**LINES[1], "tokens": 31.0}]}, "differ in tokens"),
    ],
)
def test_runs_that_differ_in_more_are_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        fair.check([ran("a"), ran("b", **changes)], ["use_peft"])


def test_other_seeds_may_differ_and_so_may_what_follows_from_the_factor() -> None:
    other_order = [LINES[0], {**LINES[1], "tokens": 31.0}]
    fair.check([ran("a", 1), ran("b", 1), ran("a", 2, other_order), ran("b", 2, other_order)], ["use_peft"])
    fair.check([ran("a"), ran("b", precision="bf16")], ["bf16"])
    with pytest.raises(UserError, match="differ in data "):
        fair.check([ran("a"), ran("b", data={"train": {"digest": "e", "tokenised": {"digest": "t"}}})], ["bf16"])


# --- what is read off a run -------------------------------------------------------------------------------------------


def test_tokens_up_to_a_step_lie_between_logged_ones() -> None:
    lines = [{"step": 1, "loss": 3.0, "tokens": 10.0}, {"step": 5, "loss": 2.0, "tokens": 80.0}]
    assert [ran(lines=lines).tokens(step) for step in (0, 1, 3, 5, 9)] == [0, 10, 50, 90, 90]


def test_tokens_to_a_quality_are_interpolated() -> None:
    curve = [Point(0, 0.0, 3.0), Point(5, 100.0, 2.0), Point(10, 200.0, 1.0)]
    assert reading.tokens_to(curve, 1.5) == 150 and reading.tokens_to(curve, 2.0) == 100
    assert reading.tokens_to(curve, 5.0) == 0 and reading.tokens_to(curve, 0.5) is None


def test_every_run_reaches_the_quality_that_is_chosen() -> None:
    def falling(*losses: float) -> Ran:
        return ran(lines=[{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)])

    runs = [falling(3, 2, 1.0), falling(3, 1.5, 1.7)]
    assert measures.reachable(runs) == 1.5
    assert all(reading.tokens_to(one.curve, 1.5) is not None for one in runs)
    assert measures.reachable([*runs, ran()]) is None


def test_losses_of_another_kind_or_on_other_rows_are_not_compared() -> None:
    alike = [ran("a"), ran("b")]
    assert measures.one_loss(["use_peft", "lora_r"], alike) and measures.one_loss(["max_steps"], alike)
    assert not measures.one_loss(["beta"], alike) and not measures.one_loss(["loss_type"], alike)
    cut = {"eval": {"digest": "e", "tokenised": {"digest": "cut"}}}
    assert not measures.one_loss(["max_length"], [ran("a"), ran("b", data=cut)])
    assert not measures.one_loss(["model_name_or_path"], [ran("a"), ran("b", frozen={"reference": {"digest": "x"}})])


def test_problems_are_paired_over_the_same_ones() -> None:
    base = [ran("a", seed, found={"exact": [0.0, 1.0, 0.0, 1.0]}) for seed in (1, 2)]
    other = [ran("b", 1, found={"exact": [1.0, 1.0, 0.0, 1.0]}), ran("b", 2, found={"exact": [1.0, 1.0, 0.0, 0.0]})]
    found = measures.problem_difference(base, other)
    assert found is not None and found.count == 4
    # by problem 100, 0, 0, -50: mean 12.5, s = 62.9153, t(3) = 3.18245
    assert found.mean == pytest.approx(12.5) and found.half == pytest.approx(3.18245 * 62.9153 / 2, rel=1e-4)
    assert measures.problem_difference(base, [ran("b")]) is None


def results(**changes: Any) -> table.Results:
    runs = {
        "full": [ran("full", seed, [{"step": 2, "eval_loss": 1.0 + seed / 100}]) for seed in (1, 2, 3)],
        "lora": [ran("lora", seed, [{"step": 2, "eval_loss": 1.2 + seed / 100}]) for seed in (1, 2, 3)],
    }
    every = [one for some in runs.values() for one in some]
    rows = [one for one in measures.measures(every, [], None) if one.title == "held-out loss"]
    sweeps = {"full": sweep.found(walked(1e-3, 1e-3)), "lora": sweep.found(walked(1e-2, 1e-3))}
    given = {"recipe": "sft", "factor": ["use_peft"], "runs": runs, "sweeps": sweeps, "rows": rows, "start": "start"}
    return table.Results(**{**given, "before": {}, "problems": "", **changes})


def test_table_shows_means_and_paired_differences() -> None:
    text = table.markdown(results())
    (row,) = [line for line in text.splitlines() if line.startswith("| held-out loss")]
    # s = 0.01: half 4.3027 * 0.01 / sqrt 3; the difference is the same on every seed, so it has no interval to show
    assert "1.0200 ± 0.0248" in row and "1.2200 ± 0.0248" in row and row.rstrip(" |").endswith("+0.2000")
    assert "The best of lora is 10 times that of full (10 by the parabolas)." in text
    assert "0.001         | 0.0000 *" in text and "t over 3 seeds" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in tables[:3]}) == 1


def held_out(*digests: str) -> list[Ran]:
    """Return runs of one arm with a seed for each digest, on whose rows each was evaluated."""
    rows = [{"eval": {"digest": "e", "tokenised": {"digest": digest}}} for digest in digests]
    lines = [{"step": 0, "eval_loss": 3.0}, {"step": 2, "eval_loss": 1.0}]
    return [ran("a", seed, [{**lines[0], "eval_loss": 2.0 + seed}, lines[1]], data=one)
            for seed, one in enumerate(rows, 1)]  # fmt: skip


def test_what_a_seed_draws_is_told_by_the_digests_of_the_rows() -> None:
    apart, alike = ({"a": held_out("x", other), "b": held_out("x", other)} for other in ("y", "x"))
    assert "draws the order of the data, which rows are held out and what an arm" in table.how(results(runs=apart))
    assert "draws the order of the data and what an arm" in table.how(results(runs=alike))
    (row,) = [line for line in table.markdown(results(runs=apart)).splitlines() if line.startswith("| held-out loss")]
    assert row.split("|")[2].strip() == "3.5000", "the start's loss is the mean over the seeds' rows"


def test_whether_rates_were_chosen_by_the_same_rows_is_told_by_digests() -> None:
    assert fair.same_held_out(held_out("x"), held_out("y", "x"))
    assert not fair.same_held_out(held_out("x"), held_out("y"))
    assert "chosen by the same held-out rows; --test_datasets" in table.markdown(results(same_rows=True))
    assert "chosen by other held-out rows" in table.markdown(results())


def test_rewards_are_shown_as_they_are_and_the_highest_is_best() -> None:
    found = sweep.found({1e-3: -0.5, 1e-2: -0.25, 1e-1: math.inf}, sweep.REWARD)
    assert found.rate == 1e-3 and found.values[1e-2] == 0.25
    shown = results(sweeps={"full": found, "lora": found})
    text = table.markdown(shown)
    assert "Held-out reward by learning rate" in text and "| 0.5000 *" in text and "diverged" in text
    assert table.plain(shown)["sweeps"]["full"]["rewards"] == {"0.001": 0.5, "0.01": 0.25, "0.1": None}


def test_rows_that_are_missing_are_named_with_why() -> None:
    runs = [ran("a", phase="reward", policy={"digest": "p", "name": "start"}, config={"save_strategy": "no"})]
    rows = measures.measures(runs, ["text"], None)
    (said,) = measures.unmeasured(rows, runs, ["text"], ["answers", "text"])
    assert "checkpoint (none was kept, save_strategy is no)" in said and "loss on text (a model that scores" in said
    assert "exact answers (a model that scores writes none)" in said and "tokens/s (the runs are too short" in said
    assert "from before" not in said and "rank" not in said


def test_one_rate_is_no_edge_and_no_ratio() -> None:
    text = table.markdown(results(sweeps={name: sweep.found({1e-3: 2.0}) for name in ("full", "lora")}))
    assert "lora: only 0.001 was tried." in text and "beyond" not in text and "times that of" not in text


def test_one_seed_has_no_intervals() -> None:
    alone = {arm: some[:1] for arm, some in results().runs.items()}
    text = table.markdown(results(runs=alone))
    assert "±" not in text and "there are no intervals" in text
    json.dumps(table.plain(results(runs=alone)), allow_nan=False)


# --- what models are judged by ----------------------------------------------------------------------------------------


def test_held_out_rows_are_the_cards_own(tmp_path: Path) -> None:
    from align_kit.compare.runs import resolve

    config = resolve("sft", ["--output_dir", str(tmp_path)])
    chosen, judged = (judges.rows(config, test=test) for test in (False, True))
    assert json.loads(chosen or "") == [{"path": "card:sums_sft", "split": "validation"}]
    assert json.loads(judged or "") == [{"path": "card:sums_sft", "split": "test"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    bare = resolve("sft", ["--datasets", json.dumps([{"path": str(rows)}])])
    with pytest.raises(UserError, match="this recipe evaluates on none"):
        judges.evaluation(bare, test=True)
    own = resolve("sft", ["--eval_strategy", "steps", "--test_split_size", "0.1"])
    assert judges.evaluation(own, test=True) == []
    assert judges.evaluation(own, test=True, datasets="[]") == ["--eval_datasets", "[]"]


# --- the update -------------------------------------------------------------------------------------------------------


def test_rank_of_a_matrix() -> None:
    from align_kit.compare.work import rank_of

    orthogonal = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    stable, effective = rank_of(orthogonal)
    assert stable == pytest.approx(6) and effective == pytest.approx(6)
    one = torch.outer(torch.randn(5, dtype=torch.float64), torch.randn(9, dtype=torch.float64))
    assert rank_of(one) == pytest.approx((1, 1), abs=1e-4)
    values = torch.tensor([3.0, 1.0], dtype=torch.float64)  # stable (9 + 1) / 9; entropy of 3/4 and 1/4
    stable, effective = rank_of(torch.diag(values))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert stable == pytest.approx(10 / 9) and effective == pytest.approx(math.exp(entropy))


def test_update_leaves_out_embeddings_and_measures_what_changed() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from align_kit.compare.work import update

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    before = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    after = LlamaForCausalLM(before.config)
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        after.lm_head.weight.add_(1.0)
        after.model.embed_tokens.weight.add_(1.0)
        up, down = torch.randn(16, 2), torch.randn(2, 16)
        after.model.layers[0].self_attn.q_proj.weight.add_(up @ down)
    found = update(after, before)
    assert found["matrices"] == 14 and 1 < found["effective_rank"] <= 2.001
    named = before.named_parameters()
    trunk = [weight.detach() for name, weight in named if weight.dim() == 2 and "layers" in name]
    norm = math.sqrt(sum(float(weight.square().sum()) for weight in trunk))
    assert found["relative"] == pytest.approx(float((up @ down).norm()) / norm, rel=1e-4)


# --- measuring --------------------------------------------------------------------------------------------------------


def doubled_or_killed(number: int) -> int:
    """Return twice a number; the system ends the process that is given 13."""
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_measuring_process_that_is_ended_is_told() -> None:
    assert measuring.shared_out(doubled_or_killed, [1, 2, 3], 2) == [2, 4, 6]
    with pytest.raises(UserError, match="ended from outside, for want of memory"):
        measuring.shared_out(doubled_or_killed, [1, 13, 3], 2)

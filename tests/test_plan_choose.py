"""The planner's batches against rows laid out by hand, what it reads of a configuration, and what it chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from align_kit import registry, zero
from align_kit.config import BatchPlan, load
from align_kit.data.collate import LanguageCollator, PreferenceCollator
from align_kit.plan import describe, hardware, show
from align_kit.plan.batches import Batches, Written, invented_rows
from align_kit.plan.choose import Choice, Engine, Limits, Setting, Space, applied, choose, combinations
from align_kit.plan.facts import Held, Micro, Run, Shape, Weight
from align_kit.plan.plan import Plan, plan
from align_kit.resources import folder

GIB = 2**30
H200 = hardware.named("h200")


# --- batches --------------------------------------------------------------------------------------------------------


def rows_of(*lengths: tuple[int, int, int]) -> list[Mapping[str, Any]]:
    """Return pairs with so many tokens of prompt, chosen and rejected; no two tokens are the same."""
    ids = iter(range(10**6))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{n: [next(ids) for _ in range(size)] for n, size in zip(names, row, strict=True)} for row in lengths]


def preference(rows: Sequence[Mapping[str, Any]], mode: Any, **more: Any) -> Batches:
    return Batches(rows, PreferenceCollator(0), mode, world_size=1, **more)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # One pair: 10 tokens of prompt, 4 chosen, 3 rejected. The last token of each completion predicts nothing.
        ("shared", Micro(2, 13 + 2, 7, 13 * 14 / 2 + 2 * 10 + 3, 13, 27)),
        ("packed", Micro(2, 13 + 12, 7, 13 * 14 / 2 + 12 * 13 / 2, 13, 27)),
        ("plain", Micro(2, 2 * 14, 2 * 14, 2 * 14 * 15 / 2, 14, 27)),
    ],
)
def test_a_micro_batch_is_what_the_run_computes(mode: str, expected: Micro) -> None:
    assert preference(rows_of((10, 4, 3)), mode).micro(rows_of((10, 4, 3))) == expected


def test_a_scoring_model_computes_every_token_and_reads_one_place_a_sequence() -> None:
    rows = rows_of((10, 4, 3))
    assert preference(rows, "packed", whole=True).micro(rows) == Micro(2, 27, 2, 14 * 15 / 2 + 13 * 14 / 2, 14, 27)


def test_mean_and_worst_are_of_the_batches_a_run_draws() -> None:
    rows = rows_of(*[(10, 4, 3)] * 63, (40, 20, 20))
    mean, worst = preference(rows, "packed").sized(2, 4)
    assert worst.longest == 59 and worst.tokens > 2 * mean.tokens > 0
    assert mean.tokens == pytest.approx(2 * 25, rel=0.5)


def test_the_longest_row_of_all_counts_though_the_sample_lacks_it() -> None:
    short, long = rows_of(*[(10, 4, 3)] * 8), rows_of((100, 40, 30))[0]
    mean, worst = preference(short, "packed", longest=long).sized(2, 1)
    assert mean.tokens == 50 and worst.tokens == 25 + 139 + 129 and worst.longest == 139


def test_an_evaluation_takes_its_rows_as_they_come() -> None:
    """The heaviest batch counts, the last filled up from the first rows; rows that are trained on stand for others."""
    rows, held_out = rows_of(*[(10, 4, 3)] * 6), rows_of(*[(10, 4, 3)] * 2, (20, 4, 4), (30, 4, 4), (10, 4, 3))
    assert preference(rows, "packed", held_out=held_out).evaluated(2).tokens == 2 * (23 + 33)
    assert preference(rows, "packed", held_out=held_out).evaluated(7).tokens == 5 * 25 + 2 * (23 + 33)
    assert preference(rows, "packed").evaluated(2).tokens == 2 * 25
    assert preference(rows, "packed", longest=rows_of((100, 40, 30))[0]).evaluated(2).tokens == 25 + 139 + 129


def test_completions_that_are_not_written_yet_share_their_prompt_in_a_micro_batch() -> None:
    prompts = [{"prompt_ids": list(range(100 * n, 100 * n + 20))} for n in range(6)]
    batches = Batches(prompts, LanguageCollator(0), "shared", world_size=2, written=Written(4, 8))
    mean, worst = batches.sized(4, 2)
    # Four completions of one prompt: it stands once, the first with 7 of its 8 tokens behind it, so do the others.
    assert mean == worst == Micro(4, 20 + 4 * 7, 4 * 8, 27 * 28 / 2 + 3 * (7 * 20 + 28), 27, 4 * 28)


def test_rows_are_invented_at_full_length_and_share_nothing() -> None:
    rows = invented_rows("preference", 4, 64)
    micro = preference(rows, "shared").micro(rows[:2])
    assert micro.longest == 63 and micro.tokens == 2 * (63 + 31)


# --- what is read of a configuration --------------------------------------------------------------------------------


def configured(phase: str, *words: str) -> Any:
    defaults = folder("recipes") / f"{phase}.yaml"
    return load(registry.get(phase), ["--config_name", "builtin:tiny", *words], defaults=defaults)


def described(phase: str, *words: str, batch: BatchPlan | None = None, engine: Any = "zero3") -> Run:
    recipe, config = registry.get(phase), configured(phase, *words)
    from align_kit.models import source

    kind = "prompt" if phase == "ppo" else "preference"
    collate = LanguageCollator(0) if phase == "ppo" else PreferenceCollator(0)
    data = describe.Data(invented_rows(kind, 8, 32), collate)  # type: ignore[arg-type]
    site = describe.Site(zero.load(engine), "fp32", batch or BatchPlan(2, 2, 4, 100))
    return describe.describe(recipe, config, source.resolve("builtin:tiny", random=True), data, site).run


def test_a_run_is_described_as_it_is_configured() -> None:
    run = described("dpo", "--max_steps", "-1", "--num_train_epochs", "2", "--gradient_checkpointing", "true")
    assert (run.phase, run.unit, run.per_device, run.accumulation, run.world_size) == ("dpo", "pairs", 2, 4, 2)
    assert run.steps == 2 * 7 and run.checkpointing and run.forward == "shared" and run.optimizer == "adamw_torch_fused"
    assert run.policy.size == run.policy.trained_size > 0
    assert run.checkpoints_kept == 0 and run.checkpoints_made == 0
    assert run.evaluated is None and run.per_device_eval == 0


def test_saves_are_counted() -> None:
    run = described("dpo", "--max_steps", "10", "--save_strategy", "steps", "--save_steps", "3")
    assert run.checkpoints_made == 3 and run.checkpoints_kept == 2
    share = described("dpo", "--max_steps", "8", "--save_strategy", "steps", "--save_steps", "0.25")
    assert share.checkpoints_made == 4


@pytest.mark.parametrize(
    "asked, made, lasting",
    [
        ("--save_steps 10", 10, 0),
        ("--save_steps 0.25", 4, 0),
        ("--save_steps 10 --save_milestone_steps 30", 10, 3),
        ("--save_steps 20 --save_milestone_steps 30", 5, 1),
        ("--save_steps 10 --eval_strategy steps --eval_steps 10 --load_best_model_at_end true", 10, 1),
        ("--save_strategy no --save_minutes 15 --save_total_limit 4", 5, 0),
        ("--save_strategy no", 0, 0),
    ],
)
def test_which_checkpoints_a_configuration_makes(asked: str, made: int, lasting: int) -> None:
    words = ["--max_steps", "100", "--save_strategy", "steps", *asked.split()]
    if "best" in asked:
        words += ["--eval_datasets", '[{"path": "card:sums_pairs", "split": "test"}]']
    run = described("dpo", *words)
    assert (run.checkpoints_made, run.checkpoints_lasting) == (made, lasting)


def test_what_ppo_writes_is_described() -> None:
    words = ("--response_length", "16", "--num_mini_batches", "3", "--num_ppo_epochs", "2", "--reward_funcs", "a:b")
    rollout = described("ppo", *words).rollout
    assert rollout is not None
    assert rollout.completions == 2 * 4 * 3 and rollout.steps == 6 and rollout.response_tokens == 16
    assert rollout.longest_prompt == 32 and rollout.placement == "gathered"


def test_sizes_that_follow_from_the_model_are_filled_in() -> None:
    facts = describe.engine_facts(zero.load("zero3"), "bf16", 4096)
    assert facts.reduce_bucket == 4096**2 and facts.persistence_threshold == 100_000 and facts.overlap_comm
    offloaded = describe.engine_facts(zero.load("zero3_offload_optimizer"), "bf16", 64)
    assert (offloaded.offload_optimizer, offloaded.offload_param) == ("cpu", "none")
    bare = describe.engine_facts({"zero_optimization": {"stage": 2}}, "fp32", 64)
    assert bare.stage == 2 and bare.reduce_bucket == 500_000_000 and not bare.overlap_comm


# --- what is chosen -------------------------------------------------------------------------------------------------


def llama_7b() -> Shape:
    """Return Llama 2 7B by its parameters."""
    hidden, inner, vocab = 4096, 11008, 32000
    square, wide = (hidden, hidden), (inner, hidden)
    layer = {f"self_attn.{name}_proj": square for name in "qkvo"}
    layer |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": (hidden, inner)}
    layer |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    weights = [Weight("model.embed_tokens.weight", (vocab, hidden))]
    weights += [Weight(f"model.layers.{n}.{name}.weight", size) for n in range(32) for name, size in layer.items()]
    weights += [Weight("model.norm.weight", (hidden,)), Weight("lm_head.weight", (vocab, hidden))]
    return Shape("7b", tuple(weights), hidden, 32, 32, 32, 128, inner, vocab)


def frozen(shape: Shape) -> Shape:
    return replace(shape, weights=tuple(replace(weight, trained=False) for weight in shape.weights))


def run_of(world_size: int = 8, stage: str = "zero3", per_device: int = 4, accumulation: int = 4) -> Run:
    """Return a DPO run of 7 B parameters on rows of 2,048 tokens."""
    shape = llama_7b()
    tokens = 2 * per_device * 2048.0
    micro = Micro(2 * per_device, tokens, tokens / 2, per_device * 2048.0 * 2049, 2048, tokens)
    facts = describe.engine_facts(zero.load(stage), "bf16", shape.hidden)
    return Run(
        "dpo", "pairs", shape, facts, "adamw_torch", micro, micro, per_device, accumulation, world_size, 100,
        frozen=(Held("reference", "sharded", frozen(shape)),),
    )  # fmt: skip


def sized(run: Run, per_device: int, accumulation: int) -> Run:
    share = per_device / run.per_device
    one = run.mean
    counted = (value * share for value in (one.sequences, one.tokens, one.predicted, one.pairs))
    micro = Micro(*counted, longest=one.longest, given=one.given * share)
    return replace(run, mean=micro, worst=micro, per_device=per_device, accumulation=accumulation)


def chosen(run: Run, device: float, host: float = 2048, **more: Any) -> Choice:
    engines = [
        Engine(name, describe.engine_facts(zero.load(name), "bf16", run.policy.hidden))
        for name in ("zero2", "zero3", "zero3_offload_optimizer", "zero3_offload")
    ]
    return choose(Space(run, engines, sized, **more), H200, Limits(round(device * GIB), round(host * GIB)))


def test_what_fits_as_configured_needs_no_change() -> None:
    found = chosen(run_of(per_device=1, accumulation=16), 139)
    assert found.configured.fits and found.smallest is None and found.configured.changes == {}
    assert found.best is not None and found.best.seconds <= found.configured.seconds * 1.01


def test_every_way_keeps_the_global_batch_and_the_ways_are_in_order() -> None:
    found = chosen(run_of(), 139)
    assert len(found.fitting) > 3
    for way in found.fitting:
        run = way.plan.run
        assert way.fits and run.per_device * run.accumulation * run.world_size == 128
        assert way.plan.memory.peak <= 139 * GIB
        assert way.changes.get("per_device_train_batch_size", 4) == run.per_device
        assert way.changes.get("gradient_accumulation_steps", 4) == run.accumulation
    seconds = [way.seconds for way in found.fitting]
    slack = [one for one in seconds if one > min(seconds) * 1.01]
    assert slack == sorted(slack) and seconds[0] <= min(seconds) * 1.01


@pytest.mark.slow
def test_the_smallest_change_is_one_and_makes_it_fit() -> None:
    run = run_of(per_device=16, accumulation=1)
    found = chosen(run, 80)
    assert not found.configured.fits and found.smallest is not None
    assert found.smallest.fits and found.smallest.setting.parts == 1
    one_less = chosen(run, 40)
    assert one_less.smallest is not None and one_less.smallest.setting.parts >= 1


def with_evaluation(run: Run, rows: int) -> tuple[Run, Any]:
    """Return the run with evaluations in batches of `rows`, and what gives their heaviest micro-batch."""

    def evaluated(count: int) -> Micro:
        return Micro(2 * count, count * 4096.0, count * 2048.0, count * 4096.0 * 2049, 2048, count * 4096.0)

    return replace(run, evaluated=evaluated(rows), per_device_eval=rows), evaluated


@pytest.mark.slow
def test_where_an_evaluation_takes_most_its_batch_is_made_smaller() -> None:
    """No other choice helps there, and the sums of an evaluation do not depend on its batches."""
    run, evaluated = with_evaluation(run_of(per_device=1, accumulation=16), 1024)
    found = chosen(run, 139, evaluated=evaluated)
    assert found.configured.plan.memory.at == "evaluation" and not found.configured.fits
    assert found.smallest is not None and set(found.smallest.changes) == {"per_device_eval_batch_size"}
    rows = found.smallest.changes["per_device_eval_batch_size"]
    assert rows < 1024 and found.smallest.plan.run.per_device_eval == rows and found.smallest.fits
    assert found.best is not None and "per_device_eval_batch_size" in found.best.changes
    small, evaluated = with_evaluation(run_of(per_device=1, accumulation=16), 1)
    assert "per_device_eval_batch_size" not in {name for way in chosen(small, 139, evaluated=evaluated).fitting
                                                for name in way.changes}  # fmt: skip


@pytest.mark.slow
def test_where_two_choices_have_to_change_both_are_named() -> None:
    run = run_of(stage="zero2", per_device=16, accumulation=1)
    found = chosen(run, 36)
    assert found.smallest is not None and found.smallest.setting.parts > 1
    words = found.smallest.words()
    assert "--deepspeed zero3" in words and words.count("--") >= 2


def test_a_cached_reference_costs_its_share_of_the_passes() -> None:
    placed = (("reference", "cached"),)
    once, often = (chosen(run_of(), 139, cached=True, passes=passes) for passes in (1.0, 10.0))

    def way(found: Choice) -> float:
        return next(w.seconds / w.plan.time.seconds for w in found.fitting if w.setting.placements == placed)

    assert way(once) == pytest.approx(4 / 3, rel=0.05), "a frozen forward is a quarter of forward, backward and it"
    assert 1 < way(often) < 1.05


def test_only_zero3_offloads_a_frozen_model() -> None:
    run = run_of()
    space = Space(run, [Engine("zero2", describe.engine_facts(zero.load("zero2"), "bf16", 4096))], sized)
    tried = [applied(space, setting) for setting in combinations(space)]
    assert {(run.engine.stage, run.frozen[0].placement) for run in tried} == {
        (3, "sharded"), (3, "offloaded"), (2, "sharded"),
    }  # fmt: skip


@pytest.mark.slow
def test_host_memory_counts_too() -> None:
    run = run_of(stage="zero3_offload", per_device=1, accumulation=16)
    assert chosen(run, 139).configured.fits
    found = chosen(run, 139, host=16)
    assert not found.configured.fits
    line = show.refusal(found, Limits(139 * GIB, 16 * GIB), "7b")
    assert line is not None and "of a node's memory" in line


def test_more_ranks_are_named_where_nothing_else_helps() -> None:
    found = chosen(run_of(world_size=1, per_device=1, accumulation=1), 24, host=48)
    assert found.smallest is None and found.fitting == () and found.wider is not None
    ranks = found.wider.ranks
    line = show.refusal(found, Limits(24 * GIB, 48 * GIB), "7b")
    assert ranks > 1 and f"it fits on {ranks} such ranks with --gradient_checkpointing true " in str(line)
    assert found.wider.batch == ranks and f"({ranks} pairs a step for 1), or" in str(line)
    there = chosen(run_of(world_size=ranks, per_device=1, accumulation=1), 24, host=48)
    assert found.wider.changes in [way.changes for way in there.fitting]


@pytest.mark.slow
def test_more_ranks_share_the_batch_that_one_had() -> None:
    found = chosen(run_of(world_size=1, per_device=4, accumulation=16), 24, host=48)
    assert found.wider is not None and found.wider.batch == 64
    accumulation = 64 // found.wider.ranks
    assert found.wider.changes["per_device_train_batch_size"] == 1
    assert found.wider.changes["gradient_accumulation_steps"] == accumulation
    line = show.refusal(found, Limits(24 * GIB, 48 * GIB), "7b")
    assert f"--gradient_accumulation_steps {accumulation} (64 pairs a step as now)" in str(line)
    there = chosen(run_of(world_size=found.wider.ranks, per_device=1, accumulation=accumulation), 24, host=48)
    assert there.fitting, "on so many ranks it fits"


@pytest.mark.slow
def test_a_global_batch_that_more_ranks_cannot_share_is_said_anew() -> None:
    given = {"host": 48, "by_global_batch": True}
    kept = chosen(run_of(world_size=1, per_device=4, accumulation=16), 24, **given).wider
    assert kept is not None and kept.batch == 64 and "global_batch_size" not in kept.changes
    few = chosen(run_of(world_size=1, per_device=4, accumulation=1), 24, **given)
    assert few.wider is not None and few.wider.ranks > 4
    assert few.wider.changes["global_batch_size"] == few.wider.batch == few.wider.ranks
    line, ranks = show.refusal(few, Limits(24 * GIB, 48 * GIB), "7b"), few.wider.ranks
    assert f"--global_batch_size {ranks} ({ranks} pairs a step for 4)" in str(line)


def test_what_leaves_less_than_proposals_do_fits_barely() -> None:
    run = run_of(per_device=1, accumulation=16)
    needed = chosen(run, 139).configured.plan.memory.peak / GIB
    assert chosen(run, 1.01 * needed).configured.barely and not chosen(run, 1.1 * needed).configured.barely
    assert not chosen(run, 0.99 * needed).configured.barely


def test_accumulation_is_left_to_the_global_batch_where_that_is_given() -> None:
    found = chosen(run_of(per_device=16, accumulation=1), 80, by_global_batch=True)
    assert all("gradient_accumulation_steps" not in way.changes for way in found.fitting)
    assert any("per_device_train_batch_size" in way.changes for way in found.fitting)


def test_a_batch_whose_cut_changes_the_loss_is_not_cut_anew() -> None:
    found = chosen(run_of(per_device=16, accumulation=1), 80, cut_is_free=False)
    assert {way.plan.run.per_device for way in found.fitting} == {16} and found.smallest is not None
    assert "--gradient_checkpointing true" in found.smallest.words()
    assert describe.cut_is_free(configured("dpo")) and describe.cut_is_free(configured("sft"))
    assert not describe.cut_is_free(configured("dpo", "--loss_type", "aot", "--loss_weights", "1"))


def test_a_refusal_names_what_is_needed_and_the_way_out() -> None:
    found = chosen(run_of(per_device=16, accumulation=1), 80)
    line = show.refusal(found, Limits(80 * GIB, 2048 * GIB), "my/7b")
    assert line is not None and "\n" not in line
    for part in ("dpo of my/7b needs", "on each of 8 ranks", "80.00 GiB are there", "it fits with --", "--force"):
        assert part in line


def test_settings_count_what_differs() -> None:
    assert Setting().parts == 0
    assert Setting(checkpointing=False, per_device=1, placements=(("reference", "cached"),)).parts == 3


# --- how it is shown ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0.00 GiB"), (5 * 2**20, "5 MiB"), (GIB, "1.00 GiB"), (1234 * GIB, "1,234 GiB")]
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert show.gib(count) == words


def test_bars_are_as_long_as_their_share_and_mark_the_limit() -> None:
    drawn = show.bars({"a": {"x": 50, "y": 25}, "bb": {"x": 200}}, limit=100).splitlines()
    assert drawn[0].count("█") == 15 and drawn[0].count("▓") in (7, 8) and drawn[0].index("|") == 4 + 30
    assert drawn[1].count("█") == 60 and "█ x" in drawn[2] and "| all there is" in drawn[2]
    far = show.bars({"a": {"x": 50, "y": 25}}, limit=1000).splitlines()
    assert far[0].count("█") == 40 and "|" not in "".join(far)


@pytest.mark.parametrize(("value", "words"), [(3e-5, "30 µs"), (0.5, "500 ms"), (90.0, "90 s"), (86400.0, "24.0 h")])
def test_times_in_words(value: float, words: str) -> None:
    assert show.seconds(value) == words


def test_plan_of_a_run_is_plain_numbers() -> None:
    found: Plan = plan(run_of(), H200)
    stored = json.loads(json.dumps(found.as_dict()))
    assert stored["peak_bytes"] >= stored["persistent_bytes"] == sum(stored["state_bytes"].values())
    assert stored["link_bytes"] > 0 and stored["seconds"] > 0 and stored["flops"] > stored["tokens"]

"""The planner's traffic: hand-worked cases, known rows of large models, and what real runs count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_kit.plan.engines import Played, played
from align_kit.plan.facts import Held, Rollout, Weight
from align_kit.plan.gathers import BACKWARD
from align_kit.plan.traffic import Sent, Traffic, traffic
from align_kit.plan.wire import on_wire
from tests.families import tiny
from tests.harness import Ranks
from tests.plan_shapes import engine_config, llama, llama_7b, run_of
from tests.small import SIZES, lab_of, make_tokenizer

GATHER, SCATTER, REDUCE, AGREE = "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast"
SMALL = {"hidden": 8, "layers": 2, "heads": 2, "intermediate": 16, "vocab": 10}
LAYER = 4 * 64 + 3 * 128  # elements of a layer's matrices
NORMS = 5 * 8
MATRICES = 2 * 80 + 2 * LAYER  # embedding and head with them


def small(**more: Any) -> Any:
    return llama(**{**SMALL, **more})


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_one_rank_sends_nothing() -> None:
    assert traffic(run_of(small(), world_size=1)) == Traffic()


@pytest.mark.parametrize(("stage", "times"), [(0, 1), (1, 1), (2, 3)])
def test_whole_gradients_are_reduced_once_a_step_or_once_a_micro_batch(stage: int, times: int) -> None:
    """ZeRO-2 reduces those of each micro-batch; ZeRO-1 and 2 gather the updated shares of both groups."""
    found = traffic(run_of(small(), stage, accumulation=3)).by
    norms = 2 if stage else 1
    assert found[REDUCE] == Sent(times + norms, 4 * (times * (MATRICES + NORMS) + norms))
    assert found.get(GATHER) == (Sent(2, 4 * (MATRICES + NORMS) / 2) if stage else None)


def test_gradients_go_in_buckets_that_hold_whole_ones() -> None:
    """In 110 elements fit the norms and the head, 3 x 8 + 80; each of seven matrices and the embedding goes alone."""
    run = run_of(small(layers=1), 2, engine={"reduce_bucket": 110})
    assert traffic(run).by[REDUCE].calls == 1 + 7 + 1 + 2  # and the norm of each of two groups


def test_zero3_gathers_shards_forward_and_backward_and_scatters_gradients() -> None:
    """All of 2 ranks: what small parameters there are stay, and are gathered once, one by one, after the update."""
    found = traffic(run_of(small(), 3, accumulation=4, engine={"persistence_threshold": 8})).by
    assert found[GATHER].bytes == 4 * (4 * 2 * MATRICES + NORMS) / 2
    assert found[SCATTER] == Sent(4, 4 * 4 * (MATRICES + NORMS))
    assert found[REDUCE] == Sent(2, 16)
    assert AGREE not in found


def test_shards_are_rounded_up_for_each_parameter() -> None:
    """Three ranks take 22 of 64 elements, 43 of 128, 27 of 80 and 3 of 8."""
    found = traffic(run_of(small(), 3, world_size=3)).by
    shard = 2 * 27 + 2 * (4 * 22 + 3 * 43) + 5 * 3
    assert found[GATHER].bytes == 2 * 4 * shard
    assert found[SCATTER].bytes == 4 * 3 * shard


def test_lora_scatters_the_adapters_gradients_alone() -> None:
    run = run_of(small(rank=2), use_peft=True)
    adapters = 2 * 2 * (4 * (8 + 8) + 3 * (8 + 16))
    assert traffic(run).by[SCATTER] == Sent(1, 4 * adapters)


def test_recomputing_gathers_a_frozen_base_a_third_time() -> None:
    """DeepSpeed lets frozen weights go that were recomputed beside another module; trained ones it keeps."""
    def gathered(rank: int, recomputing: bool) -> float:
        run = run_of(small(rank=rank), use_peft=rank > 0, checkpointing=recomputing)
        return traffic(run).by[GATHER].bytes

    assert gathered(0, True) == gathered(0, False)
    assert gathered(2, True) > gathered(2, False) + 4 * LAYER / 2


def test_a_frozen_model_is_gathered_once_a_micro_batch_unless_its_answers_are_stored() -> None:
    alone = traffic(run_of(small(), phase="dpo", frozen=(Held("reference", "cached"),), accumulation=2))
    beside = traffic(run_of(small(), phase="dpo", frozen=(Held("reference", "sharded", small()),), accumulation=2))
    assert alone.by[GATHER].bytes == 2 * 2 * 4 * (MATRICES + NORMS) / 2
    assert beside.by[GATHER].bytes == 2 * 3 * 4 * (MATRICES + NORMS) / 2


def test_a_reference_on_the_same_base_keeps_all_of_it_whole_in_the_backward() -> None:
    """Its forward makes DeepSpeed forget which gradients are to come, and so when it may let a frozen weight go."""
    def most(**more: Any) -> int:
        run = run_of(small(rank=2, layers=8), use_peft=True, engine={"prefetch_bucket": 0, "max_reuse": 0}, **more)
        return played(run, 1)[0].most[BACKWARD]

    base = 8 * LAYER - 3 * 64  # the first layer's inputs need no gradient, so its queries, keys and values are not met
    assert most() < LAYER
    assert most(phase="dpo", frozen=(Held("reference", "adapter"),)) >= base


def test_a_table_of_positions_is_not_met_in_a_backward_unless_it_is_trained() -> None:
    """What the embedding gives is made to carry a gradient where layers are computed again; positions carry none."""
    positions = Weight("base_model.model.model.embed_positions.weight", (16, 8))

    def gathered(trained: bool) -> int:
        bare = small(rank=2)
        embedding, *others = bare.weights
        shape = replace(bare, weights=(embedding, replace(positions, trained=trained), *others))
        run = run_of(shape, use_peft=True, checkpointing=True, engine={"prefetch_bucket": 0, "max_reuse": 0})
        return played(run, 1)[0].times[1]

    assert (gathered(trained=False), gathered(trained=True)) == (1, 2)


def test_what_is_trained_whole_beside_an_adapter_computes_in_place_of_its_original() -> None:
    bare = small(rank=2)
    *others, head = bare.weights
    name = head.name.removesuffix(".weight")
    copies = (Weight(f"{name}.original_module.weight", head.shape, False),)
    copies += (Weight(f"{name}.modules_to_save.default.weight", head.shape),)
    found = played(run_of(replace(bare, weights=(*others, *copies)), use_peft=True), 1)[0].times
    original = len(others)
    assert found[original] == 0 and found[original + 1] == 2


def test_a_forward_before_the_first_step_decides_what_each_later_one_lets_go() -> None:
    """DeepSpeed remembers by module and step: nothing followed the embedding where a fresh head was checked."""
    def gathered(gated: bool) -> Any:
        run = run_of(small(head="score"), phase="reward", forward="plain", gated=gated, engine={"prefetch_bucket": 0})
        return played(run, 1)[0].times

    checked, unchecked = gathered(True), gathered(False)
    assert checked[0] == 2 and unchecked[0] == 1
    assert checked.keys() == unchecked.keys()


class AllPlayed(Played):
    """Plays all that comes over and over."""

    def _repeat(self, times: int, play: Callable[[], None]) -> None:
        for _ in range(times):
            play()


REPEATED: dict[str, dict[str, Any]] = {
    "sft": {},
    "reward": {"forward": "packed"},
    "dpo": {"frozen": (Held("reference", "sharded", small()),)},
    "dpo lora": {"frozen": (Held("reference", "adapter"),), "checkpointing": True},
    "kto lora": {"frozen": (Held("reference", "adapter"),), "forward": "plain"},
    "ppo": {"frozen": (Held("reference", "sharded", small()),), "rollout": Rollout(5, 8, 4, 4, 4, "copied", 1, 3)},
}


@pytest.mark.parametrize("case", REPEATED)
@pytest.mark.parametrize("engine", [{}, {"prefetch_bucket": 400, "max_live": 900, "max_reuse": 700}])
@pytest.mark.parametrize("micros", [1, 2, 3, 7])
def test_what_is_counted_and_not_played_is_what_playing_it_would_count(case: str, engine: Any, micros: int) -> None:
    phase, rank = case.split()[0], 2 * ("lora" in case)
    shape = small(rank=rank, head="score" if phase == "reward" else "lm")
    run = run_of(shape, phase=phase, engine=engine, use_peft=rank > 0, **REPEATED[case])
    some, every = Played(run, micros), AllPlayed(run, micros)
    for play in (some, every):
        play.start()
        for _ in range(3):
            play.cycle()
    assert some.gathered() == every.gathered()


def test_rings_send_each_rank_all_others_shards() -> None:
    assert on_wire(GATHER, 10, 8) == 70
    assert on_wire(SCATTER, 80, 8) == 70
    assert on_wire(REDUCE, 80, 8) == 140
    assert Traffic({GATHER: Sent(1, 10), REDUCE: Sent(3, 80)}, 8).link_bytes == 210


# --- known rows -------------------------------------------------------------------------------------------------------

BIG = {"precision": "bf16", "persistence_threshold": 100_000, "prefetch_bucket": 15_099_494, "reduce_bucket": 1 << 24}


def test_adapters_of_a_7b_send_8_megabytes_of_gradients_where_full_training_sends_13_gigabytes() -> None:
    full = traffic(run_of(llama_7b(), world_size=8, engine=BIG)).by
    lora = traffic(run_of(llama_7b(rank=8, targets=("q_proj", "v_proj")), world_size=8, engine=BIG, use_peft=True)).by
    assert full[SCATTER].bytes == pytest.approx(13.48e9, rel=1e-3)
    assert lora[SCATTER].bytes == pytest.approx(8.39e6, rel=1e-3)


def test_zero3_sends_half_as_much_again_as_data_parallel_training() -> None:
    """Rajbhandari 2020, section 7.2.2: 3 model sizes on each rank's wire against 2."""
    plain, split = (traffic(run_of(llama_7b(), stage, world_size=64, engine=BIG)).link_bytes for stage in (0, 3))
    assert split / plain == pytest.approx(1.5, rel=1e-3)


@given(st.integers(2, 64), st.integers(1, 6), st.sampled_from([0, 1, 2, 3]))
def test_more_accumulation_never_sends_less_and_more_ranks_never_hand_in_a_greater_share(
    ranks: int, micros: int, stage: int
) -> None:
    one = traffic(run_of(small(), stage, ranks, accumulation=micros)).by
    more = traffic(run_of(small(), stage, ranks, accumulation=micros + 1)).by
    wider = traffic(run_of(small(), stage, 2 * ranks, accumulation=micros)).by
    assert all(more[name].bytes >= sent.bytes for name, sent in one.items())
    assert GATHER not in one or wider[GATHER].bytes <= one[GATHER].bytes


# --- real runs --------------------------------------------------------------------------------------------------------

# Small buckets and distances stand for what 70 B parameters do to DeepSpeed's own: little is ahead, nothing is kept.
NARROW = {
    "stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 2000,
    "stage3_max_live_parameters": 12_000, "stage3_max_reuse_distance": 5000, "reduce_bucket_size": 5000,
}  # fmt: skip
SPLIT = {"stage3_param_persistence_threshold": 0}
CASES: dict[str, dict[str, Any]] = {
    "sft": {"zero": {"stage": 2}, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "sft lora": {"zero": SPLIT, "use_peft": True, "gradient_checkpointing": True},
    "sft narrow": {"zero": NARROW, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    "dpo": {"zero": NARROW, "reference_placement": "sharded"},
    "dpo lora": {"zero": SPLIT, "use_peft": True},
    "kto": {"zero": {}, "reference_placement": "sharded"},
    "ppo": {"zero": SPLIT, "max_steps": 12},
    # What a check before the first step lets go, each step lets go; traces settle with a step's third micro-batch.
    "reward": {"zero": SPLIT, "gradient_checkpointing": True, "forward": "plain"},
    "ppo three": {
        "zero": SPLIT, "num_ppo_epochs": 1, "max_steps": 5, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3, "rollout_placement": "copied",
    },
    "sft positions": {"zero": SPLIT, "use_peft": True, "gradient_checkpointing": True},
    "sft head": {"zero": SPLIT, "use_peft": True, "lora_modules_to_save": ["lm_head"]},
}  # fmt: skip

OTHER_MODELS: dict[str, dict[str, Any]] = {
    "sft positions": {"family": "gpt2"},
    "sft head": {"family": "llama", "tie_word_embeddings": False},
}


def write_family(place: Path, *, family: str, **changes: Any) -> Path:
    """Save a small random model of a family with the small tokenizer in `place`."""
    tiny(family, **{**SIZES, **changes}).save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_foreseen_is_what_deepspeed_sends(case: str, ranks: Ranks) -> None:
    """Bytes to 0.2 %, calls to 7 %: a run's plan against what its ranks counted, without the first steps.

    Modules without parameters are not known from a model's parameters; each is one more occasion to gather ahead.
    """
    options, lab = dict(CASES[case]), lab_of(ranks)
    engine = engine_config(**options.pop("zero"))
    if case in OTHER_MODELS:
        options["model_name_or_path"] = write_family(lab.home / case.replace(" ", "-"), **OTHER_MODELS[case])
    run = lab.train(case.split()[0], deepspeed=engine, **{"max_steps": 5, **options})
    planned, counted = run.manifest["plan"]["traffic"], run.manifest["measured"]["traffic"]
    assert planned.keys() == counted.keys()
    for number, error in {"bytes": 2e-3, "calls": 7e-2}.items():
        said, seen = (sum(sent[number] for sent in by.values()) for by in (planned, counted))
        assert said == pytest.approx(seen, rel=error), f"{number}: {planned} against {counted}"
    assert run.manifest["plan"]["link_bytes"] == pytest.approx(run.manifest["measured"]["link_bytes"], rel=2e-3)


@pytest.mark.slow
def test_a_run_that_goes_on_checks_nothing_before_its_first_step(ranks: Ranks) -> None:
    """DeepSpeed then has nothing to remember from before, and lets less go."""
    lab = lab_of(ranks)
    place, options = lab.home / "gone-on", {"deepspeed": engine_config(**SPLIT), "forward": "plain", "max_steps": 7}
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 4}
    first = lab.start("reward", place, **options, **saving)
    first.result.ok()
    whole = first.manifest["plan"]["traffic"][GATHER]
    again = lab.start("reward", place, **options, **saving, resume=place / "checkpoint-2")
    again.result.ok()
    planned, counted = (again.manifest[name]["traffic"][GATHER]["bytes"] for name in ("plan", "measured"))
    assert planned == pytest.approx(counted, rel=2e-3) and planned < 0.6 * whole["bytes"]

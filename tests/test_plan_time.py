"""The planner's operations, machines and times: against arithmetic by hand and published formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align_kit.errors import UserError
from align_kit.plan import hardware
from align_kit.plan.facts import Held, Micro, Rollout, Run
from align_kit.plan.hardware import GIB, Calibration, Hardware
from align_kit.plan.time import Time, timed
from align_kit.plan.traffic import Sent, Traffic
from align_kit.plan.work import Work, work
from tests.plan_shapes import llama, llama_7b, run_of
from tests.small import SIZES

T = 10
PAIRS = T * (T + 1) / 2
MICRO = Micro(sequences=1, tokens=T, predicted=4, pairs=PAIRS, longest=T)
SMALL = {"hidden": 8, "layers": 2, "heads": 2, "intermediate": 16, "vocab": 10}
MATRICES = 2 * (4 * 64 + 3 * 128)
ATTENTION = 4 * PAIRS * 8 * 2  # 4 operations for each pair, hidden element and layer
HEAD = 8 * 10


def small_run(rank: int = 0, **more: Any) -> Run:
    facts = {"mean": MICRO, "use_peft": rank > 0, **more}
    return run_of(llama(**SMALL, rank=rank, head=facts.pop("head", "lm")), **facts)


# --- operations by hand -----------------------------------------------------------------------------------------------


def test_a_full_step_computes_forward_and_twice_that_backward() -> None:
    done = work(small_run(accumulation=3))
    forward = 2 * T * MATRICES + ATTENTION + 2 * 4 * HEAD
    assert done.by == {"forward": 3 * forward, "backward": 3 * 2 * forward}
    assert done.tokens == 3 * T
    assert done.model_flops == done.flops == 9 * forward


def test_lora_computes_no_gradient_of_the_base() -> None:
    adapters = 2 * 2 * (4 * 16 + 3 * 24)
    done = work(small_run(rank=2))
    forward = 2 * T * (MATRICES + adapters) + ATTENTION + 2 * 4 * HEAD
    assert done.by["forward"] == forward
    assert done.by["backward"] == 2 * T * (MATRICES + 2 * adapters) + 2 * ATTENTION + 2 * 4 * HEAD


def test_what_is_computed_again_counts_for_the_hardware_alone() -> None:
    plain, again = work(small_run()), work(small_run(checkpointing=True))
    assert again.by["recomputed"] == 2 * T * (MATRICES - 2 * 128) + ATTENTION  # a layer's last matrix is not needed
    assert again.model_flops == plain.model_flops
    assert again.flops == plain.flops + again.by["recomputed"]


def test_all_chunks_of_the_head_but_the_last_are_computed_again() -> None:
    vocab, rows = 1 << 23, 2  # of which a CPU's chunk of logits holds two
    shape = llama(**{**SMALL, "vocab": vocab})
    micro = replace(MICRO, predicted=5)
    assert work(run_of(shape, mean=micro), "cpu").by["recomputed"] == 2 * 8 * vocab * 2 * rows
    assert "recomputed" not in work(run_of(shape, mean=micro, forward="plain"), "cpu").by


@pytest.mark.parametrize(
    ("placement", "expected"),
    [("cached", 0), ("sharded", 1), ("adapter", 1)],
)
def test_a_frozen_model_computes_one_forward(placement: Any, expected: int) -> None:
    held = Held("reference", placement, llama(**SMALL) if placement == "sharded" else None)
    done = work(small_run(phase="dpo", frozen=(held,)))
    assert done.by.get("frozen", 0) == expected * (2 * T * MATRICES + ATTENTION + 2 * 4 * HEAD)


def test_a_score_reads_one_place_a_sequence() -> None:
    done = work(small_run(head="score", mean=replace(MICRO, predicted=1), phase="reward"))
    assert done.by["forward"] == 2 * T * MATRICES + ATTENTION + 2 * 8


def test_experts_count_where_tokens_are_sent() -> None:
    from align_kit.plan.facts import Weight

    shape = llama(**SMALL)
    experts = Weight("model.layers.0.mlp.experts.gate_up_proj", (4, 16, 8))
    mixed = replace(shape, weights=(*shape.weights, experts), experts=4, experts_per_token=1)
    more = work(run_of(mixed, mean=MICRO)).by["forward"] - work(run_of(shape, mean=MICRO)).by["forward"]
    assert more == 2 * T * 16 * 8


def test_a_7b_takes_six_operations_a_parameter_and_token_and_its_attention() -> None:
    """PaLM (Chowdhery 2022), appendix B: 6 N + 12 L H Q T a token, N without the embedding; causal pairs are half."""
    length = 2048
    micro = Micro(4, 4 * length, 4 * length, 4 * length * (length + 1) / 2, length)
    shape = llama_7b()
    theirs = 6 * (shape.size - 32000 * 4096) + 12 * 32 * 4096 * length / 2
    assert work(run_of(shape, mean=micro)).model_flops == pytest.approx(theirs * micro.tokens, rel=1e-3)


@pytest.mark.parametrize("recomputing", [False, True])
def test_operations_are_those_that_torch_counts(recomputing: bool) -> None:
    """A training step of a real Llama, attention written out: torch counts every pair, masked or not."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from align_kit.plan.shape import shape_of

    sizes = {**SIZES, "num_key_value_heads": 2, "attn_implementation": "eager", "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).train()
    if recomputing:
        model.gradient_checkpointing_enable()
    ids = torch.arange(2 * 16).reshape(2, 16)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    micro = Micro(2, 32, 32, 2 * 16 * 16, 16)
    run = run_of(shape_of(model, "a Llama", "fp32"), mean=micro, forward="plain", checkpointing=recomputing)
    assert work(run).flops == counter.get_total_flops()


def test_the_head_goes_by_the_chunks_of_the_forward() -> None:
    from align_kit.forward import head
    from align_kit.plan import work as planned

    assert planned.CHUNK == head.CHUNK


def test_an_iteration_writes_judges_and_trains() -> None:
    """Its steps share what comes before them: 6 completions of 10 tokens to prompts of 4, in three steps."""
    rollout = Rollout(6, 6, 4, 10, 4, "gathered", 6, 3)
    policy = llama(**SMALL)
    sides = {"policy": policy, "value": llama(**SMALL, head="score")}
    both = tuple(replace(w, name=f"{side}.{w.name}") for side, shape in sides.items() for w in shape.weights)
    run = run_of(replace(policy, weights=both), phase="ppo", mean=MICRO, per_device=2, rollout=rollout)
    done = work(run)
    tokens = 6 * 14
    pairs = 6 * 14 * 15 / 2
    assert done.by["rollout"] == (2 * tokens * MATRICES + 4 * pairs * 8 * 2 + 2 * 60 * HEAD) / 3
    assert done.by["forward"] == 2 * T * 2 * MATRICES + 2 * ATTENTION + 2 * 4 * HEAD
    assert done.by["score"] == 3 / 3 * done.by["forward"]


# --- time -------------------------------------------------------------------------------------------------------------

DEVICE = Hardware(
    name="by hand", memory=80 * GIB, flops={"fp32": 1e12, "bf16": 4e12}, bandwidth=1e12, node_link=1e10,
    network_link=1e9, host_link=1e9, host_memory=GIB, calibration=Calibration(0.5, 0.5, 0.5, 0.75),
    dollars_per_hour=2.0,
)  # fmt: skip
NO_TRAFFIC = Traffic(ranks=2)
TEN_GB = Traffic({"all_reduce": Sent(1, 1e10)}, 2)  # a ring of two sends as much as is handed in: 2 s here


def seconds(work_done: float = 0.0, sent: Traffic = NO_TRAFFIC, **more: Any) -> Time:
    return timed(small_run(**more), sent, Work({"forward": work_done}, 1), DEVICE)


def test_arithmetic_goes_at_the_share_of_the_peak_that_is_stated() -> None:
    time = seconds(1e12, steps=1800)
    assert time.seconds == time.compute == 2
    assert (time.hours, time.dollars) == (1, 4)  # on two devices
    assert time.bound == "compute"
    assert timed(small_run(), NO_TRAFFIC, Work({"forward": 1e12}, 1), DEVICE.with_mfu(0.25)).seconds == 4


def test_traffic_hides_behind_arithmetic_as_far_as_the_engine_overlaps_them() -> None:
    assert seconds(0.0, TEN_GB).exposed == 2
    assert seconds(0.5e12, TEN_GB).exposed == 1  # no longer than there is arithmetic
    hidden = seconds(1e14, TEN_GB)
    assert (hidden.link, hidden.exposed) == (2, 0.5)
    assert seconds(1e14, TEN_GB, engine={"overlap_comm": False}).exposed == 2
    assert seconds(0.0, TEN_GB, nodes=2).exposed == 20
    assert seconds(0.0, TEN_GB, nodes=2, world_size=8).exposed == 5  # four links leave a node
    assert seconds(0.0, TEN_GB, nodes=2, world_size=64).exposed == 2  # no faster than inside it
    assert seconds(0.0, TEN_GB).bound == "link"
    barely = seconds(0.6e12, TEN_GB)
    assert barely.exposed < barely.compute < barely.seconds == barely.link, "hidden as far as there is arithmetic"
    assert barely.bound == "link", "quicker arithmetic would not end the step sooner"


def test_a_frozen_model_on_the_host_is_fetched_for_each_forward() -> None:
    """Half of each parameter on each of two ranks, in fp32 over a gigabyte a second."""
    shape = llama(**SMALL)

    def waits(where: Any) -> float:
        return seconds(frozen=(Held("reference", where, shape),), accumulation=3).offload

    assert waits("sharded") == 0
    assert waits("offloaded") == pytest.approx(3 * shape.size / 2 * 4 / 1e9)


def test_an_offloaded_optimizer_waits_for_the_host() -> None:
    """Half of 2 x 640 + 160 + 40 elements: a gradient there, a weight back, seven passes over fp32 in its memory."""
    run = seconds(engine={"offload_optimizer": "cpu"})
    owned = (MATRICES + 2 * HEAD + 5 * 8) / 2
    assert run.offload == pytest.approx(owned * (2 * 4 + 7 * 4) / 1e9)
    assert run.bound == "offload"


def test_writing_reads_all_weights_for_each_token_of_a_batch() -> None:
    rollout = Rollout(6, 3, 4, 10, 4, "gathered", 6, 2)
    shape = llama(**SMALL)
    time = timed(run_of(shape, mean=MICRO, rollout=rollout, phase="ppo"), NO_TRAFFIC, Work({}, 1), DEVICE)
    cache = 3 * (4 + 5) * 2 * 2 * 8  # keys and values of both layers, of three prompts and half of what is written
    assert time.generation == pytest.approx(2 * 10 * 4 * (shape.size + cache) / 0.5e12 / 2)
    assert time.bound == "generation"


# --- machines ---------------------------------------------------------------------------------------------------------


def test_every_machine_of_the_table_has_its_source_and_a_price() -> None:
    for name, entry in hardware.table().items():
        made = hardware.named(name)
        assert entry["source"] and made.dollars_per_hour, name
        assert made.flops["bf16"] >= made.flops["fp32"] > 1e12 and made.memory > 20 * GIB
        assert made.node_link >= made.network_link and made.bandwidth > made.host_link
        assert made.calibration.how == "assumed" and made.kind == "cuda"


def test_a_users_file_adds_machines_and_lays_numbers_over_known_ones(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("h100: {memory_gib: 94}\n")
    prices = tmp_path / "prices.yaml"
    prices.write_text("dollars_per_hour: {h100: 1.5}\n")
    made, shipped = hardware.named("h100", hardware_file=str(mine), prices_file=str(prices)), hardware.named("h100")
    assert (made.memory, made.dollars_per_hour) == (94 * GIB, 1.5)
    assert made.flops == shipped.flops and shipped.memory < made.memory


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("h100: 80\n", "h100 is no machine"),
        ("new: {memory_gib: 80}\n", "the machine new cannot be read"),
        ("- h100\n", "holds no mapping"),
        ("h100: {\n", "cannot read"),
    ],
)
def test_a_file_that_is_none_of_machines_is_refused_in_a_line(text: str, says: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    with pytest.raises(UserError, match=says):
        hardware.named("new", hardware_file=str(mine))


def test_what_is_not_known_is_refused_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown gpu 'h20'.*h200"):
        hardware.named("h20")
    with pytest.raises(UserError, match="at most 1"):
        hardware.named("h200").with_mfu(40)
    prices = tmp_path / "prices.yaml"
    prices.write_text("h200: 3\n")
    with pytest.raises(UserError, match="holds no prices"):
        hardware.prices(str(prices))


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        (b"{h200: -4}", "-4 dollars an hour for h200 is no price"),
        (b"{h200: .nan}", "nan dollars an hour for h200 is no price"),
        (b"{h200: true}", "True dollars an hour for h200 is no price"),
        (b"{h200: three}", "'three' dollars an hour for h200 is no price"),
        (b"{typo200: 4}", "typo200 is no machine that is known; give one of .*h200"),
        (b"{h200: 4} # \xff", "cannot read .*prices.yaml: .*utf-8"),
    ],
)
def test_what_is_no_price_is_refused_in_a_line(listed: bytes, says: str, tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_bytes(b"dollars_per_hour: " + listed)
    with pytest.raises(UserError, match=says) as error:
        hardware.named("h200", prices_file=str(prices))
    assert "\n" not in str(error.value)


def test_names_of_machines_are_known_in_any_case(tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("dollars_per_hour: {H200: 2.5}\n")
    made = hardware.named("H200", prices_file=str(prices))
    assert (made.name, made.dollars_per_hour) == ("h200", 2.5)


def test_this_machine_is_measured() -> None:
    """A CPU multiplies at a billion operations a second at least, in whatever precision is asked for."""
    here = hardware.here()
    if here.kind == "cpu":
        assert here.flops["fp32"] > 1e9 and here.flops["fp32"] == here.flops["fp32"]
        assert here.bandwidth > 1e8 and here.memory > 0

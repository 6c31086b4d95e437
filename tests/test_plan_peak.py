"""The planner's peak: layers weighed against what autograd keeps, heads by hand, laws, and a real run's allocator."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from align_kit.cards import PHASE_KINDS
from align_kit.forward import head
from align_kit.forward.door import open_door
from align_kit.forward.layout import pack_rows
from align_kit.plan import peak as peaks
from align_kit.plan.activations import block_for, blocks_of, by_numbers
from align_kit.plan.facts import Block, EngineFacts, Held, Micro, Rollout, Run, Shape, Weight
from align_kit.plan.gathers import BACKWARD, EMBEDS, FORWARD, LEARNING, Coordinator, InMemory
from align_kit.plan.peak import moments
from align_kit.plan.visits import Call, Module, carry
from align_kit.plan.whole import Whole
from align_kit.trainers import rollout
from benchmarks._allocator import COLLECTIVE, TRAIN, Event, on_cpu, releases_unseen, settled, summed
from tests.harness import Ranks
from tests.small import SETTINGS, SIZES, make_rows, words, write_model, write_rows

FAMILIES = {"llama": {}, "qwen3": {"head_dim": 16}, "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
TOKENS = 90  # a segment that a CPU attends to in one block
LAYERS = 3


def built(family: str, device: str = "cpu", **changes: Any) -> Any:
    config = AutoConfig.for_model(family, **{**SIZES, "num_hidden_layers": LAYERS, **FAMILIES[family], **changes})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


@contextmanager
def kept(model: Any) -> Iterator[dict[int, int]]:
    """Yield what autograd keeps meanwhile: bytes by storage, the model's own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weighed_layer_is_what_autograd_keeps_of_it(family: str) -> None:
    """The trunk walked packed on a CPU, every tensor that autograd saves: within 2 %."""
    model = built(family)
    open_door(model, "packed")
    ids = torch.arange(TOKENS)[None] + 4
    pack = pack_rows({name: ids if name == "input_ids" else torch.ones_like(ids) for name in BATCH}, whole=True)
    with kept(model) as found:
        hidden = pack.walk(model)
    block = blocks_of(built(family, "meta"))["block"]
    assert hidden.requires_grad
    assert sum(found.values()) == pytest.approx(TOKENS * (LAYERS * block.saved + block.ends), rel=0.02)


BATCH = ("input_ids", "attention_mask", "loss_mask")


def test_a_layer_by_numbers_is_near_a_weighed_one() -> None:
    model = built("llama", "meta")
    shape = llama_shape()
    assert by_numbers(shape, "fp32").saved == pytest.approx(blocks_of(model)["block"].saved, rel=0.05)
    assert block_for(shape, 3, "fp32") == by_numbers(shape, "fp32")


def test_only_the_block_of_a_stage_is_weighed_where_one_is_named() -> None:
    """Some parameters trained and others not, so that the two differ; of a frozen model nothing is kept."""
    model = built("llama", "meta")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(False)
    both = blocks_of(model)
    assert both["block"] != both["sharded_block"]
    assert blocks_of(model, stage=2) == {"block": both["block"]}
    assert blocks_of(model, stage=3) == {"sharded_block": both["sharded_block"]}
    frozen = blocks_of(model.requires_grad_(False), stage=3)
    assert frozen["block"] == frozen["sharded_block"]
    assert frozen["block"].forward == both["block"].forward and frozen["block"].saved == 0


def test_a_model_with_weights_is_not_weighed() -> None:
    assert blocks_of(built("llama")) == {}


def test_a_model_with_an_attention_of_its_own_is_not_weighed(capfd: pytest.CaptureFixture[str]) -> None:
    """Bloom adds a bias for each pair of tokens; nothing is said of it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", hidden_size=32, n_layer=3, n_head=2))
    assert blocks_of(model) == {}
    assert capfd.readouterr().err == ""


def test_weighing_leaves_the_model_as_it_was() -> None:
    model = built("llama", "meta")
    layers, attention = list(model.model.layers), model.config._attn_implementation
    blocks_of(model)
    assert list(model.model.layers) == layers and model.config._attn_implementation == attention
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


# --- by hand ------------------------------------------------------------------------------------------------------

# Of a layer that keeps 100 bytes a token, 10 of them its input; 1,000 tokens, 400 of them predict.
BLOCK = Block(saved=100, hidden=10, ends=5, forward=30, backward=40, again=130)
MICRO = Micro(sequences=2, tokens=1_000, predicted=400, pairs=0, longest=500)
VOCAB, HIDDEN = 5_000, 64
EMBEDDING, HEAD, LAYER = Weight("e", (VOCAB, HIDDEN)), Weight("h", (VOCAB, HIDDEN)), Weight("l", (64, 64))


def llama_shape() -> Shape:
    sizes = (SIZES["hidden_size"], LAYERS, SIZES["num_attention_heads"], SIZES["num_key_value_heads"])
    return Shape("llama", (), *sizes, sizes[0] // sizes[2], SIZES["intermediate_size"], SIZES["vocab_size"])


def run_of(*weights: Weight, stage: int = 3, world_size: int = 2, engine: Any = None, **more: Any) -> Run:
    shape = Shape("by hand", weights, HIDDEN, 4, 2, 2, HIDDEN // 2, 16, VOCAB, block=BLOCK, sharded_block=BLOCK)
    facts = {"precision": "fp32", "reduce_bucket": 1_000, "prefetch_bucket": 0, "persistence_threshold": 0}
    return Run(
        phase="sft", unit="rows", policy=shape, engine=EngineFacts(stage=stage, **{**facts, **(engine or {})}),
        optimizer="adamw_torch", mean=MICRO, worst=MICRO, per_device=2, world_size=world_size, steps=1,
        **{"accumulation": 1, **more},
    )  # fmt: skip


def test_the_head_holds_a_chunk_of_logits_their_states_and_its_own_gradient() -> None:
    """400 x 5,000 logits in fp32 on top of four layers; the states twice, with their gradient; the head's in fp32."""
    found = moments(run_of(EMBEDDING, HEAD, stage=2, engine={"contiguous_gradients": False}))["head"]
    taken = 4 * 400 * VOCAB + 2 * 4 * 400 * HIDDEN + 4 * VOCAB * HIDDEN
    assert found == {"activations": 1_000 * (4 * 100 + 5), "head": taken}


def test_chunks_are_those_of_the_head_and_of_a_rollout() -> None:
    assert (peaks.CHUNK, peaks.NEAR, peaks.REFRESHED) == (head.CHUNK, head.NEAR, rollout.CHUNK)


def test_more_logits_than_a_chunk_are_never_there_together() -> None:
    run = run_of(EMBEDDING, HEAD)
    many = replace(run, worst=replace(MICRO, predicted=40_000))
    chunk = 4 * ((1 << 24) // VOCAB) * VOCAB
    assert moments(many)["head"]["head"] == chunk + 2 * 4 * 40_000 * HIDDEN + 4 * VOCAB * HIDDEN


def test_checkpointing_keeps_the_inputs_of_layers_and_computes_one_again() -> None:
    found = moments(run_of(EMBEDDING, LAYER, checkpointing=True))
    assert found["head"]["activations"] == 1_000 * (4 * 10 + 5)
    assert found["backward"]["layer"] == 1_000 * 130


def test_zero2_has_two_buckets_and_its_share_of_the_gradients() -> None:
    """Two buckets of 5,000, one joined to be reduced, and 4,096 gradients, a matrix that two ranks share."""
    frozen = replace(EMBEDDING, trained=False)
    found = moments(run_of(frozen, LAYER, stage=2, engine={"reduce_bucket": 5_000}))["reduce"]
    assert found == {"gradients in flight": 4 * (2 * 5_000 + 4_096 + 4_096)}


def test_a_reference_computes_beside_what_the_policy_keeps() -> None:
    run = run_of(EMBEDDING, LAYER, stage=2)
    beside = moments(replace(run, frozen=(Held("reference", "sharded", run.policy),)))
    assert beside["reference"]["activations"] == beside["head"]["activations"]
    assert beside["reference"]["head"] == 4 * 400 * VOCAB  # of the policy, whose backward begins with them
    assert "reference" not in moments(replace(run, frozen=(Held("reference", "cached"),)))


def test_an_evaluation_takes_what_a_forward_takes_and_its_batch() -> None:
    """2,000 tokens in a layer, told of positions, or 3,000 x 5,000 logits; nothing is kept. The next batch waits."""
    looks = Micro(sequences=8, tokens=2_000, predicted=3_000, pairs=0, longest=500)
    run = run_of(EMBEDDING, HEAD, stage=2, evaluated=looks)
    batch = 2 * 24 * 8 * 500
    cpu, cuda = moments(run)["evaluation"], moments(run, "cuda")["evaluation"]
    states = 4 * 3_000 * HIDDEN + 10 * 2_000
    assert cpu == {"activations": states + 4 * 3_000 * VOCAB + 4 * peaks.NEAR, "batch": batch}
    assert cuda == {"activations": states + 2 * 4 * 3_000 * VOCAB, "batch": batch // 2}
    told = replace(BLOCK, beside=7)
    scorer = replace(run, policy=replace(run.policy, head="score", block=told))
    assert moments(scorer)["evaluation"] == {"activations": 2_000 * (30 + 7), "batch": batch}
    larger = Held("reference", "sharded", replace(run.policy, head="score", block=replace(told, forward=10**6)))
    assert moments(replace(scorer, frozen=(larger,)))["evaluation"]["activations"] == 2_000 * (10**6 + 7)
    stored = replace(larger, placement="cached")
    assert moments(replace(scorer, frozen=(stored,))) == moments(scorer), "nobody computes it again"
    assert "evaluation" not in moments(replace(run, evaluated=None))


def test_a_rollout_keeps_keys_and_values_and_gathers_what_writes() -> None:
    writes = Rollout(4, 4, 10, 30, 20, "gathered", 4, 1)
    policy = Weight("policy.embed_tokens.weight", EMBEDDING.shape), Weight("policy.l.weight", LAYER.shape)
    run = run_of(*policy, Weight("value_head.weight", (9, 9)), rollout=writes)
    whole = 4 * (VOCAB * HIDDEN + 4_096)
    found = moments(run, "cuda")["rollout"]
    assert found["gathered"] == whole
    assert found["kv cache"] == 4 * (4 * (20 + 30)) * 2 * HIDDEN * (4 + 1)
    copied = replace(run, rollout=replace(writes, placement="copied"))
    assert moments(copied, "cuda")["rollout"] == {"gathered": whole}  # while the copy is refreshed
    # On a CPU gloo receives up to three weights in copies of its own; here there are no more.
    assert moments(run)["rollout"] == moments(copied)["rollout"] == {"gathered": 2 * whole}


def test_a_reference_computes_beside_earlier_gradients() -> None:
    """Of three micro-batches ZeRO-1 keeps all gradients, of all of them, and its buffers."""
    run = run_of(EMBEDDING, LAYER, stage=1, engine={"reduce_bucket": 5_000}, accumulation=3)
    found = moments(replace(run, frozen=(Held("reference", "sharded", run.policy),)))
    kept = 4 * (VOCAB * HIDDEN + 4_096 + 2 * 5_000)
    assert found["reference"]["gradients in flight"] == found["head"]["gradients in flight"] == kept


def test_an_int8_reference_has_one_weight_in_floating_point_at_a_time() -> None:
    """Of 64 x 64: the product in fp32, and narrowed; nothing is gathered under ZeRO-3."""
    run = replace(run_of(EMBEDDING, LAYER, engine={"precision": "bf16"}), worst=replace(MICRO, predicted=1))
    found = moments(replace(run, frozen=(Held("reference", "quantised", run.policy),)))["reference"]
    assert found["reference"] == 1_000 * 30 + (4 + 2) * 4_096 and "gathered" not in found  # the layer, not the head


def test_zero3_lets_go_of_what_always_is_whole_for_its_update() -> None:
    """Of 36,096 elements each of two ranks updates half, in three tensors like it; 4,096 or all were whole on both."""
    weights = Weight("e", (500, 64)), LAYER
    split, some, whole = (run_of(*weights, engine={"persistence_threshold": n}) for n in (0, 4_096, 32_000))
    assert moments(split)["step"] == {"optimizer": 4 * 3 * 18_048}
    assert moments(some)["step"] == {"optimizer": 4 * (3 * 18_048 - 4_096)}
    assert moments(whole)["step"] == {"optimizer": 4 * (3 * 18_048 - 36_096)}


def test_logits_stay_while_a_value_function_is_computed_after_the_policy() -> None:
    """Two trunks of four layers: the policy's are kept at its head, all eight in the backward, its logits with them."""
    two = replace(BLOCK, passes=2)
    run = run_of(EMBEDDING, LAYER, stage=2)
    both = moments(replace(run, policy=replace(run.policy, block=two, sharded_block=two)))
    assert both["head"]["activations"] == 1_000 * (4 * 100 + 5)
    assert both["backward"]["activations"] == 1_000 * (8 * 100 + 2 * 5)
    assert both["backward"]["head"] == both["forward"]["head"] == 4 * 400 * VOCAB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_head_takes_what_was_planned(dtype: torch.dtype) -> None:
    """Forward and backward on a CPU; the hidden states are there before: within 2 %."""
    run = run_of(EMBEDDING, HEAD, stage=2, engine={"precision": "fp32" if dtype == torch.float32 else "bf16"})
    linear = torch.nn.Linear(HIDDEN, VOCAB, bias=False, dtype=dtype)
    hidden = torch.randn(400, HIDDEN, dtype=dtype, requires_grad=True)
    seen: dict[str, Any] = {}
    with on_cpu(seen) as moment, moment("head"):
        answer = head.read_tokens(linear, hidden, head.Ask(torch.arange(400)), head.Scaling())
        answer.logps_P.sum().backward()
    assert seen["peaks"]["head"] == pytest.approx(moments(run)["head"]["head"] - hidden.nbytes, rel=0.02)


# --- what ZeRO-3 holds --------------------------------------------------------------------------------------------


def coordinator(*sizes: int, bucket: int) -> tuple[Coordinator, list[Call]]:
    """Return a coordinator and one call for each size: modules with a parameter each, in turn, the last a head."""
    names = [*(f"layers.{place}" for place in range(len(sizes) - 1)), "lm_head"]
    made = Coordinator(sizes, [True] * len(sizes), threshold=0, bucket=bucket, max_live=10**9, reuse=0)
    return made, [Call(Module(name, [place])) for place, name in enumerate(names)]


def settled_memory(made: Coordinator, calls: list[Call]) -> InMemory:
    """Return what is in memory in a forward whose order is known: one is dropped, one recorded, one begins by it."""
    for _ in range(3):
        made.forget()
        made.forward(calls)
    return made.memory


def test_a_bucket_lies_in_memory_twice_until_its_last_parameter_is_used() -> None:
    """40 alone; then 30, 20 and 10 in one buffer of 60, joined as the first of them is used."""
    made, calls = coordinator(40, 30, 20, 10, bucket=60)
    memory = settled_memory(made, calls)
    assert memory.held[FORWARD, EMBEDS, False] == 60 + 60  # while the second computes: all three joined, and the buffer
    assert memory.held[FORWARD, EMBEDS, True] == 10  # the last: what was joined for it
    # The buffer is asked for before the first computes, in a copy that is gone; then it is received in another.
    assert memory.arriving[FORWARD, EMBEDS, False] == memory.copied[FORWARD, EMBEDS, False] == 40 + 60 + 60


def test_nothing_is_fetched_ahead_before_the_order_is_known() -> None:
    made, calls = coordinator(100, 30, 20, 10, bucket=60)
    made.forward(calls)
    assert made.memory.held == {(FORWARD, EMBEDS, False): 100, (FORWARD, EMBEDS, True): 10}
    assert made.memory.arriving[FORWARD, EMBEDS, False] == 200


def test_weights_are_held_whole_by_the_layers_that_have_run() -> None:
    """A root with two layers of a linear each, and a head; a layer has run when it is left."""
    layers = [Module(f"layers.{n}", [], {"linear": Module(f"layers.{n}.linear", [n])}) for n in range(2)]
    calls = [Call(layer, [Call(layer.inner["linear"])]) for layer in layers] + [Call(Module("lm_head", [2]))]
    made = Coordinator([7, 8, 9], [True] * 3, threshold=0, bucket=0, max_live=10**9, reuse=0)
    for call in calls:
        carry(call, [True] * 3, opened=False, takes=True)
    made.forward(calls, learns=True)
    made.backward(calls)
    forward = {(LEARNING, 0, False): 7, (LEARNING, 1, False): 8, (LEARNING, 2, True): 9}
    assert made.memory.held == forward | {(BACKWARD, 2, True): 9, (BACKWARD, 2, False): 8, (BACKWARD, 1, False): 7}


def test_a_lone_rank_gathers_nothing() -> None:
    assert not Whole.of(run_of(EMBEDDING, LAYER, world_size=1), "cpu").policy
    assert Whole.of(run_of(EMBEDDING, LAYER), "cpu").policy


# --- laws ---------------------------------------------------------------------------------------------------------


def peak(run: Run) -> int:
    return max(sum(parts.values()) for parts in moments(run).values())


@given(stage=st.sampled_from([0, 1, 2, 3]), tokens=st.integers(1, 10_000), more=st.integers(1, 10_000))
def test_more_tokens_never_take_less(stage: int, tokens: int, more: int) -> None:
    run = run_of(EMBEDDING, LAYER, stage=stage)
    few, many = (replace(run, worst=replace(MICRO, tokens=n, predicted=n)) for n in (tokens, tokens + more))
    assert peak(few) <= peak(many)


@given(stage=st.sampled_from([1, 2, 3]), ranks=st.integers(2, 64), more=st.integers(1, 64))
def test_more_ranks_never_take_more_of_each(stage: int, ranks: int, more: int) -> None:
    """From two on: a lone one gathers nothing."""
    assert peak(run_of(EMBEDDING, LAYER, stage=stage, world_size=ranks + more)) <= peak(
        run_of(EMBEDDING, LAYER, stage=stage, world_size=ranks)
    )


# --- measured -----------------------------------------------------------------------------------------------------


def test_the_allocator_is_seen_moment_by_moment() -> None:
    seen: dict[str, Any] = {}
    with on_cpu(seen) as moment:
        stays = torch.empty(1_000)
        with moment("a"):
            gone = torch.empty(500)
            del gone
            with moment("b"):
                torch.empty(250)
    assert stays.numel() and seen["peaks"] == {"a": 6_000, "b": 5_000, "outside": 4_000}
    assert seen["lived"] == {"a": 4_000, "b": 4_000}


def test_a_training_begins_with_the_tensors_that_are_there() -> None:
    """However they came, a thread that loads weights is not followed; what only pretends to be there is not counted."""
    seen: dict[str, Any] = {}
    loaded: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: loaded.append(torch.empty(1_000)))
    with FakeTensorMode():
        pretended = torch.empty(1_000)
    before = sum(settled().values())
    with on_cpu(seen) as moment:
        thread.start()
        thread.join()
        with moment(TRAIN):
            torch.empty(100)
    assert loaded and pretended.numel()
    assert seen["lived"][TRAIN] == before + 4_000 and seen["peaks"][TRAIN] == before + 4_400


def test_what_another_thread_releases_is_found_out() -> None:
    """A collective's buffer goes with it, a place that is taken anew was free: neither release was seen."""
    turns = [(0, "a", 1), (2, COLLECTIVE, 1), (5, COLLECTIVE, -1)]
    events = [Event(time, moment=moment, turn=turn) for time, moment, turn in turns]
    events = sorted([*events, Event(3, 8, place=1), Event(7, 4, place=2), Event(9, 4, place=2)], key=lambda e: e.time)
    assert [(event.time, event.size) for event in releases_unseen(events)] == [(8, -4), (5, -8)]
    assert summed(sorted([*events, *releases_unseen(events)], key=lambda e: e.time))["peaks"]["a"] == 8


def test_what_was_gone_when_all_was_counted_is_not_released_once_more() -> None:
    """Of 8 bytes that another thread released, and 4 that lie there later; 2 others are there all the time."""
    counted = Event(5, moment=TRAIN, turn=1, there={9: 2})
    events = [Event(0, moment="a", turn=1), Event(1, 8, place=1), Event(2, 2, place=9), counted, Event(7, 4, place=1)]
    assert not list(releases_unseen(events))
    assert summed(events)["peaks"] == {"a": 10, TRAIN: 6}


def test_a_release_by_another_thread_is_not_seen_by_the_profiler() -> None:
    """What `releases_unseen` is for; where this fails the profiler follows threads, and it can go."""
    seen: dict[str, Any] = {}
    with on_cpu(seen) as moment, moment("a"):
        held = [torch.empty(1_000)]
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        torch.empty(10)
    assert seen["peaks"]["a"] == 4_040


def watched(ranks: Ranks, home: Path, phase: str, stage: int, **more: Any) -> tuple[Any, list[dict[str, int]]]:
    """Run five steps, so that ZeRO-3 has learnt the order of the modules; return the plan, and each rank's peaks."""
    engine = {"stage": stage, "reduce_bucket_size": 20_000, "stage3_param_persistence_threshold": 500}
    options = {
        **SETTINGS,
        "model_name_or_path": write_model(home / "model", num_hidden_layers=4),
        "datasets": [{"path": str(write_rows(home / "rows.jsonl", make_rows(PHASE_KINDS[phase][0], 48)))}],
        "max_steps": 5,
        "deepspeed": {"train_batch_size": "auto", "zero_optimization": engine},
        "output_dir": home / "out",
        **more,
    }
    argv, report = [phase, *words(options)], home / "report"
    ranks.run(function="benchmarks._allocator:run_watched", argv=argv, report=str(report)).ok()
    peaks = [json.loads(Path(f"{report}.{rank}").read_text())["peaks"] for rank in range(2)]
    return json.loads((home / "out" / "manifest.json").read_text())["plan"], peaks


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_real_run_takes_what_was_planned(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    """Within 10 %, at the moment that was planned."""
    plan, (peaks, _) = watched(ranks, tmp_path, "pretrain", stage)
    assert plan["peak_bytes"] == pytest.approx(max(peaks["backward"], peaks["step"], peaks["save"]), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "stage"), [("sft", 3), ("dpo", 2), ("reward", 3)])
def test_a_real_evaluation_takes_what_was_planned(ranks: Ranks, tmp_path: Path, phase: str, stage: int) -> None:
    """Within 10 %, of batches that are far larger than those trained on: the run's peak is there."""
    rows = write_rows(tmp_path / "held_out.jsonl", make_rows(PHASE_KINDS[phase][0], 70, seed=5))
    sizes = {"per_device_eval_batch_size": 32, "per_device_train_batch_size": 2}
    held_out = {"eval_datasets": [{"path": str(rows), "split": "train"}], "eval_strategy": "steps", "eval_steps": 5}
    plan, peaks = watched(ranks, tmp_path, phase, stage, **sizes, **held_out)
    found = max(rank["evaluation"] for rank in peaks)
    assert plan["peak_at"] == "evaluation" and plan["peak_bytes"] == pytest.approx(found, rel=0.1)

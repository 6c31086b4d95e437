"""What a run measures of itself: against DeepSpeed's own comms logger, and bytes that follow from the model's sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align_kit.trainers.measured import WARM_UP
from tests.harness import Ranks
from tests.plan_shapes import engine_config
from tests.small import SIZES, lab_of

pytestmark = pytest.mark.slow

ELEMENTS = 29_344  # of the small model; all sizes are even
SHARD = 4 * ELEMENTS // 2
COUNTS = 2 * 4  # AdamW counts the steps of its two groups
SPLIT = engine_config(stage3_param_persistence_threshold=0)
LOGGED = {"enabled": True, "prof_all": True, "verbose": False}


def keep_logged(trainer: Any) -> None:
    """Write what DeepSpeed's comms logger counted in the last two steps: calls and bytes, a file a rank."""
    from deepspeed.comm import comm
    from transformers import TrainerCallback

    seen: list[dict[str, list[int]]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            by = comm.comms_logger.comms_dict.items()
            seen.append({op: [sum(v[0] for v in s.values()), sum(n * v[0] for n, v in s.items())] for op, s in by})

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            last, before = seen[-1], seen[WARM_UP - 1]
            found = {op: [a - b for a, b in zip(last[op], before.get(op, [0, 0]), strict=True)] for op in last}
            Path(f"{args.output_dir}.{args.process_index}.json").write_text(json.dumps(found))

    trainer.add_callback(Keep())


def test_traffic_is_what_deepspeeds_logger_counts(ranks: Ranks, tmp_path: Path) -> None:
    """Both of the two steps after the first three, on each rank; a save and an evaluation between them are left out."""
    lab = lab_of(ranks)
    run = lab.start(
        "sft", tmp_path / "run", harm="tests.test_measured:keep_logged", max_steps=WARM_UP + 2,
        deepspeed={**SPLIT, "comms_logger": LOGGED},
    )  # fmt: skip
    run.result.ok()
    counted = run.manifest["measured"]["traffic"]
    for rank in (0, 1):
        logged = json.loads((tmp_path / f"run.{rank}.json").read_text())
        sent = {op: each for op, each in logged.items() if each[1]}
        assert sent == {op: [2 * each["calls"], 2 * each["bytes"]] for op, each in counted.items()}
    assert counted["reduce_scatter_tensor"] == {"calls": 1, "bytes": 4 * ELEMENTS, "link_bytes": 2 * ELEMENTS}
    assert run.manifest["measured"]["link_bytes"] == sum(each["link_bytes"] for each in counted.values())


def test_evaluations_and_saves_are_no_part_of_a_step(ranks: Ranks) -> None:
    """A pass over 7 rows would gather all there is once more; it makes ZeRO-3 record anew in which order it goes."""
    lab = lab_of(ranks)
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    held_out = {"eval_datasets": [{"path": lab.held_out["prompt_completion"]}]}
    run = lab.train("sft", deepspeed=SPLIT, max_steps=5, **often, **held_out)
    found = run.manifest["measured"]["traffic"]
    assert found["reduce_scatter_tensor"]["calls"] == 1
    assert 2 * SHARD <= found["all_gather_into_tensor"]["bytes"] < 2.5 * SHARD
    assert run.manifest["measured"]["steps"] == 5


def test_the_state_is_counted_tensor_by_tensor(ranks: Ranks) -> None:
    run = lab_of(ranks).train("dpo", deepspeed=SPLIT, max_steps=5, reference_placement="sharded")
    found = run.manifest["measured"]
    state = found["state_bytes"]
    assert (state["parameters"], state["masters"], state["moments"]) == (SHARD, SHARD, 2 * SHARD + COUNTS)
    buffers = 2 * 4 * (SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2)  # two tables of the rotary embedding
    assert (state["buffers"], state["reference"]) == (buffers, SHARD + buffers)
    assert SHARD <= state["gradients"] - 4 * (1 << 22) <= SHARD + 1024  # shards, and the bucket
    assert found["steps"] == 5 and found["peak_how"] == "resident size"
    assert sum(state.values()) < found["peak_bytes"] < 1 << 30


def test_an_adapters_state_is_its_own(ranks: Ranks) -> None:
    """Rank 4 on every linear layer: 2 x 2,048 elements are trained, of which each rank updates half."""
    run = lab_of(ranks).train("sft", deepspeed=SPLIT, max_steps=5, use_peft=True)
    state = run.manifest["measured"]["state_bytes"]
    assert state["parameters"] == SHARD + 4 * 4096 // 2
    assert (state["masters"], state["moments"]) == (4 * 4096 // 2, 4 * 4096 + 4)

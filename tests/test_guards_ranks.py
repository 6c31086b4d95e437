"""Real harm on two real ranks: each guard ends the run, or holds the step back, on all ranks alike and in one line."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from align_kit.resources import folder
from tests.guard_work import FLIPS as FLIPS_EACH
from tests.guard_work import LATE, STEP
from tests.harness import Ranks
from tests.small import Lab, Run, lab_of

pytestmark = pytest.mark.slow

SHORT = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
LONG = {"max_steps": LATE + 2, "per_device_train_batch_size": 4}
SECONDS = 20  # in which ranks that disagree find out: a hang lasts for minutes


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def harmed(lab: Lab, place: Path, harm: str, phase: str = "sft", **options: Any) -> Run:
    """Run `phase` on two ranks, every parameter sharded unless told otherwise, with harm of `tests.guard_work`."""
    options = {"deepspeed": lab.sharded, **SHORT, **options}
    return lab.start(phase, place, harm=f"tests.guard_work:{harm}" if harm else "", **options)


def fault(run: Run) -> str:
    """Return the one line of a run that ended in a fault on both ranks."""
    assert run.result.codes == [3, 3], f"{run.result.codes}\n{run.result.text}"
    return run.result.error(code=3)


def kept_steps(place: Path, rank: int) -> list[dict[str, Any]]:
    """Return what a rank kept of each of its steps."""
    return list(json.loads(Path(f"{place}.{rank}.json").read_text()))


def still_weights(steps: list[dict[str, Any]]) -> list[int]:
    """Return the steps, from the second on, that left the weights as they were."""
    sums = [step["weights"] for step in steps]
    return [step for step in range(2, len(sums) + 1) if sums[step - 1] == sums[step - 2]]


# --- losses and gradients -------------------------------------------------------------------------------------


def test_nan_loss_on_one_rank(lab: Lab, tmp_path: Path) -> None:
    run = harmed(lab, tmp_path / "run", "nan_loss")
    assert f"step {STEP}: the loss of rank 1 is nan; the last checkpoint stands" in fault(run)
    assert len(run.losses) == STEP - 1


@pytest.mark.parametrize("phase", ["dpo", "ppo"])
def test_nan_in_one_weight(lab: Lab, tmp_path: Path, phase: str) -> None:
    run = harmed(lab, tmp_path / "run", "nan_weight", phase, memory_check="off")
    line = fault(run)
    assert f"step {STEP}: rank 1 holds a weight that is not finite" in line and "up_proj" in line
    assert "1 of 1,024 elements" in line


ENGINES: dict[str, Any] = {
    "zero3": {},
    "zero3_offload": {"deepspeed": "zero3_offload"},
    "zero2": {"deepspeed": "zero2"},
    "zero2 bf16": {"deepspeed": "zero2", "bf16": True},
    "zero1": {"stage": 1},
    "zero0": {"stage": 0},
}


def engine(name: str, place: Path) -> dict[str, Any]:
    """Return the options of an engine; there is no shipped configuration of stages 0 and 1."""
    options = dict(ENGINES[name])
    if "stage" in options:
        config = {**json.loads((folder("ds_configs") / "zero2.json").read_text()), "zero_optimization": options}
        (place / "engine.json").write_text(json.dumps(config))
        return {"deepspeed": place / "engine.json"}
    return options


@pytest.mark.parametrize("name", ENGINES)
def test_nan_gradient_makes_no_update(lab: Lab, tmp_path: Path, name: str) -> None:
    """The engine goes on after it, whichever it is, and its learning rate with it."""
    run = harmed(lab, tmp_path / "run", "nan_gradient", **engine(name, tmp_path))
    run.result.ok()
    assert all(math.isfinite(loss) for loss in run.losses)
    line = f"warning: step {STEP}: the gradient norm is not finite; no update is made (1 in a row, 3 end the run)"
    assert line in run.result.text
    assert len(run.losses) == SHORT["max_steps"]


def test_three_steps_without_an_update_end_the_run(lab: Lab, tmp_path: Path) -> None:
    run = harmed(lab, tmp_path / "run", "nan_gradients")
    assert f"step {STEP + 2}: 3 steps in a row made no update, this one because the gradient norm" in fault(run)


# --- spikes ---------------------------------------------------------------------------------------------------


def test_spike_is_said(lab: Lab, tmp_path: Path) -> None:
    run = harmed(lab, tmp_path / "run", "steep_loss", **LONG)
    run.result.ok()
    (line,) = (line for line in run.result.text.splitlines() if line.startswith("warning: "))
    assert line.startswith(f"warning: step {LATE}: the gradient norm is ") and "usually" in line


def test_spike_that_goes_back(lab: Lab, tmp_path: Path) -> None:
    """The fault tells whoever starts the run again what to leave out."""
    kept = {**LONG, "save_strategy": "steps", "save_steps": LATE - 2}
    run = harmed(lab, tmp_path / "run", "high_loss", spike_policy="rollback", **kept)
    line = fault(run)
    assert f"step {LATE}: the loss is " in line
    assert line.endswith(f"go on with --resume --skip_steps {LATE - 1},{LATE}"), (
        "else it would come back to it for ever"
    )
    env = {"ALIGN_KIT_RESUME": "auto", "ALIGN_KIT_SKIP_STEPS": f"{LATE - 1},{LATE}"}
    again = lab.start(
        "sft", tmp_path / "run", harm="tests.guard_work:high_loss", env=env,
        **{"deepspeed": lab.sharded, **SHORT, **kept, "spike_policy": "rollback"},
    )  # fmt: skip
    again.result.ok()
    assert again.manifest["skip_steps"] == [LATE - 1, LATE]
    assert [line["step"] for line in again.metrics if "loss" in line][-2:] == [LATE + 1, LATE + 2]


def test_skip_is_decided_alike_and_again(lab: Lab, tmp_path: Path) -> None:
    """Both ranks skip the spike; a run that goes on from before it skips it too, and ends in the same bits."""
    kept = {**LONG, "spike_policy": "skip", "save_strategy": "steps", "save_steps": LATE - 2}
    first = harmed(lab, tmp_path / "run", "high_loss_kept", **kept)
    first.result.ok()
    decided = [kept_steps(tmp_path / "run", rank) for rank in range(2)]
    for steps in decided:
        assert [step["what"] for step in steps] == ["go"] * (LATE - 1) + ["skip"] + ["go"] * 2
        assert still_weights(steps) == [LATE]
        rates = [step["rate"] for step in steps]
        assert rates == sorted(set(rates), reverse=True), "the learning rate goes on"
    again = harmed(lab, tmp_path / "run", "high_loss_kept", resume=tmp_path / "run" / f"checkpoint-{LATE - 2}", **kept)
    again.result.ok()
    assert kept_steps(tmp_path / "run", 0) == decided[0][LATE - 2 :]
    assert all((again.weights[name] == tensor).all() for name, tensor in first.weights.items())


def test_spikes_that_stay_end_the_run(lab: Lab, tmp_path: Path) -> None:
    run = harmed(lab, tmp_path / "run", "high_losses", spike_policy="skip", **{**LONG, "max_steps": LATE + 4})
    assert f"step {LATE + 2}: 3 steps in a row made no update" in fault(run)


# --- steps that are passed over -------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["sft", "kto", "ppo"])
def test_steps_are_passed_over(lab: Lab, tmp_path: Path, phase: str) -> None:
    """Nothing is computed on their batches, which would fail; the data and the learning rate go on."""
    run = harmed(lab, tmp_path / "run", "poisoned_kept", phase, skip_steps=str(STEP))
    run.result.ok()
    assert f"step {STEP}: passed over, as skip_steps asks" in run.result.text
    assert run.manifest["skip_steps"] == [STEP]
    assert [line["step"] for line in run.metrics if "loss" in line] == [1, 2, 3, 5, 6]
    steps = kept_steps(tmp_path / "run", 1)
    falls = [before["rate"] - after["rate"] for before, after in itertools.pairwise(steps)]
    assert falls == pytest.approx([falls[0]] * len(falls)), "the learning rate goes on"
    assert still_weights(steps) == [STEP]


# --- memory ---------------------------------------------------------------------------------------------------


FLIPS: dict[str, tuple[str, dict[str, Any]]] = {
    "flip_in_weights": ("the weights of model.", {"bf16": True}),
    "flip_in_gathered": ("the gathered copy of model.", {"deepspeed": None}),
    "flip_in_base": ("the frozen base_model.", {"use_peft": True}),
    "flip_in_moments_of_zero2": ("exp_avg_sq of group 0", {"deepspeed": "zero2"}),
}


@pytest.mark.parametrize("harm", FLIPS)
def test_flipped_bit(lab: Lab, tmp_path: Path, harm: str) -> None:
    where, options = FLIPS[harm]
    run = harmed(lab, tmp_path / "run", harm, memory_check="full", **options)
    line = fault(run)
    assert f"step {STEP}: memory of rank 1 changed since the last update, where nothing writes: {where}" in line


def test_flips_by_the_hundred(lab: Lab, tmp_path: Path) -> None:
    """Bits of every kind of memory, at random places in a live engine: all are found, and the run goes on."""
    options = {"memory_check": "full", "bf16": True, "use_peft": True, "deepspeed": None}
    run = harmed(lab, tmp_path / "run", "flip_many", **options)
    run.result.ok()
    counts = json.loads((tmp_path / "run.json").read_text())
    assert len(counts) == 6 and all(count == [FLIPS_EACH, FLIPS_EACH] for count in counts.values()), counts


@pytest.mark.parametrize(
    ("phase", "options"),
    [
        ("ppo", {"use_peft": True, "bf16": True}),
        ("dpo", {"use_peft": True, "deepspeed": None}),
        ("kto", {"deepspeed": "zero2", "bf16": True}),
        ("dpo", {"save_strategy": "steps", "save_steps": 2}),
    ],
)
def test_full_check_of_a_sound_run(lab: Lab, tmp_path: Path, phase: str, options: dict[str, Any]) -> None:
    """Rollouts, switched adapters, saves and evaluations change nothing that is at rest."""
    asked = {"eval_strategy": "steps", "eval_steps": 2, "eval_datasets": [{"path": lab.held_out[lab.kind(phase)]}]}
    run = harmed(lab, tmp_path / "run", "", phase, memory_check="full", **asked, **options)
    run.result.ok()
    assert len(run.losses) == SHORT["max_steps"]


# --- ranks that disagree --------------------------------------------------------------------------------------


DISAGREEMENTS = {
    "drop_a_micro_batch": ("step 4 of 2 micro-batches", "step 4 of 1 micro-batches"),
    "evaluate_alone": ("rank 0 trains step 4", "rank 1 evaluates"),
    "save_alone": ("rank 0 trains step 4", "rank 1 saves step 3"),
    "stop_alone": ("rank 0 trains step 4", "rank 1 ends training at step 3"),
}


@pytest.mark.parametrize("harm", DISAGREEMENTS)
def test_ranks_that_disagree(lab: Lab, tmp_path: Path, harm: str) -> None:
    evaluation = {"eval_strategy": "steps", "eval_steps": 50, "eval_datasets": [{"path": lab.held_out["preference"]}]}
    run = harmed(lab, tmp_path / "run", harm, "dpo", **evaluation)
    line = fault(run)
    assert line.startswith("error: the ranks disagree about what they do: ")
    assert all(words in line for words in DISAGREEMENTS[harm]), line
    assert run.result.seconds < SECONDS

"""A run goes on with another number of ranks: as good as undisturbed, every row once, and never with wrong weights."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align_kit.checkpoint import manifest, universal
from align_kit.errors import UserError
from align_kit.run_folder import checkpoints
from align_kit.stages.other_world import _ways_out
from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, read_weights, relative_gap

pytestmark = pytest.mark.slow
ROWS, BATCH = 45, 8  # 6 steps an epoch, the last of 5 rows
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}


@dataclass(frozen=True)
class Change:
    """A run of `phase` on `before` ranks that goes on from `step` on `after`; how near it ends to the undisturbed."""

    phase: str
    before: int
    after: int
    step: int = 3
    epochs: int = 1
    near: float = 1e-6  # of the whole update, relative
    options: dict[str, Any] = field(default_factory=dict, hash=False)


CHANGES = {
    "sft 2 to 1": Change("sft", 2, 1, options={"weight_decay": 0.3}),
    "sft 1 to 2, into the next epoch": Change("sft", 1, 2, epochs=2),
    "dpo 2 to 4, second epoch": Change("dpo", 2, 4, step=8, epochs=2),
    "LoRA 2 to 1": Change("dpo", 2, 1, options={"use_peft": True}),
    "bf16 2 to 1": Change("sft", 2, 1, near=0.02, options={"bf16": True}),
    "ZeRO-2 1 to 2": Change("sft", 1, 2, options={"deepspeed": "zero2", "weight_decay": 0.3}),
    "moving reference 2 to 1": Change("dpo", 2, 1, options=MOVING),
    "ppo 2 to 1": Change("ppo", 2, 1, options={"value_learning_rate": 0.02, "max_steps": 6}),
}
ON_ROWS = [name for name, change in CHANGES.items() if change.phase != "ppo"]
each_change = pytest.mark.parametrize("name", CHANGES)


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def options(lab: Lab, change: Change) -> dict[str, Any]:
    """Return the options of a run; its batch is 8 on any number of ranks, as the options say it for the first."""
    rows = {} if change.phase == "ppo" else {"datasets": [{"path": str(data(lab, change.phase))}]}
    return {
        "deepspeed": lab.sharded,
        **rows,
        "max_steps": -1,
        "num_train_epochs": change.epochs,
        "save_strategy": "steps",
        "save_steps": change.step,
        "save_total_limit": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": BATCH // change.before // 2,
        **change.options,
    }


def data(lab: Lab, phase: str) -> Path:
    """Return the first rows of the small data; no two are the same."""
    place = lab.home / f"{phase}-{ROWS}.jsonl"
    if not place.exists():
        lines = lab.data[lab.kind(phase)].read_text().splitlines(keepends=True)[:ROWS]
        place.write_text("".join(lines))
    return place


@cache
def undisturbed(lab: Lab, name: str) -> Run:
    change = CHANGES[name]
    return start(lab, change, lab.home / f"undisturbed {name}", change.before, harm="keep_rows")


@cache
def changed(lab: Lab, name: str) -> Run:
    """Return the run that stopped after the checkpoint and went on with other ranks."""
    change = CHANGES[name]
    place = cut_short(undisturbed(lab, name), lab.home / f"changed {name}", change.step)
    return start(lab, change, place, change.after, harm="keep_rows", resume="auto", allow_change="world_size")


def start(lab: Lab, change: Change, place: Path, ranks: int, harm: str = "", **more: Any) -> Run:
    run = lab.start(change.phase, place, ranks, harm=harm, **options(lab, change), **more)
    run.result.ok()
    return run


def cut_short(run: Run, copy: Path, step: int) -> Path:
    """Copy a run as it stood right after a checkpoint."""
    later = [place.name for place in checkpoints(run.folder) if int(place.name.rpartition("-")[2]) > step]
    shutil.copytree(run.folder, copy, ignore=shutil.ignore_patterns(*later))
    for file in copy.glob("*.safetensors"):
        file.unlink()
    return copy


def rows_by_step(run: Run, ranks: int) -> dict[int, list[tuple[int, ...]]]:
    """Return the rows that each step trained on, over all ranks."""
    found: dict[int, list[tuple[int, ...]]] = {}
    for rank in range(ranks):
        for step, rows in json.loads(Path(f"{run.folder}.{rank}.json").read_text()).items():
            found.setdefault(int(step), []).extend(tuple(row) for row in rows)
    return found


# --- what it comes to -------------------------------------------------------------------------------------------------


@each_change
def test_the_run_ends_as_the_undisturbed_one_does(lab: Lab, name: str) -> None:
    """Not bitwise, as it says, but to rounding: weights, moments, step counts and the groups' settings arrived."""
    change, done, again = CHANGES[name], undisturbed(lab, name), changed(lab, name)
    first = {} if change.options.get("use_peft") else read_weights(lab.model)
    assert relative_gap(again.weights, done.weights, first) < change.near
    assert len(again.losses) == len(done.losses) > change.step
    assert again.losses[change.step :] == pytest.approx(done.losses[change.step :], abs=change.near * 10)


@each_change
def test_the_change_is_said_checked_and_recorded(lab: Lab, name: str) -> None:
    change, again = CHANGES[name], changed(lab, name)
    assert f"world size {change.before} -> {change.after}" in again.result.text
    assert "not bitwise" in again.result.text and "the loss of a training row is" in again.result.text
    (said,) = again.manifest["recuts"]
    assert said["bitwise"] is False and said["checkpoint"] == f"checkpoint-{change.step}"
    assert (said["from_world_size"], said["world_size"]) == (change.before, change.after)
    assert said["stored"] > 0 and said["loss"] == pytest.approx(said["stored"], rel=1e-2 if "bf16" in name else 1e-6)


@each_change
def test_nothing_is_left_behind_and_the_checkpoint_is_what_it_was(lab: Lab, name: str) -> None:
    change, again = CHANGES[name], changed(lab, name)
    assert not list(again.folder.glob(".universal*"))
    old, *_, new = checkpoints(again.folder)
    assert manifest.problems(old) == [] and universal.ranks_of(old) == change.before
    assert manifest.problems(new) == [] and universal.ranks_of(new) == change.after


@pytest.mark.parametrize("name", ON_ROWS)
def test_every_row_is_trained_on_once_an_epoch(lab: Lab, name: str) -> None:
    """The steps before the checkpoint and those after it hold every row once an epoch, and the rows they would have."""
    change = CHANGES[name]
    whole = rows_by_step(undisturbed(lab, name), change.before)
    after = rows_by_step(changed(lab, name), change.after)
    steps = -(-ROWS // BATCH)
    assert sorted(whole) == list(range(1, steps * change.epochs + 1)) and min(after) == change.step + 1
    both = {step: after.get(step, whole[step]) for step in whole}
    for epoch in range(change.epochs):
        seen = Counter(row for step in range(epoch * steps + 1, (epoch + 1) * steps + 1) for row in both[step])
        assert len(seen) == ROWS and set(seen.values()) == {1}
    assert all(Counter(both[step]) == Counter(whole[step]) for step in whole)


def test_there_and_back_and_on_again(lab: Lab, tmp_path: Path) -> None:
    """After a change the run saves what any ranks can take up: the same ones bit for bit, others to rounding."""
    name = "sft 2 to 1"
    change, done = CHANGES[name], undisturbed(lab, name)
    asked = {"resume": "auto", "allow_change": "world_size", "save_steps": 1, "save_total_limit": 4}
    there = cut_short(done, tmp_path / "there", change.step)
    alone = lab.start("sft", there, 1, **{**options(lab, change), **asked})
    alone.result.ok()
    on = lab.start("sft", cut_short(alone, tmp_path / "on", 5), 1, **{**options(lab, change), **asked})
    back = lab.start("sft", cut_short(alone, tmp_path / "back", 5), 2, **{**options(lab, change), **asked})
    for run in (on, back):
        run.result.ok()
    assert all((on.weights[key] == weight).all() for key, weight in alone.weights.items())
    assert relative_gap(back.weights, done.weights, read_weights(lab.model)) < change.near
    assert [len(run.manifest["recuts"]) for run in (alone, on, back)] == [1, 1, 2]


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(lab: Lab, tmp_path: Path, ranks: int, *, harm: str = "", **more: Any) -> Run:
    """Return what became of the first change on `ranks` ranks."""
    name = "sft 2 to 1"
    place = cut_short(undisturbed(lab, name), tmp_path / "run", CHANGES[name].step)
    return lab.start("sft", place, ranks, harm=harm, resume="auto", **{**options(lab, CHANGES[name]), **more})


def test_without_the_flag_it_is_refused(lab: Lab, tmp_path: Path) -> None:
    line = refused(lab, tmp_path, 1).result.error()
    assert "world_size was 2, now 1" in line and "--allow_change world_size" in line


def test_a_batch_that_does_not_divide_is_refused_with_what_would(lab: Lab, tmp_path: Path) -> None:
    asked = {"per_device_train_batch_size": 8, "allow_change": "world_size"}
    line = refused(lab, tmp_path, 2, **asked).result.error()
    assert "global batch of 8 stays" in line and "use --per_device_train_batch_size 1 or 2 or 4" in line


def test_an_optimizer_without_two_moments_is_refused(lab: Lab, tmp_path: Path) -> None:
    change = Change("sft", 2, 1, options={"optim": "sgd"})
    run = start(lab, change, tmp_path / "sgd", 2)
    place = cut_short(run, tmp_path / "again", change.step)
    again = lab.start("sft", place, 1, resume="auto", allow_change="world_size", **options(lab, change))
    assert "needs an optimizer with Adam's two moments, and this one keeps none" in again.result.error()
    assert not list(place.glob(".universal*"))


def test_an_epoch_that_depends_on_the_ranks_is_refused(lab: Lab, tmp_path: Path) -> None:
    change = Change("sft", 2, 1, options={"dataloader_drop_last": True})
    place = cut_short(start(lab, change, tmp_path / "first", 2), tmp_path / "again", change.step)
    again = lab.start("sft", place, 1, resume="auto", allow_change="world_size", **options(lab, change))
    assert "which rows an epoch leaves out depends on the ranks" in again.result.error()


def test_the_best_checkpoint_of_other_ranks_is_refused_beforehand(lab: Lab, tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 3}
    asked = {**best, "eval_datasets": [{"path": str(lab.held_out["prompt_completion"])}]}
    line = refused(lab, tmp_path, 1, allow_change=",".join(["world_size", *best]), **asked).result.error()
    assert "the best checkpoint may be one that was cut for other ranks" in line


HARMS = {"spoil_weights": "the loss of a training row is", "lose_moments": "the optimizer's exp_avg adds up to"}


@pytest.mark.parametrize("harm", HARMS)
def test_what_did_not_arrive_as_it_was_saved_is_not_trained_on(lab: Lab, tmp_path: Path, harm: str) -> None:
    """A conversion gone wrong ends the run before a step; the checkpoint still verifies."""
    again = refused(lab, tmp_path, 1, harm=harm, allow_change="world_size")
    assert again.result.codes == [3] and "Traceback" not in again.result.text
    assert HARMS[harm] in again.result.text and "nothing was trained" in again.result.text
    assert "  step " not in again.result.text
    (stands,) = checkpoints(again.folder)
    assert manifest.problems(stands) == [] and not list(again.folder.glob(".universal*"))


def test_groups_and_step_counts_are_each_their_own_again(tmp_path: Path) -> None:
    """What the engine does as it loads, undone: the settings of the first group for all, and one step count for all."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, (0.1, 0.2), strict=True)]
    optimizer, shared = torch.optim.AdamW(groups), torch.tensor(3.0)
    saved = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.param_groups[1]["lr"] = 0.1
    for weight in weights:
        optimizer.state[weight] = {"step": shared, "exp_avg": weight.detach() * 0, "exp_avg_sq": weight.detach() * 0}
        weight.grad = torch.ones(3)
    place = tmp_path / "global_step3" / universal.OPTIMIZER
    place.parent.mkdir(parents=True)
    torch.save({"param_groups": saved}, place)
    config = SimpleNamespace(load_universal_checkpoint=True)
    universal.mend(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer), _config=config), tmp_path)
    optimizer.step()
    assert [float(optimizer.state[weight]["step"]) for weight in weights] == [4, 4]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert not config.load_universal_checkpoint  # what it saves from now on it can load


def test_ways_out_divide() -> None:
    assert _ways_out(16, 4) == "--per_device_train_batch_size 1 or 2 or 4"
    assert _ways_out(16, 3) == "4 or 8 or 16 ranks"


def test_a_checkpoint_without_room_for_the_conversion_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needed for a while in .*; make room"):
        universal._check_room(tmp_path, shutil.disk_usage(tmp_path).total * 2)

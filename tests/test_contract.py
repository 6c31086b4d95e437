"""A run that goes on is the run it was: every difference named, refused unless allowed, and effective where allowed."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from align_kit.checkpoint import contract
from align_kit.checkpoint.contract import Difference, check, differences, names_in
from align_kit.config import BatchPlan, inherited, load
from align_kit.config.schema import namespace
from align_kit.errors import UserError
from align_kit.models import source
from align_kit.registry import RECIPES, get
from align_kit.run_folder import RunFolder
from align_kit.stages.contract import keep_frozen, keep_options
from align_kit.stages.engine import Engine
from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, make_rows, write_model, write_rows

KEYS = {name: key for recipe in RECIPES for name, key in namespace(recipe.config).items()}

# --- the rules --------------------------------------------------------------------------------------------------------


def other(value: Any) -> Any:
    """Return a value that is not `value`."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else "other"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_option_is_contract_but_for_the_list(recipe: Any) -> None:
    """An option that nobody has thought of is covered."""
    for name, key in namespace(recipe.config).items():
        found = differences({name: key.default}, {name: other(key.default)})
        compared = name not in contract.FREE and name not in contract.BY_CONTENT
        assert [one.name for one in found] == [name] * compared
    assert differences({"not_yet_thought_of": 1}, {"not_yet_thought_of": 2}) == [Difference("not_yet_thought_of", 1, 2)]


def test_the_lists_name_what_there_is() -> None:
    known = {*KEYS, *contract.FACTS, "not_compared"}
    for names in (contract.FREE, contract.BY_CONTENT, contract.FIXED, contract.SCHEDULE, contract.SHAPES_DATA):
        assert set(names) <= known, set(names) - known
    assert not contract.FREE & {*contract.FIXED, *contract.BY_CONTENT}


def test_nothing_that_is_free_is_read_by_a_loss() -> None:
    """What is free reports, stores, evaluates or guards: none of TRL's own options about losses, data or reference."""
    assert not contract.FREE & (set(inherited.TRL_TRAINERS) - {"dataset_num_proc"})


def test_a_difference_in_words() -> None:
    was, now = (
        {"learning_rate": 3e-3, "max_steps": 6, "beta": 0.1},
        {"learning_rate": 1e-3, "max_steps": 6, "beta": None},
    )
    lines = [one.line for one in differences(was, now, {"learning_rate": "command line", "beta": "my.yaml:3"})]
    assert lines == ["learning_rate was 0.003, now 0.001 (command line)", "beta was 0.1, now null (my.yaml:3)"]


def test_values_are_compared_as_a_manifest_keeps_them() -> None:
    assert not differences(
        {"loss_type": ["sigmoid"], "env": {"A": "1"}}, {"loss_type": ("sigmoid",), "env": {"A": "1"}}
    )
    assert not differences({"chat_template_path": "a"}, {"chat_template_path": Path("a")})


def test_another_phase_is_one_difference() -> None:
    (found,) = differences({"phase": "dpo", "beta": 0.1}, {"phase": "sft", "beta": 0.2})
    assert found.line == "phase was dpo, now sft" and found.fixed


def test_the_engine_is_compared_key_by_key() -> None:
    was = {
        "zero_optimization": {"stage": 3, "overlap_comm": True},
        "steps_per_print": 10,
        "optimizer": {"type": "Adam"},
    }
    now = {
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "steps_per_print": 20,
        "optimizer": {"type": "Lamb"},
    }
    found = differences({"deepspeed": was}, {"deepspeed": now}, {"deepspeed": "command line"})
    assert [one.part for one in found] == [
        "zero_optimization.stage",
        "zero_optimization.overlap_comm",
        "optimizer.type",
    ]
    assert [bool(one.fixed) for one in found] == [True, False, True]
    assert found[1].line == "deepspeed zero_optimization.overlap_comm was true, now false (command line)"
    left_out = differences({"deepspeed": {"zero_optimization": {"stage": 3}}}, {"deepspeed": {}})
    assert [one.part for one in left_out] == ["zero_optimization.stage"]


@pytest.mark.parametrize(
    ("name", "was", "now", "beside"),
    [
        ("learning_rate", 1.0, 2.0, {"deepspeed": {"scheduler": {}}}),
        ("max_steps", 1, 2, {"deepspeed": {"scheduler": {}}}),
        ("learning_rate", 1.0, 2.0, {"lr_scheduler_type": "reduce_lr_on_plateau"}),
        ("kl_coef", 0.1, 0.2, {"kl_target": 6.0}),
        ("kl_target", None, 6.0, {}),
        ("value_learning_rate", None, 1e-4, {}),
        ("metric_for_best_model", "loss", "reward", {}),
    ],
)
def test_what_is_fixed_depends_on_what_stands_beside(name: str, was: Any, now: Any, beside: dict[str, Any]) -> None:
    (found,) = differences({name: was, **beside}, {name: now, **beside})
    assert found.fixed
    free = {"kl_target": 5.0, "value_learning_rate": 1e-3, "metric_for_best_model": None}
    (found,) = differences({name: free.get(name, was)}, {name: now})
    assert not found.fixed


def test_all_that_differs_is_in_one_line() -> None:
    found = [Difference("learning_rate", 1, 2), Difference("beta", 1, 2), Difference("beta", 3, 4)]
    with pytest.raises(UserError) as refused:
        check(found, frozenset(), "out")
    assert str(refused.value) == (
        "--resume: the run in out is not the same: learning_rate was 1, now 2; beta was 1, now 2; beta was 3, now 4; "
        "put back what was or go on with --allow_change learning_rate,beta"
    )
    with pytest.raises(UserError, match="same: beta was 1, now 2; beta .* --allow_change learning_rate,beta$"):
        check(found, {"learning_rate"}, "out")
    check(found, {"learning_rate", "beta"}, "out")


def test_what_is_fixed_is_refused_allowed_or_not() -> None:
    found = differences({"seed": 1, "beta": 1}, {"seed": 2, "beta": 2})
    with pytest.raises(UserError, match="seed was 1, now 2, which cannot change: .* or start anew with --overwrite$"):
        check(found, {"seed", "beta"}, "out")


def test_what_decides_the_data_allows_the_data() -> None:
    found = [Difference("data", "48 rows", "47 rows")]
    check(found, {"max_length"}, "out")
    check(found, {"data"}, "out")
    with pytest.raises(UserError, match="data was 48 rows, now 47 rows; .*--allow_change data"):
        check(found, {"beta"}, "out")


def test_names_that_may_change() -> None:
    assert names_in(None, KEYS) == names_in("", KEYS) == frozenset()
    assert names_in("lr, beta,world_size,", KEYS) == {"learning_rate", "beta", "world_size"}
    assert names_in("datasets,model_name_or_path", KEYS) == {"data", "policy"}, "by what is compared in their stead"
    with pytest.raises(UserError, match="unknown allow_change 'learning_rat'.*did you mean 'learning_rate'"):
        names_in("beta,learning_rat", KEYS)


# --- what a run knows of itself ---------------------------------------------------------------------------------------


def begun(recipe: Any, *argv: str, **manifest: Any) -> tuple[Any, RunFolder]:
    """Return a configuration of `recipe` and the folder of the run it goes on with, which had `manifest`."""
    config = load(recipe, [*argv, "--resume"])
    return config, RunFolder(Path("out"), manifest, resume_from=Path("out/checkpoint-3"))


def test_reward_models_are_compared_by_content(tmp_path: Path) -> None:
    """One may lie elsewhere; another one, or one more, is a difference, and resolved anew where that is allowed."""
    policy, was, other = (write_model(tmp_path / name, seed=n) for n, name in enumerate(("policy", "was", "other")))
    moved = Path(shutil.copytree(was, tmp_path / "moved"))
    start, digest = source.resolve(str(policy)), source.digest(source.resolve(str(policy)))
    frozen = {
        "reference": {"name": str(policy), "digest": digest},
        "reward": {"name": str(was), "digest": source.digest(source.resolve(str(was)))},
    }

    def kept(*rewards: Path, allow: str = "") -> dict[str, Any]:
        named = ["--reward_model_name_or_path", *map(str, rewards)] if rewards else []
        config, home = begun(get("ppo"), *named, "--allow_change", allow, policy={"name": str(policy)}, frozen=frozen)
        keep_frozen(config, home, start, digest)
        return home.manifest["frozen"]

    assert kept() == kept(was) == frozen
    assert kept(moved) == {**frozen, "reward": {**frozen["reward"], "name": str(moved)}}
    for rewards in ([other], [was, other]):
        with pytest.raises(UserError, match=rf"reward was {was} \(\w+\), now {rewards[0]} .*--allow_change reward$"):
            kept(*rewards)
        assert kept(*rewards, allow="reward") == {"reference": frozen["reference"]}


def test_the_global_batch_is_compared_not_how_it_is_asked_for() -> None:
    argv = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    config, _ = begun(get("dpo"), *argv)
    manifest = {"phase": "dpo", "world_size": 2, "precision": "fp32", "config": config.as_dict()}
    batch, engine = {"per_device": 4, "world_size": 2, "accumulation": 2}, Engine({}, "zero3", "fp32")

    def compared(*argv: str, ranks: int = 2, accumulation: int = 2) -> list[str]:
        config, home = begun(get("dpo"), *argv, **manifest, batch=batch)
        keep_options(get("dpo"), config, engine, BatchPlan(4, ranks, accumulation), home)
        return [one["name"] for one in home.changes]

    began = time.perf_counter()
    assert compared(*argv) == []
    assert time.perf_counter() - began < 1, "seconds"
    assert compared("--per_device_train_batch_size", "4", "--global_batch_size", "16") == []
    with pytest.raises(UserError, match="same: global_batch_size was 16, now 8, which cannot change"):
        compared(*argv, accumulation=1)
    with pytest.raises(UserError, match="same: world_size was 2, now 1; put back"):
        compared(*argv, ranks=1)
    assert compared(*argv, "--allow_change", "world_size", ranks=1, accumulation=4) == ["world_size"]


# --- real runs --------------------------------------------------------------------------------------------------------

STEPS, SAVED_AT = 6, 3
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": SAVED_AT,
}


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def cut_short(done: Run, place: Path) -> Path:
    """Copy a run as one that was killed after its checkpoint half way, when it had trained and logged further."""
    shutil.copytree(done.folder, place, ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}", "*.safetensors"))
    shutil.copytree(done.folder / f"checkpoint-{SAVED_AT}", place / f"checkpoint-{SAVED_AT}", dirs_exist_ok=True)
    manifest = json.loads((place / "manifest.json").read_text())
    for key in ("finished", "result", "steps", "seconds"):
        manifest.pop(key)
    (place / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    return place


def go_on(lab: Lab, phase: str, place: Path, world_size: int = 2, **changes: Any) -> Run:
    return lab.start(phase, place, world_size, resume="auto", **{**OPTIONS, **changes})


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return every file below `folder` with the time of its last write and its bytes."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def sft(lab: Lab) -> Run:
    """Six steps of SFT on two ranks, saved half way and at the end."""
    return lab.train("sft", **OPTIONS)


@pytest.mark.slow
def test_all_that_differs_is_named_and_nothing_is_touched(lab: Lab, sft: Run, tmp_path: Path) -> None:
    place = cut_short(sft, tmp_path / "again")
    before = content(place)
    changes = {
        "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "max_steps": 12, "num_train_epochs": 5,
        "weight_decay": 0.1, "max_length": None, "forward": "plain", "gradient_checkpointing": True,
        "save_steps": 2, "logging_steps": 2,
    }  # fmt: skip
    said = go_on(lab, "sft", place, **changes).result.error()
    for name in set(changes) - {"save_steps", "logging_steps"}:
        assert f"{name} was " in said, name
    assert "learning_rate was 0.003, now 0.001 (command line)" in said and "forward was auto, now plain" in said
    assert "gradient_checkpointing was false, now true (command line)" in said and "now 1024 (the default)" in said
    assert "save_steps" not in said and "logging_steps" not in said
    offered = said.rpartition("--allow_change ")[2].split(",")
    assert set(offered) == set(changes) - {"save_steps", "logging_steps"}
    fixed = {"seed": 43, "optim": "sgd", "deepspeed": "zero2", "per_device_train_batch_size": 2}
    said = go_on(lab, "sft", place, **fixed, allow_change=",".join(fixed)).result.error()
    for words in (
        "seed was 42, now 43 (command line), which cannot change",
        "optim was adamw_torch, now sgd (command line), which cannot change",
        "deepspeed zero_optimization.stage was 3, now 2 (command line), which cannot change",
        "global_batch_size was 8, now 4, which cannot change",
    ):
        assert words in said
    assert "did you mean 'learning_rate'" in go_on(lab, "sft", place, allow_change="learning_rat").result.error()
    assert content(place) == before, "a refused run leaves the folder as it was"


@pytest.mark.slow
def test_another_world_size_or_phase_is_a_difference(lab: Lab, sft: Run, tmp_path: Path) -> None:
    place = cut_short(sft, tmp_path / "again")
    before = content(place)
    said = go_on(lab, "sft", place, world_size=1).result.error()
    assert said.endswith(
        "is not the same: world_size was 2, now 1; put back what was or go on with --allow_change world_size"
    )
    assert "phase was sft, now orpo, which cannot change" in go_on(lab, "orpo", place).result.error()
    assert content(place) == before


def rates(rate: float, first: int, last: int, steps: int) -> Any:
    """Return the linear schedule of `rate` over `steps` at the steps `first` to `last`, counted from 1."""
    return pytest.approx([rate * (steps - step + 1) / steps for step in range(first, last + 1)])


@pytest.mark.slow
def test_an_allowed_learning_rate_trains_from_there(lab: Lab, sft: Run, tmp_path: Path) -> None:
    place = cut_short(sft, tmp_path / "again")
    changes = {"learning_rate": 1e-3, "weight_decay": 0.5, "adam_beta2": 0.9}
    again = go_on(lab, "sft", place, **changes, allow_change="lr,weight_decay,adam_beta2", harm="tell_groups")
    again.result.ok()
    assert again.logged("learning_rate")[:SAVED_AT] == sft.logged("learning_rate")[:SAVED_AT]
    assert again.logged("learning_rate")[SAVED_AT:] == rates(1e-3, 4, 6, STEPS)
    assert "step 4 by: lr 0.0005 betas (0.9, 0.9) eps 1e-08 weight_decay 0.5" in again.result.text
    assert "changed    learning_rate was 0.003, now 0.001 (command line), from step 3 on" in again.result.text
    assert [(one["name"], one["step"]) for one in again.manifest["changes"]] == [
        (name, SAVED_AT) for name in sorted(changes)
    ]
    place = cut_short(again, tmp_path / "once more")
    line = go_on(lab, "sft", place, **changes).result.error()  # the checkpoint is still of the run before the change
    assert "learning_rate was 0.003, now 0.001" in line
    once_more = go_on(lab, "sft", place, **changes, allow_change="lr,weight_decay,adam_beta2")
    once_more.result.ok()
    assert all((once_more.weights[name] == tensor).all() for name, tensor in again.weights.items())
    assert len(once_more.manifest["changes"]) == 3


@pytest.mark.slow
def test_an_allowed_length_has_the_schedule_of_the_new_length(lab: Lab, sft: Run, tmp_path: Path) -> None:
    """Twice as long: from the checkpoint on the rates are those of twelve steps, over a second epoch."""
    again = go_on(lab, "sft", cut_short(sft, tmp_path / "again"), max_steps=12, allow_change="max_steps")
    again.result.ok()
    assert again.logged("learning_rate")[SAVED_AT:] == rates(3e-3, 4, 12, 12)
    assert "max_steps was 6, now 12 (command line), and the schedule is that of the new length" in again.result.text
    constant = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 8}
    warmer = go_on(lab, "sft", cut_short(sft, tmp_path / "warmer"), **constant, allow_change=",".join(constant))
    assert warmer.result.ok() and warmer.logged("learning_rate")[SAVED_AT:] == pytest.approx(
        [3e-3 * step / 8 for step in (3, 4, 5)]
    )


@pytest.mark.slow
def test_a_checkpoint_past_the_end_is_refused(lab: Lab, sft: Run, tmp_path: Path) -> None:
    place = cut_short(sft, tmp_path / "again")
    before = content(place)
    said = go_on(lab, "sft", place, max_steps=2, allow_change="max_steps").result.error()
    assert "the checkpoint is of step 3 and the run ends at step 2; raise max_steps" in said
    assert content(place) == before
    epochs = {"max_steps": -1, "num_train_epochs": 0.3}
    said = go_on(lab, "sft", place, **epochs, allow_change="max_steps,num_train_epochs").result.error()
    assert "the checkpoint is of step 3 and the run ends at step 2; raise max_steps" in said


@pytest.mark.slow
def test_a_run_that_had_only_to_be_saved_is_saved(lab: Lab, sft: Run, tmp_path: Path) -> None:
    """Killed between its last checkpoint and its final model, a run trains nothing more and ends in the same bits."""
    place = tmp_path / "again"
    shutil.copytree(
        sft.folder,
        place,
        ignore=lambda folder, names: {"model.safetensors"} & set(names) if Path(folder) == sft.folder else set(),
    )
    again = go_on(lab, "sft", place)
    again.result.ok()
    assert all((again.weights[name] == tensor).all() for name, tensor in sft.weights.items())
    assert again.losses == sft.losses


@pytest.mark.slow
def test_what_is_free_takes_effect(lab: Lab, sft: Run, tmp_path: Path) -> None:
    """transformers would go on with the checkpoint's cadence."""
    again = go_on(lab, "sft", cut_short(sft, tmp_path / "again"), save_steps=5, logging_steps=2, save_total_limit=9)
    again.result.ok()
    assert (again.folder / "checkpoint-5").is_dir()
    assert [line["step"] for line in again.metrics if "loss" in line] == [1, 2, 3, 4, 6]
    assert again.manifest["changes"] == []


@pytest.mark.slow
def test_counters_go_on_and_no_step_is_logged_twice(lab: Lab, sft: Run, tmp_path: Path) -> None:
    place = cut_short(sft, tmp_path / "again")
    with (place / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')  # killed in the middle of a line
    evaluation = {
        "eval_strategy": "steps",
        "eval_on_start": True,
        "eval_datasets": [{"path": lab.held_out["prompt_completion"]}],
    }
    again = go_on(lab, "sft", place, **evaluation, eval_steps=2)
    again.result.ok()
    assert [line["step"] for line in again.metrics if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in again.metrics if "eval_loss" in line] == [4, 6], "it started long ago"
    assert again.losses == sft.losses
    aside = (place / "metrics.replayed.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside[:-1]] == [4, 5, 6, 6] and aside[-1] == '{"step": 7, "lo'
    ends = [json.loads((run.folder / "checkpoint-6" / "align_kit_state.json").read_text()) for run in (sft, again)]
    assert ends[0]["tokens_seen"] == ends[1]["tokens_seen"] == sum(sft.logged("tokens")) > 0


@pytest.mark.slow
def test_data_is_compared_by_content(lab: Lab, sft: Run, tmp_path: Path) -> None:
    rows = make_rows("prompt_completion", 48)
    place = cut_short(sft, tmp_path / "again")
    before = content(place)
    fewer = [{"path": write_rows(tmp_path / "fewer.jsonl", rows[:47])}]
    said = go_on(lab, "sft", place, datasets=fewer).result.error()
    assert "data was 48 rows (" in said and "), now 47 rows (" in said and said.endswith("--allow_change data")
    swapped = [{"path": write_rows(tmp_path / "swapped.jsonl", [rows[1], rows[0], *rows[2:]])}]
    assert "data was 48 rows (" in go_on(lab, "sft", place, datasets=swapped).result.error(), "the order counts"
    assert content(place) == before
    moved = [{"path": write_rows(tmp_path / "moved.jsonl", rows)}]
    assert go_on(lab, "sft", place, datasets=moved).result.ok()
    place = cut_short(sft, tmp_path / "changed")
    changed = go_on(lab, "sft", place, datasets=fewer, max_length=40, allow_change="max_length")
    assert changed.result.ok() and "warning: the data has changed" in changed.result.text
    assert [one["name"] for one in changed.manifest["changes"]] == ["max_length", "data"]


@pytest.mark.slow
def test_the_start_of_the_policy_is_compared_by_content(lab: Lab, tmp_path: Path) -> None:
    """An adapter's base may lie elsewhere, and may not be another; all weights of a full run are in its checkpoint."""
    other = write_model(tmp_path / "other", seed=1)
    lora = lab.train("sft", use_peft=True, **OPTIONS)
    place = cut_short(lora, tmp_path / "lora")
    said = go_on(lab, "sft", place, use_peft=True, model_name_or_path=other, allow_change="policy").result.error()
    assert (
        f"policy was {lab.model} (" in said
        and f"now {other} (" in said
        and "(command line), which cannot change" in said
    )
    moved = Path(shutil.copytree(lab.model, tmp_path / "moved"))
    again = go_on(lab, "sft", place, use_peft=True, model_name_or_path=moved)
    again.result.ok()
    assert all((again.weights[name] == tensor).all() for name, tensor in lora.weights.items())
    full = lab.train("sft", **OPTIONS)
    place = cut_short(full, tmp_path / "full")
    assert go_on(lab, "sft", place, model_name_or_path=other).result.error().endswith("--allow_change policy")
    again = go_on(lab, "sft", place, model_name_or_path=other, allow_change="policy")
    again.result.ok()
    assert all((again.weights[name] == tensor).all() for name, tensor in full.weights.items())


@pytest.mark.slow
def test_the_reference_is_compared_by_content(lab: Lab, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    dpo = lab.train("dpo", **OPTIONS)
    place = cut_short(dpo, tmp_path / "again")
    before = content(place)
    named = {"reference_model_name_or_path": other}
    said = go_on(lab, "dpo", place, **named).result.error()
    assert (
        f"reference was {lab.model} (" in said
        and f"now {other} (" in said
        and said.endswith("--allow_change reference")
    )
    assert content(place) == before
    moved = Path(shutil.copytree(lab.model, tmp_path / "moved"))
    again = go_on(lab, "dpo", place, reference_model_name_or_path=moved)
    assert again.result.ok() and again.losses == dpo.losses
    again = go_on(
        lab, "dpo", cut_short(dpo, tmp_path / "other run"), **named, reference_differs=True, allow_change="reference"
    )
    assert again.result.ok() and again.manifest["frozen"]["reference"]["name"] == str(other)
    assert again.losses[:SAVED_AT] == dpo.losses[:SAVED_AT] and again.losses[SAVED_AT] != dpo.losses[SAVED_AT]


@pytest.mark.slow
def test_what_was_derived_changes_only_where_that_is_allowed(lab: Lab, tmp_path: Path) -> None:
    kto = lab.train("kto", **OPTIONS)
    ((name, (weight, _)),) = kto.manifest["derived"].items()
    place = cut_short(kto, tmp_path / "again")
    said = go_on(lab, "kto", place, **{name: 1.0}).result.error()
    assert f"{name} was {weight!r}, now 1.0 (command line);" in said
    again = go_on(lab, "kto", place, **{name: 1.0}, allow_change=name)
    again.result.ok()
    assert again.manifest["derived"] == {} and again.losses[SAVED_AT] != kto.losses[SAVED_AT]
    untouched = go_on(lab, "kto", cut_short(kto, tmp_path / "untouched"))
    assert untouched.result.ok() and untouched.losses == kto.losses and untouched.manifest["derived"]


@pytest.mark.slow
def test_samples_of_an_iteration_stand_once(lab: Lab, tmp_path: Path) -> None:
    ppo = lab.train("ppo", **OPTIONS)
    again = go_on(lab, "ppo", cut_short(ppo, tmp_path / "again"))
    again.result.ok()
    assert (again.folder / "samples.jsonl").read_text() == (ppo.folder / "samples.jsonl").read_text()
    moved = [json.loads(line) for line in (again.folder / "samples.replayed.jsonl").read_text().splitlines()]
    assert {line["iteration"] for line in moved} == {2}
    assert [line["step"] for line in again.metrics if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_an_allowed_forward_is_taken(lab: Lab, sft: Run, tmp_path: Path) -> None:
    again = go_on(lab, "sft", cut_short(sft, tmp_path / "again"), forward="plain", allow_change="forward")
    assert again.result.ok() and again.manifest["forward"]["mode"] == "plain" != sft.manifest["forward"]["mode"]


@pytest.mark.slow
def test_an_engine_that_brings_the_optimizer_takes_the_change_too(lab: Lab, tmp_path: Path) -> None:
    engine = json.loads(lab.sharded.read_text())
    names = ("lr", "betas", "eps", "weight_decay")
    params = {**dict.fromkeys(names, "auto"), "torch_adam": True, "adam_w_mode": True}
    own = tmp_path / "own.json"
    own.write_text(json.dumps({**engine, "optimizer": {"type": "AdamW", "params": params}}))
    done = lab.train("sft", deepspeed=own, **OPTIONS)
    again = go_on(
        lab, "sft", cut_short(done, tmp_path / "again"), deepspeed=own, learning_rate=1e-3, weight_decay=0.5,
        allow_change="learning_rate,weight_decay", harm="tell_groups",
    )  # fmt: skip
    again.result.ok()
    third = [rate / 3 for rate in done.logged("learning_rate")[SAVED_AT:]]
    assert again.logged("learning_rate")[SAVED_AT:] == pytest.approx(third)
    assert "step 4 by: lr 0.0005 " in again.result.text and "weight_decay 0.5" in again.result.text
    said = go_on(lab, "sft", cut_short(done, tmp_path / "other"), deepspeed=lab.sharded).result.error()
    assert "deepspeed optimizer.type was AdamW, now null (command line), which cannot change" in said

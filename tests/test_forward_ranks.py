"""Real runs on two ZeRO-3 ranks: shared is plain in every recipe, and a model that cannot be walked goes on plain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from align_kit.registry import RECIPES, Recipe, names
from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, read_weights, relative_gap

pytestmark = pytest.mark.slow

SAME = 1e-5  # relative: losses, and what weights moved by
# Two micro-batches a step, layers computed again; plain descent, so that a gap between gradients stays what it is.
STEPS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def start_of(lab: Lab, phase: str) -> Path:
    """Return the model a phase starts from: a fresh head would leave the trunk without a gradient."""
    return lab.scorer if phase == "reward" else lab.model


def options(lab: Lab, phase: str, **changes: Any) -> dict[str, Any]:
    """Return the options of a run whose every parameter is in two parts, however small."""
    return {**STEPS, "deepspeed": lab.sharded, "model_name_or_path": start_of(lab, phase), **changes}


_runs: dict[str, Run] = {}


def run(lab: Lab, phase: str, forward: str, harm: str = "keep_doors", **changes: Any) -> Run:
    """Return a finished run of `phase`, made now or before, that computes its batches the way `forward` says."""
    key = json.dumps([phase, forward, harm, changes], sort_keys=True, default=str)
    if key not in _runs:
        place = lab.home / f"forward-{len(_runs)}"
        _runs[key] = lab.start(phase, place, harm=harm, forward=forward, **options(lab, phase, **changes))
        _runs[key].result.ok()
    return _runs[key]


def doors(done: Run) -> dict[str, list[dict[str, Any]]]:
    """Return the doors of each role, a rank each."""
    kept = [json.loads(Path(f"{done.folder}.{rank}.json").read_text()) for rank in range(2)]
    return {role: [of_rank[role] for of_rank in kept] for role in kept[0]}


def assert_went(done: Run, mode: str, *roles: str) -> None:
    """Assert that every forward of these roles (or of all) on every rank went the way `mode` says."""
    for role, of_role in doors(done).items():
        for door in of_role if role in roles or not roles else []:
            walked, plain = bool(door["walked"]), bool(door["plain"])
            assert (door["mode"], walked, plain) == (mode, mode != "plain", mode == "plain"), (role, door)


def assert_same(lab: Lab, phase: str, ours: Run, theirs: Run) -> None:
    assert ours.losses == pytest.approx(theirs.losses, rel=SAME, abs=1e-7)  # PPO's first loss is all but 0
    assert len(ours.losses) == STEPS["max_steps"]
    assert relative_gap(ours.weights, theirs.weights, read_weights(start_of(lab, phase))) < SAME


# --- shared is plain --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=names())
def test_every_recipe(lab: Lab, recipe: Recipe) -> None:
    """Losses and final weights; every forward of every model on every rank took the path it is about."""
    ours, theirs = (run(lab, recipe.name, mode) for mode in ("shared", "plain"))
    assert_went(ours, "shared")
    assert_went(theirs, "plain")
    assert {"policy", *recipe.needs} - {"reward"} <= doors(ours).keys()
    assert_same(lab, recipe.name, ours, theirs)
    computed = [(door["computed"], door["given"]) for of_role in doors(ours).values() for door in of_role]
    assert all(0 < less <= given for less, given in computed)
    if recipe.name not in ("pretrain", "sft"):  # whose rows have little in common
        assert sum(less for less, _ in computed) < 0.97 * sum(given for _, given in computed)


REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
# PPO's adapters on one base refuse the re-entrant kind.
LORA: dict[str, dict[str, Any]] = {"dpo": REENTRANT, "reward": REENTRANT, "ppo": {}}


@pytest.mark.parametrize("phase", LORA)
def test_adapters(lab: Lab, phase: str) -> None:
    """The policy's own base is its reference; layers are computed again by the other kind of checkpointing too."""
    changes = {"use_peft": True, **LORA[phase]}
    ours, theirs = (run(lab, phase, mode, **changes) for mode in ("shared", "plain"))
    assert_went(ours, "shared")
    assert_went(theirs, "plain")
    assert_same(lab, phase, ours, theirs)


# --- auto goes on plain where it must ---------------------------------------------------------------------

HARM = {"forget_prefixes": "shared differs from plain by up to", "drop_segments": "does not hand its arguments on"}


@pytest.mark.parametrize(
    ("phase", "harm"),
    [("dpo", "forget_prefixes"), ("ppo", "forget_prefixes"), ("kto", "drop_segments"), ("reward", "drop_segments")],
)
def test_a_policy_that_cannot_be_walked_goes_on_plain(lab: Lab, phase: str, harm: str) -> None:
    """One line, a note in the manifest, and the losses of a run that was plain from the beginning.

    A wrong answer as well as an error in the middle of a forward, with parameters gathered; also where something
    is computed before the first step: KTO's baseline, PPO's completions.
    """
    done, plain = run(lab, phase, "auto", harm), run(lab, phase, "plain")
    lines = [line for line in done.result.text.splitlines() if "going on plain" in line]
    assert len(lines) == 1 and HARM[harm] in lines[0] and lines[0].startswith("warning: forward")
    assert done.manifest["forward"]["mode"] == "plain" and HARM[harm] in done.manifest["forward"]["why"]
    assert_went(done, "plain", "policy")
    assert_same(lab, phase, done, plain)


@pytest.mark.parametrize("harm", HARM)
def test_a_way_asked_for_by_name_that_is_wrong_is_a_mistake(lab: Lab, tmp_path: Path, harm: str) -> None:
    tried = lab.start("dpo", tmp_path / "run", harm=harm, forward="shared", **options(lab, "dpo"))
    assert "is not right for this model" in tried.result.error() and HARM[harm] in tried.result.error()


def test_a_run_that_goes_on_computes_as_it_did(lab: Lab, tmp_path: Path) -> None:
    """It fell back before its checkpoint; afterwards nothing is tried again, though it now would succeed."""
    changes = {"save_strategy": "steps", "save_steps": 1}
    done = run(lab, "dpo", "auto", "drop_segments", **changes)
    again = lab.start(
        "dpo", interrupted(done, tmp_path / "again"), harm="keep_doors", forward="auto", resume="auto",
        **options(lab, "dpo", **changes),
    )  # fmt: skip
    again.result.ok()
    assert_went(again, "plain", "policy")
    assert again.manifest["forward"] == done.manifest["forward"] and "going on plain" not in again.result.text
    assert again.losses[-1] == done.losses[-1]
    assert all((again.weights[name] == tensor).all() for name, tensor in done.weights.items())


def interrupted(done: Run, copy: Path) -> Path:
    """Copy a run as it stood right after its first checkpoint."""
    shutil.copytree(done.folder, copy, ignore=shutil.ignore_patterns("checkpoint-2", "*.safetensors"))
    shutil.copytree(done.folder / "checkpoint-1", copy / "checkpoint-1", dirs_exist_ok=True)
    manifest = json.loads((copy / "manifest.json").read_text())
    for name in ("finished", "result", "steps", "seconds"):
        manifest.pop(name)
    (copy / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    return copy


# --- dropout ----------------------------------------------------------------------------------------------

DROPOUT = {"use_peft": True, "lora_dropout": 0.1}


def test_dropout_packs_without_sharing(lab: Lab) -> None:
    done = run(lab, "sft", "auto", **DROPOUT)
    assert_went(done, "packed")
    assert "dropout 0.1" in done.manifest["forward"]["why"]
    assert "forward    packed: no padding, nothing shared: dropout 0.1" in done.result.text


def test_sharing_by_name_with_dropout_is_a_mistake(lab: Lab, tmp_path: Path) -> None:
    tried = lab.start("sft", tmp_path / "run", harm="keep_doors", forward="shared", **options(lab, "sft", **DROPOUT))
    assert "dropout 0.1" in tried.result.error() and "use auto" in tried.result.error()

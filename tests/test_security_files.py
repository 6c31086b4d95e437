"""Real runs on two ranks: harm in a checkpoint or a model is refused unrun, secrets are in no file, folders private."""

from __future__ import annotations

import argparse
import json
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from align_kit.checkpoint import manifest, trusted
from tests.harmful import FORMATS, Opens, Runs, in_shard, with_code
from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, write_rows

pytestmark = pytest.mark.slow

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The file that harm would create; it is not there at the end."""
    yield tmp_path / "harmed"
    assert not (tmp_path / "harmed").exists(), "code was run"


# --- checkpoints ------------------------------------------------------------------------------------------

MADE: list[tuple[str, dict[str, Any]]] = [
    ("sft", {}),
    ("dpo", {"bf16": True}),
    ("dpo", {"deepspeed": "zero2"}),
    ("kto", {"use_peft": True}),
    ("ppo", {}),
]


@pytest.mark.parametrize("phase, options", MADE)
def test_our_own_checkpoints_are_data(lab: Lab, phase: str, options: dict[str, Any]) -> None:
    """What every phase, precision and ZeRO stage writes is loaded without trust."""
    checkpoint = lab.train(phase, **SAVING, **options).folder / "checkpoint-1"
    pickled = [file for file in checkpoint.rglob("*") if file.suffix in trusted.PICKLES]
    assert len(pickled) >= 6 and "training_args.bin" not in {file.name for file in pickled}
    trusted.vet(checkpoint)
    assert all(trusted.load(file, map_location="cpu") for file in pickled if "_states" in file.name)


HARMED = {
    "an optimizer shard": ("global_step1/zero_pp_rank_1_mp_rank_00_optim_states.pt", "zip"),
    "an old optimizer shard": ("global_step1/zero_pp_rank_1_mp_rank_00_optim_states.pt", "legacy"),
    "a model shard": ("global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt", "zip"),
    "a generator's state": ("rng_state_1.pth", "zip"),
    "the schedule": ("scheduler.pt", "zip"),
    "arguments": ("training_args.bin", "zip"),
    "an adapter": ("adapter_model.bin", "legacy"),
}


def copied(run: Run, place: Path, change: Callable[[Path], None]) -> Path:
    """Return a copy of a run whose checkpoint was changed and sealed again, as whoever may write there can do."""
    shutil.copytree(run.folder, place)
    checkpoint = place / "checkpoint-1"
    facts = manifest.read(checkpoint)
    assert facts is not None
    change(checkpoint)
    manifest.seal(checkpoint, {name: fact for name, fact in facts.items() if name not in ("files", "format", "sum")})
    assert not manifest.problems(checkpoint)
    return place


def go_on(lab: Lab, place: Path, **options: Any) -> Run:
    """Go on with the run in `place` for a second step."""
    return lab.start("sft", place, resume="auto", allow_change="max_steps", **{**SAVING, "max_steps": 2}, **options)


@pytest.mark.parametrize("what", HARMED)
def test_a_harmful_checkpoint_is_refused_unrun(what: str, lab: Lab, tmp_path: Path, mark: Path) -> None:
    name, form = HARMED[what]
    place = copied(
        lab.train("sft", **SAVING), tmp_path / "run", lambda it: in_shard(it / name, Runs(mark), FORMATS[form])
    )
    said = go_on(lab, place).result.error()
    assert f"checkpoint-1/{name} asks for posix.system" in said and "--trust_checkpoint" in said


def test_each_rank_refuses_by_itself(lab: Lab, tmp_path: Path, mark: Path) -> None:
    """Where a file changes after it was vetted, the loading of the engine refuses it."""
    place = shutil.copytree(lab.train("sft", **SAVING).folder, tmp_path / "run")
    said = go_on(lab, place, harm="tests.harmful:change_after_vetting").result.error()
    assert f"{HARMED['an optimizer shard'][0]} asks for posix.system" in said


def test_a_checkpoint_that_is_trusted_is_loaded(lab: Lab, tmp_path: Path) -> None:
    """A class of someone's own goes through where it is asked for, and so would harm: the flag means what it says."""
    name = HARMED["an optimizer shard"][0]
    run = lab.train("sft", **SAVING)
    own = argparse.Namespace(depth=3)
    place = copied(run, tmp_path / "own", lambda it: in_shard(it / name, own, FORMATS["zip"]))
    assert f"{name} asks for argparse.Namespace" in go_on(lab, place).result.error()
    go_on(lab, place, trust_checkpoint=True).result.ok()
    mark = tmp_path / "harmed"
    place = copied(run, tmp_path / "harm", lambda it: in_shard(it / name, Opens(mark), FORMATS["zip"]))
    go_on(lab, place, trust_checkpoint=True).result.ok()
    assert mark.exists()


# --- models -----------------------------------------------------------------------------------------------


def pickled(model: Path, place: Path, mark: Path) -> Path:
    """Return a copy of a model whose weights are a harmful pickle."""
    shutil.copytree(model, place)
    (place / "model.safetensors").unlink()
    FORMATS["zip"](Runs(mark), place / "pytorch_model.bin")
    return place


@pytest.mark.parametrize(
    "phase, option",
    [
        ("sft", "model_name_or_path"),
        ("dpo", "reference_model_name_or_path"),
        ("ppo", "reward_model_name_or_path"),
        ("ppo", "value_model_name_or_path"),
    ],
)
def test_pickled_weights_are_refused_in_every_role(
    phase: str, option: str, lab: Lab, tmp_path: Path, mark: Path
) -> None:
    model = pickled(lab.scorer if "reward" in option else lab.model, tmp_path / "model", mark)
    named: Any = [str(model)] if "reward" in option else model
    more = (
        {"reward_funcs": None} if "reward" in option else {"reference_differs": True} if "reference" in option else {}
    )
    said = lab.start(phase, tmp_path / "run", 1, **{option: named}, **more).result.error()
    assert f"{option} '{model}' holds *.bin (pickled) weights only; convert them to safetensors" in said


def test_code_beside_a_model_is_not_run(lab: Lab, tmp_path: Path, mark: Path) -> None:
    model = with_code(shutil.copytree(lab.model, tmp_path / "model"), mark, kind="my_llama")
    said = lab.start("sft", tmp_path / "run", 1, model_name_or_path=model).result.error()
    assert "it comes with code of its own; read that, then give --trust_remote_code true" in said


@pytest.mark.parametrize("where", ["the model's own", "chat_template_path"])
def test_a_template_that_leaves_its_sandbox_ends_in_one_line(where: str, lab: Lab, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = write_rows(tmp_path / "chats.jsonl", [{"messages": turns}] * 4)
    given: dict[str, Any] = {"datasets": [{"path": str(data)}]}
    if where == "chat_template_path":
        given["chat_template_path"] = template
    else:
        given["model_name_or_path"] = shutil.copytree(lab.model, tmp_path / "model")
        shutil.copy(template, tmp_path / "model" / "chat_template.jinja")
    said = lab.start("sft", tmp_path / "run", 1, **given).result.error()
    assert "the chat template refuses a conversation with the roles user, assistant: access to attribute" in said


# --- secrets and folders ----------------------------------------------------------------------------------

PLANTED = {
    "HF_TOKEN": "hf_" + "Zq7" * 11,
    "WANDB_API_KEY": "1f" * 20,
    "DB_PASSWORD": "correct-horse-battery",
    "url": "url-pass-word",
    "engine": "comet-key-0123456789",
    "yaml": "ghp_" + "Ab9" * 12,
}


@pytest.fixture(scope="module")
def told(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a run wrote, checkpoints, cache, tracker and second place, that was told secrets."""
    home = tmp_path_factory.mktemp("told")
    engine = json.loads(lab.sharded.read_text())
    engine["comet"] = {"enabled": False, "api_key": PLANTED["engine"]}
    (home / "engine.json").write_text(json.dumps(engine))
    url = f"https://me:{PLANTED['url']}@host/x"
    (home / "own.yaml").write_text(
        f"env: {{MY_TOKEN: {PLANTED['yaml']}, MIRROR: '{url}'}}\n"
        f"run_name: {PLANTED['HF_TOKEN']} and {PLANTED['WANDB_API_KEY']} at {url}\n"
    )
    new = home / "new"
    secret = {name: PLANTED[name] for name in ("HF_TOKEN", "WANDB_API_KEY", "DB_PASSWORD")}
    tracker = {"WANDB_MODE": "offline", "WANDB_DIR": str(new), "WANDB_SILENT": "true"}
    env = {**secret, **tracker, "ALIGN_KIT_CACHE": str(new / "cache")}
    options: dict[str, Any] = {**SAVING, "config": home / "own.yaml", "deepspeed": home / "engine.json"}
    more = {"reference_placement": "cached", "report_to": "wandb", "save_copy_to": new / "copy"}
    finish = "tests.harmful:finish_tracking"
    lab.start("dpo", new / "runs" / "dpo", env=env, harm=finish, **options, **more).result.ok()
    data = {"datasets": [{"path": url}]}
    assert "error: " in lab.start("sft", new / "runs" / "sft", env=env, **options, **data).result.text
    return new


def test_secrets_are_in_no_file(told: Path) -> None:
    files = [file for file in told.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    shard = "zero_pp_rank_0_mp_rank_00_model_states.pt"
    assert {"manifest.json", "key.json", "rows.arrow", "trainer_state.json", shard} <= names
    assert any(b"learning_rate" in file.read_bytes() for file in files if file.suffix == ".wandb")
    held = {file: file.read_bytes() for file in files}
    assert [(file.name, kind) for file in files for kind, it in PLANTED.items() if it.encode() in held[file]] == []


def test_what_is_no_secret_is_in_the_manifest(told: Path) -> None:
    config = json.loads((told / "runs" / "dpo" / "manifest.json").read_text())["config"]
    assert config["run_name"] == "<hidden> and <hidden> at https://<hidden>@host/x"
    assert config["env"] == {"MY_TOKEN": "<hidden>", "MIRROR": "https://<hidden>@host/x"}


def test_folders_that_a_run_makes_are_private(told: Path) -> None:
    """Nobody else can enter what it made: the run's folder, the cache, the second place."""
    for name in ("runs", "runs/dpo", "cache", "cache/reference", "copy"):
        assert stat.S_IMODE((told / name).stat().st_mode) == 0o700, name

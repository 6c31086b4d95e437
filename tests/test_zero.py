"""DeepSpeed configurations: every shipped one parses and trains, every wrong one costs a line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from align_kit import zero
from align_kit.errors import UserError
from align_kit.resources import folder
from align_kit.zero import Launch
from tests.harness import Ranks
from tests.little import little_run

SHIPPED = zero.known_configs()


def zero3(**changes: Any) -> dict[str, Any]:
    """Return the shipped ZeRO-3 configuration with top-level `changes`."""
    return {**zero.load("zero3"), **changes}


# --- keys -------------------------------------------------------------------------------------------------


def test_what_is_shipped() -> None:
    assert SHIPPED == ["zero2", "zero3", "zero3_nvme", "zero3_offload", "zero3_offload_optimizer"]


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_reads_every_key_of_a_shipped_config(name: str) -> None:
    config = zero.load(name)
    assert config["zero_optimization"]["stage"] == int(name[4])
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[key] == "auto", "the run derives batch sizes"
    assert config["bf16"] == config["fp16"] == {"enabled": "auto"}, "the hardware decides precision"


def test_a_config_can_be_a_name_a_path_or_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(zero3()))
    forms: list[Any] = ["zero3", "zero3.json", "ds_configs/zero3.json", str(tmp_path / "mine.json"), zero3()]
    assert all(zero.load(form) == zero3() for form in forms)


def test_variables_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGN_KIT_NVME", raising=False)
    assert zero.load("zero3_nvme")["zero_optimization"]["offload_param"]["nvme_path"] == "/local_nvme"
    monkeypatch.setenv("ALIGN_KIT_NVME", "/fast")
    assert zero.load("zero3_nvme")["zero_optimization"]["offload_param"]["nvme_path"] == "/fast"


BAD = [
    ("zero33", r"unknown ds_config 'zero33'; known: zero2, zero3, .*\(did you mean 'zero3"),
    ({"train_batch_sze": 4}, r"key in `deepspeed:` 'train_batch_sze'.*did you mean 'train_batch_size'"),
    ({"zero_optimisation": {"stage": 3}}, r"'zero_optimisation'.*did you mean 'zero_optimization'"),
    ({"gradient_cliping": 1.0}, r"'gradient_cliping'.*did you mean 'gradient_clipping'"),
    ({"aio": {"block_sze": 1}}, r"'aio.block_sze'.*did you mean 'aio.block_size'"),
    ({"optimizer": {"type": "AdamW", "parms": {}}}, r"unknown DeepSpeed key .*'optimizer.parms'"),
    ({"zero_optimization.stage": 3}, r"dotted keys such as 'zero_optimization.stage'; nest it"),
    ({"zero_optimization": {"stage": 3, "stage3_prefetch_size": 1}}, r"refuses `deepspeed:`: stage3_prefetch_size"),
    ({"zero_optimization": {"stage": 7}}, r"refuses `deepspeed:`: stage: .*\(saw 7\)"),
    ({"bf16": {"enable": True}}, r"refuses `deepspeed:`: enable"),
    ({"flops_profiler": {"enabled": True, "profile_stp": 3}}, r"did you mean 'flops_profiler.profile_step'"),
]


@pytest.mark.parametrize(("config", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_config_costs_one_line(config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        zero.load(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot read the DeepSpeed"), ("[]", "holds a JSON list")])
def test_a_broken_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        zero.load(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value)


def test_load_does_not_touch_what_it_is_given() -> None:
    given = zero3(optimizer={"type": "AdamW", "params": {"lr": "auto", "anything": 1}})
    before = copy.deepcopy(given)
    loaded = zero.load(given)
    assert given == before == loaded and loaded["optimizer"] is not given["optimizer"]


# --- who wins ---------------------------------------------------------------------------------------------


def launch_env(**entries: str) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", **{f"ACCELERATE_{name.upper()}": v for name, v in entries.items()}}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, Launch()),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, Launch()),
        (launch_env(deepspeed_zero_stage="3", mixed_precision="bf16"), Launch(3, None, "bf16")),
        (launch_env(deepspeed_zero_stage="None", deepspeed_config_file="z.json"), Launch(None, "z.json")),
    ],
)
def test_reading_a_launch_file(environ: dict[str, str], launch: Launch) -> None:
    assert zero.read_launch(environ) == launch


CHOICES = [
    (None, Launch(), "zero3"),
    ("zero2", Launch(), "zero2"),
    ("zero2", Launch(stage=2), "zero2"),
    ("zero3", Launch(stage=2, config_file="zero3"), "zero3"),  # accelerate ignores the stage beside a file
    (None, Launch(config_file="zero2"), "zero2 (from the launch file)"),
]


@pytest.mark.parametrize(("given", "launch", "label"), CHOICES)
def test_who_wins(given: str | None, launch: Launch, label: str) -> None:
    config, said = zero.choose(given, launch)
    assert said == label and config == zero.load(label.split()[0])


def test_a_launch_files_engine_is_used_where_the_run_says_nothing() -> None:
    assert zero.choose(None, Launch(stage=2))[0]["zero_optimization"]["stage"] == 2
    assert zero.choose(None, Launch(stage=3)) == (zero.load("zero3"), "stage 3, from the launch file")
    asked = Launch(stage=3, offload=(("offload_optimizer", "cpu"), ("offload_param", "cpu")))
    config, _ = zero.choose(None, asked)
    assert config == zero.load("zero3_offload")


def test_a_zero3_engine_can_always_store_its_weights() -> None:
    key = "stage3_gather_16bit_weights_on_model_save"
    config, _ = zero.choose({"zero_optimization": {"stage": 3}}, Launch())
    assert config["zero_optimization"][key] is True
    with pytest.raises(UserError, match=f"{key} is false, but the final model is stored whole"):
        zero.choose({"zero_optimization": {"stage": 3, key: False}}, Launch())


def test_a_launch_file_for_fsdp_is_refused() -> None:
    with pytest.raises(UserError, match="asks for FSDP"):
        zero.read_launch({"ACCELERATE_USE_FSDP": "true"})


DISAGREEMENTS = [
    ("zero3", Launch(stage=2), r"launch file asks for ZeRO stage 2 .*\(zero3\) for stage 3; .*`--deepspeed zero2`"),
    ("zero2", Launch(stage=3), r"stage 3 .*\(zero2\) for stage 2"),
    ("zero3", Launch(stage=3, offload=(("offload_param", "cpu"),)), r"offload_param on cpu .*does not"),
    ("zero3", Launch(config_file="zero2"), r"names .*zero2 .*`deepspeed:` names zero3, which differs; drop one"),
]


@pytest.mark.parametrize(("given", "launch", "message"), DISAGREEMENTS)
def test_a_disagreement_is_refused(given: str | None, launch: Launch, message: str) -> None:
    with pytest.raises(UserError, match=message):
        zero.choose(given, launch)


@pytest.mark.parametrize(("asked", "precision"), [(None, "fp32"), ("no", "bf16"), ("bf16", "bf16")])
def test_precision_agrees_with_the_launch_file(asked: str | None, precision: str) -> None:
    zero.check_precision(precision, Launch(mixed_precision=asked))


@pytest.mark.parametrize(("asked", "precision"), [("bf16", "fp32"), ("fp16", "bf16")])
def test_precision_against_the_launch_file_is_refused(asked: str, precision: str) -> None:
    with pytest.raises(UserError, match=f"mixed_precision {asked} and this run trains in {precision}"):
        zero.check_precision(precision, Launch(mixed_precision=asked))


def test_the_launch_file_is_forgotten_once_read() -> None:
    environ = {**launch_env(deepspeed_zero_stage="3"), "ACCELERATE_CONFIG_DS_FIELDS": "x", "RANK": "0"}
    zero.forget_launch(environ)
    assert environ == {"RANK": "0"}


# --- frozen models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_the_config_of_a_frozen_model(name: str) -> None:
    policy = zero3() if name == "zero3" else zero.load(name)
    policy |= {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}, "gradient_clipping": 1.0}
    before = copy.deepcopy(policy)
    frozen = zero.frozen_config(policy, 64)
    assert policy == before, "a pure function"
    assert not set(frozen) & {"optimizer", "scheduler", "gradient_clipping"}
    assert "offload_optimizer" not in frozen["zero_optimization"] and '"auto"' not in json.dumps(frozen)
    frozen["zero_optimization"]["stage"] = 99
    assert policy == before, "nothing is shared"
    zero.load({**frozen, "zero_optimization": {**frozen["zero_optimization"], "stage": 0}})


def test_a_frozen_model_under_zero3_is_sharded_with_the_sizes_of_the_policy() -> None:
    for hidden_size in (64, 8192):
        policy = zero3()
        zero.fill_sizes(policy, hidden_size)
        frozen = zero.frozen_config(zero3(), hidden_size)
        assert frozen["zero_optimization"] == policy["zero_optimization"]
        assert frozen["zero_optimization"].items() >= {"stage": 3, **zero.sizes(hidden_size)}.items()
    assert zero.sizes(8192)["reduce_bucket_size"] == 8192**2 > zero.sizes(64)["reduce_bucket_size"] > 64**2
    kept = zero3(zero_optimization={"stage": 3, "reduce_bucket_size": 7})
    assert zero.frozen_config(kept, 64)["zero_optimization"]["reduce_bucket_size"] == 7


def test_below_stage_3_a_frozen_model_is_not_sharded() -> None:
    assert zero.frozen_config(zero.load("zero2"), 64)["zero_optimization"] == {"stage": 0}


def test_offloaded_parameters_of_a_frozen_model() -> None:
    nvme = zero.frozen_config(zero.load("zero3_nvme"), 64)
    assert nvme["zero_optimization"]["offload_param"]["device"] == "nvme" and nvme["aio"]["queue_depth"] == 16
    assert "aio" not in zero.frozen_config(zero3(aio={"queue_depth": 8}), 64)


@pytest.mark.parametrize(("name", "device"), [("zero3", "cpu"), ("zero3_offload", "cpu"), ("zero3_nvme", "nvme")])
def test_a_frozen_model_is_offloaded_where_the_policy_is_not_yet(name: str, device: str) -> None:
    config = zero.frozen_config(zero.load(name), 64, offload=True)
    assert config["zero_optimization"]["offload_param"]["device"] == device
    assert "offload_param" not in zero.frozen_config(zero.load("zero3"), 64)["zero_optimization"]


# --- what must be compiled --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "operators"), [
    ("zero2", []), ("zero3", []), ("zero3_offload", []), ("zero3_nvme", ["cpu_adam", "async_io"]),
])  # fmt: skip
def test_what_a_config_compiles(name: str, operators: list[str]) -> None:
    assert zero.needs_build(zero.load(name)) == operators


def test_offload_by_deepspeeds_own_optimizer_compiles_it() -> None:
    config = zero.load("zero3_offload")
    assert zero.needs_build({**config, "zero_force_ds_cpu_optimizer": True}) == ["cpu_adam"]
    del config["zero_force_ds_cpu_optimizer"]
    assert zero.needs_build(config) == ["cpu_adam"]


def test_an_nvme_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALIGN_KIT_NVME", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="mine offloads to .*below, which cannot be written; let ALIGN_KIT_NVME"):
        zero.check_buildable(zero.load("zero3_nvme"), "mine")


@pytest.mark.slow
def test_nvme_without_libaio_is_said_before_the_model_loads(ranks: Ranks, tmp_path: Path) -> None:
    if zero._has_async_io():
        pytest.skip("libaio is here: async_io can be built")
    words = little_run("dpo", tmp_path, "--deepspeed", "zero3_nvme")
    done = ranks.run(*words, cwd=tmp_path, env={"ALIGN_KIT_NVME": str(tmp_path)})
    assert "libaio or its headers are missing" in done.error() and done.text.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- they train -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "zero3_nvme"])
def test_a_shipped_config_trains_on_two_ranks(name: str, ranks: Ranks, tmp_path: Path) -> None:
    done = ranks.run(*little_run("dpo", tmp_path, "--deepspeed", name), cwd=tmp_path).ok()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["steps"] == 2
    assert manifest["engine"]["zero_optimization"]["stage"] == zero.load(name)["zero_optimization"]["stage"]
    assert f"ZeRO-{name[4]} ({name})" in done.text
    assert not list((ranks.home / "extensions").glob("*")), "no shipped configuration compiles anything on a CPU"


@pytest.mark.parametrize("path", sorted(folder("ds_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_a_launch_file(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    launch = load_config_from_file(str(path))
    assert launch.deepspeed_config["zero_stage"] == 3 and launch.num_processes >= 2

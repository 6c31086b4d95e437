"""Configuration: what a command line and YAML files resolve to, and what each mistake says."""

from __future__ import annotations

import json
import pickle
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_kit import registry, resources
from align_kit.config import Config, DatasetFields, derive, dry_run_text, load
from align_kit.errors import UserError

CLASSES = {
    "pretrain": "trl:SFTConfig",
    "sft": "trl:SFTConfig",
    "dpo": "trl:DPOConfig",
    "kto": "trl:KTOConfig",
    "reward": "trl:RewardConfig",
    "ppo": "align_kit.trainers.arguments:PPOConfig",
}


def loaded(phase: str, words: str = "", *, defaults: Path | None = None) -> Config:
    """Load a phase's configuration from a command line written as in a shell."""
    return load(SimpleNamespace(name=phase, config=CLASSES[phase]), shlex.split(words), defaults=defaults)


def refusal(phase: str, words: str) -> str:
    """Return the one line that a command line is refused with."""
    with pytest.raises(UserError) as caught:
        loaded(phase, words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def yaml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a YAML file into the working directory and return its name, as a message names it."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "a.yaml") -> str:
        (tmp_path / name).write_text(text)
        return name

    return write


# What is written, the key it sets, what it becomes.
VALUES = [
    ("dpo", "--learning_rate 5e-7", "learning_rate", 5e-7),
    ("dpo", "--beta=0.2", "beta", 0.2),
    ("dpo", "--use_peft", "use_peft", True),
    ("dpo", "--use-peft", "use_peft", True),
    ("dpo", "--bf16 false", "bf16", False),
    ("dpo", "--no_gradient_checkpointing", "gradient_checkpointing", False),
    ("dpo", "--no-disable-dropout", "disable_dropout", False),
    ("dpo", "--max_length null", "max_length", None),
    ("dpo", "--max_steps 1e3", "max_steps", 1000),
    ("dpo", "--max_steps -1", "max_steps", -1),
    ("dpo", "--loss_type sigmoid sft --loss_weights 1 0.2", "loss_weights", [1, 0.2]),
    ("dpo", "--loss_type '[\"ipo\"]'", "loss_type", ["ipo"]),
    ("dpo", "--loss_type ipo", "loss_type", ["ipo"]),
    ("dpo", "--lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}'", "lr_scheduler_kwargs", {"min_lr_rate": 0.1}),
    ("dpo", "--report_to none", "report_to", "none"),
    ("dpo", "--report_to wandb tensorboard", "report_to", ["wandb", "tensorboard"]),
    ("dpo", "--eval_strategy no", "eval_strategy", "no"),
    ("dpo", "--deepspeed zero3", "deepspeed", "zero3"),
    ("dpo", "--resume", "resume", "auto"),
    ("dpo", "--resume runs/dpo/checkpoint-5", "resume", "runs/dpo/checkpoint-5"),
    ("dpo", "--resume false", "resume", None),
    ("dpo", "--resume_from_checkpoint true", "resume", "auto"),
    ("dpo", "--resume_from_checkpoint runs/x", "resume", "runs/x"),
    ("dpo", "--local_rank=0 --seed 1 --local-rank 1", "seed", 1),
    ("dpo", "--seed 1 --seed 2", "seed", 2),
    ("dpo", "--lora_target_modules all-linear --use_peft", "lora_target_modules", "all-linear"),
    ("dpo", "--lora_target_modules q_proj v_proj --use_peft", "lora_target_modules", ["q_proj", "v_proj"]),
    ("dpo", "--config_name builtin:tiny --config_overrides a=8,b=2e-1", "config_overrides", {"a": 8, "b": 0.2}),
    ("dpo", '--datasets \'[{"path": "x", "weight": "0.5"}]\'', "datasets", [DatasetFields("x", weight=0.5)]),
    ("dpo", "--datasets a.jsonl b.jsonl", "datasets", [DatasetFields("a.jsonl"), DatasetFields("b.jsonl")]),
    ("dpo", "--dataset_name h --dataset_config c", "datasets", [DatasetFields("h", "c", split="train")]),
    ("dpo", "--dataset_name h", "eval_datasets", []),
    ("dpo", "--dataset_name h --eval_strategy epoch", "eval_datasets", [DatasetFields("h", split="test")]),
    ("dpo", "--dataset_name h --eval_strategy epoch --test_split_size 9", "eval_datasets", []),
    ("dpo", "--early_stopping_patience 2 --eval_strategy epoch", "metric_for_best_model", "loss"),
    ("dpo", "", "report_to", "none"),
    ("dpo", "", "remove_unused_columns", False),
    ("dpo", "--disable_tqdm false", "disable_tqdm", True),
    ("sft", "--loss_type chunked_nll", "loss_type", "nll"),
    (
        "sft",
        "--push_to_hub false --packing false --hub_strategy every_save --pad_to_multiple_of auto",
        "packing",
        False,
    ),
    ("pretrain", "--packing true --packing_strategy wrapped", "packing", False),  # packed always, by us
    ("reward", "--use_peft --lora_task_type SEQ_CLS", "lora_task_type", "SEQ_CLS"),
]


@pytest.mark.parametrize(("phase", "words", "key", "expected"), VALUES)
def test_a_command_line_resolves(phase: str, words: str, key: str, expected: Any) -> None:
    value = loaded(phase, words).value(key)
    assert value == expected
    assert type(value) is type(expected)


# What is written, and what the one line about it holds, in this order.
REFUSALS = [
    ("dpo", "--learning_rat 3", "learning_rat (command line) is an unknown key (did you mean 'learning_rate'"),
    ("dpo", "--placement x", "did you mean 'reference_placement'"),
    ("dpo", "--xyzzy 1", "xyzzy (command line) is an unknown key; --help lists every key"),
    ("sft", "--beta 0.1", "beta (command line) is not a key of sft; it belongs to dpo, kto"),
    ("dpo", "--packing", "packing (command line) is not a key of dpo; it belongs to pretrain, sft"),
    ("dpo", "--max_prompt_length 9", "max_prompt_length (command line) is not a key here; instead: max_length"),
    ("dpo", "--no_cuda", "no_cuda (command line) is not a key here; instead: use_cpu"),
    ("dpo", "--rpo_alpha 1", "instead: loss_type: [sigmoid, sft] with loss_weights: [1.0, <alpha>]"),
    (
        "dpo",
        "--hub_token abc",
        "hub_token (command line) is '<hidden>', which is refused",
        "instead: set HF_TOKEN in the environment",
    ),
    ("dpo", "--fsdp full_shard", "instead: deepspeed: zero3"),
    ("sft", "--packing", "packing (command line) is true, which is refused", "pretrain packs text"),
    ("dpo", "--train_sampling_strategy group_by_length", "allowed: random, sequential"),
    ("dpo", "--learning_rate fast", "learning_rate (command line) is 'fast'; expected a number"),
    ("dpo", "--learning_rate nan", "expected a finite number"),
    ("dpo", "--max_steps 1.5", "max_steps (command line) is '1.5'; expected a whole number"),
    ("dpo", "--bf16 maybe", "bf16 (command line) is 'maybe'; expected true or false"),
    ("dpo", "--dtype fp32", "allowed: auto, bfloat16, float16, float32 (did you mean 'float32'?)"),
    ("dpo", "--lr_scheduler_type cosin", "(did you mean 'cosine'?)"),
    ("dpo", "--optim adamw_torch_fusd", "(did you mean 'adamw_torch_fused'?)"),
    ("dpo", "--loss_weights 1 x", "loss_weights (command line) [1] is 'x'; expected a number"),
    ("dpo", "--lr_scheduler_kwargs '{a: 1}'", "not valid JSON", "use double quotes inside"),
    ("dpo", '--datasets \'[{"path": "a", "wieght": 3}]\'', "[0] has an unknown key 'wieght'", "did you mean 'weight'"),
    ("dpo", "--datasets '[{\"weight\": 3}]'", "[0] is {'weight': 3}; it needs 'path'"),
    ("dpo", '--datasets \'[{"path": "a", "format": "csv"}]\'', "[0].format is 'csv'; allowed: text,"),
    ("dpo", '--datasets \'[{"path": "a", "weight": 0}]\'', "datasets[0].weight is 0; expected above 0"),
    ("dpo", '--datasets \'[{"path": "a", "fraction": 0.5}, "b"]\'', "fraction must be given to all entries"),
    ("dpo", "stray", "unexpected word 'stray'"),
    ("dpo", "--beta 0.1 0.2", "--beta takes one value, not 2: 0.1 0.2"),
    ("dpo", "--beta", "--beta needs a value"),
    ("dpo", "--config", "--config needs at least one YAML file"),
    ("dpo", "--config_name builtin:tiny --config_overrides a", "config_overrides is 'a'; expected k=v,k=v"),
    # numbers that cannot be
    ("dpo", "--beta 0", "beta (command line) is 0; expected above 0"),
    ("dpo", "--label_smoothing 0.5", "expected 0 or more, under 0.5"),
    ("dpo", "--max_length 1", "max_length (command line) is 1; expected 2 or more"),
    ("dpo", "--per_device_train_batch_size 0", "expected 1 or more"),
    # contradictions
    ("dpo", "--dataset_name a --datasets b", "dataset_name (command line) and datasets (command line) were both given"),
    ("dpo", "--resume --overwrite", "resume (command line) and overwrite (command line) were both given"),
    ("dpo", "--resume_from_checkpoint x --overwrite", "resume_from_checkpoint (command line) and overwrite"),
    ("dpo", "--global_batch_size 8 --gradient_accumulation_steps 2", "drop gradient_accumulation_steps"),
    ("dpo", "--config_name builtin:tiny --model_name_or_path x", "random weights from a configuration, or a model's"),
    ("dpo", "--fp16 --bf16", "fp16 (command line) and bf16 (command line) were both given; drop one"),
    ("dpo", "--bf16 --dtype float16", "bf16: true and dtype: float16 were both given"),
    ("dpo", "--lora_r 8", "lora_r given without use_peft"),
    ("dpo", "--use_peft --reference_model_name_or_path x", "use_peft and reference_model_name_or_path", "sharded"),
    ("dpo", "--precompute_ref_log_probs --reference_placement sharded", "means reference_placement: cached"),
    ("dpo", "--precompute_ref_batch_size 4", "nothing is computed before; add reference_placement: cached"),
    ("ppo", "--reference_placement cached", "and ppo writes its own"),
    ("ppo", "--save_strategy epoch", "ppo goes by iterations, not by epochs"),
    ("ppo", "--kl_horizon 100", "but kl_coef is fixed"),
    ("ppo", "--kl_target 6 --kl_coef 0", "kl_coef is 0"),
    ("ppo", "--reward_placement shared", "needs the policy's base unchanged"),
    ("ppo", "--value_model_name_or_path m --use_peft true", "the value function is an adapter then"),
    ("dpo", "--sync_ref_model --use_peft", "sync_ref_model moves whole weights, and use_peft trains an adapter"),
    ("dpo", "--sync_ref_model --precompute_ref_log_probs", "moves a sharded reference, and cached was given"),
    ("kto", "--ref_model_mixup_alpha 0.5", "ref_model_mixup_alpha (command line) was given without sync_ref_model"),
    ("kto", "--sync_ref_model --ref_model_mixup_alpha 1.5", "is 1.5; expected above 0, at most 1"),
    ("dpo", "--use_peft false --reference_placement adapter", "reference_placement: adapter needs an adapter"),
    ("sft", "--reference_model_name_or_path x", "but sft has no reference"),
    ("sft", "--use_peft --lora_task_type SEQ_CLS", "but sft trains CAUSAL_LM"),
    ("dpo", "--loss_weights 1 0.2", "loss_weights has 2 numbers for 1 losses (sigmoid)"),
    ("dpo", "--config_overrides a=1", "config_overrides was given without config_name"),
    ("dpo", "--early_stopping_patience 2", "early_stopping_patience=2 needs evaluation; set eval_strategy"),
    ("dpo", "--load_best_model_at_end", "load_best_model_at_end (command line) needs evaluation"),
    ("dpo", "--do_eval", "do_eval (command line) needs evaluation"),
    ("pretrain", "--packing false", "but pretrain always packs"),
    ("dpo", "--no_gradient_checkpointing --activation_checkpointing", "two names of one setting"),
    # several at once
    ("dpo", "--bata 1 --max_steps x", "2 mistakes: (1) bata", "(did you mean 'beta'", "(2) max_steps"),
    ("dpo", "--beta 0 --fp16 --bf16", "2 mistakes: (1) beta", "(2) fp16"),
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: f"{case[0]} {case[1]}")
def test_a_mistake_is_one_line_that_says_what_to_do(case: tuple[str, ...]) -> None:
    phase, words, *parts = case
    message = refusal(phase, words)
    position = 0
    for part in parts:
        assert message.find(part, position) >= 0, f"{part!r} is not in {message!r}"
        position = message.find(part, position)


# What a reference needs is not a contradiction when it was asked for.
def test_an_adapter_and_a_separate_reference_are_allowed_where_asked_for() -> None:
    config = loaded("dpo", "--use_peft --reference_model_name_or_path x --reference_placement sharded")
    assert config.run.reference_model_name_or_path == "x"


WEIGHED = "loss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.2]\n"


def test_weights_go_with_the_losses_they_were_given_for(yaml_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = f"--config {yaml_file(WEIGHED)}"
    config = loaded("dpo", f"{recipe} --loss_type ipo sft")
    assert config.value("loss_weights") is None and "loss_type (command line)" in config.origin["loss_weights"]
    assert "loss_weights follows from loss_type (command line), not as in a.yaml:2" in capsys.readouterr().err
    assert loaded("dpo", f"{recipe} {yaml_file('loss_type: hinge', 'b.yaml')}").value("loss_weights") is None
    capsys.readouterr()
    for same in ("--loss_type sigmoid sft", "--loss_weights 1.0 0.2", "--beta 0.3"):
        assert loaded("dpo", f"{recipe} {same}").value("loss_weights") == [1.0, 0.2]
    assert loaded("dpo", f"{recipe} --loss_type ipo --loss_weights 0.5").value("loss_weights") == [0.5]
    assert not capsys.readouterr().err


def test_losses_that_there_are_not_are_said_before_their_number() -> None:
    from align_kit.config.check import PAIR_LOSSES
    from align_kit.losses import DPO_LOSSES

    message = refusal("dpo", "--loss_type sigmoidd --loss_weights 1 2")
    first, _, second = message.partition("(2) ")
    assert "unknown loss_type 'sigmoidd'" in first and "did you mean 'sigmoid'?" in first
    assert "loss_weights has 2 numbers for 1 losses" in second and "loss_weights: command line" in second
    assert set(PAIR_LOSSES) == set(DPO_LOSSES)


def test_later_files_win_and_the_command_line_wins_over_them(yaml_file: Any) -> None:
    first = yaml_file("beta: 0.1\nseed: 1\nlearning_rate: 5e-7\ndatasets:\n  - path: a\n  - path: b\n")
    second = yaml_file("# later\nseed: 2\ndatasets: [{path: c}]\n", "b.yaml")
    config = loaded("dpo", f"--config {first} {second} --beta 0.3")
    assert (config.value("beta"), config.value("seed"), config.value("learning_rate")) == (0.3, 2, 5e-7)
    assert config.data.datasets == [DatasetFields("c")]
    assert config.origin["beta"] == "command line"
    assert config.origin["seed"] == "b.yaml:2"
    assert config.origin["learning_rate"] == "a.yaml:3"


def test_a_later_source_replaces_what_an_earlier_one_said_in_other_words(yaml_file: Any) -> None:
    recipe = yaml_file("config_name: builtin:tiny\ngradient_accumulation_steps: 4\ndatasets: [{path: a}]\nbf16: true\n")
    words = f"--config {recipe} --model_name_or_path m --global_batch_size 8 --dataset_name h --fp16"
    config = loaded("dpo", words)
    assert config.model.config_name is None
    assert config.value("gradient_accumulation_steps") == 1
    assert [entry.path for entry in config.data.datasets] == ["h"]
    assert (config.value("fp16"), config.value("bf16")) == (True, None)


def test_the_phase_file_is_read_where_no_config_is_named_and_only_there(yaml_file: Any) -> None:
    defaults, other = Path(yaml_file("seed: 5\nbeta: 0.5\n", "dpo.yaml")), yaml_file("seed: 6\n")
    assert loaded("dpo", defaults=defaults).value("beta") == 0.5
    config = loaded("dpo", f"--config {other}", defaults=defaults)
    assert (config.value("seed"), config.value("beta")) == (6, 0.1)


def test_a_bare_name_is_looked_up_among_the_packaged_recipes(
    yaml_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped" / "recipes"
    shipped.mkdir(parents=True)
    (shipped / "lora.yaml").write_text("use_peft: true\n")
    monkeypatch.setattr(resources, "PACKAGE", shipped.parent)
    for name in ("lora", "lora.yaml", "recipes/lora", "recipes/lora.yaml"):
        assert loaded("dpo", f"--config {name}").model.use_peft
    assert "did you mean 'recipes/lora.yaml'" in refusal("dpo", "--config recipes/lore.yaml")
    assert "shipped: recipes/lora.yaml" in refusal("dpo", "--config xyzzy")
    yaml_file("use_peft: false\n", "lora.yaml")
    assert not loaded("dpo", "--config lora.yaml").model.use_peft, "a file of one's own comes first"


# YAML text, and what the one line about it holds.
BAD_YAML = [
    ("beta: 0.1\nseed: 1\nbeta: 0.2\n", "a.yaml:3 sets 'beta' again (first in line 1); keep one"),
    ("datasets:\n  - path: a\n    path: b\n", "a.yaml:3 sets 'path' again"),
    ("- beta\n", "a.yaml holds no mapping at its top"),
    ("beta: [1\n", "a.yaml:2 is not valid YAML"),
    ("\tbeta: 1\n", "a.yaml:1 is not valid YAML"),
    ("x: !!python/object:os.system {}\n", "a.yaml:1 is not valid YAML"),
    ("# c\nrun_name: ${NOBODY_SETS_THIS}\n", "a.yaml:2 run_name: environment variable NOBODY_SETS_THIS is not set"),
    ("datasets:\n  - path: ${NOBODY_SETS_THIS}/x\n", "a.yaml:2 datasets[0].path: environment variable"),
    ("# c\n\nbata: 1\n", "bata (a.yaml:3) is an unknown key (did you mean 'beta'"),
    ("learning_rate: fast\n", "learning_rate (a.yaml:1) is 'fast'; expected a number"),
    ("use_peft: 3\n", "use_peft (a.yaml:1) is 3; expected true or false"),
    ("max_length: true\n", "max_length (a.yaml:1) is true; expected a whole number"),
    ("run_name: 2024-01-01\n", "run_name (a.yaml:1) is", "expected text"),
    ("env: 3\n", "a.yaml:1 env is 3; expected a mapping"),
]


@pytest.mark.parametrize(("text", "parts"), [(text, parts) for text, *parts in BAD_YAML])
def test_a_bad_yaml_is_named_with_file_and_line(yaml_file: Any, text: str, parts: list[str]) -> None:
    message = refusal("dpo", f"--config {yaml_file(text)}")
    assert all(part in message for part in parts), message


def test_an_unreadable_yaml_is_named(yaml_file: Any, tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9\n")
    assert refusal("dpo", "--config latin.yaml") == "cannot read latin.yaml: it is not UTF-8 text"
    (tmp_path / "folder.yaml").mkdir()
    assert "is a folder" in refusal("dpo", "--config folder.yaml")
    yaml_file("seed: 1\n", "mine.yaml")
    assert "did you mean 'mine.yaml'" in refusal("dpo", "--config mein.yaml")


def test_variables_are_filled_in_and_typed_again(yaml_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETA", "0.4")
    monkeypatch.setenv("EMPTY", "")
    name = yaml_file(
        "beta: ${BETA}\nseed: ${NOBODY_SETS_THIS:-7}\nrun_name: '${EMPTY:-x}-${BETA}'\n"
        "lr_scheduler_kwargs: {min_lr_rate: '${BETA}', num_cycles: 5e-1}\n"
    )
    config = loaded("dpo", f"--config {name}")
    assert (config.value("beta"), config.value("seed"), config.value("run_name")) == (0.4, 7, "x-0.4")
    assert config.value("lr_scheduler_kwargs") == {"min_lr_rate": "0.4", "num_cycles": 0.5}


def test_yaml_words_that_yaml_reads_as_something_else(yaml_file: Any) -> None:
    name = yaml_file("eval_strategy: no\nsave_strategy: no\nreport_to: null\nlearning_rate: 1e-6\nbase: &b {a: 1}\n")
    assert "base (a.yaml:5) is an unknown key" in refusal("dpo", f"--config {name}")
    name = yaml_file("eval_strategy: no\nsave_strategy: no\nreport_to: null\nlearning_rate: 1e-6\n")
    config = loaded("dpo", f"--config {name}")
    values = [config.value(key) for key in ("eval_strategy", "save_strategy", "report_to", "learning_rate")]
    assert values == ["no", "no", "none", 1e-6]


def test_env_is_set_and_secrets_stay_out_of_the_manifest(yaml_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for variable in ("AK_TEST_COLOUR", "AK_TEST_TOKEN"):
        monkeypatch.setenv(variable, "before")  # so that monkeypatch puts things back
    config = loaded("dpo", f"--config {yaml_file('env: {AK_TEST_COLOUR: 1, AK_TEST_TOKEN: s3cret}')}")
    assert os.environ["AK_TEST_COLOUR"] == "1"
    assert config.as_dict()["env"] == {"AK_TEST_COLOUR": "1", "AK_TEST_TOKEN": "<hidden>"}


# A recipe of the alignment handbook's kind: every key that does not carry over is named, all at once.
FOREIGN = """\
model_name_or_path: some/model
torch_dtype: bfloat16
trust_remote_code: true
dataset_mixer:
  some/data: 1.0
dataset_num_proc: 12
bf16: true
do_eval: false
evaluation_strategy: "no"
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: true}
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
loss_type: apo_zero
max_prompt_length: 512
overwrite_output_dir: true
padding_free: true
push_to_hub: true
report_to: [wandb]
save_steps: 0.5
use_liger_kernel: true
warmup_ratio: 0.1
"""


def test_every_key_of_a_foreign_yaml_that_does_not_carry_over_is_named_at_once(yaml_file: Any) -> None:
    message = refusal("dpo", f"--config {yaml_file(FOREIGN)}")
    named = {part.split(" (a.yaml")[0].split()[-1] for part in message.split("; (") if " (a.yaml" in part}
    assert named == {
        *("torch_dtype", "dataset_mixer", "evaluation_strategy", "max_prompt_length", "overwrite_output_dir"),
        *("padding_free", "push_to_hub", "use_liger_kernel", "warmup_ratio"),
    }


def test_a_trl_yaml_runs_as_it_is(yaml_file: Any) -> None:
    gone = (
        "torch_",
        "dataset_mixer",
        "  some",
        "evaluation_",
        "max_prompt",
        "overwrite_",
        "padding_",
        "push_",
        "use_l",
    )
    kept = [line for line in FOREIGN.splitlines() if not line.startswith((*gone, "warmup_ratio"))]
    text = "\n".join([*kept, "dataset_name: some/data", "warmup_steps: 0.1", "report_to: none"]).replace(
        "report_to: [wandb]\n", ""
    )
    arguments = loaded("dpo", f"--config {yaml_file(text)} --bf16 false").training_arguments()
    assert arguments.loss_type == ["apo_zero"]
    assert arguments.warmup_steps == 0.1
    assert arguments.activation_checkpointing_kwargs == {"use_reentrant": True}


@pytest.mark.parametrize("phase", CLASSES)
def test_training_arguments_are_built_for_this_machine_without_a_warning(phase: str, tmp_path: Path) -> None:
    import torch

    words = f"--output_dir {tmp_path} --learning_rate 5e-7"
    extra = {"pretrain": " --truncation_mode keep_end --pad_token x", "dpo": " --truncation_mode keep_end"}
    config = loaded(phase, words + extra.get(phase, ""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = config.training_arguments(gradient_accumulation_steps=3)
    assert (arguments.learning_rate, arguments.gradient_accumulation_steps) == (5e-7, 3)
    assert arguments.gradient_checkpointing is arguments.activation_checkpointing is True
    assert arguments.use_cpu is not torch.accelerator.is_available()
    assert not (arguments.use_cpu and arguments.bf16)
    assert arguments.report_to == []
    if phase == "pretrain":
        assert (arguments.truncation_mode, arguments.pad_token) == ("keep_end", "x")


def test_a_value_the_class_refuses_is_one_line() -> None:
    config = loaded("dpo", "--lr_scheduler_type reduce_lr_on_plateau")
    with pytest.raises(UserError, match="the dpo configuration was refused: .*requires an eval strategy"):
        config.training_arguments()


def test_output_goes_under_the_folder_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGN_KIT_RUNS", raising=False)
    assert loaded("sft").value("output_dir") == "runs/sft"
    monkeypatch.setenv("ALIGN_KIT_RUNS", "/big/disk")
    assert loaded("sft").value("output_dir") == "/big/disk/sft"
    assert loaded("sft", "--output_dir x").value("output_dir") == "x"


def test_a_configuration_pickles_and_is_json() -> None:
    config = loaded("dpo", "--beta 0.2 --datasets a --use_peft")
    assert pickle.loads(pickle.dumps(config)) == config
    flat = json.loads(json.dumps(config.as_dict()))
    assert (flat["phase"], flat["beta"], flat["datasets"], flat["use_peft"]) == ("dpo", 0.2, [{"path": "a"}], True)
    assert flat["adam_beta1"] == 0.9, "defaults are written out too"


def test_a_dry_run_shows_each_key_that_was_set_and_where() -> None:
    text = dry_run_text(loaded("dpo", "--beta 0.2 --dry-run"), derive(2, 2, 4), {"zero_optimization": {"stage": 3}})
    assert "batch: 16 pairs = 2 per rank x 2 ranks x 4 accumulation steps" in text
    assert '"stage": 3' in text
    assert "beta" in text and "0.2  (command line)" in text
    assert "(align_kit's default)" in text


def test_help_lists_every_usable_key_in_groups_and_exits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        loaded("dpo", "--help --nonsense")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    titles = ["align_kit's own:", "the model:", "the data:", "training (DPOConfig):", "training (TrainingArguments):"]
    positions = [text.index(title) for title in titles]
    assert positions == sorted(positions)
    assert "--reference_placement" in text and "[auto]" in text
    assert "[runs/dpo]" in text, "defaults are ours where they differ"
    assert max(map(len, text.splitlines())) <= 120
    from align_kit.config.schema import namespace

    missing = [name for name in namespace("trl:DPOConfig") if name not in text]
    assert not missing


@pytest.mark.parametrize("recipe", registry.RECIPES, ids=lambda recipe: recipe.name)
def test_each_shipped_recipe_loads_alone_and_under_the_lora_overlay(recipe: registry.Recipe) -> None:
    recipes = resources.folder("recipes")
    alone = load(recipe, [], defaults=recipes / f"{recipe.name}.yaml")
    assert alone.data.datasets and not alone.model.use_peft
    overlaid = load(recipe, ["--config", str(recipes / f"{recipe.name}.yaml"), "lora"])
    assert overlaid.model.use_peft
    assert overlaid.data == alone.data


def test_importing_the_configuration_is_light() -> None:
    code = "import sys, align_kit.config; print([m for m in ('torch', 'trl', 'transformers') if m in sys.modules])"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_cadence_of_checkpoints_that_a_recipe_switches_off() -> None:
    """The shipped recipes save at the end only; a word on the command line must not do nothing."""
    recipe = resources.folder("recipes") / "dpo.yaml"
    with pytest.raises(UserError, match="save_steps was given, but save_strategy .*dpo.yaml:16. is no; add --save_"):
        loaded("dpo", "--save_steps 5", defaults=recipe)
    assert loaded("dpo", "--save_steps 5 --save_strategy steps", defaults=recipe).value("save_steps") == 5
    assert loaded("dpo", "--save_steps 5 --save_strategy no", defaults=recipe).value("save_strategy") == "no"

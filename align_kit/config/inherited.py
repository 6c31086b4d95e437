"""What becomes of every field inherited from transformers and TRL: honoured, mapped or refused, one row each.

The rows cover `transformers.TrainingArguments`, TRL's `SFTConfig`, `DPOConfig`, `KTOConfig`, `RewardConfig`,
`ModelConfig`, `ScriptArguments` and `DatasetMixtureConfig`; a test walks those classes, so a field that a new version
adds needs a row before anything else passes.

- `honoured(by)`: works as its own documentation says; `by` names who reads it.
- `mapped(to)`: accepted, and something else does its work.
- `refused(why, instead)`: an error when it is given another value than its default, so that a YAML that spells the
  default out still runs.

`only` lists the values that work where not all do. `phases` names the phases that have the key where not all do.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Fate = Literal["honoured", "mapped", "refused"]


class Row(NamedTuple):
    """The fate of one inherited field."""

    fate: Fate
    note: str  # who reads it, what does its work, or why it is refused
    instead: str = ""
    only: tuple[Any, ...] = ()
    phases: tuple[str, ...] = ()


def honoured(by: str, *, only: tuple[Any, ...] = (), instead: str = "", phases: str = "") -> Row:
    """Return the row of a field that works; `instead` is said where a value outside `only` is given."""
    return Row("honoured", by, instead, only, tuple(phases.split()))


def mapped(to: str, *, phases: str = "") -> Row:
    """Return the row of a field that is accepted and whose work is done by something else."""
    return Row("mapped", to, "", (), tuple(phases.split()))


def refused(why: str, instead: str, *, phases: str = "") -> Row:
    """Return the row of a field that is an error where it is given another value than its default."""
    return Row("refused", why, instead, (), tuple(phases.split()))


# Who reads a field. Names that begin with `align_kit` must be found reading it: a test looks.
TRAINER = "transformers.Trainer"
ARGUMENTS = "transformers.TrainingArguments"
ENGINE = "DeepSpeed, through the Trainer"
US = "align_kit"

# Reasons and replacements that several rows share.
HUB = ("nothing leaves the machine during a run", "upload the finished folder: hf upload <repo> <output_dir>")
SUMS = ("evaluation adds up loss and metrics itself and keeps no predictions", "drop it")
DDP = ("the engine is DeepSpeed, not DDP", "drop it")
FSDP = ("models are sharded by DeepSpeed ZeRO-3", "deepspeed: zero3")
COMPILE = ("torch.compile does not yet carry ZeRO-3's hooks and rows of changing length", "drop it")
LIGER = ("the shared forward computes no logits it does not need", "drop it")
LENGTHS = ("rows carry no padding, so grouping them by length saves nothing", "drop it")
BITS = ("its outlier columns are split at every step, which ZeRO-3's shards do not know", "load_in_4bit: true")
STREAM = ("data is read, counted and cached before training", "max_samples in the entry of datasets")
PACKING = ("sft keeps one example per row", "drop it; phase pretrain packs text")
NO_PADDING = ("rows carry no padding to begin with", "drop it")

SFT = "pretrain sft"
PAIRED = "dpo kto"
TEMPLATED = "pretrain sft reward orpo ppo"
DROPOUT = "dpo kto reward orpo ppo"
CUT = "pretrain sft dpo orpo"
TRL_FIVE = "pretrain sft dpo kto reward"
ALL = "pretrain sft dpo kto reward orpo ppo"

TRAINING_ARGUMENTS: dict[str, Row] = {
    # length and schedule
    "num_train_epochs": honoured(TRAINER),
    "max_steps": honoured(TRAINER),
    "per_device_train_batch_size": honoured(TRAINER),
    "per_device_eval_batch_size": honoured(TRAINER),
    "gradient_accumulation_steps": honoured(TRAINER),
    "auto_find_batch_size": refused(
        "a batch that changes by itself changes the run", "global_batch_size and a small per_device_train_batch_size"
    ),
    "average_tokens_across_devices": refused("the loss is a mean over the whole global batch on all ranks", "drop it"),
    # optimizer
    "learning_rate": honoured(TRAINER),
    "lr_scheduler_type": honoured(TRAINER),
    "lr_scheduler_kwargs": honoured(TRAINER),
    "warmup_steps": honoured(TRAINER),
    "optim": honoured(TRAINER),
    "optim_args": honoured(TRAINER),
    "optim_target_modules": refused("GaLore and APOLLO need whole matrices, ZeRO hands out flat shards", "use_peft"),
    "weight_decay": honoured(TRAINER),
    "adam_beta1": honoured(TRAINER),
    "adam_beta2": honoured(TRAINER),
    "adam_epsilon": honoured(TRAINER),
    "max_grad_norm": honoured(ENGINE),
    "label_smoothing_factor": refused("the losses are align_kit's own", "label_smoothing (dpo)"),
    "neftune_noise_alpha": honoured(TRAINER),
    # precision, memory, speed
    "bf16": honoured(US),
    "fp16": honoured(ENGINE),
    "bf16_full_eval": refused("evaluation runs in the precision of training", "bf16"),
    "fp16_full_eval": refused("evaluation runs in the precision of training", "fp16"),
    "tf32": honoured(ARGUMENTS),
    "activation_checkpointing": honoured(TRAINER),
    "activation_checkpointing_kwargs": honoured(TRAINER),
    "gradient_checkpointing": honoured(US),
    "gradient_checkpointing_kwargs": honoured(US),
    "torch_compile": refused(*COMPILE),
    "torch_compile_backend": refused(*COMPILE),
    "torch_compile_mode": refused(*COMPILE),
    "use_liger_kernel": refused(*LIGER),
    "liger_kernel_config": refused(*LIGER),
    "use_cache": honoured(TRAINER),
    "torch_empty_cache_steps": honoured(TRAINER),
    # logging
    "logging_strategy": honoured(TRAINER),
    "logging_steps": honoured(TRAINER),
    "logging_first_step": honoured(TRAINER),
    "log_on_each_node": honoured(TRAINER),
    "logging_nan_inf_filter": honoured(TRAINER),
    "include_num_input_tokens_seen": refused("tokens are always counted", "drop it"),
    "log_level": honoured(TRAINER),
    "log_level_replica": honoured(TRAINER),
    "disable_tqdm": mapped("align_kit's own progress bar"),
    "report_to": honoured(TRAINER),
    "run_name": honoured(TRAINER),
    "project": honoured(TRAINER),
    "trackio_space_id": honoured(TRAINER),
    "trackio_bucket_id": honoured(TRAINER),
    "trackio_static_space_id": honoured(TRAINER),
    # evaluation
    "eval_strategy": honoured(TRAINER),
    "eval_steps": honoured(TRAINER),
    "eval_delay": honoured(TRAINER),
    "eval_on_start": honoured(TRAINER),
    "prediction_loss_only": refused(*SUMS),
    "eval_do_concat_batches": refused(*SUMS),
    "eval_use_gather_object": refused(*SUMS),
    "eval_accumulation_steps": refused(*SUMS),
    "include_for_metrics": refused(*SUMS),
    "batch_eval_metrics": refused(*SUMS),
    "label_names": refused(*SUMS),
    # saving and resuming
    "output_dir": honoured(TRAINER),
    "save_strategy": honoured(TRAINER),
    "save_steps": honoured(TRAINER),
    "save_total_limit": honoured(TRAINER),
    "save_on_each_node": honoured(TRAINER),
    "save_only_model": refused("a checkpoint without optimizer cannot be resumed", 'save_strategy: "no"'),
    "enable_jit_checkpoint": refused("a signal reaches the ranks at different steps", "save_steps and --resume"),
    "load_best_model_at_end": honoured(TRAINER),
    "metric_for_best_model": honoured(TRAINER),
    "greater_is_better": honoured(TRAINER),
    "ignore_data_skip": refused("a resumed run repeats the unbroken one exactly", "drop it"),
    "restore_callback_states_from_checkpoint": honoured(TRAINER),
    "resume_from_checkpoint": mapped("resume"),
    # the hub
    "push_to_hub": refused(*HUB),
    "hub_token": refused("it would be pickled in clear into every checkpoint", "set HF_TOKEN in the environment"),
    "hub_private_repo": refused(*HUB),
    "hub_model_id": refused(*HUB),
    "hub_strategy": refused(*HUB),
    "hub_always_push": refused(*HUB),
    "hub_revision": refused(*HUB),
    # randomness
    "seed": honoured(TRAINER),
    "data_seed": honoured(TRAINER),
    "full_determinism": honoured(TRAINER),
    # the machine
    "use_cpu": honoured(US),
    "deepspeed": honoured(US),
    "accelerator_config": refused("it would split or dispatch batches behind the batch arithmetic", "drop it"),
    "parallelism_config": refused(*FSDP),
    "fsdp": refused(*FSDP),
    "fsdp_config": refused(*FSDP),
    "ddp_find_unused_parameters": refused(*DDP),
    "ddp_bucket_cap_mb": refused(*DDP),
    "ddp_broadcast_buffers": refused(*DDP),
    "ddp_static_graph": refused(*DDP),
    "ddp_backend": honoured(ARGUMENTS),
    "ddp_timeout": honoured(ARGUMENTS),
    "local_rank": mapped("the launcher's LOCAL_RANK"),
    "debug": honoured(TRAINER),
    "skip_memory_metrics": honoured(TRAINER),
    # loading data
    "dataloader_drop_last": honoured(TRAINER),
    "dataloader_num_workers": honoured(TRAINER),
    "dataloader_pin_memory": honoured(TRAINER),
    "dataloader_persistent_workers": honoured(TRAINER),
    "dataloader_prefetch_factor": honoured(TRAINER),
    "dataloader_multiprocessing_context": honoured(TRAINER),
    "dataloader_in_order": honoured(TRAINER),
    "remove_unused_columns": mapped("rows hold only what the phase reads"),
    "train_sampling_strategy": honoured(TRAINER, only=("random", "sequential"), instead=LENGTHS[0]),
    "length_column_name": refused(*LENGTHS),
    # what a script does
    "do_train": mapped("a recipe always trains"),
    "do_eval": mapped("eval_strategy"),
    "do_predict": refused("a recipe trains and evaluates", "eval_datasets with eval_strategy"),
}

TRL_TRAINERS: dict[str, Row] = {
    # model
    "trust_remote_code": honoured(US, phases=ALL),
    "model_init_kwargs": refused(
        "each of its keys has a name of its own",
        "dtype, attn_implementation, model_revision, trust_remote_code, config_overrides",
        phases=TRL_FIVE,
    ),
    "router_aux_loss_coef": honoured(US, phases="pretrain sft dpo kto"),
    "chat_template_path": honoured(US, phases=TEMPLATED),
    "eos_token": honoured(US, phases=TEMPLATED),
    "pad_token": honoured(US, phases="pretrain sft dpo reward orpo ppo"),
    "disable_dropout": honoured(US, phases=DROPOUT),
    "activation_offloading": refused(
        "activations are recomputed, not moved", "gradient_checkpointing: true", phases=TRL_FIVE
    ),
    # data
    "max_length": honoured(US, phases=ALL),
    "truncation_mode": honoured(US, phases=CUT),
    "dataset_num_proc": mapped("rows are tokenised once and cached by content", phases=TRL_FIVE),
    "dataset_text_field": refused("a column is named where its data is", "columns in an entry of datasets", phases=SFT),
    "dataset_kwargs": refused("rows are always prepared here", "drop it", phases=SFT),
    "shuffle_dataset": mapped("train_sampling_strategy: random draws rows in a seeded random order", phases=SFT),
    "pad_to_multiple_of": refused(*NO_PADDING, phases=TRL_FIVE),
    "padding_free": refused(*NO_PADDING, phases="pretrain sft dpo"),
    "packing": refused(*PACKING, phases=SFT),
    "packing_strategy": refused(*PACKING, phases=SFT),
    "eval_packing": refused(*PACKING, phases=SFT),
    "completion_only_loss": honoured(US, phases=SFT),
    "assistant_only_loss": honoured(US, phases=SFT),
    # losses
    "loss_type": honoured(US, phases="pretrain sft dpo kto"),
    "beta": honoured(US, phases="dpo kto orpo"),
    "loss_weights": honoured(US, phases="dpo"),
    "label_smoothing": honoured(US, phases="dpo"),
    "ld_alpha": honoured(US, phases="dpo"),
    "f_divergence_type": honoured(US, phases="dpo"),
    "f_alpha_divergence_coef": honoured(US, phases="dpo"),
    "use_weighting": honoured(US, phases="dpo"),
    "discopop_tau": honoured(US, phases="dpo"),
    "desirable_weight": honoured(US, phases="kto"),
    "undesirable_weight": honoured(US, phases="kto"),
    "center_rewards_coefficient": honoured(US, phases="reward"),
    # reference
    "precompute_ref_log_probs": honoured(US, phases=PAIRED),
    "precompute_ref_batch_size": honoured(US, phases=PAIRED),
    "sync_ref_model": honoured(US, phases=PAIRED),
    "ref_model_mixup_alpha": honoured(US, phases=PAIRED),
    "ref_model_sync_steps": honoured(US, phases=PAIRED),
}

MODEL_CONFIG: dict[str, Row] = {
    "model_name_or_path": honoured(US),
    "model_revision": honoured(US),
    "dtype": honoured(US),
    "attn_implementation": honoured(US),
    "use_peft": honoured(US),
    "lora_r": honoured(US),
    "lora_alpha": honoured(US),
    "lora_dropout": honoured(US),
    "lora_target_modules": honoured(US),
    "lora_target_parameters": honoured(US),
    "lora_modules_to_save": honoured(US),
    "lora_task_type": mapped("the phase: SEQ_CLS for reward, CAUSAL_LM for the others"),
    "use_rslora": honoured(US),
    "use_dora": honoured(US),
    "load_in_8bit": refused(*BITS),
    "load_in_4bit": honoured(US),
    "bnb_4bit_quant_type": honoured(US),
    "use_bnb_nested_quant": honoured(US),
    "bnb_4bit_quant_storage": refused("ZeRO-3 shards one dtype, so 4-bit weights are stored in the run's", "drop it"),
}

DATA_CONFIG: dict[str, Row] = {
    "datasets": honoured(US),
    "dataset_name": mapped("one entry of datasets"),
    "dataset_config": mapped("name in the entry of datasets"),
    "dataset_train_split": mapped("split in the entry of datasets"),
    "dataset_test_split": mapped("split in the entry of eval_datasets"),
    "dataset_streaming": refused(*STREAM),
    "streaming": refused(*STREAM),
    "test_split_size": honoured(US),
    "ignore_bias_buffers": refused(*DDP),
}

TABLE: dict[str, Row] = TRAINING_ARGUMENTS | TRL_TRAINERS | MODEL_CONFIG | DATA_CONFIG


def row(name: str, phase: str) -> Row | None:
    """Return the row of an inherited field in a phase, None for a field of align_kit's own.

    Pretraining packs always, so what `sft` refuses about packing is accepted there.
    """
    if phase == "pretrain" and name in ("packing", "packing_strategy", "eval_packing"):
        return mapped("pretrain always packs text into full rows")
    return TABLE.get(name)


def phases_with(name: str) -> tuple[str, ...]:
    """Return the phases that have the key, where TRL gives it to some phases only; nothing for an unknown key."""
    return TABLE[name].phases if name in TABLE else ()

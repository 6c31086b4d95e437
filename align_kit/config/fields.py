"""The fields align_kit declares itself: the model, the data, and the few of its own about a run.

Each group is a plain dataclass. In YAML and on the command line the names are flat; a name stands in one group only.
`metadata["help"]` is the line `--help` prints; `choices` and `bare` (the value of a flag given without one) are read
by the parser. Names and defaults that TRL has too are TRL's, so its documents apply.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), bare: Any = None) -> Any:
    """Declare one field: its default, the line `--help` prints, the words allowed, the value of the bare flag."""
    metadata = {"help": help, "choices": choices, "bare": bare}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class DatasetFields:
    """One entry of `datasets` or `eval_datasets`: TRL's keys down to `fraction`, then align_kit's."""

    path: str = option("", "card:<name>, a local jsonl/json/csv/parquet/txt file, or a hub id")
    name: str | None = option(None, "configuration of a hub data set")
    data_dir: str | None = option(None, "folder of a hub data set")
    data_files: str | list[str] | dict[str, str] | None = option(None, "files of a hub data set or of a local folder")
    split: str | None = option(None, "split to read; the card's or file's training split where none is given")
    columns: list[str] | dict[str, str] | None = option(None, "columns to keep, or {ours: theirs} to rename")
    fraction: float | None = option(None, "TRL's share of the mixture: of all entries or of none")
    weight: float | None = option(None, "sampling weight in the mixture")
    max_share: float | None = option(None, "most that this entry may be of the mixture: 0.5 is half; others fill up")
    epochs: float | None = option(None, "how often its rows are there, 2.5: twice and half of them again; once if None")
    format: str | None = option(
        None,
        "shape of the rows where it cannot be recognised",
        choices=("text", "prompt", "prompt_completion", "messages", "preference", "binary", "alpaca", "sharegpt",
                 "reason"),
    )
    max_samples: int | None = option(None, "use at most this many rows")
    revision: str | None = option(None, "branch, tag or commit of a hub data set")
    prompt_template: str | None = option(None, "text around the prompt: 'Question: {prompt}'")
    reason_template: str | None = option(None, "of format reason: '<think>{reasoning}</think>{answer}'")

    def spec(self) -> dict[str, Any]:
        """Return the entry as the mapping that `align_kit.data.load` reads: only what was given."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass
class ModelFields:
    """Which model, in which form: TRL's `ModelConfig`, plus a start from a bare configuration."""

    model_name_or_path: str | None = option(None, "folder or hub id of the model to start from")
    model_revision: str = option("main", "branch, tag or commit of a hub model")
    dtype: str | None = option(
        "float32", "dtype the weights are loaded in", choices=("auto", "bfloat16", "float16", "float32")
    )
    attn_implementation: str | None = option(
        None, "attention implementation; the model's own choice where none is given"
    )
    use_peft: bool = option(False, "train a LoRA adapter instead of all weights")
    lora_r: int = option(16, "rank of the adapter")
    lora_alpha: int = option(32, "scale of the adapter: alpha / r")
    lora_dropout: float = option(0.05, "dropout in the adapter; 0.05 is TRL's default, not 0")
    lora_target_modules: list[str] | str | None = option(None, "modules that get an adapter, or 'all-linear'")
    lora_target_parameters: list[str] | None = option(None, "parameters that get an adapter (expert weights)")
    lora_modules_to_save: list[str] | None = option(None, "modules trained in full beside the adapter")
    lora_task_type: str = option("CAUSAL_LM", "the phase decides it: SEQ_CLS for reward, else CAUSAL_LM")
    use_rslora: bool = option(False, "scale the adapter by alpha / sqrt(r)")
    use_dora: bool = option(False, "decompose weights into magnitude and direction (DoRA)")
    load_in_8bit: bool = option(False, "load base weights in 8 bits")
    load_in_4bit: bool = option(False, "load base weights in 4 bits")
    bnb_4bit_quant_type: str = option("nf4", "4-bit number format", choices=("fp4", "nf4"))
    use_bnb_nested_quant: bool = option(False, "quantise the quantisation constants too")
    bnb_4bit_quant_storage: str | None = option(None, "dtype that 4-bit weights are stored in")
    config_name: str | None = option(None, "start from random weights: folder, hub id or builtin:tiny")
    config_overrides: dict[str, Any] | str | None = option(None, "change config_name's values: a mapping or k=v,k=v")
    tokenizer_name: str | None = option(None, "folder or hub id of the tokenizer, where it is not the model's")


@dataclass
class DataFields:
    """Which data: TRL's `ScriptArguments` and `DatasetMixtureConfig`, plus `eval_datasets`."""

    datasets: list[DatasetFields] = option([], "what to train on: a list of {path, split, weight, ...}")
    eval_datasets: list[DatasetFields] = option([], "what to evaluate on, in the same shape")
    dataset_name: str | None = option(None, "short for one entry of datasets")
    dataset_config: str | None = option(None, "configuration of dataset_name")
    dataset_train_split: str = option("train", "training split of dataset_name")
    dataset_test_split: str = option("test", "evaluation split of dataset_name, read when eval_strategy is on")
    dataset_streaming: bool = option(False, "stream dataset_name")
    streaming: bool = option(False, "stream datasets")
    mixture_temperature: float | None = option(
        None, "take entries of datasets in proportion to rows^(1/T), without weights: 1 by size, a high T all alike"
    )
    test_split_size: float | None = option(
        None, "rows (or their share, under 1) cut off the training data to evaluate on"
    )
    test_split_seed: int | None = option(
        None, "draws the rows to evaluate on; default: the run's seed, with which other rows are held out"
    )
    ignore_bias_buffers: bool = option(False, "leave bias buffers out of DDP")
    data_limits: dict[str, float] | None = option(
        None, "share of rows above which a suspicion about them is an error, by its name: {dropped: 0.9}; 1 is never"
    )
    control_tokens: str = option(
        "text",
        "what control tokens such as <|im_end|> in the data are: text, or tokens (for rows that were rendered before)",
        choices=("text", "tokens"),
    )


@dataclass
class RunFields:
    """What align_kit adds to a run."""

    global_batch_size: int | None = option(
        None, "pairs or rows per optimizer step over all ranks; gradient_accumulation_steps follows from it"
    )
    starts_from: str | None = option(None, "phase or run folder whose model to start from, without model_name_or_path")
    resume: str | None = option(
        None, "continue a run: bare for its last checkpoint, or a checkpoint's path", bare="auto"
    )
    overwrite: bool = option(False, "replace what stands in output_dir")
    forward: str = option(
        "auto",
        "how batches are computed: shared (a common prefix once, no padding), packed (no padding), plain; auto: as "
        "shared as the model allows; checked against plain on a few rows before training",
        choices=("auto", "shared", "packed", "plain"),
    )
    reference_model_name_or_path: str | None = option(None, "the reference; the policy's start where none is given")
    reference_placement: str = option(
        "auto",
        "where the reference lives",
        choices=("auto", "adapter", "sharded", "offloaded", "quantised", "cached"),
    )
    reference_differs: bool = option(False, "the reference is not the policy's start, on purpose: no step-0 identity")
    fingerprint_steps: int = option(50, "steps between comparisons of frozen weights; 0 = only at load and save")
    early_stopping_patience: int | None = option(None, "stop after this many evaluations without a better metric")
    async_save: bool = option(True, "write checkpoints in the background; training waits for the copy in memory only")
    save_minutes: float | None = option(None, "save every so many minutes too")
    save_before: str | None = option(None, "save and stop before this much time has passed: 3:50:00, or 90 (minutes)")
    save_milestone_steps: int | None = option(None, "keep for good the checkpoints at multiples of so many steps")
    save_bytes_limit: str | None = option(None, "room that checkpoints may take together: 200GB")
    save_copy_to: str | None = option(None, "second place for each checkpoint: a folder or any fsspec URL")
    full_disk: str = option("stop", "what a checkpoint that finds no room means for the run", choices=("stop", "go_on"))
    allow_change: str | None = option(
        None, "options that may differ when a run goes on, separated by commas: learning_rate,max_steps,world_size"
    )
    trust_checkpoint: bool = option(False, "load pickled objects of any kind from a checkpoint: they can run code")
    spike_policy: str = option(
        "warn",
        "what a spike of loss or gradient norm means: a line, no update, or back to the last checkpoint",
        choices=("warn", "skip", "rollback"),
    )
    spike_deviations: float = option(12.0, "a spike is so many median absolute deviations above the rolling median")
    memory_check: str = option(
        "sampled",
        "compare weights and optimizer states at rest, from one update to the next: all, or a share that costs little",
        choices=("off", "sampled", "full"),
    )
    skip_steps: str | None = option(None, "steps whose batches are drawn but not trained on: 17,18 or 120-180")
    force: bool = option(False, "start a run that the planner says cannot fit in memory")
    sample_prompts: int = option(4, "prompts answered before and after training for the report; 0 = none")
    report: bool = option(True, "write report.html into the run's folder when it ends, however it ends")
    dry_run: bool = option(False, "print the resolved configuration, batch arithmetic and engine config, then exit")


GROUPS: dict[str, type] = {"run": RunFields, "model": ModelFields, "data": DataFields}

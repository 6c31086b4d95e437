"""What a run that goes on has in common with what it was: every difference is a line, and refused unless allowed.

Everything that was recorded is contract, so an option that is added later is one too. The exceptions are `FREE`, which
changes nothing that is trained; what is compared `BY_CONTENT`, whatever it is called; and `FIXED`, which cannot change
within a run because the checkpoint holds what follows from it: such a change would be ignored, or break the promise
that no row is seen twice. Pure functions of what was and what is; nothing is read here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from align_kit.config.values import show
from align_kit.errors import UserError, unknown

# What may differ without a word: nothing of it reaches a weight.
FREE = frozenset(
    {
        # the run and its folder
        *("output_dir", "overwrite", "resume", "resume_from_checkpoint", "allow_change", "trust_checkpoint", "dry_run"),
        "force",
        *("restore_callback_states_from_checkpoint", "do_train", "do_eval", "local_rank"),
        # saving
        *("save_strategy", "save_steps", "save_minutes", "save_before", "save_milestone_steps", "save_bytes_limit"),
        *("save_copy_to", "save_total_limit", "save_on_each_node", "async_save", "full_disk"),
        # evaluation
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
        # logging and reporting
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node"),
        *("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id"),
        *("trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics", "num_sample_completions"),
        *("sample_prompts", "report"),
        # guards
        *("fingerprint_steps", "spike_policy", "spike_deviations", "memory_check", "skip_steps", "debug"),
        *("reference_differs", "data_limits"),  # a permission, not a choice
        # workers and their connections
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataset_num_proc"),
        *("ddp_timeout", "ddp_backend"),
    }
)
FREE_ENGINE = frozenset(  # top-level keys of a DeepSpeed configuration that only report, or say how files are written
    {"steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "comms_logger", "flops_profiler"}
    | {"tensorboard", "wandb", "csv_monitor", "comet", "checkpoint", "timers"}
)

# Options that say where something is or what it follows from: what they come to is compared under these names.
BY_CONTENT = {
    "datasets": "data",
    "dataset_name": "data",
    "dataset_config": "data",
    "dataset_train_split": "data",
    "mixture_temperature": "data",
    "eval_datasets": "eval_data",
    "dataset_test_split": "eval_data",
    "model_name_or_path": "policy",
    "model_revision": "policy",
    "reference_model_name_or_path": "reference",
    "reward_model_name_or_path": "reward",
    "dtype": "precision",
    "bf16": "precision",
    "fp16": "precision",
    "gradient_accumulation_steps": "global_batch_size",
}
SHORT = {"lr": "learning_rate"}
# What is compared beside the options.
FACTS = ("phase", "world_size", "precision", *dict.fromkeys(BY_CONTENT.values()))

IN_CHECKPOINT = "its weights are in the checkpoint"
ADAPTER = "the adapter in the checkpoint was made so"
ORDER = "the place in the data would be lost, and rows seen twice or never"
BEST = "the best so far was measured so"
FIXED = {
    "phase": "go on with that phase's recipe",
    "precision": "the optimizer's state was stored in it",
    "config_name": IN_CHECKPOINT,
    "config_overrides": IN_CHECKPOINT,
    "starts_from": IN_CHECKPOINT,
    "value_model_name_or_path": IN_CHECKPOINT,
    **dict.fromkeys(("use_peft", "use_rslora", "use_dora", "lora_r", "lora_alpha", "lora_dropout"), ADAPTER),
    **dict.fromkeys(("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"), ADAPTER),
    "optim": "the optimizer's state is of the other kind",
    "optim_args": "the optimizer's state was made with it",
    "seed": ORDER,
    "data_seed": ORDER,
    "train_sampling_strategy": ORDER,
    "dataloader_drop_last": ORDER,
    "global_batch_size": ORDER,
    "num_generations": ORDER,
    "num_mini_batches": ORDER,
    "sync_ref_model": "a reference that moves is in the checkpoint, one that does not is in its source",
}
FIXED_ENGINE = {
    "zero_optimization.stage": "the checkpoint's files are cut for it",
    "tensor_parallel": "the checkpoint's files are cut for it",
    "optimizer": "the optimizer's state is in the checkpoint",
    "scheduler": "the schedule's state is in the checkpoint",
}
LENGTH = ("max_steps", "num_train_epochs")
SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
# Options that decide what rows become: where one of them may change, so may the data.
SHAPES_DATA = frozenset(
    {"max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss", "chat_template_path"}
    | {"eos_token", "pad_token", "tokenizer_name", "test_split_size", "test_split_seed", "response_length"}
)


@dataclass(frozen=True)
class Difference:
    """One thing that is not what it was: `name` is what `allow_change` calls it, `said` where the new value stands.

    `part` tells which key of the engine's configuration it is; `fixed` why it cannot change, empty where it can.
    """

    name: str
    was: Any
    now: Any
    said: str = ""
    part: str = ""
    fixed: str = ""

    @property
    def line(self) -> str:
        """The difference in words: `learning_rate was 0.003, now 0.001 (command line)`."""
        place = f" ({self.said})" if self.said else ""
        return f"{' '.join(filter(None, (self.name, self.part)))} was {_shown(self.was)}, now {_shown(self.now)}{place}"

    def as_dict(self) -> dict[str, Any]:
        """Return it for the run's manifest."""
        return {name: value for name, value in asdict(self).items() if value != ""}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else show(value)


def names_in(allow_change: str | None, known: Iterable[str]) -> frozenset[str]:
    """Return the names in an `allow_change`; raise `UserError` with the nearest for one that is not known."""
    given = [SHORT.get(name, name) for word in (allow_change or "").split(",") if (name := word.strip())]
    known = sorted({*known, *FACTS})
    for name in given:
        if name not in known:
            raise unknown("allow_change", name, known)
    return frozenset(BY_CONTENT.get(name, name) for name in given)


def differences(
    recorded: Mapping[str, Any], now: Mapping[str, Any], origin: Mapping[str, str] | None = None
) -> list[Difference]:
    """Return what of `now` is not what was `recorded`, by name: options and facts, plain values.

    `origin` maps a name to where its value was said. The engine's configurations, as they were asked for, stand under
    `deepspeed` and are compared key by key. A name that only one side has is not compared.
    """
    if recorded.get("phase") != now.get("phase"):  # the options are others, too: one line says it
        return [_difference("phase", recorded.get("phase"), now.get("phase"), "", recorded, now)]
    found = []
    for name in now:
        if name in FREE or name in BY_CONTENT or name not in recorded:
            continue
        was, value = _plain(recorded[name]), _plain(now[name])
        said = (origin or {}).get(name, "")
        if name == "deepspeed":
            found += _of_engine(was, value, said, recorded, now)
        elif was != value:
            found.append(_difference(name, was, value, said, recorded, now))
    return found


def _plain(value: Any) -> Any:
    """Return a value as a manifest gives it back."""
    return json.loads(json.dumps(value, default=str))


def _of_engine(
    was: Any, now: Any, said: str, recorded: Mapping[str, Any], options: Mapping[str, Any]
) -> list[Difference]:
    before, after = _leaves(was), _leaves(now)
    found = []
    for part in dict.fromkeys([*before, *after]):
        if part.partition(".")[0] not in FREE_ENGINE and before.get(part) != after.get(part):
            found.append(_difference("deepspeed", before.get(part), after.get(part), said, recorded, options, part))
    return found


def _leaves(config: Any, path: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by dotted key."""
    if not isinstance(config, Mapping):
        return {path: config}
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _leaves(value, f"{path}.{key}" if path else str(key))
    return found


def _difference(
    name: str, was: Any, now: Any, said: str, recorded: Mapping[str, Any], options: Mapping[str, Any], part: str = ""
) -> Difference:
    if part:
        fixed = next((why for key, why in FIXED_ENGINE.items() if part == key or part.startswith(f"{key}.")), "")
    else:
        fixed = FIXED.get(name, "") or _fixed_here(name, was, now, recorded, options)
    return Difference(name, was, now, said, part, fixed)


def _fixed_here(name: str, was: Any, now: Any, recorded: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Return why an option cannot change beside what else is asked for; empty where it can."""
    engine = recorded.get("deepspeed")
    if name in SCHEDULE + LENGTH and isinstance(engine, Mapping) and "scheduler" in engine:
        return "the DeepSpeed configuration brings a schedule of its own"
    if name in SCHEDULE and any(side.get("lr_scheduler_type") in STATEFUL_SCHEDULES for side in (recorded, options)):
        return "a schedule that follows a metric goes on from its state"
    if name in ("metric_for_best_model", "greater_is_better") and was is not None:
        return BEST
    if name == "kl_coef" and recorded.get("kl_target") is not None:
        return "an adaptive coefficient goes on from where it is"
    if name in ("kl_target", "value_learning_rate") and (was is None or now is None):
        return "the checkpoint holds the state of one kind only"
    return ""


def check(found: Sequence[Difference], allowed: Collection[str], run: Any) -> None:
    """Raise `UserError`, in one line that lists them, where the run in `run` differs in what is not `allowed`."""
    refused = [one for one in found if one.fixed or not is_allowed(one.name, allowed)]
    if not refused:
        return
    lines = [f"{one.line}, which cannot change: {one.fixed}" if one.fixed else one.line for one in refused]
    names = ",".join(dict.fromkeys(one.name for one in found if not one.fixed))
    ways = ["put back what was"]
    if any(one.fixed for one in refused):
        ways.append("start anew with --overwrite")
    else:
        ways.append(f"go on with --allow_change {names}")
    raise UserError(f"--resume: the run in {run} is not the same: {'; '.join(lines)}; {' or '.join(ways)}")


def is_allowed(name: str, allowed: Collection[str]) -> bool:
    """Tell whether a difference in `name` is allowed: by its name, or because it follows from one that is."""
    if name == "per_device_train_batch_size" and "world_size" in allowed:  # the global batch stays what it was
        return True
    return name in allowed or (name in ("data", "eval_data") and not SHAPES_DATA.isdisjoint(allowed))


def check_length(step: int, steps: int) -> None:
    """Raise `UserError` where the checkpoint of step number `step` lies beyond the end of a run of `steps`."""
    if step > steps:
        raise UserError(
            f"--resume: the checkpoint is of step {step} and the run ends at step {steps}; raise max_steps, or name an "
            "earlier checkpoint"
        )

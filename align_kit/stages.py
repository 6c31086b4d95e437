"""The stages of a run, in the order `run.execute` calls them; each knows one thing and no method's name."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_kit import cards, log, machine, run_folder, zero
from align_kit import frozen as frozen_models
from align_kit.config import BatchPlan, Config, derive
from align_kit.data.prepare import Prepared, Wanted, prepare, reopen
from align_kit.data.report import TokeniseOptions
from align_kit.errors import UserError
from align_kit.models import load, lora, moe, policy_and_value, source
from align_kit.models.source import Source
from align_kit.registry import Recipe
from align_kit.run_folder import RunFolder

CARD = "card:"

# --- the machine and the engine ---------------------------------------------------------------------------


@dataclass
class Engine:
    """The DeepSpeed configuration of a run, where it came from, and the precision to train in."""

    config: dict[str, Any]
    label: str
    precision: str

    @property
    def stage(self) -> int:
        return int(self.config.get("zero_optimization", {}).get("stage", 0))


def start(config: Config) -> Engine:
    """Choose precision and engine configuration, agree with the launch file, look for what would block the start."""
    machine.choose_accelerator(os.environ)
    launch = zero.read_launch(os.environ)
    precision = _precision(config)
    zero.check_precision(precision, launch)
    if precision == "fp16" and machine.device_name() == "CPU":
        raise UserError("fp16 does not train on a CPU; use --bf16 true, or leave both out for what the hardware does")
    engine, label = zero.choose(config.training.get("deepspeed"), launch)
    zero.check_buildable(engine, label)
    for line in machine.check_locks(zero.needs_build(engine), os.environ):
        log.warn(line)
    return Engine(engine, label, precision)


def shown(config: Config, engine: Engine, plan: BatchPlan) -> dict[str, Any]:
    """Return the engine configuration as `--dry-run` shows it: what does not wait for the model is filled in."""
    values = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.per_device,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.value("max_grad_norm"),
        "bf16.enabled": engine.precision == "bf16",
        "fp16.enabled": engine.precision == "fp16",
    }
    return zero.filled(engine.config, values)


PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _precision(config: Config) -> str:
    """Return what to train in: `bf16` and `fp16` where given, else a `dtype` that was given, else the hardware's."""
    bf16, fp16, dtype = config.training.get("bf16"), config.training.get("fp16"), config.model.dtype
    if fp16:
        return "fp16"
    if bf16 is not None:
        return "bf16" if bf16 else "fp32"
    if config.given("dtype") and dtype in PRECISIONS:
        return PRECISIONS[dtype]
    return machine.hardware_precision()


def batch(config: Config, rows: int | None = None) -> BatchPlan:
    """Return the batch arithmetic of one optimizer step."""
    accumulation = config.value("gradient_accumulation_steps")
    return derive(
        config.value("per_device_train_batch_size"),
        machine.world_size(),
        None if config.run.global_batch_size else accumulation,
        config.run.global_batch_size,
        rows,
    )


def repeats(recipe: Recipe, config: Config) -> int:
    """Return how often an epoch trains on a row of the data."""
    return math.prod(config.value(name) for name in recipe.repeats)


@contextmanager
def process_group(config: Config, engine: Engine, plan: BatchPlan) -> Iterator[Any]:
    """Join the ranks and yield the phase's training arguments; leave the group at the end."""
    import torch.distributed as dist

    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes"):
        config.training.setdefault("use_cpu", True)
    zero.forget_launch(os.environ)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # the arguments say it
    with open(os.devnull, "w") as nowhere, log.native_output_to(nowhere.fileno()):
        zero.join_ranks()
        args = config.training_arguments(
            deepspeed=engine.config,
            bf16=engine.precision == "bf16",
            fp16=engine.precision == "fp16",
            gradient_accumulation_steps=plan.accumulation,
        )
        dist.barrier()  # gloo connects, and prints about it, at the first collective
    yield args
    if dist.is_initialized():
        dist.destroy_process_group()


def open_home(config: Config, args: Any) -> RunFolder:
    """Open the run's folder under the rule for folders that are not empty; rank 0 first."""
    with args.main_process_first(local=False, desc="output folder"):
        return run_folder.open_folder(
            args.output_dir,
            resume=config.run.resume,
            overwrite=config.run.overwrite,
            first=args.process_index == 0,
        )


def clear_home(home: RunFolder, config: Config, start: Start, args: Any) -> None:
    """Remove the run that is replaced, now that everything the new one needs has been found; rank 0 does it."""
    used: list[tuple[str, str | Path | None]] = [
        ("model", start.source.folder),
        ("base model", start.source.weights.folder),
    ]
    used += [("tokenizer", start.tokenizer.folder), ("reference", config.run.reference_model_name_or_path)]
    used += [("data", entry.path) for entry in [*config.data.datasets, *config.data.eval_datasets]]
    for option, place in used:
        home.refuse_inside(option, place)
    if args.process_index == 0:
        home.clear()


# --- where the policy starts ------------------------------------------------------------------------------


@dataclass
class Start:
    """The policy's start: its source and digest, and a sentence that says why this one."""

    source: Source
    digest: str
    why: str
    tokenizer: Source


def starting_point(recipe: Recipe, config: Config, home: RunFolder) -> Start:
    """Find what the policy starts from: what is named, else the newest finished run of the phase before, else random.

    A resumed run starts from what its manifest names.
    """
    model = config.model
    home.check_same_run(recipe.name, machine.world_size())
    if home.resume_from is not None and "policy" in home.manifest:
        recorded = home.manifest["policy"]["name"]
        if model.model_name_or_path not in (None, recorded):
            log.warn(f"model_name_or_path {model.model_name_or_path} is not read: the run goes on from {recorded}")
        return _recorded_start(home.manifest["policy"], config)
    if model.config_name:
        where, why = source.resolve(model.config_name, random=True, option="config_name"), "random weights"
    elif model.model_name_or_path:
        where = source.resolve(model.model_name_or_path, revision=model.model_revision)
        why = _why_named(where)
        owner = run_folder.read_manifest(frozen_models.of_run(where.folder))
        if recipe.needs and not config.run.reference_model_name_or_path:
            frozen_models.refuse_checkpoint_of(recipe.name, where, owner)
    else:
        where, why = _previous_phase(recipe, config)
    return _start(where, why, config)


def _start(where: Source, why: str, config: Config) -> Start:
    tokenizer = config.model.tokenizer_name
    words = source.resolve(tokenizer, random=True, option="tokenizer_name") if tokenizer else where
    return Start(where, source.digest(where, seed=config.value("seed")), why, words)


def _recorded_start(policy: dict[str, Any], config: Config) -> Start:
    where = source.resolve(policy["name"], random=policy["random"], option="the policy this run started from:")
    start = _start(where, "the start of the run that goes on", config)
    if start.digest != policy["digest"]:
        raise UserError(
            f"{policy['name']}, which this run started from, has changed since (digest {start.digest[:12]}, was "
            f"{policy['digest'][:12]}); restore it, or start anew with --overwrite"
        )
    return start


def _why_named(where: Source) -> str:
    manifest = run_folder.read_manifest(frozen_models.of_run(where.folder))
    return f"{manifest['phase']} run" if manifest else "as configured"


def _previous_phase(recipe: Recipe, config: Config) -> tuple[Source, str]:
    output, asked = Path(config.value("output_dir")), config.run.starts_from
    if asked and Path(asked).is_dir():
        return source.resolve(asked, option="starts_from"), _why_named(source.resolve(asked))
    found = run_folder.predecessor(output, (asked,) if asked else recipe.starts_from)
    if found:
        return source.resolve(str(found[0])), f"the finished {found[1]} run"
    if asked:
        raise UserError(
            f"starts_from {asked!r}: no finished {asked} run beside {output}; run it first, or name a folder"
        )
    log.warn(
        f"no model_name_or_path and no finished {' or '.join(recipe.starts_from)} run beside {output}: starting the "
        "embedded model from random weights, which shows that things run, not that they help"
    )
    return source.resolve("builtin:tiny", random=True), "random weights"


def tokenizer(start: Start, config: Config) -> Any:
    """Return the tokenizer of the run, with the tokens and the chat template the configuration names."""
    chosen = load.load_tokenizer(start.tokenizer, trust_remote_code=config.value("trust_remote_code"))
    names = {"eos_token": config.training.get("eos_token"), "pad_token": config.training.get("pad_token")}
    for kind, token in names.items():
        if token is not None:
            if token not in chosen.get_vocab():
                raise UserError(
                    f"{kind} {token!r} is not in the vocabulary of {start.tokenizer.name}; name a token that is"
                )
            setattr(chosen, kind, token)
    if template := config.training.get("chat_template_path"):
        chosen.chat_template = _chat_template(template)
    return chosen


def _chat_template(place: str) -> str:
    path = Path(place).expanduser()
    if path.is_file():
        return path.read_text()
    other = load.load_tokenizer(source.resolve(place, random=True, option="chat_template_path"))
    if not other.chat_template:
        raise UserError(f"chat_template_path {place!r}: its tokenizer has no chat template; give a .jinja file")
    return str(other.chat_template)


# --- the data ---------------------------------------------------------------------------------------------


def rows(recipe: Recipe, config: Config, words: Any, args: Any) -> Prepared:
    """Load, render and tokenise the data: the first rank of each machine works, the others open what it stored."""
    import torch.distributed as dist

    wanted = Wanted(
        phase=recipe.name,
        train=[entry.spec() for entry in config.data.datasets],
        eval=[entry.spec() for entry in config.data.eval_datasets],
        test_split_size=config.data.test_split_size,
        evaluate=args.eval_strategy != "no",
        seed=args.seed if args.data_seed is None else args.data_seed,
        options=_token_options(recipe, config),
        cache=run_folder.cache_folder(os.environ),
    )
    mine = prepare(wanted, words) if args.local_process_index == 0 else None
    accounts = [mine.accounts() if mine else None]
    dist.broadcast_object_list(accounts, src=0)
    prepared = mine or reopen(accounts[0] or {}, wanted.cache)
    for split in filter(None, (prepared.train, prepared.eval)):
        split.rows = recipe.trainer_class().complete(split.rows, args)
    return prepared


def _token_options(recipe: Recipe, config: Config) -> TokeniseOptions:
    given = {"max_length": config.value("max_length")}
    if recipe.writes and given["max_length"] is not None:  # what is written needs room behind the prompt
        given["max_length"] -= config.value(recipe.writes) - 1
    for name in ("truncation_mode", "completion_only_loss", "assistant_only_loss"):
        if name in config.training:
            given[name] = config.training[name]
    if recipe.head == "score":
        given["truncation_mode"] = "drop"  # as TRL: a completion without its end is not what was judged
    return TokeniseOptions(**given, packing=recipe.packed)


# --- the models -------------------------------------------------------------------------------------------


def policy(recipe: Recipe, start: Start, words: Any, config: Config, args: Any) -> Any:
    """Load the policy, sharded as it is built under ZeRO-3, with LoRA where that is asked for.

    What is "auto" in the engine's configuration and follows from the model's size is filled in.
    """
    loaded = _policy(recipe, start, words, config, args)
    if recipe.values:
        loaded = _with_values(loaded, start, words, config, args)
    load.check_vocabulary(loaded, words, start.tokenizer.name)
    zero.set_leaf_modules(loaded, moe.sparse_blocks, args.hf_deepspeed_config.config)
    zero.fill_sizes(args.hf_deepspeed_config.config, getattr(loaded.config, "hidden_size", None))
    return loaded


def _policy(recipe: Recipe, start: Start, words: Any, config: Config, args: Any) -> Any:
    fields = config.model
    if fields.use_peft and start.source.weights.random:
        raise UserError(
            "use_peft needs a model to adapt, and this run would start from random weights that nobody keeps; give "
            "model_name_or_path, or run the phase before"
        )
    overrides = fields.config_overrides if isinstance(fields.config_overrides, dict) else None
    ending = {"head": recipe.head, "pad_token_id": words.pad_token_id}
    loading = {**_loading(config, args), **ending, "overrides": overrides}
    if not fields.use_peft:
        return load.load_policy(start.source, **loading)
    base = load.load_policy(start.source.weights, **loading)
    if start.source.is_adapter:
        copy = frozen_models.REFERENCE_ADAPTER if "reference" in recipe.needs else None
        return lora.load_adapter(base, start.source, head=recipe.head, frozen_copy=copy)
    return lora.add_lora(base, fields, head=recipe.head)


def _with_values(policy: Any, start: Start, words: Any, config: Config, args: Any) -> Any:
    """Return the policy with its value function: an adapter on one base under LoRA, else a model of its own."""
    named = args.value_model_name_or_path
    if config.model.use_peft:
        if named:
            raise UserError("value_model_name_or_path and use_peft: the value function is an adapter then; drop one")
        return policy_and_value.shared(policy, copy_start=start.source.is_adapter)
    where = source.resolve(named, option="value_model_name_or_path") if named else start.source
    made = policy_and_value.separate(policy, where, pad_token_id=words.pad_token_id, **_loading(config, args))
    load.check_vocabulary(made.value, words, start.tokenizer.name)  # it reads the policy's tokens
    return made


def _loading(config: Config, args: Any) -> dict[str, Any]:
    import torch

    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return {
        "dtype": dtype,
        "seed": args.seed,
        "attn_implementation": config.model.attn_implementation,
        "trust_remote_code": config.value("trust_remote_code"),
    }


def frozen(
    recipe: Recipe, start: Start, policy: Any, words: Any, rows: Prepared, config: Config, args: Any, home: RunFolder
) -> dict[str, frozen_models.Frozen]:
    """Resolve and load the frozen models the recipe needs, each from its own source.

    A `cached` reference lays its log-probabilities beside `rows`.
    """
    splits = [rows.train, *([rows.eval] if rows.eval else [])]
    site = frozen_models.Site(args.hf_deepspeed_config.config, _loading(config, args), policy, words, splits)
    recorded = home.manifest.get("frozen", {}) if home.resume_from else {}
    held: dict[str, frozen_models.Frozen] = {}
    if "reference" in recipe.needs:
        held["reference"] = frozen_models.reference(
            config, args, start.source, start.digest, site, recorded, home.resume_from
        )
    if "reward" in recipe.needs:
        base = start.source.weights if config.model.use_peft else None
        held |= frozen_models.rewards(args, site, recorded, base=base)
    return held


# --- the trainer ------------------------------------------------------------------------------------------


def derived(
    recipe: Recipe, rows: Prepared, policy: Any, config: Config, args: Any, home: RunFolder
) -> dict[str, tuple[Any, str]]:
    """Set the options that follow from the data or the machine, and return them with the reason for each.

    A run that goes on takes them from its manifest.
    """
    from align_kit.trainers.base import Known

    if home.resume_from is not None and "derived" in home.manifest:
        decided = {name: (value, why) for name, (value, why) in home.manifest["derived"].items()}
    else:
        known = Known(rows.train.rows, policy, config.given, _checker(config), _finished_beside(home))
        decided = recipe.trainer_class().derive(args, known)
    for name, (value, _) in decided.items():
        setattr(args, name, value)
    return decided


def _checker(config: Config) -> str | None:
    """Return the checker that the first card of the training data names, as a dotted path."""
    named = [entry.path.removeprefix(CARD) for entry in config.data.datasets if entry.path.startswith(CARD)]
    return next((checker for name in named if (checker := cards.load_card(name).block.checker)), None)


def _finished_beside(home: RunFolder) -> Callable[[str], Path | None]:
    def newest(phase: str) -> Path | None:
        found = run_folder.predecessor(home.path, (phase,))
        return found[0] if found else None

    return newest


def trainer(
    recipe: Recipe,
    policy: Any,
    words: Any,
    rows: Prepared,
    frozen: dict[str, Any],
    config: Config,
    args: Any,
    home: RunFolder,
) -> Any:
    """Return the phase's trainer with our progress and metrics in place of transformers' printer."""
    from transformers import EarlyStoppingCallback, PrinterCallback

    from align_kit.telemetry.progress import Fingerprints, MetricsFile, Progress

    made = recipe.trainer_class()(
        model=policy,
        args=args,
        train_dataset=rows.train.rows,
        eval_dataset=rows.eval.rows if rows.eval else None,
        processing_class=words,
        frozen=frozen,
    )
    made.remove_callback(PrinterCallback)
    made.add_callback(MetricsFile(home.path / run_folder.METRICS))
    made.progress = Progress(recipe.name)
    made.add_callback(made.progress)
    if frozen:
        made.add_callback(Fingerprints(made.check_frozen, config.run.fingerprint_steps))
        made.add_callback(frozen_models.Following(made.move_frozen))
    if config.run.early_stopping_patience:
        made.add_callback(EarlyStoppingCallback(config.run.early_stopping_patience))
    return made

"""From a configuration to what the planner knows of its run, without reading a weight: `describe`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from align_kit import zero
from align_kit.config import BatchPlan, Config
from align_kit.config.quantities import parse_bytes
from align_kit.plan.batches import Batches, Row, Written
from align_kit.plan.facts import EngineFacts, Held, Micro, Placement, Precision, Rollout, Run
from align_kit.plan.shape import meta_frozen, meta_policy

if TYPE_CHECKING:
    from align_kit.models.source import Source


@dataclass(frozen=True)
class Data:
    """What is known of the data: tokenised rows or a sample of them, and the phase's way from rows to a batch."""

    rows: Sequence[Row]
    collate: Callable[[Sequence[Row]], Mapping[str, Any]]
    longest: Row | None = None  # of all rows, where `rows` is a sample
    held_out: Sequence[Row] = ()  # rows to evaluate on, the longest first where they are a sample
    notes: tuple[str, ...] = ()  # what was assumed, in words


@dataclass(frozen=True)
class Site:
    """On what a run is to be planned: the engine's configuration, the precision, the batch and how many nodes."""

    engine: Mapping[str, Any]
    precision: Precision
    batch: BatchPlan  # with rows, where their number is known: those of an epoch
    nodes: int = 1
    settled: bool = False  # no other ZeRO stage than the engine's is of interest


@dataclass(frozen=True)
class Described:
    """A run, and the micro-batches it would draw at another size."""

    run: Run
    batches: Batches = field(repr=False)


class Asked:
    """A configuration under the attribute names of its training arguments, for code that takes those."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        value = asked(self._config, name, missing := object())
        if value is missing:
            raise AttributeError(name)
        return None if value == "auto" else value


def asked(config: Config, name: str, default: Any = None) -> Any:
    """Return the resolved value of a key, `default` where the phase has no such key."""
    try:
        return config.value(name)
    except KeyError:
        return default


def describe(
    recipe: Any,
    config: Config,
    source: Source,
    data: Data,
    site: Site,
    *,
    value_source: Source | None = None,
    frozen_copy: str | None = None,
    rewards: Mapping[str, Source] | None = None,
) -> Described:
    """Return the run that `config` asks for, as yet without frozen models of its own (see `held`).

    `recipe` is the phase's row of the registry; for `value_source`, `frozen_copy` and `rewards` see
    `shape.meta_policy`.
    """
    module, policy = meta_policy(
        recipe, config, source, precision=site.precision, value_source=value_source, frozen_copy=frozen_copy,
        rewards=rewards, stage=_stage(site.engine) if site.settled else None,
    )  # fmt: skip
    batches = _batches(recipe, config, data, site, _mode(module, config))
    accumulation = _accumulation(recipe, site.batch)
    mean, worst = batches.sized(site.batch.per_device, accumulation)
    steps = steps_of(config, site.batch, batches.written)
    run = Run(
        phase=recipe.name,
        unit=recipe.unit,
        policy=policy,
        engine=engine_facts(site.engine, site.precision, getattr(module.config, "hidden_size", policy.hidden)),
        optimizer=_optimizer(config, site.engine),
        mean=mean,
        worst=worst,
        per_device=site.batch.per_device,
        accumulation=accumulation,
        world_size=site.batch.world_size,
        steps=steps,
        forward=batches.mode,
        checkpointing=recomputes(config),
        evaluated=batches.evaluated(rows) if (rows := _evaluated(recipe, config)) else None,
        per_device_eval=rows,
        rollout=_rollout(recipe, config, data.rows, site.batch),
        nodes=site.nodes,
        checkpoints_kept=asked(config, "save_total_limit") if saves(config) else 0,
        checkpoints_made=_checkpoints(config, steps),
        checkpoints_lasting=_lasting(config, steps),
        checkpoints_limit=parse_bytes(limit) if (limit := config.run.save_bytes_limit) else None,
        use_peft=config.model.use_peft,
        gated=recipe.head != "score" or source.head == "lm",
        notes=data.notes,
    )
    return Described(run, batches)


def held(
    config: Config,
    source: Source,
    role: str,
    placement: Placement,
    *,
    precision: Precision,
    head: Literal["lm", "score"] = "lm",
) -> Held:
    """Return a frozen model as the planner knows it; one that lives on the policy's base has no weights of its own."""
    if placement in ("adapter", "shared"):
        return Held(role, placement)
    shape = meta_frozen(config, source, precision=precision, head=head, quantised=placement == "quantised")[1]
    return Held(role, placement, shape)


def _accumulation(recipe: Any, batch: BatchPlan) -> int:
    """Return the micro-batches of a step: an epoch that has fewer ends in a step that is shorter."""
    if batch.rows is None or recipe.writes:
        return batch.accumulation
    return min(batch.accumulation, max(1, -(-batch.rows // (batch.per_device * batch.world_size))))


# --- the parts --------------------------------------------------------------------------------------------------------


def engine_facts(config: Mapping[str, Any], precision: Precision, hidden: int) -> EngineFacts:
    """Return what decides on bytes and traffic of a DeepSpeed configuration, "auto" sizes filled in as a run does.

    What the configuration leaves out has DeepSpeed's own default.
    """
    zero_part = config.get("zero_optimization", {})
    stage, automatic = _stage(config), zero.sizes(hidden)

    def size(key: str, default: int) -> int:
        value = zero_part.get(key, default)
        return int(automatic.get(key, default) if value == "auto" else value)

    overlap = zero_part.get("overlap_comm")
    return EngineFacts(
        stage=stage,
        precision=precision,
        offload_optimizer=_device(zero_part, "offload_optimizer"),
        offload_param=_device(zero_part, "offload_param"),
        reduce_bucket=size("reduce_bucket_size", EngineFacts.reduce_bucket),
        allgather_bucket=size("allgather_bucket_size", EngineFacts.allgather_bucket),
        prefetch_bucket=size("stage3_prefetch_bucket_size", EngineFacts.prefetch_bucket),
        persistence_threshold=size("stage3_param_persistence_threshold", EngineFacts.persistence_threshold),
        max_live=size("stage3_max_live_parameters", EngineFacts.max_live),
        max_reuse=size("stage3_max_reuse_distance", EngineFacts.max_reuse),
        contiguous_gradients=bool(zero_part.get("contiguous_gradients", True)),
        overlap_comm=stage == 3 if overlap is None else bool(overlap),
    )


def _stage(config: Mapping[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _device(zero_part: Mapping[str, Any], part: str) -> Any:
    return (zero_part.get(part) or {}).get("device") or "none"


def _optimizer(config: Config, engine: Mapping[str, Any]) -> str:
    """Return the optimizer's name: the engine's own where its configuration brings one."""
    own = engine.get("optimizer", {}).get("type")
    return str(own).lower() if own else str(asked(config, "optim", "adamw_torch"))


def recomputes(config: Config) -> bool:
    """Tell whether activations are recomputed; transformers has an old and a new name for it."""
    said = asked(config, "activation_checkpointing")
    return bool(asked(config, "gradient_checkpointing") if said is None else said)


def _mode(module: Any, config: Config) -> Any:
    """Return how batches will be computed, by the rule the run itself decides by."""
    from align_kit.forward.choose import PLAIN, CannotWalk, choose

    trains, noise = not asked(config, "disable_dropout", False), asked(config, "neftune_noise_alpha")
    try:
        return choose(module, trains=trains, asked=config.run.forward, noise=noise).mode
    except CannotWalk:  # the run will say so itself
        return PLAIN


def _batches(recipe: Any, config: Config, data: Data, site: Site, mode: Any) -> Batches:
    written = None
    if recipe.writes:
        written = Written(
            config.value("num_generations"), config.value(recipe.writes), config.value("num_mini_batches")
        )
    return Batches(
        rows=data.rows,
        collate=data.collate,
        mode=mode,
        world_size=site.batch.world_size,
        whole=recipe.head == "score",
        longest=data.longest,
        held_out=data.held_out,
        written=written,
    )


def _evaluated(recipe: Any, config: Config) -> int:
    """Return the rows of a micro-batch of the evaluations; 0 where there are none, or they write as rollouts do."""
    evaluates = asked(config, "eval_strategy", "no") != "no" and not recipe.writes
    return int(config.value("per_device_eval_batch_size")) if evaluates else 0


def _rollout(recipe: Any, config: Config, rows: Sequence[Row], batch: BatchPlan) -> Rollout | None:
    if not recipe.writes:
        return None
    parts = config.value("num_mini_batches")
    lengths = [len(row["prompt_ids"]) for row in rows]
    completions = batch.per_device * batch.accumulation * parts
    copied = config.value("rollout_placement") == "copied"  # `auto` gathers: both take as long, a copy keeps memory
    return Rollout(
        completions=completions,
        batch_size=min(config.value("rollout_batch_size"), completions),
        prompt_tokens=sum(lengths) / len(lengths),
        response_tokens=config.value(recipe.writes),
        longest_prompt=max(lengths),
        placement="copied" if copied else "gathered",
        score_batch_size=config.value("score_batch_size") or batch.per_device,
        steps=config.value("num_ppo_epochs") * parts,
    )


def steps_of(config: Config, batch: BatchPlan, written: Written | None = None) -> int:
    """Return the optimizer steps of a run: `max_steps`, or what its epochs take; 1 where nothing tells."""
    if config.value("max_steps") > 0:
        return int(config.value("max_steps"))
    epochs = float(config.value("num_train_epochs"))
    if batch.rows is None:
        return 1
    if written is not None:  # an epoch writes to every prompt once, and trains on what is written several times
        return max(1, round(epochs * batch.rows / batch.global_batch))
    return math.ceil((batch.steps_per_epoch or 1) * epochs)


def cut_is_free(config: Config) -> bool:
    """Tell whether the loss of a step is the same however its global batch is cut into micro-batches."""
    from align_kit.losses import BATCH_COUPLED

    named = asked(config, "loss_type") or []
    losses = {named} if isinstance(named, str) else set(named)
    coupled = BATCH_COUPLED.keys() - {"sft"}  # which is told the tokens of the whole step
    return not (losses & coupled or asked(config, "router_aux_loss_coef"))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def saves(config: Config) -> bool:
    """Tell whether the run makes checkpoints."""
    return config.value("save_strategy") != "no" or bool(config.run.save_minutes or config.run.save_before)


def _checkpoints(config: Config, steps: int) -> int:
    """Return how many checkpoints the run makes; of those by the clock, as many as lie there at a time."""
    strategy = config.value("save_strategy")
    made = int(saves(config))
    if strategy == "steps":
        made = steps // _stride(config, steps)
    elif strategy == "epoch":
        made = math.ceil(float(config.value("num_train_epochs")))
    by_clock = (asked(config, "save_total_limit") or 0) + 1 if config.run.save_minutes else 0
    return max(made, by_clock)


def _lasting(config: Config, steps: int) -> int:
    """Return how many checkpoints the rule keeps beside the newest: milestones, and the best by metric."""
    every = config.run.save_milestone_steps
    stride = _stride(config, steps) if config.value("save_strategy") == "steps" else 1
    return (steps // math.lcm(every, stride) if every else 0) + bool(asked(config, "load_best_model_at_end"))


def _stride(config: Config, steps: int) -> int:
    """Return the steps from one checkpoint to the next; below 1, `save_steps` is a share of all."""
    every = config.value("save_steps")
    return int(every if every >= 1 else max(1, math.ceil(every * steps)))


def with_batch(run: Run, micros: tuple[Micro, Micro], per_device: int, accumulation: int) -> Run:
    """Return the run at another micro-batch: `micros` are the mean and the worst one of it."""
    mean, worst = micros
    rollout = run.rollout
    if rollout is not None and rollout.score_batch_size == run.per_device:
        rollout = replace(rollout, score_batch_size=per_device)
    return replace(run, mean=mean, worst=worst, per_device=per_device, accumulation=accumulation, rollout=rollout)

"""What a run says and leaves behind: its manifest, header and footer, and the verified final model."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

from align_kit import frozen as frozen_models
from align_kit import log, machine, run_folder
from align_kit.config import BatchPlan, Config
from align_kit.data.prepare import Prepared
from align_kit.forward.choose import Choice
from align_kit.forward.door import door_of
from align_kit.registry import Recipe
from align_kit.run_folder import RunFolder
from align_kit.stages import Engine, Planned, Start, reporting
from align_kit.telemetry import spent
from align_kit.telemetry.clock import clock


def record(
    recipe: Recipe,
    config: Config,
    engine: Engine,
    home: RunFolder,
    start: Start,
    rows: Prepared,
    frozen: dict[str, frozen_models.Frozen],
    forward: Choice,
    derived: dict[str, tuple[Any, str]],
    plan: BatchPlan,
    planned: Planned,
    args: Any,
) -> None:
    """Write the manifest of the run that begins: everything a result depends on."""
    if args.process_index != 0:
        return
    home.write(
        format=1,
        phase=recipe.name,
        status="running",
        config=config.as_dict(),
        origin=config.origin,
        versions=machine.versions(),
        git=machine.git_revision(),
        seed=args.seed,
        world_size=plan.world_size,
        batch=asdict(plan),
        plan=planned.as_dict(),
        engine=args.hf_deepspeed_config.config,
        asked_engine=engine.config,
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        data=rows.accounts(),
        policy={"name": start.source.name, "digest": start.digest, "random": start.source.random, "why": start.why},
        frozen={role: held.identity.as_dict() for role, held in frozen.items()},
        forward=asdict(forward),
        derived=derived,
        changes=[*home.manifest.get("changes", []), *({**one, "step": home.step} for one in home.changes)],
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def _small_numbers(config: Config) -> str:
    """Say so where a user's own model would train with the numbers of the embedded one; empty otherwise."""
    recipe = f"recipes/{config.phase}.yaml"
    numbers = ("learning_rate", "max_length", "max_steps", "per_device_train_batch_size")
    theirs = [name for name in numbers if recipe in config.origin.get(name, "")]
    if config.origin.get("model_name_or_path") != "command line" or not theirs:
        return ""
    return f"{', '.join(theirs)}: from {recipe}, made for the small embedded model; give your own with --config"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def header(
    recipe: Recipe,
    config: Config,
    engine: Engine,
    start: Start,
    rows: Prepared,
    frozen: dict[str, frozen_models.Frozen],
    forward: Choice,
    derived: dict[str, tuple[Any, str]],
    plan: BatchPlan,
    planned: Planned,
    args: Any,
    home: RunFolder,
) -> None:
    """Say what was derived and why, before the first step."""
    ranks = f"{plan.world_size} rank{'s' * (plan.world_size != 1)}"
    where = f"{ranks} on {machine.device_name()}"
    log.say(f"align_kit {recipe.name}: {where}, {engine.precision}, ZeRO-{engine.stage} ({engine.label})")
    bits = f", in 4 bits ({config.model.bnb_4bit_quant_type})" if config.model.load_in_4bit else ""
    log.say(f"  policy     {start.source.name} ({start.why}, digest {start.digest[:12]}){bits}")
    for role, held in frozen.items():
        who = held.identity
        log.say(f"  {role:<10} {who.name} (digest {who.digest[:12]}), {who.placement}: {who.reason}")
    splits = [rows.train, *([rows.eval] if rows.eval else [])]
    for title, split in zip(("data", "eval"), splits, strict=False):
        log.say(f"  {title:<10} {split.sentence()}")
    log.say(f"  labels     {rows.labels}")
    for line in dict.fromkeys(line for split in splits for line in split.mixture()):
        log.say(f"  mixture    {line}")
    if weights := rows.train.weights():
        log.say(f"  weights    {weights}")
    for line in dict.fromkeys(line for split in splits for line in split.warnings):
        log.warn(line)
    log.say(f"  forward    {forward.mode}: {forward.why}")
    steps = args.max_steps if args.max_steps > 0 else math.ceil((plan.steps_per_epoch or 1) * args.num_train_epochs)
    epochs = steps / (plan.steps_per_epoch or 1)
    log.say(
        f"  batch      {plan.sentence(recipe.unit)}; {steps} steps, {epochs:.3g} epochs of {plan.rows} {recipe.unit}"
    )
    log.say(f"  plan       {planned.line()}")
    for name, (value, why) in derived.items():
        log.say(f"  {'derived':<10} {name} {_shown(value)}: {why}")
    if note := _small_numbers(config):
        log.say(f"  note       {note}")
    resumed = f", going on from {home.resume_from}" if home.resume_from else ""
    log.say(f"  output     {home.path}{resumed}")
    for change in home.changes:
        log.say(f"  changed    {change['line']}, from step {home.step} on")


@spent.during("final save")
def save(trainer: Any, rows: Prepared, home: RunFolder) -> Any:
    """Store and verify the final model; a frozen model that changed fails the run here at the latest."""
    from align_kit.trainers.save import save_final

    trainer.check_frozen("at the end of training")
    _measure(trainer, home)
    probe = trainer.collator(trainer.processing_class, trainer.args)([rows.train.rows[0]])
    return save_final(trainer, home.path, probe)


def _measure(trainer: Any, home: RunFolder) -> None:
    """Let the manifest keep what training took, before its state goes; all ranks call it."""
    from align_kit.trainers.measured import measured

    found = measured(trainer)
    if trainer.args.process_index == 0:
        home.write(measured=found)


def _computed(trainer: Any) -> str:
    """Tell which share of the tokens had to be computed, where not all had."""
    door = door_of(trainer.model)
    percent = round(100 * door.computed / max(1, door.given))
    return f" ({percent}% of them computed)" if door.walked and percent < 100 else ""


def stopped(trainer: Any, home: RunFolder) -> None:
    """Note that the run was asked to stop, and say from where it goes on; there is no final model yet."""
    step, why = trainer.state.global_step, trainer.stopped_early
    _measure(trainer, home)
    if trainer.args.process_index == 0:
        home.write(status=run_folder.STOPPED, stopped={"step": step, "why": why})
    unsaved = "" if trainer.saver.committed == step else ", not saved"
    log.say(f"stopped at step {step} ({why}){unsaved}: go on with --resume")
    reporting.write(home)


def footer(trainer: Any, saved: Any, home: RunFolder, seconds: float) -> None:
    """Close the manifest and say what came out and where it is."""
    if saved is None:
        return
    latest = {name: value for name, value in trainer.progress.latest.items() if isinstance(value, float)}
    home.write(
        status=run_folder.FINISHED,
        finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        seconds=round(seconds, 1),
        steps=trainer.state.global_step,
        saves={"count": len(trainer.saver.held), "held_seconds": round(sum(trainer.saver.held), 3)},
        frozen_checks=trainer.frozen_checks,
        result={"digest": saved.digest, "bytes": saved.size, "logit_gap": saved.logit_gap, "last": latest},
    )
    shown = [f"{name} {latest[name]:.4f}" for name in trainer.headline if name in latest]
    speed = f"{trainer.progress.tokens_per_second():,.0f} tokens/s{_computed(trainer)}"
    log.say(f"done in {clock(seconds)}, {trainer.state.global_step} steps: {', '.join([*shown, speed])}")
    for line in trainer.closing_lines():
        log.say(line)
    if page := reporting.write(home):
        log.say(f"report: {page}")
    log.say(
        f"saved and verified: {home.path} ({saved.size / 1e6:.1f} MB, digest {saved.digest[:12]}, re-opened logits "
        f"within {saved.logit_gap:.1g})"
    )

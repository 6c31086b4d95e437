"""`align-kit plan <recipe>`: what a run would take on given hardware, and the ways to carry it out that fit it best."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from align_kit import log, machine, registry, zero
from align_kit.config import BatchPlan, Config, command_line, derive, load
from align_kit.errors import UserError, first_line
from align_kit.registry import Recipe
from align_kit.resources import folder

if TYPE_CHECKING:
    from align_kit.models.source import Source
    from align_kit.plan.hardware import Hardware
    from align_kit.plan.show import Answer

USAGE = """usage: align-kit plan <recipe> [--config a.yaml ...] [--key value ...]
           [--gpu NAME] [--gpus N] [--nodes N] [--mfu SHARE] [--hardware my.yaml] [--prices my.yaml]
           [--json plan.json] [--html plan.html] [--write best.yaml] [--force]

Prints what the run would take on each rank, of the host, of the disk and of the network, how long it would take and
cost, and which ways to carry it out fit with the least time. No weights are read: --config_name FOLDER plans a model
of which only config.json is there. Exit code 2 where the run cannot fit as configured, unless --force.

  --gpu NAME       what to plan for: {known}; this machine where none is named
  --gpus N         devices of each node, one rank each (1)
  --nodes N        nodes (1)
  --mfu SHARE      share of the peak rate that training reaches, where you know it better
  --hardware FILE  machines of your own, laid over align_kit's; align_kit/plan/hardware.yaml shows the shape
  --prices FILE    $ per device and hour, laid over align_kit's; align_kit/plan/prices.yaml
  --json FILE      the whole answer as JSON
  --html FILE      the same as a page, with a picture of the memory
  --write FILE     the best way as YAML; run it by naming FILE after the other files of --config"""
OPTIONS = {"gpus": int, "nodes": int, "mfu": float}  # the others are words


@dataclass(frozen=True)
class Options:
    """What `align-kit plan` is asked beside the configuration of the run."""

    gpu: str | None = None
    gpus: int = 1
    nodes: int = 1
    mfu: float | None = None
    hardware: str | None = None
    prices: str | None = None
    json: str | None = None
    html: str | None = None
    write: str | None = None


def planner(words: Sequence[str]) -> int:
    """Plan the run that a command line describes, print the answer, and return 0.

    Raises `UserError` for a mistake in the command line, the configuration or the model, and, once everything has been
    said and written, where the run cannot fit as configured and is not forced.
    """
    if not words or {"-h", "--help"} & set(words):
        from align_kit.plan.hardware import table

        print(USAGE.format(known=", ".join(table())))
        return 0
    log.quiet()
    recipe = registry.get(words[0])
    options, rest = parted(words[1:])
    config = load(recipe, rest, defaults=folder("recipes") / f"{recipe.name}.yaml")
    found = answer(recipe, config, options)
    _tell(found, options)
    refused = refusal(found, config, here=not options.gpu)
    if refused and not config.run.force:
        raise UserError(refused)
    return 0


def parted(words: Sequence[str]) -> tuple[Options, list[str]]:
    """Return what is said to the planner, and the words that are the run's own.

    Raises `UserError` for a value that is none.
    """
    given, rest = command_line.parted(words, {one.name for one in fields(Options)})
    return Options(**{name: _value(name, values) for name, values in given.items()}), rest


def _value(name: str, words: Sequence[str]) -> Any:
    kind = OPTIONS.get(name, str)
    try:
        (word,) = words
        value = kind(word)
        if kind is not str and not value > 0:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--{name} {' '.join(words) or '(nothing)'}: give one {'positive number' if kind is not str else 'word'}"
        ) from None
    return value


# --- the answer -------------------------------------------------------------------------------------------------------


def answer(recipe: Recipe, config: Config, options: Options, start: Source | None = None) -> Answer:
    """Return the plan of the run as configured, the ways that fit, and what they were compared by.

    `start` is what the policy starts from, where that is known.
    """
    from align_kit.plan.describe import Site
    from align_kit.plan.show import Answer
    from align_kit.stages import alone, sampled
    from align_kit.stages import plan as stage

    machine.choose_accelerator(os.environ)
    device = _device(options)
    engine, _ = zero.choose(config.training.get("deepspeed"), zero.Launch())
    start = start or alone.start_of(recipe, config)
    ranks = options.gpus * options.nodes
    data, rows = sampled.sample(recipe, config, start, _batch(recipe, config, ranks, None).global_batch)
    batch = _batch(recipe, config, ranks, rows)
    site = Site(engine, stage.precision_on(config, device), batch, options.nodes)
    limits = stage.limits_of(device, options.gpus)
    free = None if limits.one else limits.device
    try:
        described = stage.described(recipe, config, start, data, site, find=_find, free=free)
    except (AttributeError, NotImplementedError, KeyError) as error:  # of a family that no plan was made for
        raise UserError(
            f"{start.name} cannot be planned ({type(error).__name__}: {first_line(error)}); it may train all the same"
        ) from None
    choice = stage.choice(recipe, config, described, site, device, limits)
    return Answer(recipe.name, recipe.unit, start.name, device, limits, batch, choice)


def refusal(found: Answer, config: Config, here: bool = True) -> str | None:
    """Return the line about a run that cannot fit as configured, `None` where it can.

    Its disk is looked at where it would run on this machine.
    """
    from align_kit.stages.disk import without_room

    if (line := found.refusal()) or not here:
        return line
    return without_room(found.choice.configured.plan.run, config, found.model)


def _device(options: Options) -> Hardware:
    """Return one rank's device; the ranks of this machine's CPU share its memory."""
    from align_kit.plan import hardware

    found = hardware.named(options.gpu or "here", hardware_file=options.hardware, prices_file=options.prices)
    if found.kind == hardware.CPU:
        share = found.memory // options.gpus
        found = replace(found, memory=share, host_memory=share)
    return found.with_mfu(options.mfu) if options.mfu else found


def _find(name: str, option: str) -> Source:
    from align_kit.models import source

    return source.configuration(name, option=option)


def _batch(recipe: Recipe, config: Config, world: int, rows: int | None) -> BatchPlan:
    from align_kit.stages.engine import repeats

    total = config.run.global_batch_size
    accumulation = None if total else config.value("gradient_accumulation_steps")
    counted = None if rows is None else max(world, rows * repeats(recipe, config))
    return derive(config.value("per_device_train_batch_size"), world, accumulation, total, counted)


# --- what is said and written -----------------------------------------------------------------------------------------


def _tell(found: Answer, options: Options) -> None:
    """Print the answer, and write the files that were asked for."""
    from align_kit.plan import show
    from align_kit.report.page import write_whole

    print(show.text(found))
    if options.json:
        write_whole(Path(options.json), json.dumps(found.as_dict(), indent=2) + "\n")
    if options.html:
        show.write_page(found, options.html)
    if options.write:
        write_whole(Path(options.write), overlay(found))
    for place in filter(None, (options.json, options.html, options.write)):
        print(f"written: {place}")


def overlay(found: Answer) -> str:
    """Return the best way as YAML for `--config`, to be named after the files that it changes.

    Raises `UserError` where no way fits.
    """
    best = found.choice.best
    if best is None:
        raise UserError("--write: no way to carry out the run fits; take more or other devices, or a smaller model")
    lines = [f"# {line}" for line in (f"{found.phase} of {found.model}: the best way on {found.ranks}", *found.why())]
    return "\n".join([*lines, yaml.safe_dump(dict(best.changes), sort_keys=False) if best.changes else "{}\n"])

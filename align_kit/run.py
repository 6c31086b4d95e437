"""One run of one phase, whatever the method: configure, check, load, train, save, report."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align_kit import failures, imports, log, machine, occupied, registry, supervised
from align_kit.config import Config, dry_run_text, load
from align_kit.registry import Recipe
from align_kit.resources import folder
from align_kit.telemetry import spent


def run(name: str, config: str | Path | None = None, argv: Sequence[str] | None = None) -> int:
    """Run the recipe `name` and return the exit code: 0, 75 where it was asked to stop, 2 after a user's mistake.

    `config` is the YAML read where the command line (`argv`, by default the process's) names none; by default
    `recipes/<name>.yaml`.
    """
    log.quiet()
    spent.begin()
    supervised.answer()
    with failures.in_one_line() as outcome:
        machine.prepare_process(os.environ)
        recipe = registry.get(name)
        defaults = Path(config) if config else folder("recipes") / f"{recipe.name}.yaml"
        settings = load(recipe, list(sys.argv[1:] if argv is None else argv), defaults=defaults)
        outcome.code = execute(recipe, settings)
    return outcome.code


def execute(recipe: Recipe, config: Config) -> int:
    """Carry out a resolved configuration and return the exit code; raises `UserError` for what the user can mend."""
    with imports.uncollected():
        from align_kit import narrate, stages

    engine = stages.start(config)
    plan = stages.batch(config)
    if config.run.dry_run:
        log.say(dry_run_text(config, plan, stages.shown(config, engine, plan), unit=recipe.unit))
        return 0
    began = time.monotonic()
    with contextlib.ExitStack() as ending:
        args = ending.enter_context(stages.process_group(config, engine, plan))
        recipe.trainer_class().check(args)
        ending.callback(occupied.release, Path(args.output_dir).expanduser())
        home = stages.open_home(recipe, config, engine, plan, args)
        ending.enter_context(stages.of_a_failure(home))
        ending.enter_context(home.telling_failure())
        ending.enter_context(failures.naming_memory(plan))
        ending.enter_context(failures.naming_packages())
        ending.enter_context(stages.naming_a_full_disk(home.path))
        start = stages.starting_point(recipe, config, home)
        ending.enter_context(stages.reading_sources(config, start, args))
        tokenizer = stages.tokenizer(start, config)
        rows = stages.rows(recipe, config, start, tokenizer, args)
        stages.keep_data(config, rows, home)
        plan = stages.batch(config, rows=len(rows.train.rows) * stages.repeats(recipe, config))
        planned = stages.planned(recipe, config, engine, start, tokenizer, rows, plan, home)
        ending.enter_context(stages.cut_anew(config, home, args))
        policy = stages.policy(recipe, start, tokenizer, config, args)
        derived = stages.derived(recipe, rows, policy, config, args, home)
        forward = stages.forward(policy, config, args, home)
        frozen = stages.frozen(recipe, start, policy, tokenizer, rows, forward, config, args, home)
        stages.clear_home(home, config, start, args)
        trainer = stages.trainer(recipe, policy, tokenizer, rows, frozen, config, args, home)
        narrate.record(recipe, config, engine, home, start, rows, frozen, forward, derived, plan, planned, args)
        narrate.header(recipe, config, engine, start, rows, frozen, forward, derived, plan, planned, args, home)
        stages.tell_meters(trainer, planned)
        with trainer.when.listening():
            trainer.train(resume_from_checkpoint=str(home.loads_from) if home.loads_from else None)
        if trainer.stopped_early:
            narrate.stopped(trainer, home)
        else:
            saved = narrate.save(trainer, rows, home)
            stages.before_and_after(recipe, config, start, rows, trainer, home)
            narrate.footer(trainer, saved, home, time.monotonic() - began)
        stages.finish_copies(trainer)
    return supervised.STOPPED_CODE if trainer.stopped_early else 0


def main(name: str, argv: Sequence[str] | None = None) -> Any:
    """Run `name` and leave the process with its exit code."""
    with contextlib.suppress(BrokenPipeError):
        sys.exit(run(name, argv=argv))

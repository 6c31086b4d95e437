"""`align-kit check <recipe>`: everything a run would stop at, looked at as a whole, before anything trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit import log, machine, registry, run_folder
from align_kit.config import Config, load
from align_kit.errors import UserError
from align_kit.registry import Recipe
from align_kit.resources import folder

if TYPE_CHECKING:
    from align_kit.models.source import Source

USAGE = """usage: align-kit check <recipe> [--config a.yaml ...] [--key value ...]

Looks at everything the run would stop at: options, output folder, models (names, shapes and numbers as stored), words,
all rows of the data, and whether it fits on this machine. Nothing trains and no process group is joined. Exit code 2 at
what is wrong, with one line for each part of the run; what is only suspicious is a warning."""
REWARD, VALUE = "reward_model_name_or_path", "value_model_name_or_path"
MODELS = {"reference_model_name_or_path": "lm", REWARD: "score", VALUE: "score"}  # and their ends
Part = tuple[str, Callable[[], str]]


def check(words: Sequence[str]) -> int:
    """Check the run that a command line describes, say what each part came to, and return 0.

    Raises `UserError` where a part is wrong, once all parts that could be looked at have been.
    """
    if not words or {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    log.quiet()
    recipe = registry.get(words[0])
    config = load(recipe, list(words[1:]), defaults=folder("recipes") / f"{recipe.name}.yaml")
    machine.choose_accelerator(os.environ)
    wrong = [name for name, look in parts(recipe, config) if not _said(name, look)]
    if wrong:
        raise UserError(f"{recipe.name} would stop at {', '.join(wrong)}: see above")
    log.say(f"nothing is in the way of {recipe.name}")
    return 0


def _said(name: str, look: Callable[[], str]) -> bool:
    """Say what a part came to; tell whether nothing is wrong with it."""
    try:
        log.say(f"  {name:<9} {look()}")
    except UserError as error:
        log.say(f"  {name:<9} wrong: {error}")
        return False
    return True


def parts(recipe: Recipe, config: Config) -> Iterator[Part]:
    """Yield the parts of a run in the order the run comes to them: name, and what looks at it."""
    from align_kit.stages import alone

    yield "options", lambda: _options(recipe, config)
    yield "output", lambda: _output(config)
    start = cache(lambda: alone.start_of(recipe, config))
    yield "models", lambda: _models(recipe, config, start())
    yield "data", lambda: _data(recipe, config, start())
    yield "plan", lambda: _plan(recipe, config, start())


def _options(recipe: Recipe, config: Config) -> str:
    """Build the real training arguments, and let the method look at them."""
    recipe.trainer_class().check(_arguments(config))
    given = [name for name, where in config.origin.items() if where == "command line"]
    return f"{len(config.origin)} set, {len(given)} of them on the command line"


def _arguments(config: Config) -> Any:
    return config.training_arguments(deepspeed=None, bf16=False, fp16=False, use_cpu=True)


def _output(config: Config) -> str:
    run, place = config.run, Path(config.value("output_dir")).expanduser()
    new = [folder for folder in (place, *place.parents) if not folder.exists()]
    home = run_folder.open_folder(config.value("output_dir"), resume=run.resume, overwrite=run.overwrite)
    for made in new:
        made.rmdir()
    stands = ", replaces what stands there" if home.replaces else ""
    return f"{home.path} can be written{stands}"


def _models(recipe: Recipe, config: Config, start: Source) -> str:
    from align_kit.models import load as models
    from align_kit.models import source, stored
    from align_kit.plan.describe import asked
    from align_kit.stages import alone
    from align_kit.stages.beginning import refuse_changed

    if config.model.model_name_or_path and not config.model.config_name:  # whose configuration was enough so far
        start = source.resolve(config.model.model_name_or_path, revision=config.model.model_revision)
    named = {name: key for key in MODELS for name in _listed(asked(config, key))}
    beside = {source.resolve(name): key for name, key in named.items()}
    words = alone.words_of(config, start)
    for one, key in {start: "", **beside}.items():
        if key == REWARD:  # which reads its own words; a value model may begin as a language model
            source.check_scores(one, key)
            models.load_tokenizer(one, trust_remote_code=config.value("trust_remote_code"))
        model = _without_weights(one, MODELS.get(key, recipe.head), config)
        if key in ("", VALUE):  # they read the words of the run
            models.check_vocabulary(model, words, config.model.tokenizer_name or start.name)
    found = [start, *beside]
    whole = list(dict.fromkeys(one for model in found for one in (model, model.base) if one and not one.random))
    for one in whole:
        refuse_changed(one, source.digest(one))
        stored.check_values(one)
    size = sum(file.stat().st_size for one in whole for file in one.folder.glob("*.safetensors"))
    names = ", ".join(dict.fromkeys(one.name for one in found))
    read = f"{size / 1e6:,.1f} MB read, every tensor there and every number finite"
    return f"{names}: {read}" if whole else f"{names}: random weights"


def _without_weights(one: Source, head: str, config: Config) -> Any:
    """Return what a run would build of `one` or its base, on the meta device; refuse stored weights that do not fit."""
    import torch

    from align_kit.models.hollow import hollow, hollow_model
    from align_kit.models.stored import check_fit

    trusted = config.value("trust_remote_code")
    if not one.random:
        return check_fit(one.weights, head, trust_remote_code=trusted)
    given = config.model.config_overrides
    overrides = given if isinstance(given, dict) else None
    with hollow(torch.float32):
        return hollow_model(one, dtype=torch.float32, head=head, overrides=overrides, trust_remote_code=trusted)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _data(recipe: Recipe, config: Config, start: Source) -> str:
    from align_kit.data.prepare import prepare
    from align_kit.plan.describe import Asked
    from align_kit.stages import alone
    from align_kit.stages.data import wanted
    from align_kit.trainers.base import Known

    found = prepare(wanted(recipe, config, Asked(config)), alone.words_of(config, start))
    for split in filter(None, (found.train, found.eval)):
        for warning in split.warnings:
            log.warn(warning)
    if not recipe.values:  # there it follows from the policy too, which is not loaded here
        known = Known(found.train.rows, None, config.given, None, lambda phase: None)
        recipe.trainer_class().derive(_arguments(config), known)  # which warns of rows that teach nothing
    return found.train.sentence()


def _plan(recipe: Recipe, config: Config, start: Source) -> str:
    import torch

    from align_kit import planner
    from align_kit.plan import show

    found = planner.answer(recipe, config, planner.Options(gpus=max(1, torch.cuda.device_count())), start)
    if refused := planner.refusal(found, config):
        raise UserError(refused)
    return show.line(found.choice.configured.plan, found.limits)

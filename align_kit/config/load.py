"""From YAML files and a command line to one checked `Config`.

The rule: `recipes/<phase>.yaml` is read where no `--config` is given; `--config a.yaml b.yaml` replaces it, and of the
files named the later wins, key by key (a list or a mapping is replaced whole). The command line wins over every file.
Two keys that say one thing (`dataset_name` and `datasets`, see `merge.ALTERNATIVES`) count as one key here: the later
source's wins, both in one source are a contradiction. What was given for a value that a later source replaces goes with
it (`merge.BELONGS_TO`). Underneath lie align_kit's own defaults, and under those TRL's. `recipes/lora.yaml` is an
overlay: name the recipe's file before it. Every mistake in every source is reported together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from align_kit import log
from align_kit.config import check, merge, show
from align_kit.config.command_line import layer, split
from align_kit.config.fields import DataFields, DatasetFields, ModelFields, RunFields
from align_kit.config.resolved import ALWAYS, ALWAYS_SO, OUR_DEFAULT, Config, our_defaults
from align_kit.config.schema import namespace
from align_kit.config.yaml_file import Layer, assignments, find, read
from align_kit.errors import UserError


class Row(Protocol):
    """What loading needs of a registry row."""

    @property
    def name(self) -> str:
        """The phase."""

    @property
    def config(self) -> str:
        """Its config class, dotted."""


def load(recipe: Row, argv: Sequence[str], *, defaults: Path | None = None) -> Config:
    """Return the resolved and checked configuration of a phase.

    `argv` is the command line without the program's name; `defaults` is the YAML read where it has no `--config`.
    Sets the environment variables of a YAML's `env:` key, before any heavy import. Prints and exits for `--help`.
    Raises `UserError` for every mistake in files and command line together.
    """
    line = split(argv)
    if line.help:
        _print_help(recipe, defaults)
    files = [find(name) for name in line.configs] or ([find(str(defaults))] if defaults is not None else [])
    layers = [read(path) for path in files]
    env = _take_env(layers)
    keys = namespace(recipe.config)
    values, origin, problems = merge.merge([*layers, layer(line, keys)], keys, recipe.name)
    if problems:
        raise UserError(_together(problems))
    for name, owner in merge.BELONGS_TO.items():
        if (why := origin.get(name, "")).startswith(f"{owner} ("):
            log.warn(f"{name} follows from {why}: each weighs 1; give {name} to say otherwise")
    config = _grouped(recipe, values, origin, env)
    if contradictions := check.contradictions(config):
        raise UserError(_together(contradictions))
    return _derived(config)


def _print_help(recipe: Row, defaults: Path | None) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(show.help_text(recipe.name, recipe.config, defaults))
    raise SystemExit(0)


def _take_env(layers: Sequence[Layer]) -> dict[str, str]:
    """Take `env:` out of the layers and set its variables, as TRL's parser does."""
    env: dict[str, str] = {}
    for one in layers:
        given = one.values.pop("env", None) or {}
        if not isinstance(given, dict):
            raise UserError(f"{one.places['env']} env is {given!r}; expected a mapping of environment variables")
        env |= {str(name): str(value) for name, value in given.items()}
    os.environ.update(env)
    return env


def _together(problems: Sequence[str]) -> str:
    """Return one message for several problems, numbered where there are several."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} mistakes: " + "; ".join(f"({i}) {text}" for i, text in enumerate(problems, 1))


# Keys whose work something else does; they do not reach the config class.
DONE_ELSEWHERE = ("resume_from_checkpoint", "do_train", "do_eval", "local_rank", "shuffle_dataset")
PACKING = ("packing", "packing_strategy", "eval_packing")
BEST_BY = {"ppo": "reward"}  # what tells the best of several evaluations, where it is not the loss


def _grouped(recipe: Row, values: dict[str, Any], origin: dict[str, str], env: dict[str, str]) -> Config:
    keys = namespace(recipe.config)
    groups: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "run": {}, "training": {}}
    for name, value in values.items():
        groups[keys[name].group][name] = value
    under = our_defaults(recipe.name)
    origin = dict.fromkeys(under, OUR_DEFAULT) | origin | dict.fromkeys(ALWAYS, ALWAYS_SO)
    return Config(
        phase=recipe.name,
        config_class=recipe.config,
        model=ModelFields(**groups["model"]),
        data=DataFields(**groups["data"]),
        run=RunFields(**groups["run"]),
        training=under | groups["training"] | ALWAYS,
        origin=origin,
        env=env,
    )


def _derived(config: Config) -> Config:
    """Do the work of mapped keys: a short data set name, TRL's resume key, the metric of early stopping."""
    training, origin = config.training, config.origin
    config.model.config_overrides = assignments(config.model.config_overrides)
    if config.data.dataset_name:
        _expand_dataset_name(config)
    if training.get("resume_from_checkpoint"):
        config.run.resume = training["resume_from_checkpoint"]
        origin["resume"] = f"resume_from_checkpoint ({origin['resume_from_checkpoint']})"
    asks = [name for name in ("early_stopping_patience", "load_best_model_at_end") if config.value(name)]
    if asks and not training.get("metric_for_best_model"):
        training["metric_for_best_model"] = BEST_BY.get(config.phase, "loss")
        origin["metric_for_best_model"] = asks[0]
    if training.get("loss_type") == "chunked_nll":  # TRL's deprecated alias, about which its class warns
        training["loss_type"] = "nll"
    dropped = DONE_ELSEWHERE + (PACKING if config.phase == "pretrain" else ())
    for name in dropped:
        training.pop(name, None)
        origin.pop(name, None)
    return config


def _expand_dataset_name(config: Config) -> None:
    """Write `dataset_name` out as entries of `datasets` and, where evaluation is on, of `eval_datasets`."""
    data, place = config.data, f"dataset_name ({config.origin['dataset_name']})"
    path, name = data.dataset_name or "", data.dataset_config
    data.datasets = [DatasetFields(path, name, split=data.dataset_train_split)]
    config.origin["datasets"] = place
    evaluates = config.value("eval_strategy") != "no" and data.test_split_size is None
    if evaluates and not data.eval_datasets:
        data.eval_datasets = [DatasetFields(path, name, split=data.dataset_test_split)]
        config.origin["eval_datasets"] = place

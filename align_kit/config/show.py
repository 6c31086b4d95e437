"""What `--help` and `--dry-run` print about a configuration."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align_kit.config import inherited
from align_kit.config.batch import BatchPlan
from align_kit.config.resolved import Config, our_defaults
from align_kit.config.schema import Key, namespace
from align_kit.config.values import show

WIDTH = 120
INDENT = 36
GROUP_TITLES = {"run": "align_kit's own", "model": "the model", "data": "the data"}


def help_text(phase: str, config_class: str, defaults: Path | None) -> str:
    """Return every key of a phase, grouped: align_kit's own, model, data, then training, nearest class first."""
    keys = list(namespace(config_class).values())
    fates = {key.name: _fate(key, phase) for key in keys}
    under = our_defaults(phase)
    parts = [_usage(phase, defaults)]
    for title, members in _sections(keys, config_class).items():
        lines = [_entry(key, under.get(key.name, key.default)) for key in members if fates[key.name] == "honoured"]
        parts.append("\n".join([f"{title}:", *lines]))
    mapped = {key.name: inherited.row(key.name, phase) for key in keys if fates[key.name] == "mapped"}
    lines = [f"  --{name:<{INDENT - 5}} {row.note}" for name, row in mapped.items() if row]
    parts.append("\n".join(["accepted, and done by something else:", *lines]))
    refused = sorted(name for name, fate in fates.items() if fate == "refused")
    parts.append(textwrap.fill("refused by name, with a reason: " + ", ".join(refused), WIDTH))
    return "\n\n".join(parts)


def _usage(phase: str, defaults: Path | None) -> str:
    source = f"recipes/{phase}.yaml" if defaults is None else f"{defaults.parent.name}/{defaults.name}"
    return (
        f"usage: {phase} [--config a.yaml b.yaml ...] [--key value | --key=value | --flag | --no_flag] ...\n\n"
        f"Without --config, {source} is read; with it, only the files it names are, and the later one wins.\n"
        f"The command line wins over every file. LoRA: --config recipes/{phase}.yaml recipes/lora.yaml\n"
        "YAML may hold env: {NAME: value} and ${NAME:-default}.\n"
        "Lists are words or JSON (--loss_type sigmoid sft), mappings are JSON, 'null' is nothing."
    )


def _sections(keys: list[Key], config_class: str) -> dict[str, list[Key]]:
    """Return the keys by heading; of training, the phase's own class stands before those it inherits from."""
    rank = {config_class.partition(":")[2]: 0, "TrainingArguments": 2}
    training = sorted((key for key in keys if key.group == "training"), key=lambda key: rank.get(key.declared_by, 1))
    sections: dict[str, list[Key]] = {}
    for key in [key for key in keys if key.group != "training"] + training:
        title = GROUP_TITLES.get(key.group) or f"training ({key.declared_by})"
        sections.setdefault(title, []).append(key)
    return sections


def _fate(key: Key, phase: str) -> str:
    row = inherited.row(key.name, phase)
    return "honoured" if row is None else row.fate


def _entry(key: Key, default: Any) -> str:
    head = f"  --{key.name}"
    shown = f"[{default if isinstance(default, str) and default else show(default)}]"
    start = f"{head:<{INDENT - 1}} {shown}"
    words = key.help.replace("%%", "%")  # TRL escapes them for argparse
    return f"{start} {textwrap.shorten(words, WIDTH - len(start) - 1, placeholder='...')}"


def dry_run_text(
    config: Config, plan: BatchPlan | None = None, engine: Mapping[str, Any] | None = None, *, unit: str = "pairs"
) -> str:
    """Return what a run would do: the keys that were set and where, the batch arithmetic, the engine's configuration.

    Keys at TRL's defaults are counted only. `unit` is what a batch counts, pairs or rows.
    """
    values = config.as_dict()
    changed = sorted(name for name in config.origin if name in values)
    width = max((len(name) for name in changed), default=0)
    lines = [f"  {name:<{width}}  {json.dumps(values[name])}  ({config.origin[name]})" for name in changed]
    rest = len(values) - 1 - len(changed)
    head = f"{config.phase}: {len(changed)} keys set, {rest} at their defaults (--help lists them)"
    batch = [f"batch: {plan.sentence(unit)}"] if plan is not None else []
    derived = [f"engine: {json.dumps(engine, indent=2)}"] if engine is not None else []
    return "\n".join([head, *lines, *batch, *derived])

"""Lay sources over each other and check each key: known, honoured in this phase, of the right type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align_kit.config import inherited, renamed
from align_kit.config.schema import Key
from align_kit.config.values import Misfit, coerce, show
from align_kit.config.yaml_file import Layer

# Ways to write "off": a YAML that spells one of them out asks for nothing.
OFF: tuple[Any, ...] = (None, False, "", "no", "none", "false", [], {})

# Pairs of keys that say one thing: both in one source contradict each other, a later source replaces an earlier one.
ALTERNATIVES: dict[tuple[str, str], str] = {
    ("dataset_name", "datasets"): "drop one: dataset_name is short for one entry of datasets",
    ("global_batch_size", "gradient_accumulation_steps"): "drop gradient_accumulation_steps: it follows from the other",
    ("config_name", "model_name_or_path"): "drop one: random weights from a configuration, or a model's weights",
    ("config_name", "starts_from"): "drop one: random weights from a configuration, or another run's model",
    ("starts_from", "model_name_or_path"): "drop one: both name the model to start from",
    ("eval_datasets", "test_split_size"): "drop one: evaluate on data of its own, or on a part of the training data",
    ("fp16", "bf16"): "drop one",
}

# Keys that mean something beside one value of another key only: weights were given for the losses they weigh.
BELONGS_TO = {"loss_weights": "loss_type"}


def merge(
    layers: Iterable[Layer], keys: Mapping[str, Key], phase: str
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return the typed values of the keys, where each was set, and every problem found, in the order of the sources.

    A later layer wins; a value that a later one replaces is still checked, since a wrong file is a wrong file.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    problems: list[str] = []
    for layer in layers:
        _displace(layer, values, origin)
        before = dict(values)
        for name, raw in layer.values.items():
            where = layer.places.get(str(name), "YAML")
            try:
                value = _checked(str(name), raw, keys, phase)
            except Misfit as misfit:
                problems.append(f"{name} ({where}) {misfit}")
                continue
            values[str(name)], origin[str(name)] = value, where
        _orphan(layer, before, values, origin)
    return values, origin, problems


def _displace(layer: Layer, values: dict[str, Any], origin: dict[str, str]) -> None:
    """Drop what earlier sources said in other words: `--model_name_or_path` replaces a recipe's `config_name`."""
    for pair in ALTERNATIVES:
        for name, other in (pair, pair[::-1]):
            if layer.values.get(name) not in OFF and other not in layer.values:
                values.pop(other, None)
                origin.pop(other, None)


def _orphan(layer: Layer, before: Mapping[str, Any], values: dict[str, Any], origin: dict[str, str]) -> None:
    """Take back what earlier sources gave for a value that this one replaces; the key then follows from the other."""
    for name, owner in BELONGS_TO.items():
        changed = owner in layer.values and values.get(owner) != before.get(owner)
        if changed and before.get(name) is not None and name not in layer.values:
            values[name], origin[name] = None, f"{owner} ({origin[owner]}), not as in {origin[name]}"


def _checked(name: str, raw: Any, keys: Mapping[str, Key], phase: str) -> Any:
    """Return a key's typed value; raise `Misfit` with what to do where it cannot be used."""
    key = keys.get(name)
    if key is None:
        raise Misfit(unknown_key(name, list(keys), phase))
    row = inherited.row(name, phase)
    if row is not None and row.fate == "refused":
        return _default_or_refuse(key, raw, row)
    value = coerce(key, raw)
    if row is not None and row.only and value not in row.only:
        raise Misfit(f"is {show(value)}; allowed: {', '.join(map(str, row.only))} ({row.instead})")
    return value


def _default_or_refuse(key: Key, raw: Any, row: inherited.Row) -> Any:
    """Return the default of a refused field that was spelt out; refuse any other value, saying what to do instead."""
    try:
        value = coerce(key, raw)
    except Misfit:
        value = raw
    if value == key.default or (value in OFF and key.default in OFF) or value is None:
        return key.default
    shown = show("<hidden>" if key.name.endswith("_token") else value)  # a message is no place for a credential
    raise Misfit(f"is {shown}, which is refused: {row.note}; instead: {row.instead}")


def unknown_key(name: str, known: Sequence[str], phase: str) -> str:
    """Return what to say of a key this phase does not have: its new name, the phases that have it, or the nearest."""
    if name in renamed.INSTEAD:
        return f"is not a key here; instead: {renamed.INSTEAD[name]}"
    if phases := inherited.phases_with(name):
        return f"is not a key of {phase}; it belongs to {', '.join(phases)}"
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    if not near and len(name) > 2:  # a part of a name: `placement`
        near = [key for key in known if name in key.split("_")][:4]
    hint = f" (did you mean {', '.join(map(repr, near))}?)" if near else "; --help lists every key"
    return f"is an unknown key{hint}"

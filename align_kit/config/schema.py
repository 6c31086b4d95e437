"""The flat namespace of one phase: every key that its YAML and command line may hold, with type and default."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import Any

from align_kit import imports
from align_kit.config.fields import GROUPS


@dataclass(frozen=True)
class Key:
    """One key: the group that owns it, its type, its default and what `--help` says of it."""

    name: str
    group: str  # "run", "model", "data" or "training"
    hint: Any
    default: Any
    help: str = ""
    choices: tuple[str, ...] = ()
    bare: Any = None
    declared_by: str = ""  # the class, for the headings of --help


def resolve(dotted: str) -> type:
    """Import the class that `module:Name` names; a broken registry row is a bug, so errors are not dressed up."""
    module, _, name = dotted.partition(":")
    with imports.uncollected():
        return getattr(importlib.import_module(module), name)


def default_of(field: dataclasses.Field) -> Any:
    """Return a dataclass field's default, made fresh where it has a factory."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def plain(value: Any) -> Any:
    """Return an enum member's value; everything else as it is."""
    return value.value if isinstance(value, Enum) else value


def enum_choices(hint: Any) -> tuple[str, ...]:
    """Return the words of the enum in a union such as `SchedulerType | str`, or nothing."""
    members = typing.get_args(hint) or (hint,)
    for member in members:
        if isinstance(member, type) and issubclass(member, Enum):
            return tuple(str(item.value) for item in member)
    return ()


def _owner(cls: type, name: str) -> str:
    """Return the name of the most general class that declares `name`."""
    owners = [base.__name__ for base in cls.__mro__ if name in base.__dict__.get("__annotations__", {})]
    return owners[-1] if owners else cls.__name__


def keys_of(cls: type, group: str) -> dict[str, Key]:
    """Return the keys a dataclass contributes to the namespace."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: Key(
            name=field.name,
            group=group,
            hint=hints[field.name],
            default=plain(default_of(field)),
            help=field.metadata.get("help") or "",
            choices=tuple(field.metadata.get("choices") or ()) or enum_choices(hints[field.name]),
            bare=field.metadata.get("bare"),
            declared_by=_owner(cls, field.name),
        )
        for field in dataclasses.fields(cls)
        if field.init
    }


@cache
def own_keys() -> dict[str, Key]:
    """Return align_kit's own keys; needs no heavy import."""
    return {name: key for group, cls in GROUPS.items() for name, key in keys_of(cls, group).items()}


@cache
def namespace(config_class: str) -> dict[str, Key]:
    """Return every key of a phase: align_kit's own, then those of the config class named by a dotted string."""
    inherited = keys_of(resolve(config_class), "training")
    if "resume_from_checkpoint" in inherited:
        inherited["resume_from_checkpoint"] = replace(inherited["resume_from_checkpoint"], bare="auto")
    return own_keys() | {name: key for name, key in inherited.items() if name not in own_keys()}

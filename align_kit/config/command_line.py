"""Read the command line: `--key value`, `--key=value`, `--flag`, `--no_flag`, lists, and `--config a.yaml b.yaml`.

This is not argparse, because argparse would abbreviate names, stop at the first unknown one, and know nothing of the
places that messages name. The words after a key belong to it up to the next `--`.
"""

from __future__ import annotations

import typing
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from align_kit.config.schema import Key
from align_kit.config.yaml_file import Layer
from align_kit.errors import UserError

PLACE = "command line"
HELP = ("-h", "--help")
# The launchers pass the rank of a process on its node; align_kit reads it from the environment.
LAUNCHER = ("local_rank",)


@dataclass
class CommandLine:
    """The words of a command line, by key, before the namespace of the phase is known."""

    words: dict[str, list[str]] = field(default_factory=dict)
    configs: list[str] = field(default_factory=list)
    help: bool = False


def split(argv: Sequence[str]) -> CommandLine:
    """Group a command line by key; `--config` and `--help` are taken out. A key said twice: the later one wins."""
    line = CommandLine()
    for name, words in _groups(argv):
        if name == "config":
            if not words:
                raise UserError("--config needs at least one YAML file")
            line.configs += words
        elif name == "help":
            line.help = True
        elif name not in LAUNCHER:
            line.words[name] = words
    return line


def parted(argv: Sequence[str], own: Container[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the words of a command's `own` options by name, and the rest, which are the run's, as a command line."""
    line = split(argv)
    given = {name: line.words.pop(name) for name in list(line.words) if name in own}
    rest = [word for name, values in line.words.items() for word in (f"--{name}", *values)]
    return given, [*(["--config", *line.configs] if line.configs else []), *rest]


def _groups(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word in HELP:
            groups.append(("help", []))
        elif word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            groups.append((name.replace("-", "_"), [value] if equals else []))
        elif not groups or groups[-1][0] == "help":
            raise UserError(f"unexpected word {word!r} on the command line; write --key value or --config file.yaml")
        else:
            groups[-1][1].append(word)
    return groups


def layer(line: CommandLine, keys: Mapping[str, Key]) -> Layer:
    """Return the command line's values for a phase's keys; unknown keys stay in, for one message about all of them."""
    values: dict[str, object] = {}
    for name, words in line.words.items():
        positive = name.removeprefix("no_")
        if name not in keys and positive != name and _is_bool(keys.get(positive)) and not words:
            values[positive] = False
        else:
            values[name] = _value(name, words, keys.get(name))
    return Layer(values, dict.fromkeys(values, PLACE))


def _is_bool(key: Key | None) -> bool:
    return key is not None and (key.hint is bool or bool in typing.get_args(key.hint))


def _takes_list(key: Key) -> bool:
    members = (key.hint, *typing.get_args(key.hint))
    return any(list in (member, typing.get_origin(member)) for member in members)


def _value(name: str, words: list[str], key: Key | None) -> object:
    """Return the words after a key as one raw value: the bare flag's, the only one, or a list of them."""
    if key is None:
        return words
    if not words:
        if key.bare is None and not _is_bool(key):
            raise UserError(f"--{name} needs a value ({key.help or 'see --help'})")
        return True if key.bare is None else key.bare
    if len(words) == 1:
        return words[0]
    if not _takes_list(key):
        raise UserError(f"--{name} takes one value, not {len(words)}: {' '.join(words)}")
    return words

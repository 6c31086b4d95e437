"""From what a YAML file or a command line holds to a value of the declared type, or one line about why not."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union

from align_kit.config.schema import Key, keys_of

TRUE = {"true", "yes", "on", "1"}
FALSE = {"false", "no", "off", "0"}
NONE = {"none", "null", "~"}


class Misfit(ValueError):
    """A value that does not fit its type; carries the words for the message, without key and place.

    `deep` marks one that was found inside a list, a mapping or its JSON text: it says more than "expected a list" does.
    """

    def __init__(self, words: str, *, deep: bool = False) -> None:
        super().__init__(words)
        self.deep = deep


def coerce(key: Key, value: Any) -> Any:
    """Return `value` as the key's type; raise `Misfit` naming what was expected.

    Strings are parsed, because the command line and `${VAR}` give nothing else; numbers such as `5e-7`, which YAML 1.1
    reads as a string, become floats. `no`, which YAML 1.1 reads as false, is the word again where the key allows it.
    """
    words = {"no"} & set(key.choices) | ({"none"} if key.default == "none" else set())
    if key.bare is not None and str(value).lower() in ("true", "false"):
        value = key.bare if str(value).lower() == "true" else None
    if value is False and "no" in words:
        value = "no"
    if value is None and "none" in words:
        value = "none"
    fitted = value if isinstance(value, str) and value in words else fit(key.hint, value)
    if key.choices and isinstance(fitted, str) and fitted not in key.choices:
        raise Misfit(f"is {fitted!r}{_choices(fitted, key.choices)}")
    return fitted


def _choices(word: str, choices: tuple[str, ...]) -> str:
    """Return what is allowed instead of `word`, the nearest first where the list is long."""
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    listed = "; allowed: " + ", ".join(choices) if len(choices) <= 12 else ""
    return listed + (f" (did you mean {near[0]!r}?)" if near else "")


def fit(hint: Any, value: Any) -> Any:
    """Return `value` as type `hint`: a union takes the first member that fits, structured before `str`."""
    members = _members(hint)
    if type(None) in members and (value is None or (isinstance(value, str) and value.lower() in NONE)):
        return None
    members = [member for member in members if member is not type(None)]
    for member in sorted(members, key=lambda member: _eagerness(member, value)):
        try:
            return _fit_one(member, value)
        except Misfit as misfit:
            if len(members) == 1 or misfit.deep:
                raise
    raise Misfit(f"is {show(value)}; expected {describe(hint)}")


def _members(hint: Any) -> list[Any]:
    """Return the members of a union, or the type itself; `Literal` members count as their values' types."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [inner for member in typing.get_args(hint) for inner in _members(member)]
    return [hint]


def _eagerness(hint: Any, value: Any) -> int:
    """Order a union's members: `str` takes everything, so it comes late; one word is a `str` before a list of one."""
    if hint in (bool, int, float):
        return (bool, int, float).index(hint)
    if dict in (hint, typing.get_origin(hint)):
        return 3
    looks_like_json = isinstance(value, str) and value.lstrip().startswith("[")
    return (3 if looks_like_json else 5) if list in (hint, typing.get_origin(hint)) else 4


def _fit_one(hint: Any, value: Any) -> Any:
    origin = typing.get_origin(hint) or hint
    if dataclasses.is_dataclass(hint):
        return _fit_dataclass(hint, value)
    if origin is Literal:
        return _fit_literal(hint, value)
    if isinstance(origin, type) and issubclass(origin, Enum):
        return _fit_str(value)
    fitter = _FITTERS.get(origin)
    if fitter is not None:
        return fitter(value)
    if origin is list:
        return _fit_list(hint, value)
    if origin is dict:
        return _fit_dict(hint, value)
    return value  # a type this table does not know is checked by the class that declares it


def _fit_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in TRUE | FALSE:
        return value.lower() in TRUE
    raise Misfit(f"is {show(value)}; expected true or false")


def _fit_int(value: Any) -> int:
    number = _fit_float(value, "a whole number")
    if number != int(number):
        raise Misfit(f"is {show(value)}; expected a whole number")
    return int(number)


def _fit_float(value: Any, wanted: str = "a number") -> float | int:
    """Return a number, a whole one as int: `logging_steps: 10` should read 10 in the manifest, not 10.0."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        number: float | int = value
    elif isinstance(value, str):
        number = _parse_number(value, wanted)
    else:
        raise Misfit(f"is {show(value)}; expected {wanted}")
    if number != number or number in (float("inf"), float("-inf")):
        raise Misfit(f"is {show(value)}; expected a finite number")
    return number


def _parse_number(text: str, wanted: str) -> float | int:
    for parse in (int, float):
        try:
            return parse(text)
        except ValueError:
            continue
    raise Misfit(f"is {show(text)}; expected {wanted}")


def _fit_str(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise Misfit(f"is {show(value)}; expected text (put it in quotes)")


def _fit_literal(hint: Any, value: Any) -> Any:
    for allowed in typing.get_args(hint):
        if value == allowed or str(value).lower() == str(allowed).lower():
            return allowed
    raise Misfit(f"is {show(value)}; allowed: {', '.join(map(str, typing.get_args(hint)))}")


def _fit_list(hint: Any, value: Any) -> list[Any]:
    value = _parse_json(value, "[")
    items = value if isinstance(value, list | tuple) else [value]
    inner = (typing.get_args(hint) or (Any,))[0]
    fitted = []
    for position, item in enumerate(items):
        try:
            fitted.append(fit(inner, item))
        except Misfit as misfit:
            path = f"[{position}]" + ("" if str(misfit).startswith(".") else " ")
            raise Misfit(f"{path}{misfit}", deep=isinstance(value, list)) from None
    return fitted


def _fit_dict(hint: Any, value: Any) -> dict[str, Any]:
    value = _parse_json(value, "{")
    if not isinstance(value, dict):
        raise Misfit(f"is {show(value)}; expected a mapping")
    inner = (typing.get_args(hint) or (str, Any))[1]
    return {str(name): fit(inner, item) for name, item in value.items()}


def _fit_dataclass(cls: Any, value: Any) -> Any:
    """Return an entry such as one of `datasets`; a bare string is its `path`, an unknown key is named."""
    if isinstance(value, cls):
        return value
    value = _parse_json(value, "{")
    if isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, dict):
        raise Misfit(f"is {show(value)}; expected a mapping with 'path'")
    keys = keys_of(cls, "entry")
    for name in value:
        if name not in keys:
            raise Misfit(f"has an unknown key {name!r}{_choices(str(name), tuple(keys))}")
    if not value.get("path"):
        raise Misfit(f"is {show(value)}; it needs 'path' (card:<name>, a file or a hub id)")
    return cls(**{name: _fit_entry(keys[name], item) for name, item in value.items()})


def _fit_entry(key: Key, value: Any) -> Any:
    try:
        return coerce(key, value)
    except Misfit as misfit:
        raise Misfit(f".{key.name} {misfit}", deep=True) from None


def _parse_json(value: Any, opening: str) -> Any:
    """Return the JSON a string holds where it opens like a list or a mapping; other values unchanged."""
    if not (isinstance(value, str) and value.lstrip().startswith(opening)):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        message = f"is {show(value)}, not valid JSON: {error}; use double quotes inside and single quotes around it"
        raise Misfit(message, deep=True) from None


_FITTERS: dict[Any, Callable[[Any], Any]] = {bool: _fit_bool, int: _fit_int, float: _fit_float, str: _fit_str}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def describe(hint: Any) -> str:
    """Return a type in a user's words: `a number or null`."""
    names = []
    for member in _members(hint):
        origin = typing.get_origin(member) or member
        word = {list: "a list", dict: "a mapping", Literal: "a word"}.get(origin, _NAMES.get(origin, "text"))
        if word not in names:
            names.append(word)
    return " or ".join(names)


def show(value: Any, width: int = 60) -> str:
    """Return a value for a message, in YAML's words, cut where it is long."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."

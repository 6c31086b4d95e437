"""What opens a door stays out of every file a run writes: tokens, keys, passwords, and URLs that carry them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<hidden>"
SHORTEST = 8  # characters of a secret in the environment: shorter ones stand in ordinary words

# Names of variables, and of options: an eos_token is no secret.
_VARIABLE = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_OPTION = re.compile(
    r"(^|_)(api_?key|access_?key|private_?key|secret(_key)?|passw(or)?d|credentials?|auth)$"
    r"|(^|_)(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)token$",
    re.IGNORECASE,
)
# Variables whose value is looked for in everything: narrower, since TOKENIZER_NAME=gpt2 is no secret either.
_SURE = re.compile(r"(^|_)(\w*TOKEN|(\w*API)?KEY|\w*SECRET|\w*PASSW(OR)?D|PAT|CREDENTIALS?)(_|$)", re.IGNORECASE)

_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/]+@", re.IGNORECASE)
_IN_QUERY = re.compile(
    r"([?&][\w.-]*(?:token|key|secret|passw(?:or)?d|credential|signature|sig|auth)[\w.-]*=)[^&\s#\"']+", re.IGNORECASE
)
_BY_SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})"
)


def scrubbed(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """Return `value` (plain values, lists, mappings) with `<hidden>` for every secret that can be told from its place.

    That is the value of an option or variable with such a name, user and password in a URL and what its query signs
    with, tokens of the shapes that Hugging Face, GitHub, AWS and others give, and the value of each variable in
    `environ` (the process's where none is given) with such a name, wherever it stands.
    """
    return _scrubbed(value, _secrets(os.environ if environ is None else environ), _OPTION)


def _secrets(environ: Mapping[str, str]) -> list[str]:
    """Return the values of secret variables, the longest first; paths and numbers are none."""
    found = {value for name, value in environ.items() if _SURE.search(name) and len(value) >= SHORTEST}
    return sorted((one for one in found if one[0] not in "/~." and not one.isdigit()), key=len, reverse=True)


def _scrubbed(value: Any, secrets: list[str], names: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return _text(value, secrets)
    if isinstance(value, Mapping):
        return {
            _scrubbed(key, secrets, names): HIDDEN
            if _is_named(key, item, names)
            else _scrubbed(item, secrets, _VARIABLE if key == "env" else names)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_scrubbed(item, secrets, names) for item in value)
    return value


def _is_named(key: Any, item: Any, names: re.Pattern[str]) -> bool:
    return isinstance(key, str) and isinstance(item, str) and item != "" and names.search(key) is not None


def _text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    return _BY_SHAPE.sub(HIDDEN, _IN_QUERY.sub(rf"\1{HIDDEN}", text))

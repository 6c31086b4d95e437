"""What opens a door stays out of every file a run writes: tokens, keys, passwords, and URLs that carry them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HIDDEN = "<hidden>"
SHORTEST = 8  # characters of a secret in the environment: shorter ones stand in ordinary words
SHORTEST_NUMBER = 6  # digits of a password there

# Names, written with underscores: of options (an eos_token is no secret), and of variables, where more is one.
_OPTION = re.compile(
    r"(^|_)((api|access|account|auth|deploy|encryption|master|private|secret|service|shared|signing|subscription)"
    r"_?keys?(_id)?|secrets?|passw(or)?ds?|passphrases?|credentials?|auth|authorization|conn(ection)?_?str(ing)?"
    r"|(api|access|auth|hub|refresh|session)_?tokens"
    r"|(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)token)$",
    re.IGNORECASE,
)
_VARIABLE = re.compile(
    r"(^|_)(\w*(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)token|(\w*(api|access))?keys?|\w*secrets?"
    r"|\w*passw(or)?ds?|pat|credentials?|(pass|auth|dsn)$)(_|$)",
    re.IGNORECASE,
)
_PLACE = re.compile(r"_(file|path|dir|sock)$", re.IGNORECASE)  # such a variable says where the secret lies
_PASSWORD = re.compile(r"pass|secret", re.IGNORECASE)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]")  # accountKey, x-api-key
_NO_SECRET = re.compile(r"<[^<>\s]{1,40}>|none|null|true|false", re.IGNORECASE)  # <|im_end|>, <image>, <hidden>

# A password may hold a "/": where a name and a colon stand before, and no port behind.
_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*://)(?:[^\s/]+|[^\s/:@\[]+:(?!\d{1,5}/)\S*)@", re.IGNORECASE)
_IN_QUERY = re.compile(
    r"([?&][\w.-]*(?:token|key|secret|passw(?:or)?d|credential|signature|sig|auth)[\w.-]*=)[^&\s#\"']+", re.IGNORECASE
)
_HEADER = re.compile(r"(\bauthorization[\"']?\s*[:=]\s*[\"']?)(?:(?:basic|bearer|digest|token)\s+)?[^\s\"',]+", re.I)
_BEARER = re.compile(r"(\bbearer\s+)(?=\S*\d)[\w.~+/=-]{8,}", re.IGNORECASE)
_VALUE = r"(?P<value>\"[^\"]*\"|'[^']*'|(?:(?![;&][\w.-]+=)[^\s\"'])+)"
_ASSIGNED = re.compile(rf"(?P<name>[A-Za-z][\w.-]*)(?P<mark>[\"']?(?: ?=(?!=) ?| ?: ?)){_VALUE}")
_WORDS = re.compile(rf"--(?P<name>[A-Za-z][\w.-]*)(?P<mark>[ \t]+)(?!-){_VALUE}")
_BY_SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})"
)


def scrubbed(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """Return `value` (plain values, lists, mappings) with `<hidden>` for every secret that can be told from its place.

    By name, in any spelling (api_key, x-api-key, apiKey): `*_token`, `*_password`, `*_secret`, `*_credentials`,
    `*_auth`, authorization, connection strings, and keys to an API, an account and the like; in `env`, and where a
    name is in capitals, every KEY, PAT, PASS and DSN too. Hidden are all strings of a mapping's entry of that name, the
    word behind `--name` in a list, and in a text what follows `name=`, `"name":`, `some_name:` and `--name`.
    By form: user and password in a URL, what its query signs with, `Authorization:` and `Bearer`, and tokens as
    Hugging Face, GitHub, GitLab, OpenAI, Slack, AWS, Google and JWT write them.
    By value, wherever it stands: that of each variable in `environ` (the process's where none is given) with such a
    name, of 8 characters or more, or a password of 6 digits or more.

    Left alone: values written `<so>`, as tokens of a vocabulary are, and None, true and false; the tokens eos, bos,
    pad, unk, sep, cls and mask; of `environ` paths that exist, other numbers, and what `*_FILE`, `*_PATH`, `*_DIR` and
    `*_SOCK` hold; a number that is no string.
    """
    return _scrubbed(value, list(_secrets(os.environ if environ is None else environ)), in_env=False)


def _secrets(environ: Mapping[str, str]) -> Iterator[re.Pattern[str]]:
    """Yield what finds the values of secret variables, the longest first; a number only where it stands by itself."""
    named = {value: name for name, value in environ.items() if _is_secret(name, in_env=True)}
    for value, name in sorted(named.items(), key=lambda item: len(item[0]), reverse=True):
        if value.isdigit():
            if len(value) >= SHORTEST_NUMBER and _PASSWORD.search(name):
                yield re.compile(rf"(?<!\w){value}(?!\w)")
        elif len(value) >= SHORTEST and not _NO_SECRET.fullmatch(value) and not _is_path(value):
            yield re.compile(re.escape(value))


def _is_path(value: str) -> bool:
    return value[0] in "/~." and os.path.exists(os.path.expanduser(value))


def _is_secret(name: str, *, in_env: bool) -> bool:
    """Tell whether what bears this name is a secret; names in capitals are those of variables."""
    plain = _HUMP.sub("_", name)
    if _OPTION.search(plain):
        return True
    return (in_env or name.isupper()) and not _PLACE.search(plain) and _VARIABLE.search(plain) is not None


def _scrubbed(value: Any, secrets: Sequence[re.Pattern[str]], *, in_env: bool) -> Any:
    if isinstance(value, str):
        return _text(value, secrets)
    if isinstance(value, Mapping):
        return {
            _scrubbed(key, secrets, in_env=in_env): _hidden(item)
            if isinstance(key, str) and _is_secret(key, in_env=in_env)
            else _scrubbed(item, secrets, in_env=key == "env")
            for key, item in value.items()
        }
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        before = [None, *value]
        return type(value)(
            _hidden(item) if _is_option(option, item) else _scrubbed(item, secrets, in_env=False)
            for option, item in zip(before, value, strict=False)
        )
    return value


def _hidden(value: Any) -> Any:
    """Return what bears a secret's name with every string in it hidden."""
    if isinstance(value, str):
        return value if value == "" or _NO_SECRET.fullmatch(value) else HIDDEN
    if isinstance(value, Mapping):
        return {key: _hidden(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_hidden(item) for item in value)
    return value


def _is_option(word: Any, following: Any) -> bool:
    """Tell whether a word of a command line asks for a secret, and the one behind it is one."""
    if not isinstance(word, str) or not isinstance(following, str):
        return False
    return word.startswith("--") and not following.startswith("--") and _is_secret(word[2:], in_env=False)


def _text(text: str, secrets: Sequence[re.Pattern[str]]) -> str:
    for secret in secrets:
        text = secret.sub(HIDDEN, text)
    for pattern in (_IN_QUERY, _HEADER, _BEARER):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    for pattern in (_ASSIGNED, _WORDS):
        text = pattern.sub(_unassigned, text)
    return _BY_SHAPE.sub(HIDDEN, text)


def _unassigned(found: re.Match[str]) -> str:
    """Return `name=value` without a value that is secret; what a plain word and a colon begin is a sentence."""
    name, mark, value = found["name"], found["mark"], found["value"]
    is_sentence = mark.strip() == ":" and not (set("-_") & set(name) or name.isupper())
    if is_sentence or not _is_secret(name, in_env=False) or _NO_SECRET.fullmatch(value.strip("\"'")):
        return found[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{found[0].removesuffix(value)}{quote}{HIDDEN}{quote}"

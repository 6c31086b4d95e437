"""Personal data and keys in a text: found by their form, replaced by a mark such as <email>, and counted by kind.

What has no form, such as a name or an address, is not found. Where a form is doubtful the text is left as it is: a
false mark in a text costs more than one number that stays.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

# Bounds on every repeat and a look behind before it: a text of a million letters is read once, not once a letter.
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}\b")
_KEY = re.compile(
    r"-----BEGIN (?:[A-Z]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----.{1,8000}?-----END [A-Z ]{1,40}-----"
    r"|\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
    r"|sk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}|[sr]k_live_[A-Za-z0-9]{20,}|xox[abprs]-[\w-]{20,}|AKIA[0-9A-Z]{16}"
    r"|AIza[\w-]{35}|npm_[A-Za-z0-9]{36}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})\b",
    re.DOTALL,
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{1,4}:){1,7}(?::?[0-9a-fA-F]{1,4}){1,7}(?![\w:])")
_PHONE = re.compile(
    r"(?<![\w.+/-])(?:"
    r"\+\d{1,3}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]?\d{1,5}){2,6}"  # international: a plus sign and the country
    r"|(?:1[ .-])?\(\d{3}\) ?\d{3}[ .-]\d{4}"  # North American: (213) 484-0480
    r"|(?:1[ .-])?[2-9]\d{2}([.-])[2-9]\d{2}\1\d{4}"  # and 213-484-0480
    r")(?![\w-]|\.\d)"
)
_VERSION = re.compile(r"(?:\bv|\bver|version|release|firmware|build)[ .:]{0,2}$", re.IGNORECASE)
_PHONE_DIGITS = range(9, 16)  # E.164 allows no more than 15; with fewer than 9 a sum looks the same
_UNNAMED = ("role", "type")  # of a message: words of the format, nobody's text


def masked(value: Any, found: Counter[str]) -> Any:
    """Return a value of a row with personal data in its strings replaced; the kinds are counted in `found`."""
    if isinstance(value, str):
        return masked_text(value, found)
    if isinstance(value, list):
        return [masked(item, found) for item in value]
    if isinstance(value, dict):
        return {key: item if key in _UNNAMED else masked(item, found) for key, item in value.items()}
    return value


def masked_text(text: str, found: Counter[str]) -> str:
    """Return `text` with <email>, <key>, <ip> and <phone> in the place of what was found."""
    for kind, is_possible, pattern, is_one in _KINDS:
        if is_possible(text):
            text = pattern.sub(_marking(kind, is_one, found), text)
    return text


def _marking(kind: str, is_one: Callable[[re.Match[str]], bool], found: Counter[str]) -> Callable[[re.Match[str]], str]:
    def mark(match: re.Match[str]) -> str:
        if not is_one(match):
            return match[0]
        found[kind] += 1
        return f"<{kind}>"

    return mark


def _is_public(match: re.Match[str]) -> bool:
    """Tell whether an address belongs to somebody: not to a private or documented range, and no version number."""
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    if address.version == 6 and (len(match[0]) < 8 or match[0].count(":") < 3):
        return False  # `a::b` is also a name in C++
    return address.is_global and not _VERSION.search(match.string[max(0, match.start() - 12) : match.start()])


def _is_phone(match: re.Match[str]) -> bool:
    return sum(map(str.isdigit, match[0])) in _PHONE_DIGITS


def _always(_: re.Match[str]) -> bool:
    return True


_KEY_MARKS = ("hf_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat", "glpat", "sk-", "k_live", "xox", "AKIA",
              "AIza", "npm_", "eyJ", "PRIVATE KEY")  # fmt: skip
_FOUR_DIGITS = re.compile(r"\d{4}|\d[ .-]\d{2}").search
_DOTTED = re.compile(r"\d\.\d{1,3}\.\d").search

# Kind, a cheap test of whether the text can hold one at all, the pattern, and what decides about a match. Keys first:
# a private key may hold what looks like something else.
_KINDS: tuple[tuple[str, Callable[[str], object], re.Pattern[str], Callable[[re.Match[str]], bool]], ...] = (
    ("key", lambda text: any(mark in text for mark in _KEY_MARKS), _KEY, _always),
    ("email", lambda text: "@" in text, _EMAIL, _always),
    ("ip", _DOTTED, _IPV4, _is_public),
    ("ip", lambda text: text.count(":") > 2, _IPV6, _is_public),
    ("phone", _FOUR_DIGITS, _PHONE, _is_phone),
)  # fmt: skip
KINDS = tuple(dict.fromkeys(kind for kind, *_ in _KINDS))

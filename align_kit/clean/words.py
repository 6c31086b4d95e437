"""Words and tokens of a text, for comparing only: what is written keeps its spelling.

Case, Unicode form and white space never tell two texts apart. Tokens keep punctuation, because `2 + 2` is not `2 - 2`;
words leave it out, because a copied sentence stays one when its commas move.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from align_kit.data.digest import canonical_json

# Scripts that put no space between words: each of their characters is a word.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"  # kana and Chinese characters
)
_PLAIN_WORD = re.compile(r"\w+")
_PLAIN_TOKEN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")
_TOKEN = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+|[^\w\s]")
_ONE_SPACELESS = re.compile(rf"[{_SPACELESS}]")


def words(text: str) -> list[str]:
    """Return the words of `text`, folded (NFKC, no case), without punctuation."""
    return _PLAIN_WORD.findall(text.lower()) if text.isascii() else _WORD.findall(folded(text))


def tokens(text: str) -> list[str]:
    """Return the words and punctuation marks of `text`, folded (NFKC, no case)."""
    return _PLAIN_TOKEN.findall(text.lower()) if text.isascii() else _TOKEN.findall(folded(text))


def folded(text: str) -> str:
    """Return `text` in one Unicode form and without case."""
    return unicodedata.normalize("NFKC", text).casefold()


def is_spaceless(text: str) -> bool:
    """Tell whether `text` is mostly in a script without spaces, so that its words cannot be counted by them."""
    return not text.isascii() and 2 * len(_ONE_SPACELESS.findall(text)) > len(text)


def collapsed(value: Any) -> Any:
    """Return a value of a row with each run of white space one space, and every string in one Unicode form (NFC)."""
    if isinstance(value, str):
        text = " ".join(value.split())
        return text if text.isascii() else unicodedata.normalize("NFC", text)
    if isinstance(value, list):
        return [collapsed(item) for item in value]
    if isinstance(value, dict):
        return {key: collapsed(item) for key, item in value.items()}
    return value


def row_digest(row: dict[str, Any]) -> bytes:
    """Return 16 bytes that are equal for rows that are equal but for white space and Unicode form."""
    import xxhash

    return xxhash.xxh3_128_digest(canonical_json(collapsed(row)).encode("utf-8", "surrogatepass"))

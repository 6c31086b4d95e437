"""Numbers of one completion or one pair, and the few statistics that sum them up."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from align_kit.data.chains import chain_of
from align_kit.data.digest import canonical_json, text_digest

if TYPE_CHECKING:
    import numpy as np

Z = 1.959964  # the normal distribution's 97.5 % quantile
# A word, a character of a script that is written without spaces, or a mark.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]")


def text_of(value: Any) -> str:
    """Return what a prompt or a completion says: the string, or its messages' thoughts and contents, line by line."""
    if isinstance(value, str):
        return value
    return "\n".join(_content(message) for message in value)


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else canonical_json(content)
    if chain := chain_of(message):
        text = f"{chain}\n{text}"
    return text + (canonical_json(message["tool_calls"]) if message.get("tool_calls") else "")


def words(text: str) -> list[str]:
    """Return the words and marks of a text in order, capitals as they are."""
    return _WORD.findall(text)


def similarity(one: Sequence[str], other: Sequence[str]) -> float:
    """Return the edit similarity of two lists of words: 1 - (insertions + deletions) / all words.

    That is 2 LCS / (n + m), by the longest common subsequence in bit-parallel form (Hyyro 2004, "Bit-Parallel
    LCS-length Computation Revisited"): n steps on an integer of m bits. 1 for two empty lists.
    """
    if not one and not other:
        return 1.0
    at: dict[str, int] = {}
    for place, word in enumerate(one):
        at[word] = at.get(word, 0) | 1 << place
    every = (1 << len(one)) - 1
    state = every
    for word in other:
        matched = state & at.get(word, 0)
        state = ((state + matched) | (state - matched)) & every
    common = len(one) - state.bit_count()
    return 2 * common / (len(one) + len(other))


def pair_key(prompt: str, sides: Sequence[str]) -> tuple[bytes, bool]:
    """Return a digest of a prompt and its completions in either order, and whether they stand in reverse order.

    White space around a text and the kind of its line ends do not count; indents do, since code lives by them.
    """
    texts = [plain(text) for text in sides]
    return bytes.fromhex(text_digest(plain(prompt), *sorted(texts))), texts != sorted(texts)


def plain(text: str) -> str:
    """Return a text as it is compared for equality."""
    return text.strip().replace("\r\n", "\n")


def wilson(share: float, trials: float) -> tuple[float, float]:
    """Return the 95 % interval of a share of so many trials (Wilson 1927); the whole of 0 to 1 without trials."""
    if not trials:
        return 0.0, 1.0
    square = Z * Z / trials
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def point_biserial(yes: np.ndarray, no: np.ndarray) -> float | None:
    """Return the correlation of a number with a yes or no, from the numbers of either group; None where undefined."""
    import numpy as np

    everything = np.concatenate([yes, no])
    if not len(yes) or not len(no) or not everything.std():
        return None
    balance = math.sqrt(len(yes) * len(no)) / len(everything)
    return float((yes.mean() - no.mean()) / everything.std() * balance)


def ranked_right(yes: np.ndarray, no: np.ndarray) -> float | None:
    """Return how often a yes has the larger number than a no, equal ones counting half (the area under the ROC curve).

    By ranks (Mann and Whitney 1947); None where one group is empty.
    """
    import numpy as np

    if not len(yes) or not len(no):
        return None
    ordered = np.sort(no)
    below, up_to = np.searchsorted(ordered, yes, "left"), np.searchsorted(ordered, yes, "right")
    return float((below + up_to).sum() / 2 / (len(yes) * len(no)))

"""Hashes of word runs for many texts at once, and MinHash signatures of them (Broder 1997), by numpy alone.

All is the same on every machine and in every process. Legend: T tokens of all texts, N runs, R rows, P permutations.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHINGLE = 5  # tokens a run, as FineWeb compares (Penedo 2024, sec. 3.3)
PERMUTATIONS = 128
RECALL = 0.99  # of pairs exactly at the threshold that must meet in a band; pairs above it meet more often
_PAD = ""  # no text holds it as a token
_ODD = 0x9E3779B97F4A7C15  # 2**64 / golden ratio (Knuth, vol. 3, sec. 6.4)
_CACHE = 1 << 20  # words whose hashes are remembered


class _Hashes(dict[str, int]):
    """XXH3 of each word, remembered: most words of a text have been seen before."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _CACHE:
            self.clear()
        found = self[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return found


_hashes = _Hashes()


def runs(texts: Sequence[Sequence[str]], length: int) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
    """Return the hashes of all runs of `length` words in each text, and the number of the text that each is of.

    A text of fewer words has no run.
    """
    import numpy as np

    lengths_R = np.fromiter(map(len, texts), np.intp, len(texts))
    total = int(lengths_R.sum())
    if total < length:
        return np.empty(0, np.uint64), np.empty(0, np.intp)
    words = itertools.chain.from_iterable(texts)
    hashes_T = np.fromiter(map(_hashes.__getitem__, words), np.uint64, total)
    stop = total - length + 1
    found_N = hashes_T[:stop].copy()
    for place in range(1, length):
        found_N *= np.uint64(_ODD)
        found_N += hashes_T[place : stop + place]
    text_N = np.repeat(np.arange(len(texts)), lengths_R)[:stop]
    inside = np.arange(stop) + length <= np.cumsum(lengths_R)[text_N]
    return mixed(found_N[inside]), text_N[inside]


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return `values` with every bit made to depend on all (the finaliser of MurmurHash3)."""
    import numpy as np

    shift = np.uint64(33)
    values = (values ^ (values >> shift)) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> shift)) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> shift)


def padded(tokens: list[str]) -> list[str]:
    """Return tokens that make at least one shingle: a text of few is compared as a whole."""
    return tokens if len(tokens) >= SHINGLE else tokens + [_PAD] * (SHINGLE - len(tokens))


def shingles(tokens: list[str]) -> frozenset[tuple[str, ...]]:
    """Return the set of a text's shingles, by their words, as `jaccard` compares them."""
    tokens = padded(tokens)
    return frozenset(zip(*(tokens[place:] for place in range(SHINGLE)), strict=False))


def jaccard(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """Return the share of the shingles of either that both have."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def bands(threshold: float, permutations: int = PERMUTATIONS) -> tuple[int, int]:
    """Return how many bands of how many hashes make pairs at `threshold` meet with a chance of at least `RECALL`.

    Long bands make few false candidates, so the longest that still finds enough is taken: the chance to meet is
    1 - (1 - threshold**rows)**bands (Leskovec 2020, sec. 3.4.2).
    """
    for rows in range(permutations, 1, -1):
        number = permutations // rows
        if 1 - (1 - threshold**rows) ** number >= RECALL:
            return number, rows
    return permutations, 1


def signed(
    texts: Sequence[Sequence[Sequence[str]]], tags: Sequence[int], threshold: float, seed: int = 0
) -> NDArray[np.uint64]:
    """Return each row's band hashes, (R, bands); an equal band makes a candidate pair.

    `texts` are rows of parts of tokens. A shingle counts as another in another part or under another tag of its row.
    So where every part is alike by `threshold`, the whole is too, and one signature a row finds all such pairs.
    """
    import numpy as np

    flat = [padded(list(part)) for row in texts for part in row]
    row_of_part = np.repeat(np.arange(len(texts)), [len(row) for row in texts])
    place = np.concatenate([np.arange(len(row)) for row in texts]) + len(texts[0]) * np.asarray(tags)[row_of_part]
    found_N, part_N = runs(flat, SHINGLE)
    found_N = mixed(found_N + place[part_N].astype(np.uint64) * np.uint64(_ODD))
    counts_R = np.bincount(row_of_part[part_N], minlength=len(texts))
    minima = _minima(found_N, np.concatenate([[0], np.cumsum(counts_R)[:-1]]), seed)
    number, rows = bands(threshold)
    banded = minima[:, : number * rows].astype(np.uint64).reshape(len(texts), number, rows)
    keys = np.arange(number, dtype=np.uint64)[None, :].repeat(len(texts), axis=0)
    for column in range(rows):
        keys = mixed(keys * np.uint64(_ODD) + banded[:, :, column])
    return keys


def _minima(found_N: NDArray[np.uint64], starts_R: NDArray[np.intp], seed: int) -> NDArray[np.uint32]:
    """Return the least of each row's hashes under each of P permutations of 32 bits, (R, P)."""
    import numpy as np

    multipliers, offsets = _permutations(seed)
    high_N = (found_N >> np.uint64(32)).astype(np.uint32)
    least = np.empty((len(starts_R), PERMUTATIONS), np.uint32)
    for place in range(PERMUTATIONS):
        least[:, place] = np.minimum.reduceat((high_N ^ offsets[place]) * multipliers[place], starts_R)
    return least


@functools.cache
def _permutations(seed: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    import numpy as np

    drawn = mixed(np.arange(2 * PERMUTATIONS, dtype=np.uint64) + np.uint64(seed * 2 * PERMUTATIONS + 1))
    return drawn[:PERMUTATIONS].astype(np.uint32) | np.uint32(1), drawn[PERMUTATIONS:].astype(np.uint32)

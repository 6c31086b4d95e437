"""The least that a training step must multiply, how fast this machine multiplies, and the tokens each path computes.

P, C and R are the tokens of a pair's prompt, chosen and rejected side; N are the parameters of the layers; V x H are
those of the head. A multiplied parameter costs 2 FLOPs a token forwards and 4 backwards; attention is left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from benchmarks._world import Shape

Pair = tuple[int, int, int]
PROBE_SECONDS = 0.05
UNSHARED = 4


def pairs_of(rows: Sequence[dict[str, Any]]) -> list[Pair]:
    """Return P, C and R of tokenised pairs; of rows with one completion, R is 0."""
    if "chosen_ids" in rows[0]:
        return [tuple(len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")) for row in rows]  # type: ignore[misc]
    trained = [sum(row["loss_mask"]) for row in rows]
    return [(len(row["input_ids"]) - count, count, 0) for row, count in zip(rows, trained, strict=True)]


def floor_flops(pairs: Sequence[Pair], shape: Shape, *, reference: bool) -> float:
    """Return the FLOPs of a step that computes nothing twice and the head only where a token is predicted.

    The last token of a completion predicts nothing: P + C + R - 2 positions of a pair, P + C - 1 where R is 0. A
    reference that is not cached adds its forward, a third.
    """
    positions = sum(p + c + r - (2 if r else 1) for p, c, r in pairs)
    predicted = sum(c + r for _, c, r in pairs)
    return (6 + 2 * reference) * (positions * shape.body + predicted * shape.head)


def tokens_of(pairs: Sequence[Pair], path: str) -> tuple[int, int]:
    """Return the least and the most tokens the policy's forwards of a step compute on `path`, on all ranks together.

    Plain rows are padded, to what depends on how they are dealt. Packed rows may leave out a sequence's last token;
    shared ones have their prompt in common, or more; one under 4 tokens may not be worth sharing.
    """
    sequences = [p + side for p, *sides in pairs for side in sides if side]
    if path == "plain":
        return sum(sequences), len(sequences) * max(sequences)
    if path == "packed":
        return sum(sequences) - len(sequences), sum(sequences)
    return 1, sum(p + c + r + (p if p < UNSHARED else 0) for p, c, r in pairs)


def matrix_flops(shape: Shape, tokens: int) -> float:
    """Return the FLOP/s of a matrix product of the model's kind, now and with this thread's cores."""
    import torch

    left, right = torch.randn(tokens, shape.hidden), torch.randn(shape.hidden, shape.intermediate)
    done, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < PROBE_SECONDS or done < 2:
        torch.mm(left, right)
        done += 1
    return done * 2 * tokens * shape.hidden * shape.intermediate / passed

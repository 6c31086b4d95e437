"""Before ranks do something together they tell each other what: who disagrees is named, where a collective would hang.

Collectives do not know what they are for: where one rank evaluates while another trains, their gathers pair up, and
the run hangs or computes nonsense. One small exchange at the start of each activity, on a group of its own, finds out.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from align_kit.errors import Fault

SAVE, STOP = 1, 2  # what a rank may wish for

# What ranks do together, in words; `step` counts optimizer steps (of a rollout: iterations), `count` as the words say.
ACTIVITIES = {
    "start": "starts training at step {step}, a model with signature {count:x}",
    "step": "trains step {step} of {count} micro-batches",
    "update": "updates the weights at step {step}",
    "evaluation": "evaluates {count} batches at step {step}",
    "rollout": "writes iteration {step} of {count} completions",
    "check": "compares frozen models at step {step}",
    "save": "saves step {step}",
    "epoch": "ends an epoch at step {step}",
    "end": "ends training at step {step}",
}
NAMES = tuple(ACTIVITIES)
HEADER = 5  # activity, step, count, number of values, wish
VALUES = 11
WIDTH = HEADER + VALUES  # 128 bytes a rank, whatever is said

Row = tuple[int, ...]


class RollCall:
    """One fixed-size exchange at the start of each activity, over `group` (gloo: these are a few bytes on the CPU).

    `wish` is what this rank asks all ranks for (bits `SAVE`, `STOP`); `agreed` is what any of them asked for at the
    latest call, the same on all ranks. With one rank nothing is exchanged and `agreed` is its own wish.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, group: Any = None) -> None:
        self.rank, self.world_size, self.group = rank, world_size, group
        self.wish = 0
        self.agreed = 0

    @classmethod
    def of_all_ranks(cls) -> RollCall:
        """Return the roll call of every rank that has joined, on a group of its own; all of them call it."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))

    def __call__(
        self, activity: str, step: int, count: int = 0, values: Sequence[float] = ()
    ) -> list[tuple[float, ...]]:
        """Return the `values` (at most 11) that each rank brings to an activity, in the order of ranks.

        Raises `Fault`, on all ranks alike, where they do not all bring as many values to the same activity, step and
        count.
        """
        rows = self._exchanged((NAMES.index(activity), step, count, len(values), self.wish, *_as_words(values)))
        self.agreed = 0
        for row in rows:
            self.agreed |= row[4]
        if len({row[:4] for row in rows}) > 1:
            raise Fault(f"the ranks disagree about what they do: {_who_does_what(rows)}; go on with --resume")
        return [_as_values(row[HEADER : HEADER + len(values)]) for row in rows]

    def summed(self, activity: str, step: int, count: int, mine: torch.Tensor) -> torch.Tensor:
        """Return `mine` (a few numbers) summed over the ranks of an activity, in the order of ranks.

        The sum is taken in double precision and rounded once to what `mine` is: of two ranks it has the bits that a
        reduction gives, of more it does not depend on how they are linked.
        """
        brought = self(activity, step, count, mine.reshape(-1).tolist())
        return torch.tensor(brought, dtype=torch.float64).sum(0).reshape(mine.shape).to(mine)

    def words(self, mine: str) -> list[str]:
        """Return what each rank says, in the order of ranks; for the rare case that numbers do not tell enough."""
        if self.world_size == 1:
            return [mine]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def _exchanged(self, row: Row) -> list[Row]:
        if self.world_size == 1:
            return [row]
        mine = torch.tensor([*row, *[0] * (WIDTH - len(row))], dtype=torch.int64)
        table = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(table, mine, group=self.group)
        return [tuple(row.tolist()) for row in table]


def _as_words(values: Sequence[float]) -> Row:
    """Return the bits of numbers as 64-bit words: a sum of float32 must not be rounded on its way."""
    assert len(values) <= VALUES, "a row of the roll call has a fixed size"
    return struct.unpack(f"{len(values)}q", struct.pack(f"{len(values)}d", *values))


def _as_values(words: Row) -> tuple[float, ...]:
    return struct.unpack(f"{len(words)}d", struct.pack(f"{len(words)}q", *words))


def _who_does_what(rows: Sequence[Row]) -> str:
    """Return a clause for each thing that is done: `ranks 0, 2-7: trains step 3 of 4 micro-batches`."""
    doing: dict[Row, list[int]] = {}
    for rank, row in enumerate(rows):
        doing.setdefault(row[:4], []).append(rank)
    said = {row: ACTIVITIES[NAMES[row[0]]].format(step=row[1], count=row[2]) for row in doing}
    if len(set(said.values())) < len(said):  # the same words: the number of sums tells them apart
        said = {row: f"{words} ({row[3]} sums)" for row, words in said.items()}
    return "; ".join(f"{named(ranks)} {said[row]}" for row, ranks in doing.items())


def named(ranks: Sequence[int]) -> str:
    """Return ranks in words, neighbours drawn together: `rank 3`, `ranks 0, 2-7`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    listed = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"

"""The micro-batches a run will compute, drawn from its tokenised rows before it starts: the mean one and the worst."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from align_kit.plan.facts import Micro

if TYPE_CHECKING:
    from align_kit.forward.layout import Pack

Row = Mapping[str, Any]
Batch = Mapping[str, Any]
Mode = Literal["shared", "packed", "plain"]

MEASURED, MEASURED_ROWS, FEWEST = 16, 256, 3  # micro-batches laid out as the run would, for the mean
HEAVIEST = 2  # and of all that are drawn, for the worst
DRAWN = 4096  # rows looked at for the heaviest
INVENTED = 1 << 20  # a number that no completion drawn has
SEED = 20240501


@dataclass(frozen=True)
class Written:
    """How completions that are not written yet join their prompts: `each` to a prompt, all of `length` tokens.

    An iteration trains on `parts` mini-batches in turn, each drawn at random.
    """

    each: int
    length: int
    parts: int = 1


@dataclass(frozen=True)
class Batches:
    """Tokenised rows and what a run makes of them.

    `rows` are the rows or a sample of them, `collate` the phase's way from rows to a padded batch, `mode` the way
    batches are computed; `whole` tells that every token is computed and each sequence gives one score.
    `world_size` shapes the step inside which rows are dealt out. `longest` is the longest row of all, where `rows` is a
    sample; `written` is given where the rows are prompts. `held_out` are rows of the evaluation in their order, the
    longest first where they are a sample; those that are trained on stand for them where there are none.
    """

    rows: Sequence[Row]
    collate: Callable[[Sequence[Row]], Batch]
    mode: Mode
    world_size: int
    whole: bool = False
    longest: Row | None = None
    written: Written | None = None
    held_out: Sequence[Row] = ()

    def sized(self, per_device: int, accumulation: int) -> tuple[Micro, Micro]:
        """Return the mean and the worst micro-batch of `per_device` rows on a rank, `accumulation` of them a step."""
        batches = list(self._drawn(per_device, accumulation))
        count = max(FEWEST, min(MEASURED, MEASURED_ROWS // per_device))
        stride = max(1, len(batches) // count)
        typical = [self.micro(rows) for rows in batches[::stride][:count]]
        heaviest = sorted(batches, key=self._work, reverse=True)[:HEAVIEST]
        if self.longest is not None:  # it has to come some time, in the heaviest micro-batch at worst
            heaviest[0] = [self._whole(self.longest), *sorted(heaviest[0], key=_length)[:-1]]
        return _mean(typical), _worst([*typical, *map(self.micro, heaviest)])

    def evaluated(self, per_device: int) -> Micro:
        """Return the heaviest micro-batch of `per_device` rows in an evaluation, which takes them as they come."""
        rows = list(self.held_out or [*([] if self.longest is None else [self.longest]), *self.rows])[:DRAWN]
        rows += [rows[place % len(rows)] for place in range(-len(rows) % per_device)]  # the last batch is filled up
        batches = [rows[start : start + per_device] for start in range(0, len(rows), per_device)]
        return _worst([self.micro(rows) for rows in sorted(batches, key=self._work, reverse=True)[:HEAVIEST]])

    def micro(self, rows: Sequence[Row]) -> Micro:
        """Return what computing `rows` as one micro-batch takes."""
        return micro_of(self.collate(rows), self.mode, self.whole)

    def _work(self, rows: Sequence[Row]) -> int:
        lengths = [_length(row) for row in rows]
        return len(lengths) * max(lengths) if self.mode == "plain" else sum(lengths)

    def _whole(self, row: Row) -> Row:
        return row if self.written is None else _completed(row, INVENTED, self.written.length)

    def _drawn(self, per_device: int, accumulation: int) -> Iterator[list[Row]]:
        """Yield micro-batches of steps drawn at random, dealt out inside a step as the trainers do."""
        import numpy as np

        from align_kit.data.balance import deal

        draw = np.random.default_rng(SEED)
        step = per_device * self.world_size * accumulation
        if self.written is not None:
            yield from self._iterations(per_device, step, draw)
            return
        order = draw.permutation(len(self.rows))[:DRAWN].tolist()
        while len(order) % step or not order:  # fewer rows than a step takes begin again, as an epoch does
            order.append(order[len(order) % len(self.rows)] if order else 0)
        for start in range(0, len(order), step):
            rows = [self.rows[place] for place in order[start : start + step]]
            work = [_length(row) for row in rows]
            for items in deal(work, per_device, self.world_size):
                yield [rows[item] for item in items]

    def _iterations(self, per_device: int, step: int, draw: Any) -> Iterator[list[Row]]:
        """Yield micro-batches of completions; those of one prompt meet in one where they can."""
        from align_kit.data.balance import Group, deal

        assert self.written is not None
        each, length, parts = self.written.each, self.written.length, self.written.parts
        for _ in range(max(1, min(DRAWN, 4 * len(self.rows)) // (step * parts))):
            prompts = [self.rows[int(place)] for place in draw.integers(len(self.rows), size=step * parts // each + 1)]
            places = draw.permutation(step * parts)[:step].tolist()
            of_prompt: dict[int, list[int]] = {}
            for item, place in enumerate(places):
                of_prompt.setdefault(place // each, []).append(item)
            groups = [Group(items, _length(prompts[number])) for number, items in of_prompt.items()]
            for items in deal([length] * step, per_device, self.world_size, groups):
                yield [_completed(prompts[places[item] // each], places[item], length) for item in items]


def micro_of(batch: Batch, mode: Mode, whole: bool) -> Micro:
    """Return what computing a padded batch takes: see `Batches` for `mode` and `whole`."""
    count, longest = batch["input_ids"].shape
    given = int(batch["attention_mask"].sum())
    if mode == "plain":
        tokens = count * longest
        read = count if whole else tokens
        return Micro(count, tokens, read, count * _causal(longest), longest, given)
    pack = _pack(batch, share=mode == "shared", whole=whole)
    predicted = count if whole else len(pack.at_P)
    segments = pack.segments.items
    pairs = sum(one.length * one.prefix + _causal(one.length) for one in segments)
    deepest = max(one.prefix + one.length for one in segments)
    return Micro(count, pack.segments.total, predicted, pairs, deepest, given)


def _completed(prompt: Row, number: int, length: int) -> Row:
    """Return a prompt with a completion of ids that no other row has: nothing of it is shared."""
    ids = list(prompt["prompt_ids"])
    invented = [-1 - number * length - place for place in range(length)]
    return {"input_ids": [*ids, *invented], "loss_mask": [0] * len(ids) + [1] * length}


def _length(row: Row) -> int:
    """Return the tokens of a row, a pair's prompt once."""
    return sum(len(ids) for name, ids in row.items() if name in TOKENS)


TOKENS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")


def _causal(length: int) -> int:
    """Return the query-key pairs of `length` tokens of which each attends to those before it and itself."""
    return length * (length + 1) // 2


def _pack(batch: Batch, *, share: bool, whole: bool) -> Pack:
    from align_kit.forward.layout import pack_rows

    return pack_rows(batch, share=share, whole=whole)


FIELDS = ("sequences", "tokens", "predicted", "pairs", "longest", "given")


def _mean(micros: Sequence[Micro]) -> Micro:
    return Micro(*(sum(getattr(one, name) for one in micros) / len(micros) for name in FIELDS))


def _worst(micros: Sequence[Micro]) -> Micro:
    """Return the micro-batch that computes most tokens, and that is as bad in every other number as any."""
    return Micro(*(max(float(getattr(one, name)) for one in micros) for name in FIELDS))


# --- rows where there are none ----------------------------------------------------------------------------------------


def invented_rows(kind: str, count: int, length: int) -> list[Row]:
    """Return `count` rows of `kind` that are `length` tokens long each, a prompt being half of it; nothing is shared.

    Of prompts that are to be completed, `length` is what the prompt takes alone.
    """
    half = length // 2
    ids = iter(range(1, 4 * (count + 1) * length))

    def take(tokens: int) -> list[int]:
        return [next(ids) for _ in range(tokens)]

    def row() -> Row:
        if kind == "prompt":
            return {"prompt_ids": take(length)}
        if kind in ("preference", "binary"):
            names = ("chosen_ids", "rejected_ids") if kind == "preference" else ("completion_ids",)
            label = {"label": True} if kind == "binary" else {}
            return {"prompt_ids": take(half), **{name: take(length - half) for name in names}, **label}
        return {"input_ids": take(length), "loss_mask": [1] * length}

    return [row() for _ in range(count)]

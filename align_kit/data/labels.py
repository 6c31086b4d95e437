"""Count over tokenised rows what decides whether they teach what they should: what is trained, and how it ends.

The numbers come from the same columns that batches are made of, so they say what is trained, not what was meant.
A sequence is one input of the model: a row, or each side of a pair with the prompt before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from align_kit.data.control import ControlTokens

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import NDArray

CHUNK = 10_000  # rows held in memory at a time
ENDING = 3  # last trained tokens: templates write a newline or two behind the token that ends a turn
ENOUGH = 0.99  # share of sequences that should end in a trained end token
SIDES = {"preference": ("chosen", "rejected"), "binary": ("completion",)}  # kind -> completions behind the prompt


@dataclass(frozen=True)
class Words:
    """The tokens that mean something: those that generation stops at, control tokens, and the special ones by name."""

    stops: frozenset[int]
    control: frozenset[int]
    eos: int
    bos: int | None = None
    pad: int | None = None
    unknown: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, stops: Sequence[int] = ()) -> Words:
        """Return those of `tokenizer`; `stops` are what generation stops at beside its EOS."""
        marks = tokenizer.convert_tokens_to_ids(ControlTokens(tokenizer).tokens)
        return cls(
            stops=frozenset([tokenizer.eos_token_id, *stops]),
            control=frozenset(marks),
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
            unknown=tokenizer.unk_token_id,
        )


@dataclass
class Labels:
    """What was counted in `measured` of `rows` rows; lengths are tokens, by part, an array each.

    `ended`: sequences whose last trained tokens hold one that generation stops at, by that token; `turned`: others that
    end in a control token, by it; `open`: sequences with no masked token at their start; `double_bos`, `no_bos`: how
    they begin; `unknown`: tokens that stand for text the tokenizer cannot spell; `documents`: EOS tokens in text.
    """

    kind: str
    rows: int
    measured: int = 0
    sequences: int = 0
    tokens: int = 0
    trained: int = 0
    open: int = 0
    ended: Counter[int] = field(default_factory=Counter)
    turned: Counter[int] = field(default_factory=Counter)
    double_bos: int = 0
    no_bos: int = 0
    unknown: int = 0
    documents: int = 0
    lengths: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def ended_share(self) -> float:
        """Share of sequences that end in a trained token that generation stops at."""
        return self.ended.total() / self.sequences if self.sequences else 0.0

    @property
    def trained_share(self) -> float:
        """Share of tokens that are trained."""
        return self.trained / self.tokens if self.tokens else 0.0


class Lists(NamedTuple):
    """Lists of numbers in one array: list `n` is `values[starts[n]:starts[n + 1]]`."""

    values: NDArray[np.int64]
    starts: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.starts[1:] - self.starts[:-1]


class Part(NamedTuple):
    """Sequences of one name: prompts that are not trained, where there are any, and what stands behind them."""

    name: str
    heads: Lists | None
    tails: Lists
    trained: NDArray[np.bool_]  # for each value of `tails`


def measure(rows: Dataset, kind: str, words: Words, *, most: int | None = None) -> Labels:
    """Return what is counted in tokenised `rows` of `kind`, in `most` of them, evenly spread, where there are more."""
    import numpy as np

    found = Labels(kind, len(rows))
    few = rows if most is None or len(rows) <= most else rows.select(np.linspace(0, len(rows) - 1, most, dtype=int))
    lengths: dict[str, list[NDArray[np.int64]]] = {}
    for table in few.with_format("arrow").iter(CHUNK):
        found.measured += len(table)
        for part in _parts(table, found):
            _count(part, words, found)
            for name, more in _lengths(part).items():
                lengths.setdefault(name, []).append(more)
    found.lengths = {name: np.concatenate(many) for name, many in lengths.items()}
    return found


def _parts(table: Any, found: Labels) -> Iterator[Part]:
    import numpy as np

    kind = found.kind

    if kind == "prompt":
        prompts = _lists(table["prompt_ids"])
        yield Part("prompt", None, prompts, np.zeros(len(prompts.values), dtype=bool))
    elif kind in SIDES:
        prompts = _lists(table["prompt_ids"])
        for side in SIDES[kind]:
            tails = _lists(table[f"{side}_ids"])
            yield Part(side, prompts, tails, np.ones(len(tails.values), dtype=bool))
    else:
        ids = _lists(table["input_ids"])
        trained = _lists(table["loss_mask"]).values.astype(bool)
        found.open += int(trained[ids.starts[:-1]].sum())
        trained[ids.starts[:-1]] = False  # nothing stands before the first token to predict it from
        yield Part("row", None, ids, trained)


def _lists(column: Any) -> Lists:
    import numpy as np

    whole = column.combine_chunks()
    lengths = whole.value_lengths().to_numpy(zero_copy_only=False)
    return Lists(whole.flatten().to_numpy(), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


def _lengths(part: Part) -> dict[str, NDArray[np.int64]]:
    """Return lengths by name; those of the prompt once for both sides of a pair."""
    if part.heads is None:
        return {"prompt" if part.name == "prompt" else "row": part.tails.lengths}
    prompt = {} if part.name == "rejected" else {"prompt": part.heads.lengths}
    return prompt | {part.name: part.tails.lengths, "whole": part.heads.lengths + part.tails.lengths}


def _count(part: Part, words: Words, found: Labels) -> None:
    begins = part.tails if part.heads is None else part.heads
    found.sequences += len(part.tails.lengths)
    found.tokens += len(part.tails.values) + (0 if part.heads is None else len(part.heads.values))
    found.trained += int(part.trained.sum())
    if words.unknown is not None and words.unknown not in words.stops:
        found.unknown += int((part.tails.values == words.unknown).sum())
        found.unknown += 0 if part.heads is None else int((part.heads.values == words.unknown).sum())
    _count_beginnings(begins, words, found)
    if found.kind == "text":
        found.documents += int((part.tails.values == words.eos).sum())
    if found.kind != "prompt":
        _count_endings(part, words, found)


def _count_beginnings(begins: Lists, words: Words, found: Labels) -> None:
    if words.bos is None:
        return
    firsts = begins.values[begins.starts[:-1][begins.lengths > 0]]
    longer = begins.starts[:-1][begins.lengths > 1]
    found.no_bos += int((firsts != words.bos).sum())
    found.double_bos += int(((begins.values[longer] == words.bos) & (begins.values[longer + 1] == words.bos)).sum())


def _count_endings(part: Part, words: Words, found: Labels) -> None:
    """Count how the trained tokens of each sequence end."""
    import numpy as np

    where = np.flatnonzero(part.trained)
    after = np.searchsorted(where, part.tails.starts[1:])  # of each sequence: how many trained tokens, up to its end
    before = np.searchsorted(where, part.tails.starts[:-1])
    ended, turned = np.full(len(after), -1), np.full(len(after), -1)
    control = sorted(words.control - words.stops)
    for back in range(1, ENDING + 1):
        there = after - back >= before
        last = np.full(len(after), -1)
        last[there] = part.tails.values[where[(after - back)[there]]]
        ended = np.where((ended < 0) & np.isin(last, list(words.stops)), last, ended)
        turned = np.where((turned < 0) & np.isin(last, control), last, turned)
    found.ended.update(ended[ended >= 0].tolist())
    found.turned.update(turned[(ended < 0) & (turned >= 0)].tolist())


def sentence(found: Labels, tokenizer: Any, *, scored: bool = False) -> str:
    """Return one line for the header of a run: what is trained, and whether it ends; `scored`: one score is trained."""
    if found.kind == "prompt":
        return f"{found.sequences:,} prompts to write to, none of it trained"
    said = ["no token, the score of each whole sequence" if scored else f"{found.trained_share:.1%} of the tokens"]
    if found.open and found.kind in ("prompt_completion", "messages"):
        said.append(f"{share(found.open, found.sequences)} rows with nothing masked at their start")
    if found.double_bos:
        said.append(f"{share(found.double_bos, found.sequences)} begin with BOS twice")
    if found.kind != "text":
        names = " or ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(found.ended)))) or "an end token"
        verdict = "ok" if found.ended_share >= ENOUGH else f"NOT the {ENOUGH:.0%} that teach a model to stop"
        said.append(f"{share(found.ended.total(), found.sequences)} end in {names}: {verdict}")
    part = "" if found.measured == found.rows else f" (of {found.measured:,} rows looked at)"
    return f"trained on: {'; '.join(said)}{part}"


def share(count: int, of: int) -> str:
    """Return a count with its share; one that is neither none nor all is never shown as either."""
    part = 100 * count / max(of, 1)
    return f"{count:,} of {of:,} ({part if count in (0, of) else min(99.9, max(0.1, part)):.1f}%)"

"""Log-probabilities of a frozen reference, computed once and kept by content: the `cached` placement.

A store is a folder named by everything its numbers depend on (`StoreKey`); runs that differ only in beta, loss or
learning rate share it. In it lie chunks (see `chunks`) of rows, each row under the digest of its own tokens, so that
order, duplicates and the number of ranks mean nothing. A filling that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from uuid import uuid4

from align_kit import log
from align_kit.data.digest import canonical_json, text_digest
from align_kit.errors import UserError
from align_kit.frozen import chunks
from align_kit.run_folder import make_private

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from align_kit.frozen.chunks import Digests, Logps

    Indices = NDArray[np.int64]

# Part of every key: raise it whenever the same row may get other numbers, or the layout of a chunk changes.
SCHEMA_VERSION = 1
CHUNK_ROWS = 256  # what a killed rank loses at most
_OPEN_CHUNKS = 64


class Row(NamedTuple):
    """One sequence: the tokens given and the tokens whose log-probabilities are asked for."""

    prompt_ids: Sequence[int] | NDArray[np.int32]
    completion_ids: Sequence[int] | NDArray[np.int32]

    @property
    def digest(self) -> bytes:
        """The XXH3-128 of both id lists; where the prompt ends counts."""
        import numpy as np
        import xxhash

        ids = np.concatenate([[len(self.prompt_ids)], self.prompt_ids, self.completion_ids]).astype("<i4")
        return bytes(xxhash.xxh3_128_digest(ids.tobytes()))


class Rows(Protocol):
    """Rows by number and in order: a list, or `columns.DatasetRows` over data too large for one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...
    def __iter__(self) -> Iterator[Row]: ...


# Gives the log-probabilities (nats) of the completion tokens of some rows, one array for each row.
Compute = Callable[[list[Row]], Sequence["ArrayLike"]]
Progress = Callable[[int, int], None]  # rows computed so far on all ranks, rows to compute


@dataclass(frozen=True)
class StoreKey:
    """All that a stored number depends on beside the row: change any and the store is another.

    `weights` is the reference's content digest, `tokenizer` its tokenizer's with the chat template, `precision` what
    the forward computes in; `forward` holds whatever else changes results (attention implementation, quantisation).
    """

    weights: str
    tokenizer: str
    precision: str
    forward: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """32 hexadecimal digits."""
        return text_digest(canonical_json(asdict(self)))


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class World:
    """The ranks that fill a store together; `gather` hands every rank the values of all, in order, and waits."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = _alone

    @classmethod
    def of_process(cls) -> World:
        """Return the ranks of this process's default group; one rank where there is no group."""
        import torch.distributed as dist

        if not dist.is_initialized():
            return cls()

        def gather(value: Any) -> list[Any]:
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, value)
            return gathered

        return cls(dist.get_rank(), dist.get_world_size(), gather)


ALONE = World()


@dataclass(frozen=True)
class Filled:
    """What a filling found and did: rows asked for, distinct ones among them, those computed, chunks found damaged."""

    rows: int
    distinct: int
    computed: int
    damaged: int

    def sentence(self) -> str:
        """Return it in words, for the header of a run."""
        found = self.distinct - self.computed
        return f"{self.distinct:,} sequences: {found:,} found, {self.computed:,} computed"


class ReferenceStore:
    """The log-probabilities of one reference, by row. Opening it reads and verifies every chunk there is."""

    def __init__(self, folder: Path, key: StoreKey) -> None:
        import numpy as np

        self.key = key
        self.path = Path(folder) / key.digest
        self.damaged: set[str] = set()  # names of chunks that did not hold what was written
        self._chunks: dict[str, Digests] = {}
        self._names: list[str] = []
        self._starts = np.zeros(1, np.int64)  # the number of each chunk's first row, and of all rows
        self._digests = np.empty(0, chunks.DIGEST)  # sorted; `_numbers` are the rows they belong to
        self._numbers = np.empty(0, np.int64)
        self._values = lru_cache(maxsize=_OPEN_CHUNKS)(lambda name: chunks.Values(self.path / name))
        self.refresh()

    def refresh(self) -> None:
        """Read the chunks that this or another process has added since; damaged ones are removed and named."""
        with self._disk():
            found = set(chunks.names(self.path)) - self._chunks.keys() - self.damaged
            read = {name: chunks.digests_of(self.path / name) for name in found}
        self.damaged.update(name for name, digests in read.items() if digests is None)
        self._chunks.update((name, digests) for name, digests in read.items() if digests is not None)
        self._index()

    def _index(self) -> None:
        import numpy as np

        self._names = sorted(self._chunks)
        per_chunk = [self._chunks[name] for name in self._names]
        self._starts = np.cumsum([0, *map(len, per_chunk)], dtype=np.int64)
        digests = np.concatenate([np.empty(0, chunks.DIGEST), *per_chunk])
        self._numbers = np.argsort(digests, kind="stable")  # of a row stored twice, the first is read by all
        self._digests = digests[self._numbers]

    def _find(self, digests: Digests) -> Indices:
        """Return the number of each digest's row, -1 where it is not stored."""
        import numpy as np

        if not len(self._digests):
            return np.full(len(digests), -1)
        places = np.minimum(np.searchsorted(self._digests, digests), len(self._digests) - 1)
        return np.where(self._digests[places] == digests, self._numbers[places], -1)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot keep log-probabilities in {self.path}: {error.strerror or error}; free or change the cache "
                "folder (ALIGN_KIT_CACHE), or use another reference_placement"
            ) from None

    # --- reading ---

    def missing(self, rows: Rows) -> list[int]:
        """Return the indices of rows that are not stored, in order; of equal rows the first."""
        import numpy as np

        digests, _ = _described(rows)
        distinct = np.sort(np.unique(digests, return_index=True)[1])
        return [int(index) for index in distinct[self._find(digests[distinct]) < 0]]

    def lookup(self, rows: Rows) -> list[Logps]:
        """Return the log-probabilities (nats, float32) of each row's completion tokens; all rows must be stored."""
        import numpy as np

        digests, _ = _described(rows)
        numbers = self._find(digests)
        assert (numbers >= 0).all(), f"{int((numbers < 0).sum())} of {len(rows)} rows are not stored; fill comes first"
        found: list[Any] = [None] * len(rows)
        of_chunk = np.searchsorted(self._starts, numbers, side="right") - 1
        with self._disk():
            for index in np.argsort(numbers):  # chunk by chunk: each is opened once
                chunk = of_chunk[index]
                found[index] = self._values(self._names[chunk]).row(numbers[index] - self._starts[chunk])
        return found

    # --- filling ---

    def fill(
        self,
        rows: Rows,
        compute: Compute,
        *,
        batch_rows: int,
        world: World = ALONE,
        chunk_rows: int = CHUNK_ROWS,
        progress: Progress | None = None,
    ) -> Filled:
        """Compute and store what is missing of `rows`; afterwards every rank sees every row.

        All ranks call it with the same rows, and each calls `compute` equally often (ZeRO-3 gathers together), on up
        to `batch_rows` rows of like length, the longest first. Which rows stand in a batch does not depend on the
        number of ranks. A chunk is stored whenever a rank has `chunk_rows` rows. Raises `UserError` where the folder
        cannot be written or is not shared by all ranks, or where the model gives numbers that are not finite.
        """
        with self._disk():
            self._open(world)
        digests, lengths = _described(rows)
        order = _longest_first(digests, lengths)
        todo, damaged = self._agree(digests, order, world)
        pending: dict[int, Logps] = {}
        for number, (batch, counts) in enumerate(_rounds(todo, batch_rows, world), start=1):
            values = _checked(compute, [rows[int(index)] for index in batch])
            if counts:
                pending.update(zip(map(int, batch), values, strict=True))
            if len(pending) >= chunk_rows:
                self._commit(digests, pending)
            if progress:
                progress(min(len(todo), number * world.size * batch_rows), len(todo))
        if pending:
            self._commit(digests, pending)
        world.gather(None)  # every rank has stored its share
        self.refresh()
        self._check_complete(digests, world)
        return Filled(len(rows), len(order), len(todo), damaged)

    def _open(self, world: World) -> None:
        """Make the folder on rank 0 and see that it is the same one on all ranks."""
        probe = world.gather(f"{chunks.DRAFT}{uuid4().hex}")[0]
        if world.rank == 0:
            make_private(self.path)
            (self.path / "key.json").write_text(canonical_json(asdict(self.key)) + "\n", encoding="utf-8")
            chunks.sweep(self.path)
            (self.path / probe).touch()
        world.gather(None)
        strangers = [rank for rank, seen in enumerate(world.gather((self.path / probe).exists())) if not seen]
        if world.rank == 0:
            (self.path / probe).unlink()
        if strangers:
            raise UserError(
                f"rank {strangers[0]} does not see what rank 0 writes to {self.path}; cached log-probabilities need "
                "a folder that all machines share: point ALIGN_KIT_CACHE to one, or use another reference_placement"
            )

    def _agree(self, digests: Digests, order: Indices, world: World) -> tuple[Indices, int]:
        """Return the rows that any rank lacks, the same on all ranks, and how many chunks were found damaged.

        Another run may be filling the store at the same time, so that each rank has found other chunks.
        """
        import numpy as np

        self.refresh()
        lacking = np.packbits(self._find(digests[order]) < 0).tobytes()
        told = world.gather((text_digest(digests.tobytes().hex()), lacking, self.damaged))
        assert len({rows for rows, _, _ in told}) == 1, "the ranks hold different rows"
        damaged = set().union(*(names for _, _, names in told))
        self.damaged.clear()  # they are gone, and told once
        if damaged:
            log.warn(f"{len(damaged)} damaged files of log-probabilities in {self.path} were removed; computing anew")
        bits = np.bitwise_or.reduce([np.frombuffer(bits, np.uint8) for _, bits, _ in told])
        return order[np.unpackbits(bits, count=len(order)).astype(bool)], len(damaged)

    def _commit(self, digests: Digests, pending: dict[int, Logps]) -> None:
        with self._disk():
            chunks.write(self.path, digests[list(pending)], list(pending.values()))
        pending.clear()

    def _check_complete(self, digests: Digests, world: World) -> None:
        lost = max(world.gather(int((self._find(digests) < 0).sum())))
        if lost:
            raise UserError(
                f"{lost} rows of log-probabilities stored in {self.path} are not there any more; something removes "
                "files there: point ALIGN_KIT_CACHE to another folder and start again"
            )

    # --- verifying ---

    def verify(
        self,
        rows: Rows,
        compute: Compute,
        *,
        count: int,
        tolerance: float,
        batch_rows: int,
        world: World = ALONE,
    ) -> float:
        """Recompute `count` stored rows, from the longest to the shortest, and return the largest difference (nats).

        All ranks call it with the same rows. Raises `UserError` on all of them where a token's log-probability
        differs by more than `tolerance`: the store was filled by something else than what computes now.
        """
        import numpy as np

        order = _longest_first(*_described(rows))
        chosen = order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(np.int64))]
        worst = 0.0
        for batch, _ in _rounds(chosen, batch_rows, world):
            asked = [rows[int(index)] for index in batch]
            for stored, now in zip(self.lookup(asked), _checked(compute, asked), strict=True):
                worst = max(worst, float(np.abs(stored - now).max(initial=0.0)))
        worst = max(world.gather(worst))
        if worst > tolerance:
            raise UserError(
                f"the log-probabilities in {self.path} are not what the reference gives: {len(chosen)} rows computed "
                f"again differ by up to {worst:.4g} (allowed {tolerance:.4g}); remove that folder to compute them anew"
            )
        return worst


def _described(rows: Rows) -> tuple[Digests, Indices]:
    """Return the digest and the tokens (prompt and completion) of each row."""
    import numpy as np

    digests, lengths = bytearray(), []
    for row in rows:
        digests += row.digest
        lengths.append(len(row.prompt_ids) + len(row.completion_ids))
    return np.frombuffer(bytes(digests), dtype=chunks.DIGEST), np.array(lengths, dtype=np.int64)


def _longest_first(digests: Digests, lengths: Indices) -> Indices:
    """Return the indices of distinct rows: rows of like length together, equally long ones by digest.

    The longest come first, so that what does not fit in memory shows at once; the order of the data means nothing.
    """
    import numpy as np

    distinct = np.unique(digests, return_index=True)[1]
    return distinct[np.argsort(-lengths[distinct], kind="stable")]


def _rounds(order: Indices, batch_rows: int, world: World) -> Iterator[tuple[Indices, bool]]:
    """Yield this rank's batches and whether each counts; a rank with none left repeats a row beside the others."""
    batches = [order[start : start + batch_rows] for start in range(0, len(order), batch_rows)]
    for first in range(0, len(batches), world.size):
        mine = first + world.rank
        yield (batches[mine], True) if mine < len(batches) else (order[-1:], False)


def _checked(compute: Compute, rows: list[Row]) -> list[Logps]:
    """Return what `compute` gives as float32, one finite number for each completion token."""
    import numpy as np

    values = [np.asarray(row, dtype=np.float32) for row in compute(rows)]
    wanted = [(len(row.completion_ids),) for row in rows]
    assert [row.shape for row in values] == wanted, "log-probabilities are not one per completion token"
    for row in values:
        if not np.isfinite(row).all():
            raise UserError(
                f"the reference gives a log-probability of {row[~np.isfinite(row)][0]} in a completion of {len(row)} "
                "tokens, which nothing can be compared with; check its weights and precision"
            )
    return values

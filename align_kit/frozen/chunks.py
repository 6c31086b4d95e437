"""Chunks: files of stored log-probabilities that are whole or absent and prove their own content.

A chunk is an Arrow IPC file of some rows: `digest` (16 bytes) and `logps` (float32, one for each completion token). Its
name is the XXH3-128 of its bytes and a word of its own: a torn or changed file does not fit its name, and no two
writers ever mean the same file, so that removing a damaged one cannot hit another's good one.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Digests = NDArray[np.bytes_]  # of 16 bytes each
    Logps = NDArray[np.float32]

DIGEST = "S16"  # fixed width: numpy sorts and compares all 16 bytes, trailing zeros included
_NAME = re.compile(r"(?P<checksum>[0-9a-f]{32})-[0-9a-f]{8}\.arrow")
DRAFT = ".draft-"
_DRAFT_SECONDS = 24 * 3600  # writing one takes a second; an older draft is a killed writer's


def names(folder: Path) -> list[str]:
    """Return the file names of the chunks in `folder`, sorted; none where there is no folder."""
    return sorted(path.name for path in folder.iterdir() if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def write(folder: Path, digests: Digests, logps: Sequence[Logps]) -> Path:
    """Store the rows as one chunk: beside its place first, flushed to the disk, then renamed into it."""
    import xxhash

    data = _encoded(digests, logps)
    place = folder / f"{xxhash.xxh3_128_hexdigest(data)}-{uuid.uuid4().hex[:8]}.arrow"
    draft = folder / f"{DRAFT}{uuid.uuid4().hex[:8]}"
    try:
        with draft.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(draft, place)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync_folder(folder)
    return place


def digests_of(path: Path) -> Digests | None:
    """Return the digests of a chunk's rows, having read all of it; None where it is gone or not what was written.

    A damaged chunk is removed.
    """
    import numpy as np
    import pyarrow as pa
    import xxhash

    try:
        data = path.read_bytes()
    except FileNotFoundError:  # another process found it damaged
        return None
    named = _NAME.fullmatch(path.name)
    if named is None or named["checksum"] != xxhash.xxh3_128_hexdigest(data):
        with suppress(OSError):  # where the folder is read-only, ignoring it is enough
            path.unlink()
        return None
    return np.frombuffer(_table(pa.BufferReader(data)).column("digest").buffers()[1], dtype=DIGEST)


class Values:
    """The log-probabilities of one chunk, mapped into memory: row number -> float32 array."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        column = _table(pa.memory_map(str(path))).column("logps")
        self._values, self._offsets = column.values.to_numpy(), column.offsets.to_numpy()

    def row(self, number: int) -> Logps:
        """Return a copy of one row's values."""
        values: Logps = self._values[self._offsets[number] : self._offsets[number + 1]]
        return values.copy()


def sweep(folder: Path) -> None:
    """Remove what writers killed a day ago or more left half written."""
    for draft in folder.glob(f"{DRAFT}*"):
        with suppress(OSError):
            if time.time() - draft.stat().st_mtime > _DRAFT_SECONDS:
                draft.unlink()


def _encoded(digests: Digests, logps: Sequence[Logps]) -> Any:
    import numpy as np
    import pyarrow as pa

    offsets = np.cumsum([0, *(len(row) for row in logps)], dtype=np.int64)
    values = np.concatenate(logps).astype(np.float32, copy=False)
    columns = {
        "digest": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(digests), [None, pa.py_buffer(digests.astype(DIGEST, copy=False).tobytes())]
        ),
        "logps": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)),
    }
    batch = pa.record_batch(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _table(source: Any) -> Any:
    import pyarrow as pa

    return pa.ipc.open_file(source).get_batch(0)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, on systems where a folder can be flushed."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

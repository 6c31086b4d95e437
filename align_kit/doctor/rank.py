"""One rank of the doctor's own: it joins the others, adds up numbers with them, and compares clocks.

Run as `python -m align_kit.doctor.rank <file> <seconds>` under a launcher's variables; each deed done is a line of JSON
in the file, so that one that hangs shows where.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from align_kit import log
from align_kit.errors import first_line

ELEMENTS = 1 << 20  # fp32, 4 MiB: a bucket of a small model
JOIN_SECONDS = 30  # another machine may load torch more slowly
ROUNDS = 16  # of asking for the time; the quickest answer is the one that counts
BEGAN, JOINED, ADDED, CLOCKS, FAILED = "began", "joined", "added", "clocks", "failed"


def main(words: Sequence[str]) -> int:
    """Do all of it and return 0, or 1 with why as the last line of the file; a rank waits `seconds` for another."""
    file, seconds = Path(words[0]), float(words[1])
    log.quiet()
    try:
        import torch.distributed as dist

        _tell(file, BEGAN)
        dist.init_process_group("gloo", timeout=timedelta(seconds=JOIN_SECONDS))
        _tell(file, JOINED)
        _tell(file, ADDED, **_add(timedelta(seconds=seconds)))
        _tell(file, CLOCKS, skew=_clocks(timedelta(seconds=seconds)))
        dist.destroy_process_group()
    except Exception as error:  # whatever it is, the doctor has to hear of it
        _tell(file, FAILED, why=f"{type(error).__name__}: {first_line(error)}")
        return 1
    return 0


def _tell(file: Path, deed: str, **more: Any) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"deed": deed, **more}) + "\n")


def _add(patience: timedelta) -> dict[str, Any]:
    """Add rank numbers up over all ranks, on the GPUs where each rank of this machine has one; say how fast."""
    import torch
    import torch.distributed as dist

    from align_kit import machine

    rank, world = dist.get_rank(), dist.get_world_size()
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.device_count() >= machine.local_world_size():
        backend, device = "nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    group = dist.new_group(backend=backend, timeout=patience)
    numbers = torch.full((ELEMENTS,), float(rank + 1), device=device)
    dist.all_reduce(numbers, group=group)  # the first one connects
    right = bool((numbers == world * (world + 1) / 2).all())
    begun = time.perf_counter()
    dist.all_reduce(numbers, group=group)
    last = float(numbers[-1])  # waits for the device
    spent = time.perf_counter() - begun
    return {"backend": backend, "right": right and last == world * world * (world + 1) / 2, "seconds": spent}


def _clocks(patience: timedelta) -> list[tuple[float, float]]:
    """Return, on rank 0, how far each rank's clock is ahead of its own, and by how much that may be wrong; seconds.

    Each is asked for the time and the quickest answer is taken (RFC 5905, section 8): the answer was written somewhere
    between question and answer, so half of that time is the most the figure may be wrong by.
    """
    import torch
    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=patience)
    found, stamp = [(0.0, 0.0)], torch.zeros(1, dtype=torch.float64)
    for other in range(1, dist.get_world_size()):
        rounds = []
        for _ in range(ROUNDS):
            if dist.get_rank() == 0:
                asked = time.time()
                dist.send(stamp, other, group=group)
                dist.recv(stamp, other, group=group)
                answered = time.time()
                rounds.append(((answered - asked) / 2, float(stamp) - (asked + answered) / 2))
            elif dist.get_rank() == other:
                dist.recv(stamp, 0, group=group)
                stamp.fill_(time.time())
                dist.send(stamp, 0, group=group)
        if rounds:
            error, ahead = min(rounds)
            found.append((ahead, error))
    return found if dist.get_rank() == 0 else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The process that does harm: waits for its moment, then kills ranks or fills a disk. Only the standard library.

    python -m tests.faults.inject '{"home": …, "ranks": [1], "signal": 9, "when": {"marker": "backward.1"}, …}'

Every rank under `tests.faults.victims` writes its process id to `home/pid.<rank>`. The moment is one of: a file in
`home` that a victim lays down, a file or folder of the run that is being written, a step by the ranks' heartbeats, or
a number of seconds. What was done is told in `home/struck.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOOK = 0.002
PATIENCE = 60.0
ACTIVITIES = ("start", "train", "evaluate", "save", "rollout", "end")


def moment(home: Path, when: dict[str, Any]) -> Callable[[], bool]:
    """Return what tells that the moment has come."""
    if "marker" in when:
        return (home / when["marker"]).exists
    if "seen" in when:  # a pattern below a folder, such as the staging folder of a save
        return lambda: any(Path(when["below"]).glob(when["seen"]))
    if "step" in when:
        return lambda: (beat := heartbeat(home, when.get("rank", 0))) is not None and beat["step"] >= when["step"]
    return lambda: True


def heartbeat(home: Path, rank: int) -> dict[str, Any] | None:
    """Return the last sign of life of a rank."""
    try:
        _, step, micro_batch, activity, _ = struct.unpack("<4qd", (home / f"heartbeat.{rank}").read_bytes())
    except (OSError, struct.error):
        return None
    return {"step": step, "micro_batch": micro_batch, "activity": ACTIVITIES[activity]}


def wait(ready: Callable[[], bool], seconds: float) -> bool:
    """Wait until `ready()`, at most `seconds`."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            return False
        time.sleep(LOOK)
    return True


def pids(home: Path, ranks: list[int]) -> list[int]:
    return [int((home / f"pid.{rank}").read_text()) for rank in ranks]


def strike(spec: dict[str, Any]) -> dict[str, Any]:
    """Wait for the moment, do the harm, and return what was done and where the ranks were."""
    home = Path(spec["home"])
    patience = float(spec.get("patience", PATIENCE))
    there = wait(lambda: all((home / f"pid.{rank}").exists() for rank in spec["ranks"]), patience)
    if not there or not wait(moment(home, spec["when"]), patience):
        return {"struck": False}
    time.sleep(float(spec.get("delay", 0.0)))
    where = [heartbeat(home, rank) for rank in spec["ranks"]]
    if "fill" in spec:
        return {"struck": fill(Path(spec["fill"])), "where": where}
    done = 0
    for pid in pids(home, spec["ranks"]):
        try:
            os.kill(pid, int(spec.get("signal", signal.SIGKILL)))
            done += 1
        except ProcessLookupError:
            continue
    return {"struck": done > 0, "where": where}


def fill(place: Path) -> bool:
    """Write until nothing more fits."""
    with place.open("wb", buffering=0) as stream:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while stream.write(bytes(size)):
                    pass
    return True


def main() -> None:
    """Do what the first argument says, and tell it."""
    spec = json.loads(sys.argv[1])
    outcome = strike(spec)
    place = Path(spec["home"]) / "struck.json"
    place.with_suffix(".part").write_text(json.dumps(outcome))
    place.with_suffix(".part").rename(place)


if __name__ == "__main__":
    main()

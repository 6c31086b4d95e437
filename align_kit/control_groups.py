"""What the control groups of this process allow, whichever version of them the kernel has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ENDLESS = 1 << 60  # version 1 writes "no limit" as the largest number of whole pages
PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Limits:
    """The tightest limits of a process's groups and those above them; `None` where there is none.

    Memory in bytes; `memory_left` counts cached files as free, `processes_left` counts threads.
    """

    memory: int | None = None
    memory_left: int | None = None
    cores: float | None = None
    processes_left: int | None = None


def read(process: Path = PROCESS) -> Limits:
    """Return the limits of the process whose folder below /proc is given; none where there are no such groups."""
    memory = [limit for group in _groups("memory", process) if (limit := _memory(group))]
    cores = [quota for group in _groups("cpu", process) if (quota := _cores(group))]
    threads = [left for group in _groups("pids", process) if (left := _processes_left(group)) is not None]
    return Limits(
        min((limit for limit, _ in memory), default=None),
        min((left for _, left in memory), default=None),
        min(cores, default=None),
        min(threads, default=None),
    )


def _groups(controller: str, process: Path) -> Iterator[Path]:
    """Yield the folders of the process's group and of those above it, in every hierarchy that may hold `controller`."""
    try:
        lines = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return
    own = {name: path for _, names, path in lines for name in names.split(",")}
    for line in mounts:
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(maxsplit=2)
        of_ours = kind == "cgroup" and controller in options.split(",")
        path = own.get("") if kind == "cgroup2" else own.get(controller) if of_ours else None
        if path is not None:
            root, mount = (Path(word.replace("\\040", " ")) for word in before.split()[3:5])
            # A container sees its own group as the root of the mount.
            below = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
            yield from (mount / part for part in (below, *below.parents))


def _memory(group: Path) -> tuple[int, int] | None:
    """Return the limit of a group and what is left of it, in bytes."""
    limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
    if limit is None or limit >= ENDLESS:
        return None
    used = _number(group / "memory.current", group / "memory.usage_in_bytes") or 0
    rows = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    cached = int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))
    return limit, max(0, limit - used + cached)


def _cores(group: Path) -> float | None:
    if both := _text(group / "cpu.max").split():
        return None if both[0] == "max" else int(both[0]) / int(both[1])
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _processes_left(group: Path) -> int | None:
    most, now = _number(group / "pids.max"), _number(group / "pids.current")
    return None if most is None or now is None else most - now


def _number(*places: Path) -> int | None:
    """Return the number in the first of these files that says something; `None` for the word "max" too."""
    found = next((text for place in places if (text := _text(place).strip())), "max")
    return None if found == "max" else int(found)


def _text(place: Path) -> str:
    """Return what stands in a file, nothing where it cannot be read."""
    try:
        return place.read_text()
    except OSError:
        return ""

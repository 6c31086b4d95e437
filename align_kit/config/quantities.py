"""Sizes and durations as people write them: `200GB`, `1.5TiB`, `3:50:00`."""

from __future__ import annotations

import re

from align_kit.config.values import Misfit

SIZE = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>[a-z]*)", re.IGNORECASE)
PREFIXES = "kmgtp"
UNITS = {"": 1, "b": 1}
UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate(PREFIXES, 1)}
UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate(PREFIXES, 1)}

# Slurm's forms of a time limit, so that the one of a job can be copied.
DURATION = re.compile(
    r"((?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]?\d):(?P<seconds>[0-5]?\d)"
    r"|(?P<bare>\d+(\.\d*)?|\.\d+)(:(?P<rest>[0-5]?\d))?"
)


def parse_bytes(text: str) -> int:
    """Return the bytes that `200GB` (powers of 1000) or `1.5TiB` (of 1024) says; raise `Misfit` for anything else."""
    found = SIZE.fullmatch(text.strip())
    unit = UNITS.get(found["unit"].lower()) if found else None
    size = int(float(found["number"]) * unit) if found and unit else 0
    if size < 1:
        raise Misfit(f"is {text!r}; expected a size above 0 such as 200GB or 1.5TiB")
    return size


def parse_duration(text: str) -> float:
    """Return the seconds that `3:50:00`, `1-12:00:00` (days first), `45:30` (minutes first) or `90` (minutes) says.

    Raises `Misfit` for anything else.
    """
    found = DURATION.fullmatch(text.strip())
    parts = {name: float(value) for name, value in (found.groupdict() if found else {}).items() if value}
    minutes = parts.get("minutes", 0.0) + parts.get("bare", 0.0)
    hours = parts.get("days", 0.0) * 24 + parts.get("hours", 0.0)
    total = (hours * 60 + minutes) * 60 + parts.get("seconds", 0.0) + parts.get("rest", 0.0)
    if total <= 0:
        raise Misfit(f"is {text!r}; expected a time above 0 such as 3:50:00, 1-12:00:00, 45:30 or 90 (minutes)")
    return total


def shown_bytes(count: int) -> str:
    """Return a size for a message, in powers of 1000: `1.2 GB`, `300 MB`, `12 B`."""
    size, unit = float(count), "B"
    for prefix in PREFIXES:
        if size < 999.5:
            break
        size, unit = size / 1000, f"{prefix.upper() if prefix != 'k' else 'k'}B"
    return f"{size:.3g} {unit}"

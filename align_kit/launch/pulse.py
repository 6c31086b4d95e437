"""Which rank hangs: heartbeats read again and again, a limit that follows from the run's own pace, and stacks."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align_kit import supervised
from align_kit.supervised import Beat

STEPS_LATE = 20  # a rank hangs after so many median steps without a sign of life
# Longer limits, in units of hang_seconds: until the first heartbeat a run imports, loads and tokenises, after the last
# step it stores, verifies and copies; the first step builds what later ones reuse; an evaluation, a rollout or a save
# beats seldom.
AT_THE_ENDS, SELDOM = 120, 30
STACK_SECONDS = 2.0
LONGEST_LOOK = 1.0  # s that one look may count for: a launcher that was stopped itself must not find ranks late
# Innermost frames that mean a rank waits for others: it is not the one that hangs.
WAITS = (
    "torch/distributed/", "deepspeed/comm/", " in wait", " in _allgather_params_coalesced",
    "align_kit/telemetry/roll_call.py",
)  # fmt: skip
INNERMOST = 4
SHOWN_FRAMES = 12


@dataclass
class Pulse:
    """The signs of life of some ranks of one attempt, on this machine."""

    folder: Path
    ranks: Sequence[int]
    hang_seconds: float
    _clock: float = 0.0  # s that were watched
    _looked: float | None = None
    _beats: dict[int, Beat] = field(default_factory=dict)
    _heard: dict[int, float] = field(default_factory=dict)  # on _clock
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=101))
    _step_began: Beat | None = None

    def look(self, now: float) -> None:
        """Read every rank's heartbeat; `now` in seconds."""
        if self._looked is not None:
            self._clock += min(now - self._looked, LONGEST_LOOK)
        self._looked = now
        for rank in self.ranks:
            beat = supervised.read_beat(self.folder, rank)
            if beat is not None and beat != self._beats.get(rank):
                self._beats[rank], self._heard[rank] = beat, self._clock
                if rank == self.ranks[0]:
                    self._time_steps(beat)

    def _time_steps(self, beat: Beat) -> None:
        began = self._step_began
        if beat.activity != "train" or (began is not None and beat.step <= began.step):
            return
        if began is not None:
            self._steps.append((beat.seconds - began.seconds) / (beat.step - began.step))
        self._step_began = beat

    def last(self, rank: int) -> Beat | None:
        """Return the last heartbeat of a rank that was read."""
        return self._beats.get(rank)

    def silent_for(self, rank: int) -> float:
        """Return the seconds since a rank's last sign of life."""
        return self._clock - self._heard.get(rank, 0.0)

    def limit(self, rank: int) -> float:
        """Return after how many seconds of silence a rank counts as hung, in what it does now."""
        beat = self._beats.get(rank)
        if beat is None or beat.activity in ("start", "end"):
            return AT_THE_ENDS * self.hang_seconds
        if beat.activity != "train" or not self._steps:
            return SELDOM * self.hang_seconds
        return max(self.hang_seconds, STEPS_LATE * statistics.median(self._steps))

    def late(self, alive: Sequence[int]) -> bool:
        """Return whether one of the ranks that are alive has been silent for longer than it may.

        A rank that fails still writes the checkpoint it has begun; the others wait in their step, and may so long.
        """
        if self.hang_seconds == 0:
            return False
        saving = [self.limit(rank) for rank, beat in self._beats.items() if rank in alive and beat.activity == "save"]
        return any(self.silent_for(rank) > max(self.limit(rank), *saving, 0.0) for rank in alive)


@dataclass(frozen=True)
class Hang:
    """Ranks that hang, for how many seconds, with the innermost frames of each rank's stack."""

    ranks: tuple[int, ...]
    seconds: float
    stacks: Mapping[int, tuple[str, ...]]


def take_stacks(folder: Path, processes: Mapping[int, int]) -> dict[int, tuple[str, ...]]:
    """Ask processes (rank -> process id) for their stacks and return the frames, innermost first.

    A rank that does not answer within `STACK_SECONDS` has none: it is stopped, or deep in code that is not Python.
    """
    for pid in processes.values():
        os.kill(pid, supervised.STACK_SIGNAL)
    found: dict[int, tuple[str, ...]] = {}
    ending = time.monotonic() + STACK_SECONDS
    while len(found) < len(processes) and time.monotonic() < ending:
        time.sleep(0.05)
        for rank in processes:
            if text := _read(supervised.stack_file(folder, rank)):
                found[rank] = text
    return {rank: found.get(rank, ()) for rank in processes}


def _read(place: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in place.read_text().splitlines() if line.startswith("  File"))
    except OSError:
        return ()


def waits(stack: Sequence[str]) -> bool:
    """Return whether a stack ends in a collective: the rank waits for others."""
    return any(words in frame for frame in stack[:INNERMOST] for words in WAITS)


def name_hung(
    ranks: Sequence[int], last: Callable[[int], Beat | None], stacks: Mapping[int, tuple[str, ...]]
) -> tuple[int, ...]:
    """Return those of `ranks` that hang: the furthest behind, and of these the ones that wait for nobody.

    Where all of them wait for each other, all are named. Where some do not answer though others do, it is they: even
    one that is deep in native code answers. On a GPU collectives run beside Python, so a rank may wait in a
    synchronisation that is not known as one.
    """

    def place(rank: int) -> tuple[int, int]:
        beat = last(rank)
        return (beat.step, beat.micro_batch) if beat else (-1, -1)

    silent = [rank for rank in ranks if not stacks.get(rank)]
    busy = [rank for rank in ranks if not waits(stacks.get(rank, ()))]
    candidates = silent or busy or list(ranks)
    furthest_behind = min(place(rank) for rank in candidates)
    return tuple(rank for rank in candidates if place(rank) == furthest_behind)

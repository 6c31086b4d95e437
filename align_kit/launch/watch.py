"""The ranks of one attempt on this machine: alive or ended and how, hung or not, and their orderly end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from align_kit import supervised
from align_kit.launch.pulse import Hang, Pulse, name_hung, take_stacks
from align_kit.supervised import STOPPED_CODE, Beat, Failure

FINE = {0, STOPPED_CODE}
ECHO_SECONDS = 3.0  # for ranks to notice that a peer has ended and say how they end themselves
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
DEAF = (None, "start", "end")  # activities in which a rank does not listen to SIGUSR1, which would end it


class Process(Protocol):
    """What is asked of a rank's process; `subprocess.Popen` has it."""

    pid: int

    def poll(self) -> int | None: ...


@dataclass
class Rank:
    """A rank's process: when it was last seen alive (monotonic s), its exit code, whether it was ended from here."""

    process: Process
    seen: float
    code: int | None = None
    killed: bool = False


@dataclass
class Watch:
    """Looks after the ranks of one attempt; `look` is called every 0.1 s or so until it returns False."""

    folder: Path
    hang_seconds: float
    grace_seconds: float
    ranks: dict[int, Rank] = field(default_factory=dict)
    pulse: Pulse | None = None
    hang: Hang | None = None
    _deadline: float = float("inf")

    def begin(self, processes: Mapping[int, Process]) -> None:
        """Take over the processes (rank -> process) that have just been started."""
        now = time.monotonic()
        self.ranks = {rank: Rank(process, now) for rank, process in processes.items()}
        self.pulse = Pulse(self.folder, sorted(processes), self.hang_seconds)

    @property
    def alive(self) -> list[int]:
        """The ranks that run."""
        return [number for number, rank in self.ranks.items() if rank.code is None]

    @property
    def codes(self) -> set[int]:
        """The exit codes of the ranks that have ended."""
        return {rank.code for rank in self.ranks.values() if rank.code is not None}

    @property
    def _failed(self) -> bool:
        """Whether a rank has ended badly: then the others are left behind, and hang for no reason of their own."""
        return not self.codes <= FINE

    @property
    def is_fine(self) -> bool:
        """Whether every rank has ended well: done, or saved and stopped."""
        return self.codes <= FINE and not self.alive

    def last(self, rank: int) -> Beat | None:
        """Return the last heartbeat of a rank."""
        return self.pulse.last(rank) if self.pulse else None

    def look(self) -> bool:
        """Note who has ended, end who hangs or is left behind; return whether any rank still runs."""
        now = time.monotonic()
        for rank in self.ranks.values():
            self._look_at(rank, now)
        assert self.pulse is not None
        self.pulse.look(now)
        if self.alive and self.hang is None and not self._failed and self.pulse.late(self.alive):
            self._find_hung()
        if self.alive and now > self._deadline:
            self._give_up()
        return bool(self.alive)

    def _look_at(self, rank: Rank, now: float) -> None:
        if rank.code is not None:
            return
        rank.code = rank.process.poll()
        if rank.code is None:
            rank.seen = now
            return
        if rank.code < 0:  # it could not end what it had started itself
            _end_group(rank.process.pid)
        if rank.code == STOPPED_CODE:  # the others may still be saving
            self._end_by(now + self.grace_seconds)
        elif rank.code:
            self._end_by(now + ECHO_SECONDS)

    def _end_by(self, when: float) -> None:
        self._deadline = min(self._deadline, when)

    def _give_up(self) -> None:
        """End the ranks that are left; where the others gave up waiting for them, they are the ones that hang."""
        ended = [rank for rank in self.ranks if rank not in self.alive]
        if self.hang is None and any(self._said(rank, "late") for rank in ended):
            self._find_hung()
        self.kill()

    def _said(self, rank: int, kind: str) -> bool:
        failure = supervised.read_failure(self.folder, rank)
        return failure is not None and failure.kind == kind

    def _find_hung(self) -> None:
        """Name who hangs, then end all ranks."""
        assert self.pulse is not None
        running = self.alive
        seconds = max(self.pulse.silent_for(rank) for rank in running)
        stacks = take_stacks(self.folder, {rank: self.ranks[rank].process.pid for rank in running})
        self.hang = Hang(name_hung(running, self.pulse.last, stacks), seconds, stacks)
        self.kill()

    def pass_on(self, signum: int) -> None:
        """Send a signal to every rank; after one that stops the run they have `grace_seconds`, after two none.

        SIGUSR1 asks a rank that trains to save and go on; the others have nothing to save yet, or are at it.
        """
        if signum in STOPPING:
            asked_before = self._deadline < float("inf")
            self._end_by(time.monotonic() + (0 if asked_before else self.grace_seconds))
        for rank in self.alive:
            beat = self.last(rank)
            if signum == signal.SIGUSR1 and (beat.activity if beat else None) in DEAF:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.ranks[rank].process.pid, signum)

    def kill(self) -> None:
        """End every rank that runs, and the processes it has started: each leads a group of its own."""
        for rank in self.alive:
            self.ranks[rank].killed = True
            _end_group(self.ranks[rank].process.pid)

    # --- who failed first ---

    def first_failure(self) -> Failure:
        """Return the failure that the others followed from: a mistake of the user's first, an echo last, by time."""
        if self.hang is not None:
            rank = self.hang.ranks[0]
            return Failure(rank, "hang", "", self._step(rank))
        ended_badly = [number for number, rank in self.ranks.items() if rank.code not in FINE]
        by_themselves = [number for number in ended_badly if not self.ranks[number].killed]
        found = [self._failure_of(number) for number in by_themselves or ended_badly]
        order = {"user": 0, "late": 2, "peer": 3}
        return min(found, key=lambda failure: (order.get(failure.kind, 1), failure.seconds))

    def _failure_of(self, number: int) -> Failure:
        told, rank = supervised.read_failure(self.folder, number), self.ranks[number]
        if told is not None:
            return told
        assert rank.code is not None
        how = f"ended with signal {-rank.code}" if rank.code < 0 else f"ended with exit code {rank.code}"
        return Failure(number, "died", how, self._step(number), seconds=rank.seen)

    def _step(self, rank: int) -> int | None:
        beat = self.last(rank)
        return beat.step if beat else None


def _end_group(leader: int) -> None:
    """End a rank and the processes it has started, of which it leads the group; they may outlive it.

    The kernel gives the number to nobody else while one of them lives.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)

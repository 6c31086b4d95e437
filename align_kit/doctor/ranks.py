"""Real ranks, started beside the other checks: do they meet, do they add up right, and do their clocks agree?"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_kit import machine
from align_kit.doctor import rank as work
from align_kit.doctor.finding import BAD, NOTE, WARN, Finding, ok

STEP_SECONDS = 8.0  # that a rank which has joined the others waits for them
START_SECONDS = 60.0  # that loading torch, or joining, may take
GRACE = 2.0  # s for the others once one has failed
SKEW = 0.5  # s from which the lines of two ranks' logs cannot be told apart by their times
LOADING = "loading torch"
WORDS = (sys.executable, "-m", "align_kit.doctor.rank")
DOING = {
    work.BEGAN: "joining the others",
    work.JOINED: "the all-reduce",
    work.ADDED: "comparing clocks",
}  # after each deed


@dataclass
class Group:
    """The ranks that were started here: all of a world, or under a launcher this process's own."""

    world: int
    here: int  # ranks of it on this machine
    first: int  # the rank of the first process
    processes: list[subprocess.Popen[bytes]]
    folder: tempfile.TemporaryDirectory[str]
    step: float  # s that each waits for the others once it has joined them
    ended: bool = False
    hung: tuple[int, ...] = ()  # which had to be ended

    def deeds(self, index: int) -> list[dict[str, Any]]:
        """Return what a rank has done so far."""
        text = _text(self.folder.name, index, "deeds")
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def told(self, deed: str) -> list[dict[str, Any]]:
        """Return what the ranks said with one of their deeds, in order; those that did not do it are missing."""
        return [one for index in range(len(self.processes)) for one in self.deeds(index) if one["deed"] == deed]

    def wait(self) -> None:
        """Wait until all are done or have ended, and end those that make no progress any more."""
        progress, deadline = -1, 0.0
        while not self.ended and self.at_work():
            now, done = time.monotonic(), sum(len(self.deeds(index)) for index in range(len(self.processes)))
            if done != progress:
                joined = len(self.told(work.JOINED)) == len(self.processes)
                progress, deadline = done, now + (self.step + GRACE if joined else START_SECONDS)
            if any(process.poll() for process in self.processes):
                deadline = min(deadline, now + GRACE)
            if now > deadline:
                break
            time.sleep(0.02)
        if not self.ended:
            self.hung = self.at_work()
        self.end()

    def at_work(self) -> tuple[int, ...]:
        """Return the processes that still run and have something to do."""
        running = [index for index, process in enumerate(self.processes) if process.poll() is None]
        return tuple(index for index in running if not any(one["deed"] == work.CLOCKS for one in self.deeds(index)))

    def end(self) -> None:
        """End what still runs; what the ranks told can be read until the group is closed."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.ended = True

    def close(self) -> None:
        """End what still runs and remove what it wrote."""
        self.end()
        self.folder.cleanup()

    def trouble(self) -> list[str]:
        """Return a phrase for each rank that did not come to the end."""
        return [said for index in range(len(self.processes)) if (said := self._trouble(index))]

    def _trouble(self, index: int) -> str:
        done, name = self.deeds(index), f"rank {self.first + index}"
        deeds = [one["deed"] for one in done if one["deed"] != work.FAILED]
        if deeds and deeds[-1] == work.CLOCKS:
            return ""
        where = DOING[deeds[-1]] if deeds else LOADING
        if len(done) > len(deeds):
            return f"{name} failed at {where} ({done[-1]['why']})"
        if index in self.hung:
            return f"{name} hangs at {where}"
        lines = _text(self.folder.name, index, "errors").splitlines() or ["without a word"]
        return f"{name} ended at {where} ({lines[-1]})"


def start(ranks: int, environ: Mapping[str, str], *, words: Sequence[str] = WORDS, step: float = STEP_SECONDS) -> Group:
    """Start `ranks` processes that meet on this machine; under a launcher the one that is this process's rank.

    A step that waits for the others fails after `step` seconds. Whoever calls it must close the group.
    """
    launched = is_launched(environ)
    shared = {} if launched else _apart(ranks)
    kept = {name: value for name, value in environ.items() if launched or not name.startswith("TORCHELASTIC_")}
    folder = tempfile.TemporaryDirectory(prefix="align_kit_doctor_")
    processes = []
    for index in range(1 if launched else ranks):
        own = {} if launched else {"RANK": str(index), "LOCAL_RANK": str(index)}
        command = [*words, str(Path(folder.name) / f"{index}.deeds"), str(step)]
        with (Path(folder.name) / f"{index}.errors").open("wb") as errors:
            process = subprocess.Popen(
                command, env={**kept, "OMP_NUM_THREADS": "1", **shared, **own}, stdout=errors, stderr=errors
            )
        processes.append(process)
    here = int(environ.get("LOCAL_WORLD_SIZE", "1")) if launched else ranks
    world, first = (int(environ["WORLD_SIZE"]), int(environ["RANK"])) if launched else (ranks, 0)
    return Group(world, here, first, processes, folder, step)


def is_launched(environ: Mapping[str, str]) -> bool:
    """Tell whether a launcher made this process one rank of several."""
    rank, world = environ.get("RANK", ""), environ.get("WORLD_SIZE", "")
    return rank.isdigit() and world.isdigit() and int(rank) < int(world) > 1


def _apart(ranks: int) -> dict[str, str]:
    """Return what a launcher would set for ranks of a world of their own."""
    count, port = str(ranks), str(machine.free_port())
    return {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _text(folder: str, index: int, kind: str) -> str:
    place = Path(folder) / f"{index}.{kind}"
    return place.read_text(encoding="utf-8", errors="replace") if place.is_file() else ""


# --- what is to be said -----------------------------------------------------------------------------------------------


def all_reduce(group: Group) -> Finding:
    """Do the ranks meet within seconds, and do all of them get the right sum?"""
    group.wait()
    if trouble := group.trouble():
        return Finding(BAD, "; ".join(trouble), _remedy(group, " ".join(trouble)))
    sums = group.told(work.ADDED)
    slowest = max(one["seconds"] for one in sums)
    what = f"{group.world} ranks on {sums[0]['backend']}: {work.ELEMENTS * 4 >> 20} MiB in {1e3 * slowest:.1f} ms"
    if not all(one["right"] for one in sums):
        return Finding(BAD, f"{what}, and the sum is wrong", "do not train here: memory, a link or a driver is broken")
    return ok(f"{what}, the sum is right")


def _remedy(group: Group, trouble: str) -> str:
    if LOADING in trouble:
        return f"{sys.executable} -c 'import torch' says more"
    remedy = "is the host name an address of this machine, or GLOO_SOCKET_IFNAME an interface?"
    alone = group.world == len(group.processes)
    return remedy if alone else f"{remedy} is a firewall between the machines, does each reach MASTER_ADDR?"


def clocks(group: Group) -> Finding:
    """Do all ranks have the same time, as far as can be told from how quickly they answer?"""
    group.wait()
    found = group.told(work.CLOCKS)
    if not found:
        return Finding(NOTE, "not compared", "the ranks did not come so far")
    if group.first:
        return ok("rank 0 compares them")
    ahead, error, rank = max((abs(ahead), error, rank) for rank, (ahead, error) in enumerate(found[0]["skew"]))
    what = f"{group.world} ranks within {1e3 * ahead:.2f} ms (known to {1e3 * error:.2f} ms)"
    if ahead - error > SKEW:
        said = f"rank {rank}'s clock is {ahead:.1f} s off rank 0's"
        return Finding(WARN, said, "set both by NTP (chrony): logs are mixed up and files seem newer than they are")
    return ok(what)

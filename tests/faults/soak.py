"""Faults at random for as long as asked, and what became of the runs they were done to.

    python -m tests.faults.soak [--minutes 30] [--seed 0] [--steps 60]

A run of two ZeRO-3 ranks trains a small model, with a checkpoint every 3 steps. It is disturbed by a process of its own
until it has finished: a rank is killed at a random step or in the middle of a save, the launcher is killed
(`align-kit launch`, whose ranks must end with it), the disk is filled; between two attempts bytes of a random
checkpoint are flipped, files are cut or removed. Then it is compared with the run nobody disturbed, and the next one
begins. What is done, and when, follows from `--seed`; to the millisecond it depends on the machine.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_kit import run_folder
from align_kit.checkpoint import manifest
from benchmarks._ranks import ranks_in_a_folder
from tests.faults.world import LORA, Victim, differences, flip, undisturbed
from tests.small import Lab, lab_of, words

EVERY = 3  # steps from checkpoint to checkpoint
DISK = 24  # MiB of the small file system that a run lives on, where one can be mounted
# How often each is done to an attempt, by weight.
ATTEMPTS = {"kill a rank": 40, "kill in a save": 25, "kill all ranks": 10, "kill the launcher": 5, "fill the disk": 10,
            "nothing": 10}  # fmt: skip
BETWEEN = {"nothing": 60, "flip a bit": 20, "cut a file": 8, "remove a file": 7, "remove the manifest": 5}
MOST_ATTEMPTS = 60  # of one run: more, and something does not get better


@dataclass
class Soak:
    """The runs of one soak, and what was counted."""

    lab: Lab
    home: Path
    draw: random.Random
    steps: int
    counts: Counter[str] = field(default_factory=Counter)
    flipped: set[Path] = field(default_factory=set)  # checkpoints that were changed and not yet met

    @property
    def changes(self) -> dict[str, Any]:
        return {**LORA, "max_steps": self.steps, "save_steps": EVERY, "save_total_limit": 3}

    def one_run(self, number: int) -> None:
        """Disturb one run until it has finished, then compare it with the undisturbed one."""
        home = self.home / f"run{number}"
        home.mkdir()
        disk = Disk(home / "disk")
        victim = Victim(self.lab, "dpo", home, self.changes, folder=disk.place / "run")
        try:
            for _ in range(MOST_ATTEMPTS):
                if self.attempt(victim, disk):
                    break
                self.between(victim)
            else:
                self.counts["runs given up"] += 1
            self.settle(victim)
        finally:
            disk.close()
            shutil.rmtree(home, ignore_errors=True)

    def attempt(self, victim: Victim, disk: Disk) -> bool:
        """Let the run go on, disturbed once; return whether it has finished."""
        kind = self.draw.choices(list(ATTEMPTS), list(ATTEMPTS.values()))[0]
        last = max(victim.steps, default=0)
        step = min(self.steps, last + self.draw.randint(1, 12))
        delay, rank = self.draw.uniform(0, 0.08), self.draw.randrange(2)
        if kind == "kill the launcher":
            code, text = self.launched(victim, step, delay)
        elif kind == "fill the disk" and disk.small:
            code, text = self.filled(victim, disk, step)
        else:
            strike = {
                "kill a rank": {"ranks": [rank], "when": {"step": step}},
                "kill all ranks": {"ranks": [0, 1], "when": {"step": step}},
                "kill in a save": {"ranks": [rank], "when": {"below": str(victim.folder), "seen": ".saving-*"}},
            }.get(kind)
            asked = {**strike, "signal": 9, "delay": delay} if strike else None
            done = victim.go(strike=asked, env={"ALIGN_KIT_RESUME": "auto"})
            code, text = max(done.codes, key=abs), done.text
        if victim.struck:
            self.counts[kind] += 1
        self.counts["attempts"] += 1
        self.counts["torn checkpoints met"] += text.count("does not verify") + text.count("was cut short")
        self.counts["saves that lacked only their name"] += text.count("written whole but not named")
        finished = code == 0 and (run_folder.read_manifest(victim.folder) or {}).get("status") == run_folder.FINISHED
        if not finished:
            self.counts["restarts"] += 1
            self.explain([*victim.failures, *[line for line in text.splitlines() if line.startswith("error:")]], text)
        return finished

    def explain(self, failures: list[str], text: str) -> None:
        """Count how an attempt ended that was not killed, and show what is not the doing of this soak."""
        for line in failures[:1]:  # the first; others say it too
            full = "no space" in line.lower() or "missing" in line and "free" in line
            self.counts["ended by a full disk" if full else "ended in an error of its own"] += 1
            if not full:
                print(f"{line}\n{text[-2000:]}", flush=True)

    def launched(self, victim: Victim, step: int, delay: float) -> tuple[int, str]:
        """Run under `align-kit launch`, and kill the launcher; its ranks must not outlive it."""
        env = {**self.lab.ranks.env, "ALIGN_KIT_RESUME": "auto"}
        command = [sys.executable, "-m", "align_kit", "launch", "--nproc_per_node", "2", "dpo", *words(victim.options)]
        with tempfile.TemporaryFile("w+") as said:
            launcher = subprocess.Popen(command, cwd=victim.home, env=env, stdout=said, stderr=said)
            struck = self.kill_when(launcher, victim, step, delay)
            code = launcher.wait(timeout=300)
            said.seek(0)
            text = said.read()
        self.counts["kill the launcher"] += struck
        time.sleep(1.0)
        self.counts["ranks that outlived their launcher"] += len(ranks_in(victim.folder))
        return code, text

    def kill_when(self, launcher: subprocess.Popen[bytes], victim: Victim, step: int, delay: float) -> bool:
        """Kill the launcher once the run has logged `step`, or let it end."""
        metrics = victim.folder / "metrics.jsonl"
        while launcher.poll() is None:
            if metrics.exists() and f'"step": {step},' in metrics.read_text():
                time.sleep(delay)
                launcher.kill()
                return True
            time.sleep(0.05)
        return False

    def filled(self, victim: Victim, disk: Disk, step: int) -> tuple[int, str]:
        """Fill the disk while the run trains; make room again when it has ended."""
        strike = {"ranks": [0], "when": {"step": step}, "fill": str(disk.place / "filler")}
        done = victim.go(strike=strike, env={"ALIGN_KIT_RESUME": "auto"})
        (disk.place / "filler").unlink(missing_ok=True)
        return max(done.codes, key=abs), done.text

    def between(self, victim: Victim) -> None:
        """Do something to a random checkpoint while nothing runs."""
        kind = self.draw.choices(list(BETWEEN), list(BETWEEN.values()))[0]
        standing = run_folder.checkpoints(victim.folder)
        if kind == "nothing" or not standing:
            return
        place = self.draw.choice(standing)
        files = sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size)
        path = place / manifest.NAME if kind == "remove the manifest" else self.draw.choice(files)
        if not path.exists():
            return
        if kind == "flip a bit":
            flip(path, self.draw)
        elif kind == "cut a file":
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.unlink()
        self.counts[kind] += 1
        self.counts["changed checkpoints"] += place not in self.flipped
        self.flipped.add(place)

    def settle(self, victim: Victim) -> None:
        """Count what was found of what was changed, and how the run compares with the undisturbed one."""
        standing = set(run_folder.checkpoints(victim.folder))
        for place in self.flipped:
            if any((victim.folder / "torn").glob(f"{place.name}*")):
                self.counts["changed checkpoints found"] += 1
            elif place not in standing:  # an older one, that the rule has let go
                self.counts["changed checkpoints deleted unread"] += 1
            elif manifest.problems(place):
                self.counts["changed checkpoints found"] += 1
            else:
                self.counts["changed checkpoints MISSED"] += 1
        self.flipped.clear()
        lost, equal = differences(victim, undisturbed(self.lab, "dpo", **self.changes))
        self.counts["runs"] += 1
        self.counts["rows lost"] += lost
        self.counts["runs equal to the undisturbed one"] += equal


class Disk:
    """A small file system for one run where one can be mounted, an ordinary folder where not."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(place)]
        self.small = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0

    def close(self) -> None:
        if self.small:
            subprocess.run(["umount", "-l", str(self.place)], check=True)


def ranks_in(folder: Path) -> list[int]:
    """Return the processes whose command line names a run's folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in process.read_bytes():
                found.append(int(process.parent.name))
        except OSError:
            continue
    return found


def main() -> int:
    """Soak, and print the counts; 1 where a run was not equal or a change was not found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    with ranks_in_a_folder() as (ranks, folder):
        soak = Soak(lab_of(ranks), folder, random.Random(asked.seed), asked.steps)
        while not soak.counts["runs"] or time.monotonic() < end:
            soak.one_run(soak.counts["runs"])
            left = max(0.0, end - time.monotonic()) / 60
            print(f"{soak.counts['runs']} runs, {soak.counts['restarts']} restarts, {left:.0f} min left", flush=True)
    counts = soak.counts
    for name in sorted(counts):
        print(f"{name:42} {counts[name]}")
    bad = counts["runs"] - counts["runs equal to the undisturbed one"] + counts["rows lost"]
    bad += counts["changed checkpoints MISSED"] + counts["runs given up"] + counts["ended in an error of its own"]
    bad += counts["ranks that outlived their launcher"]
    print(f"soak of {asked.minutes:g} minutes, seed {asked.seed}: {'all well' if not bad else 'NOT WELL'}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

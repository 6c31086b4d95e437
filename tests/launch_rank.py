"""A rank without a model: it keeps the launcher's protocol, and does and fails as `PLAN` says.

`PLAN` holds, for each attempt and each rank, a list of deeds such as `["train", 6]` or `["die", 9]`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from align_kit import supervised
from align_kit.supervised import Beat

FOLDER, RANK, OUT = Path(os.environ[supervised.FOLDER]), int(os.environ["RANK"]), Path(os.environ["OUT"])


class Deeds:
    """What a rank can be told to do."""

    def __init__(self) -> None:
        self.beats = 0
        self.stop = False

    def beat(self, activity: str, step: int) -> None:
        self.beats += 1
        beat = Beat(self.beats, step, 0, activity, time.monotonic())
        supervised.beat_file(FOLDER, RANK).write_bytes(supervised.pack(beat))

    def train(self, until: int, seconds: float = 0.02) -> None:
        """Take steps until step `until` is at hand, or a signal asks to stop."""
        self.claim()
        for step in range(1, until + 1):
            self.beat("train", step)
            time.sleep(seconds)
            if self.stop:
                sys.exit(supervised.STOPPED_CODE)

    def claim(self) -> None:
        """Say that what lies in the folder is of this run."""
        if RANK == 0:
            supervised.tell_output(str(OUT))

    def heed(self) -> None:
        """From now on save and stop where SIGTERM asks for it."""

        def note(*_: Any) -> None:
            self.stop = True

        signal.signal(signal.SIGTERM, note)

    def ignore(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def save_on_request(self) -> None:
        """From now on commit a checkpoint where SIGUSR1 asks for it, and go on."""
        signal.signal(signal.SIGUSR1, lambda *_: self.commit(60))

    def commit(self, step: int) -> None:
        (OUT / f"checkpoint-{step}").mkdir(exist_ok=True)

    def die(self, signum: int) -> None:
        os.kill(os.getpid(), signum)

    def leave(self, code: int) -> None:
        sys.exit(code)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def report(self, kind: str, line: str, skip_steps: list[int] = [], trace: str = "") -> None:  # noqa: B006
        supervised.report(kind, line, skip_steps, trace)
        sys.exit({"user": 2, "fault": 3}.get(kind, 1))

    def stuck(self) -> None:
        """Make no progress for longer than anybody waits."""
        time.sleep(60)

    def leave_behind(self) -> None:
        """Start a process that would outlive this one."""
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (OUT / f"child.{RANK}").write_text(str(child.pid))

    def wait(self) -> None:
        """Do as a rank does that waits for others in a collective."""
        time.sleep(60)


def main() -> None:
    """Do what the plan holds for this attempt and this rank, and note what the launcher said."""
    supervised.answer()
    told = {name: os.environ.get(name) for name in (supervised.ATTEMPT, supervised.RESUME, supervised.SKIP_STEPS)}
    with (OUT / "told.jsonl").open("a") as stream:
        stream.write(json.dumps({"rank": RANK, "pid": os.getpid(), **told}) + "\n")
    attempts = json.loads(os.environ["PLAN"])
    deeds = Deeds()
    for name, *given in attempts[int(os.environ[supervised.ATTEMPT])][RANK]:
        getattr(deeds, name)(*given)


if __name__ == "__main__":
    main()

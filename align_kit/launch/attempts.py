"""A run through as many attempts as it takes: each with ranks, a port and a folder of its own.

torchrun's agent can restart ranks itself, but on the store of the attempt before, where new ranks read the addresses
of dead ones. On several machines each has a launcher that loops alike: a rank that ends anywhere ends all of them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from align_kit import run_folder, supervised
from align_kit.config.steps import parse_steps
from align_kit.launch import tell
from align_kit.launch.agent import Agent
from align_kit.launch.judge import Ended, Verdict, judge, without_progress
from align_kit.launch.options import Options
from align_kit.launch.signals import Signals
from align_kit.launch.watch import Watch


def supervise(options: Options, command: Sequence[str]) -> int:
    """Run `command` (words after the interpreter) on every rank until it is done or hopeless; return the exit code.

    0, 2 after a user's mistake, 3 after a fault, 75 where the run saved and stopped on request, 128 + n after a
    signal n that ended it, else 1.
    """
    with _private_folder() as folder:
        return _Attempts(options, command, folder).run()


@contextmanager
def _private_folder() -> Iterator[Path]:
    """Make a folder that only this user can read, for as long as the launcher runs."""
    folder = Path(tempfile.mkdtemp(prefix="align_kit-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Attempts:
    def __init__(self, options: Options, command: Sequence[str], folder: Path) -> None:
        self.options, self.command, self.folder = options, command, folder
        self.signals = Signals()
        self.history: list[Ended] = []
        self.output: Path | None = None  # where the run keeps its checkpoints, once the folder is its own
        given = os.environ.get(supervised.SKIP_STEPS)
        self.skipped = parse_steps(given) if given else frozenset()

    def run(self) -> int:
        with self.signals.heard():
            return self._until_it_is_over()

    def _until_it_is_over(self) -> int:
        while True:
            agent = self._attempt()
            verdict = judge(self.history, self.options, self.skipped, self.signals.asked)
            if verdict.code is not None:
                self._say_end(verdict, agent)
                return verdict.code
            left_out = verdict.skip_steps - self.skipped
            tell.starting_again(self.history[-1], without_progress(self.history), self.options.max_restarts, left_out)
            self.skipped = verdict.skip_steps

    def _attempt(self) -> Agent:
        """Run one attempt to its end and note how it ended."""
        number = len(self.history)
        place = self.folder / f"attempt-{number}"
        place.mkdir()
        self._set_environment(place, number)
        watch = Watch(place, self.options.hang_seconds, self.options.grace_seconds)
        agent = Agent(self.options, self.command, number, watch, self.signals)
        agent.start()
        self.output = supervised.read_output(place) or self.output
        self.history.append(self._ended(watch))
        return agent

    def _set_environment(self, place: Path, number: int) -> None:
        """Tell the ranks, which inherit it, about this attempt."""
        os.environ[supervised.FOLDER] = str(place)
        os.environ[supervised.LAUNCHER] = str(os.getpid())
        os.environ[supervised.ATTEMPT] = str(number)
        if self.output is not None:  # before, the folder may still hold the run that this one replaces
            os.environ[supervised.RESUME] = "auto"
        if self.skipped:
            os.environ[supervised.SKIP_STEPS] = ",".join(map(str, sorted(self.skipped)))

    def _ended(self, watch: Watch) -> Ended:
        if watch.is_fine:
            return Ended(frozenset(watch.codes))
        failure = watch.first_failure()
        beat = watch.last(failure.rank)
        stored = run_folder.checkpoints(self.output) if self.output else []
        return Ended(
            frozenset(watch.codes),
            failure,
            beat.activity if beat else None,
            stored[-1].name if stored else None,
            watch.hang,
        )

    def _say_end(self, verdict: Verdict, agent: Agent) -> None:
        ended = self.history[-1]
        if ended.failure is None:
            return
        asked_to_end = verdict.code is not None and verdict.code > 128
        if asked_to_end and ended.failure.kind not in ("user", "fault", "error"):  # those have something to say
            return tell.say(f"stopped: {verdict.why}")
        tell.the_end(ended, verdict, len(self.history) - 1, agent.written_by(ended.failure.rank))

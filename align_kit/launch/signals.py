"""Signals to the launcher: passed on to the ranks, which save, or save and stop; then nothing is started again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from align_kit.launch.watch import Watch

# A terminal that closes asks for what SIGTERM asks for.
PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGQUIT: signal.SIGQUIT,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}


class Signals:
    """Passes signals on to the ranks that run, and remembers them for those that are just being started."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self._watch: Watch | None = None
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Hear signals meanwhile; one that is ignored stays so (`nohup`)."""
        self._before = {signum: signal.getsignal(signum) for signum in PASSED_ON}
        self._install()
        try:
            yield
        finally:
            self._restore()

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Let signals do meanwhile what they did before: no rank runs, and the launcher may wait for long."""
        self._restore()
        try:
            yield
        finally:
            self._install()

    def take_over(self, watch: Watch) -> None:
        """Pass signals on to the ranks of `watch`, those too that came while they were being started."""
        self._install()  # torch's agent has handlers of its own
        self._watch = watch
        for signum in self.asked:
            watch.pass_on(PASSED_ON[signal.Signals(signum)])

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        self.asked.append(signum)
        if self._watch is not None:
            self._watch.pass_on(PASSED_ON[signal.Signals(signum)])

    def _install(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler if handler is signal.SIG_IGN else self._hear)

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

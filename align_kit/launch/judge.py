"""What becomes of a run whose attempt has ended: over, or started again, and without which steps."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from align_kit.errors import EXIT_CODE, FAULT_CODE
from align_kit.launch.options import Options
from align_kit.launch.pulse import Hang
from align_kit.run_folder import step_of
from align_kit.supervised import Failure


@dataclass(frozen=True)
class Ended:
    """How one attempt ended: the exit codes of its ranks, and, where it failed, how and from where it could go on.

    `commit` names the newest checkpoint, `activity` is what the failing rank did, `None` where it had not begun.
    """

    codes: frozenset[int]
    failure: Failure | None = None
    activity: str | None = None
    commit: str | None = None
    hang: Hang | None = None

    @property
    def step(self) -> int:
        """The step of the newest checkpoint, -1 without one."""
        return step_of(self.commit) if self.commit else -1

    def is_like(self, other: Ended) -> bool:
        """Return whether two attempts failed in the same way at the same step, with no newer checkpoint between."""
        mine, theirs = self.failure, other.failure
        if mine is None or theirs is None:
            return False
        same_place = (mine.step, self.activity, self.commit) == (theirs.step, other.activity, other.commit)
        return same_place and (mine.kind, mine.line) == (theirs.kind, theirs.line)


@dataclass(frozen=True)
class Verdict:
    """`code` is the launcher's exit code, `None` to start again; `why` says why it is over, where a reader may ask."""

    code: int | None
    why: str = ""
    skip_steps: frozenset[int] = frozenset()


def judge(history: Sequence[Ended], options: Options, skipped: frozenset[int], asked: Sequence[int]) -> Verdict:
    """Return what becomes of a run after the attempts in `history`; `skipped` are the steps it leaves out already.

    `asked` are the signals that the launcher was sent.
    """
    last = history[-1]
    if last.failure is None:
        return Verdict(max(last.codes))  # done, or saved and stopped; where a rank was lost meanwhile, neither is sure
    if ending := [signum for signum in asked if signum != signal.SIGUSR1 or _died_of(last.failure, signum)]:
        return Verdict(128 + ending[0], f"{_name(ending[0])}{_whence(last)}")
    code = exit_code(last.failure)
    if code == EXIT_CODE:
        return Verdict(code)
    if last.failure.kind == "error" and last.activity is None and len(history) == 1:
        return Verdict(code, "nothing was trained yet, so it would fail in the same way" * (options.max_restarts > 0))
    more = frozenset(last.failure.skip_steps) - skipped
    if len(history) > 1 and last.is_like(history[-2]) and not more:
        more = _poisoned(last, options) - skipped
        if not more:
            return Verdict(code, f"the same failure twice without progress{_hint(last, options)}")
    if without_progress(history) > options.max_restarts:
        why = f"--max_restarts {options.max_restarts} without a newer checkpoint{_without(more)}"
        return Verdict(code, why * (options.max_restarts > 0))
    return Verdict(None, skip_steps=skipped | more)


def without_progress(history: Sequence[Ended]) -> int:
    """Return how many attempts there are since one left a checkpoint newer than any before, that one included."""
    newest, count = history[0].step, 0
    for ended in history:
        count = 1 if ended.step > newest else count + 1
        newest = max(newest, ended.step)
    return count


def exit_code(failure: Failure) -> int:
    """Return what the launcher exits with after a failure that ends a run."""
    return {"user": EXIT_CODE, "fault": FAULT_CODE}.get(failure.kind, 1)


def _poisoned(last: Ended, options: Options) -> frozenset[int]:
    """Return the step whose batch may be left out, where that was asked for."""
    assert last.failure is not None
    if not options.skip_poisoned or last.activity != "train" or last.failure.step is None:
        return frozenset()
    return frozenset([last.failure.step])


def _hint(last: Ended, options: Options) -> str:
    could = last.activity == "train" and not options.skip_poisoned and options.nodes == 1
    return "; --skip_poisoned leaves out the batch of such a step" if could else ""


def _without(steps: frozenset[int]) -> str:
    """Return how the run goes on without steps that the last attempt asked to leave out."""
    return f"; go on with --resume --skip_steps {','.join(map(str, sorted(steps)))}" if steps else ""


def _died_of(failure: Failure, signum: int) -> bool:
    return failure.kind == "died" and failure.line.endswith(f"signal {signum}")


def _name(signum: int) -> str:
    return signal.Signals(signum).name


def _whence(last: Ended) -> str:
    return f" before it had saved; --resume goes on from {last.commit}" if last.commit else " before it had saved"

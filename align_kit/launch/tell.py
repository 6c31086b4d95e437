"""What the launcher says of a failure: a line where the run starts again, the first failing rank's error at the end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from align_kit.launch.judge import Ended, Verdict
from align_kit.launch.pulse import SHOWN_FRAMES, Hang, waits

LAST_LINES = 40  # of what a rank that died wrote

DOING = {
    None: "before the first step",
    "start": "before the first step",
    "train": "at step {step}",
    "evaluate": "in the evaluation at step {step}",
    "rollout": "in the rollout at step {step}",
    "save": "in the save of step {step}",
    "end": "after the last step",
}


def say(text: str) -> None:
    """Print to standard error, at once."""
    print(text, file=sys.stderr, flush=True)


def starting_again(ended: Ended, restart: int, of: int, left_out: frozenset[int]) -> None:
    """Say what happened, and from where the run goes on; `left_out` are steps that it newly leaves out."""
    steps = ", ".join(map(str, sorted(left_out)))
    without = f", without the batch of step {steps}" if left_out else ""
    say(f"{what_happened(ended)}; starting again{_whence(ended)}{without} (restart {restart} of {of})")
    if ended.hang is not None:
        say(stack_text(ended.hang))


def the_end(ended: Ended, verdict: Verdict, restarts: int, written: Path | None) -> None:
    """Say how the run ended: a user's mistake in one line, else the first failing rank's error and why it is over.

    `written` is what that rank wrote to standard error where nobody has seen it.
    """
    failure = ended.failure
    assert failure is not None
    if failure.kind in ("user", "fault"):
        if os.environ.get("ALIGN_KIT_TRACEBACK") and written is not None:
            say(_last_lines(written))
        say(f"error: {failure.line}")
    elif failure.trace:
        say(f"rank {failure.rank}, {_where(ended)}:\n{failure.trace.rstrip()}")
    elif ended.hang is not None:
        say(f"{what_happened(ended)}\n{stack_text(ended.hang)}")
    else:
        if written is not None and (text := _last_lines(written)):
            say(f"rank {failure.rank} wrote last:\n{text}")
        say(f"{what_happened(ended)}, and the others with it")
    if verdict.why:
        again = "" if not restarts else f" after {restarts} restart{'s' * (restarts > 1)}"
        say(f"stopped{again}: {verdict.why}")


def what_happened(ended: Ended) -> str:
    """Return in one clause which rank failed, how and where."""
    failure, where = ended.failure, _where(ended)
    assert failure is not None
    if ended.hang is not None:
        return f"{_who(ended.hang)} {where}, no progress for {ended.hang.seconds:.0f} s"
    if failure.kind == "died":
        return f"rank {failure.rank} {failure.line} {where}"
    return f"rank {failure.rank} failed {where}: {failure.line}"


def _who(hang: Hang) -> str:
    several = len(hang.ranks) > 1
    names = f"rank{'s' * several} {' and '.join(map(str, hang.ranks))}"
    if all(waits(hang.stacks.get(rank, ())) for rank in hang.ranks):
        return f"{names} wait{'s' * (not several)} for others"
    return f"{names} hang{'s' * (not several)}"


def _whence(ended: Ended) -> str:
    if ended.commit:
        return f" from {ended.commit}"
    return "" if ended.activity is None else " from the beginning"  # where it keeps checkpoints it had not said yet


def _where(ended: Ended) -> str:
    step = ended.failure.step if ended.failure else None
    return DOING[ended.activity].format(step=step)


def stack_text(hang: Hang) -> str:
    """Return the innermost frames of the ranks that hang."""
    lines = []
    for rank in hang.ranks:
        frames = hang.stacks.get(rank, ())
        if not frames:
            lines.append(f"  rank {rank} does not answer: it is stopped, or deep in code that is not Python")
            continue
        lines.append(f"  rank {rank}, innermost call first:")
        lines += [f"    {frame}" for frame in frames[:SHOWN_FRAMES]]
    return "\n".join(lines)


def _last_lines(place: Path) -> str:
    try:
        return "\n".join(place.read_text(errors="replace").splitlines()[-LAST_LINES:])
    except OSError:
        return ""

"""What a launcher and its ranks tell each other, through a private folder: heartbeats, stacks, how a rank failed.

The launcher sets the variables below; without them a rank keeps nothing and runs as under any other launcher.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

FOLDER = "ALIGN_KIT_SUPERVISED"  # this attempt's folder
LAUNCHER = "ALIGN_KIT_LAUNCHER"  # the launcher's process id
ATTEMPT = "ALIGN_KIT_ATTEMPT"  # 0, then 1 for the first restart
RESUME = "ALIGN_KIT_RESUME"  # "auto" on a restart of a run that has begun: the newest verified checkpoint, or anew
SKIP_STEPS = "ALIGN_KIT_SKIP_STEPS"  # "17,18": steps not to train on

STOPPED_CODE = 75  # the run has saved and stopped because it was asked to (EX_TEMPFAIL of sysexits.h)
STACK_SIGNAL = signal.SIGUSR2
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h

ACTIVITIES = ("start", "train", "evaluate", "save", "rollout", "end")
_BEAT = struct.Struct("<4qd")
_RUN = "run.json"
_kept: list[TextIO] = []  # files that signal handlers write to


class Beat(NamedTuple):
    """A sign of life: its number, the step and micro-batch at hand, the activity, when (monotonic s)."""

    number: int
    step: int
    micro_batch: int
    activity: str
    seconds: float


def pack(beat: Beat) -> bytes:
    """Return the bytes of `beat` as a rank's file holds them."""
    return _BEAT.pack(beat.number, beat.step, beat.micro_batch, ACTIVITIES.index(beat.activity), beat.seconds)


def beat_file(folder: Path, rank: int) -> Path:
    """Return where a rank writes its heartbeat."""
    return folder / f"heartbeat.{rank}"


def read_beat(folder: Path, rank: int) -> Beat | None:
    """Return the last heartbeat of a rank, `None` before its first."""
    try:
        number, step, micro_batch, activity, seconds = _BEAT.unpack(beat_file(folder, rank).read_bytes())
    except (OSError, struct.error):
        return None
    return Beat(number, step, micro_batch, ACTIVITIES[activity], seconds)


# --- how a rank failed ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """How a rank ended badly: `kind`, one line, its traceback where it has one, when (monotonic s).

    Kinds: user (a mistake to mend), fault (nobody's), error (not foreseen), late (another rank did not come in
    time), peer (only the echo of another rank's end).
    """

    rank: int
    kind: str
    line: str
    step: int | None = None
    skip_steps: tuple[int, ...] = ()
    trace: str = ""
    seconds: float = 0.0


def report(kind: str, line: str, skip_steps: Iterable[int] = (), trace: str = "") -> bool:
    """Tell the launcher how this rank ends; return False where none listens, and the rank has to say it itself."""
    folder, rank = folder_of(os.environ), int(os.environ.get("RANK", "0"))
    if folder is None:
        return False
    beat = read_beat(folder, rank)
    step = beat.step if beat else None
    failure = Failure(rank, kind, line, step, tuple(skip_steps), trace, time.monotonic())
    try:
        _write(folder / f"failure.{rank}.json", dataclasses.asdict(failure))
    except OSError:
        return False
    return True


def read_failure(folder: Path, rank: int) -> Failure | None:
    """Return what a rank said about its end, `None` where it said nothing."""
    try:
        found = json.loads((folder / f"failure.{rank}.json").read_text())
        return Failure(**{**found, "skip_steps": tuple(found["skip_steps"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


# --- where the run lives ----------------------------------------------------------------------------------


def tell_output(output_dir: str) -> None:
    """Tell the launcher where this run keeps its checkpoints, once what lies there is of this run."""
    if folder := folder_of(os.environ):
        with contextlib.suppress(OSError):
            _write(folder / _RUN, {"output_dir": os.path.abspath(output_dir)})


def read_output(folder: Path) -> Path | None:
    """Return where the run keeps its checkpoints, `None` where it has not said so: what lies there may be another's."""
    try:
        return Path(json.loads((folder / _RUN).read_text())["output_dir"])
    except (OSError, ValueError, KeyError):
        return None


def _write(place: Path, content: dict[str, object]) -> None:
    staging = place.with_suffix(".part")
    staging.write_text(json.dumps(content))
    os.replace(staging, place)


# --- the rank's side --------------------------------------------------------------------------------------


def folder_of(environ: os._Environ[str] | dict[str, str]) -> Path | None:
    """Return the folder that this rank's launcher listens to, `None` without one."""
    given = environ.get(FOLDER)
    return Path(given) if given else None


def stack_file(folder: Path, rank: int) -> Path:
    """Return where a rank writes the stack of its main thread when it is asked for it."""
    return folder / f"stack.{rank}"


def answer() -> None:
    """Be ready to show the stack (on SIGUSR2), and end with the launcher, however it ends; call it early."""
    folder = folder_of(os.environ)
    if folder is None:
        return
    with contextlib.suppress(OSError):
        _kept.append(stack_file(folder, int(os.environ.get("RANK", "0"))).open("w"))
        faulthandler.register(STACK_SIGNAL, _kept[-1], all_threads=False)
    if LAUNCHER in os.environ and sys.platform == "linux":
        die_with(int(os.environ[LAUNCHER]))


def die_with(launcher: int) -> None:
    """Let the kernel kill this process when its parent ends: a launcher that was killed cannot do it."""
    import ctypes

    _die_with(launcher, ctypes.CDLL(None))


def dying_with_us() -> Callable[[], None] | None:
    """Return what a child does before it becomes another program, so that it ends with this process (`preexec_fn`)."""
    if sys.platform != "linux":
        return None
    import ctypes

    return functools.partial(_die_with, os.getpid(), ctypes.CDLL(None))  # loaded here: the child may be short of locks


def _die_with(parent: int, kernel: Any) -> None:
    kernel.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(1)

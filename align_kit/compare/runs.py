"""Real runs in a folder of the experiment's: each by `align-kit launch`, once; what is finished is not run again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from align_kit import log, machine, registry, run_folder, supervised
from align_kit.config import Config, load
from align_kit.errors import EXIT_CODE, FAULT_CODE, UserError
from align_kit.resources import folder
from align_kit.run_folder import FINISHED
from align_kit.telemetry.clock import clock

# Keys that say how a run was started, not what it does.
STARTING = ("overwrite", "resume", "resume_from_checkpoint", "allow_change")
LOOK_SECONDS = 0.5
TAIL = 12  # lines shown of a run that failed
CLEAR = "\r\x1b[2K"  # the line on a terminal

Launch = Callable[[list[str], Path, Callable[[], None]], int]


def launch(words: list[str], output: Path, look: Callable[[], None]) -> int:
    """Run `align-kit launch <words>` with what it prints in a file, call `look` meanwhile, and return its exit code."""
    command = [sys.executable, "-m", "align_kit", "launch", *words]
    with output.open("w") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            preexec_fn=supervised.dying_with_us(),  # else a run would go on that nobody waits for
        )  # fmt: skip
        try:
            while process.poll() is None:
                look()
                time.sleep(LOOK_SECONDS)
        except BaseException:  # asked to stop: the run is asked too, and saves where it can
            process.terminate()
            process.wait()
            raise
    return process.returncode


def resolve(recipe: str, words: Sequence[str]) -> Config:
    """Return the configuration that a run of `recipe` with these words has; raises `UserError` as it would."""
    return load(registry.get(recipe), words, defaults=folder("recipes") / f"{recipe}.yaml")


@dataclass(frozen=True)
class Job:
    """One run: its recipe, the words it is given, its folder, and how it is called in what is said."""

    recipe: str
    words: tuple[str, ...]
    home: Path
    title: str
    may_diverge: bool = False  # one of a sweep, which tries rates that are too high

    @property
    def command_line(self) -> list[str]:
        return [*self.words, "--output_dir", str(self.home)]

    def identity(self, ranks: int) -> dict[str, Any]:
        """Return what makes two runs the same: the resolved configuration, the ranks, the code."""
        config = resolve(self.recipe, self.command_line).as_dict()
        return _identity(
            {"config": config, "world_size": ranks, "versions": machine.versions(), "git": machine.git_revision()}
        )


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what of a manifest, written or to come, makes two runs the same."""
    plain = json.loads(json.dumps(manifest, default=str))
    config = {name: value for name, value in plain["config"].items() if name not in STARTING}
    return {**config, **{name: plain[name] for name in ("world_size", "versions", "git")}}


class Runner:
    """Does one job after another on the same ranks, and says how far all of them are."""

    def __init__(self, home: Path, ranks: int, *, overwrite: bool, launch: Launch = launch) -> None:
        self.home, self.ranks, self.overwrite, self.launch = home, ranks, overwrite, launch
        self.began = time.monotonic()
        self.expected = 0  # jobs in all, as far as is known
        self.done = 0
        self.spent: list[float] = []  # seconds of the jobs that were run now

    def manifest(self, job: Job) -> dict[str, Any] | None:
        """Return the manifest of a job, run now or before; `None` where it diverged and might.

        Raises `UserError` where it ended otherwise, and where its folder holds another run that may not go.
        """
        self.done += 1
        how = self._how(job)
        if how is None:
            self._say(job, "done before")
            return run_folder.read_manifest(job.home)
        began = time.monotonic()
        code = self._launch(job, how)
        self.spent.append(time.monotonic() - began)
        if code == FAULT_CODE and job.may_diverge:
            self._say(job, f"diverged, {clock(self.spent[-1])}")
            return None
        if code:
            self._fail(job, code)
        self._say(job, f"{clock(self.spent[-1])}{self._outlook()}")
        return run_folder.read_manifest(job.home)

    def _how(self, job: Job) -> list[str] | None:
        """Return the words by which a job begins or goes on; `None` where it is done."""
        manifest = run_folder.read_manifest(job.home)
        if manifest is None:
            self._clear_torn(job.home)
            return []
        finished, stored = manifest.get("status") == FINISHED, run_folder.checkpoints(job.home)
        if not finished and not stored:
            return ["--overwrite"]
        before, now = _identity(manifest), job.identity(self.ranks)
        differing = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if not differing:
            return None if finished else ["--resume"]
        if self.overwrite:
            return ["--overwrite"]
        name = differing[0]
        raise UserError(
            f"{job.home} holds a run with {name} {_short(before.get(name))}, now {_short(now.get(name))}; name another "
            "--output_dir, or replace what differs with --overwrite"
        )

    def _clear_torn(self, home: Path) -> None:
        """Remove a run whose manifest is there and cannot be read, where that is asked for; nothing can go on from it.

        The run itself would refuse to replace a folder that it cannot tell from somebody's own.
        """
        torn = home / run_folder.MANIFEST
        if not torn.is_file():
            return
        if not self.overwrite:
            raise UserError(f"{torn} cannot be read; remove {home}, or give --overwrite to replace it: it is run anew")
        shutil.rmtree(home)

    def _launch(self, job: Job, how: Sequence[str]) -> int:
        # What diverges does so again at once; a fault of the machine does not, and must not cost a rate its place.
        options = ["--nproc_per_node", str(self.ranks), *(["--max_restarts", "1"] if job.may_diverge else [])]
        output = self.log_of(job)
        run_folder.make_private(output.parent)
        words = [*options, job.recipe, *job.command_line, *how]
        return self.launch(words, output, lambda: self._show(job, output))

    def log_of(self, job: Job) -> Path:
        """Return the file that holds what a job printed."""
        return self.home / "logs" / f"{job.home.relative_to(self.home).as_posix().replace('/', '-')}.log"

    def _fail(self, job: Job, code: int) -> NoReturn:
        """Say how a run failed: its own line after a user's mistake, else the last it printed."""
        output = self.log_of(job)
        lines = output.read_text(errors="replace").splitlines()
        mistake = next((line for line in lines if line.startswith("error: ")), None)
        if code == EXIT_CODE and mistake:
            raise UserError(f"{job.title}: {mistake.removeprefix('error: ')}")
        if code == supervised.STOPPED_CODE:
            raise UserError(f"{job.title} was stopped; the same command goes on from there")
        for line in lines[-TAIL:]:
            log.say(f"    {line}")
        raise UserError(f"{job.title} ended with exit code {code}; all it said is in {output}")

    # --- progress over all jobs ---

    @property
    def elapsed(self) -> float:
        """Seconds since the experiment began, in this process."""
        return time.monotonic() - self.began

    def _say(self, job: Job, what: str) -> None:
        start = CLEAR if sys.stdout.isatty() else ""
        log.say(f"{start}  {self.done:>2}/{self.expected}  {job.title:<40} {what}")

    def _show(self, job: Job, output: Path) -> None:
        """Show the running job's own last line of progress, on a terminal."""
        if not sys.stdout.isatty():
            return
        steps = [line for line in output.read_text(errors="replace").splitlines() if line.startswith("  step ")]
        at = steps[-1].strip() if steps else "starting"
        line = f"{self.done:>2}/{self.expected}  {job.title}: {at}  [{clock(self.elapsed)}]"
        print(f"{CLEAR}  {line}", end="", flush=True)

    def _outlook(self) -> str:
        left = max(0, self.expected - self.done) * sum(self.spent) / len(self.spent)
        return f", {clock(self.elapsed)} in all, about {clock(left)} left" if left else ""


def forget_weights(home: Path) -> None:
    """Delete the models and checkpoints of a finished run; what it is known by and what it logged stay."""
    for file in home.glob("*.safetensors"):
        file.unlink()
    for checkpoint in run_folder.checkpoints(home):
        shutil.rmtree(checkpoint)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

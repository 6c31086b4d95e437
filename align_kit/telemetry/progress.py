"""Progress of a run on rank 0: a bar on a terminal, a few lines where output goes to a file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from align_kit import log
from align_kit.telemetry.clock import clock
from align_kit.telemetry.replayed import put_aside

LINES = 10  # how many progress lines a run prints where there is no terminal


class Progress(TrainerCallback):
    """Show step, loss, tokens/s and time left; keep the last line for the footer.

    Tokens are those the model computed on all ranks, padding not counted.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Any = None
        self.started = 0.0
        self.first_step = 0
        self.latest: dict[str, float] = {}
        self.tokens = 0.0
        self.tenth: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            from tqdm import tqdm

            bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", leave=False)
            self.bar = None if bar.disable else bar  # TQDM_DISABLE asks for lines

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last step is never left out, whatever logging_steps says
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            self._evaluated(logs or {}, state)
            return
        self.latest = {**self.latest, **logs}
        self.tokens += logs.get("tokens", 0.0)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}  {self.tokens_per_second():,.0f} tokens/s")
        elif self._due(state):
            log.say(f"  {self._line(state, logs)}")

    def _evaluated(self, logs: dict[str, float], state: Any) -> None:
        shown = next((name for name in ("eval_loss", "eval_reward") if name in logs), None)
        if shown is not None and state.is_world_process_zero:
            self.latest = {**self.latest, **logs}
            text = f"  step {state.global_step}: {shown.replace('_', ' ')} {logs[shown]:.4f}"
            self.bar.write(text) if self.bar is not None else log.say(text)

    def _due(self, state: Any) -> bool:
        """Tell whether this logged step is the first, the last, or the first of another tenth of the run."""
        tenth = state.global_step * LINES // state.max_steps
        due = self.tenth is None or tenth > self.tenth or state.global_step == state.max_steps
        self.tenth = tenth
        return due

    def _line(self, state: Any, logs: dict[str, float]) -> str:
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.started) / max(1, done) * (state.max_steps - state.global_step)
        return (
            f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
            f"{self.tokens_per_second():,.0f} tokens/s  {clock(left)} left"
        )

    def tokens_per_second(self) -> float:
        """Return computed tokens per second over all ranks since training began."""
        return self.tokens / max(1e-9, time.monotonic() - self.started)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class MetricsFile(TrainerCallback):
    """Append every logged line to `metrics.jsonl` of the run, on rank 0; a run that goes on logs no step twice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put aside what was logged after the checkpoint, and the closing line of a run that ended."""
        if state.is_world_process_zero:
            put_aside(self.path, lambda line: line["step"] <= state.global_step and "train_runtime" not in line)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a") as stream:
                stream.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class Fingerprints(TrainerCallback):
    """Compare the frozen models with their first fingerprint every `every` steps (0: never) and at each save."""

    def __init__(self, check: Any, every: int) -> None:
        self.check = check
        self.every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self.check(f"at step {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.check(f"at the save of step {state.global_step}")

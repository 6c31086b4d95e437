"""What a line of training took on this machine: seconds, tokens per second, memory, and use of the peak arithmetic.

These numbers stand under `machine/` and nowhere else: all other numbers of a line are the same whenever a run is
repeated, and these are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from align_kit.run_folder import MACHINE
from align_kit.telemetry import spent

GIB = 2**30


def repeatable(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a logged line without what depends on the machine: what a run that is repeated must give again."""
    return {
        name: value
        for name, value in line.items()
        if not name.startswith(MACHINE) and not name.endswith(("_runtime", "_per_second"))
    }


class Meters(TrainerCallback):
    """Clocks training from one line to the next; evaluations and saves in between do not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._restart(0)

    def _restart(self, step: int) -> None:
        self._step, self._since, self._aside = step, self._clock(), spent.ledger().aside()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._restart(state.global_step)

    def read(self, *, step: int, tokens: float, peak_bytes: int, utilisation: float | None) -> dict[str, float]:
        """Return the numbers of a line and begin the next.

        `tokens` were trained on all ranks since the last line, `step` is the step now, `peak_bytes` the most memory
        that this process has taken for the run, `utilisation` the share of all ranks' peak arithmetic that one token
        per second takes (recomputation is no use of it: Chowdhery 2022, "PaLM", appendix B); `None`: not known.
        """
        seconds = self._clock() - self._since - (spent.ledger().aside() - self._aside)
        steps, speed = max(1, step - self._step), tokens / max(seconds, 1e-9)
        self._restart(step)
        found = {"seconds": seconds / steps, "tokens_per_second": speed, "peak_gib": peak_bytes / GIB}
        if utilisation is not None:
            found["mfu"] = speed * utilisation
        return {MACHINE + name: value for name, value in found.items()}

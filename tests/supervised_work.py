"""Command lines run by ranks that do not come, or that note each sign of life they give."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any


def run_where_rank_1_sleeps(words: Sequence[str], step: int = 2) -> int:
    """Run the command line; rank 1 sleeps for a minute in its forward at step `step`."""
    from align_kit.cli import main
    from align_kit.trainers.base import PhaseTrainer

    compute_loss = PhaseTrainer.compute_loss

    def sleepy(self: Any, *given: Any, **named: Any) -> Any:
        if os.environ["RANK"] == "1" and self.state.global_step + 1 == step:
            time.sleep(60)
        return compute_loss(self, *given, **named)

    PhaseTrainer.compute_loss = sleepy  # type: ignore[method-assign]
    return main(words)


def run_noting_beats(words: Sequence[str]) -> int:
    """Run the command line and print the activities that its heartbeat named, repeats left out."""
    from align_kit.cli import main
    from align_kit.telemetry.heartbeat import Heart

    beat, seen = Heart.beat, []

    def noted(self: Heart, activity: str, **where: Any) -> None:
        beat(self, activity, **where)
        if seen[-1:] != [activity]:
            seen.append(activity)

    Heart.beat = noted  # type: ignore[method-assign]
    code = main(words)
    print("beats:", *seen)
    return code

"""A trainer as the real command line builds it, measured where its training would begin."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def in_place_of_training(argv: list[str], report: str, measure: Callable[[Any], dict[str, Any]]) -> int:
    """Run `align-kit argv…` up to its training; write what `measure` finds of the trainer to `report`.<rank>.

    The process ends there: what follows a training, saving and closing, is not measured.
    """
    from align_kit.cli import main
    from align_kit.trainers.base import PhaseTrainer

    def measured(trainer: Any, *_: Any, **__: Any) -> Any:
        Path(f"{report}.{trainer.args.process_index}").write_text(json.dumps(measure(trainer)))
        sys.stdout.flush()
        os._exit(0)

    PhaseTrainer.train = measured  # type: ignore[method-assign]
    return int(main(argv) or 0)

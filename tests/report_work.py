"""What ranks do in tests of the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def leave_no_room_for_the_page(trainer: Any) -> None:
    """Put a folder where the page is to be."""
    if trainer.args.process_index == 0:
        (Path(trainer.args.output_dir) / "report.html").mkdir()

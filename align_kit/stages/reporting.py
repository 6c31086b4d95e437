"""The page of a run, written from its folder when the run ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align_kit import log, run_folder
from align_kit.errors import UserError, first_line
from align_kit.run_folder import RunFolder
from align_kit.telemetry import spent


def write(home: RunFolder, *, failed: bool = False) -> Path | None:
    """Write `report.html` on rank 0, tell wandb where that listens, and return where the page is.

    A run does not fail over either.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return None
    config = home.manifest.get("config", {})
    page = None
    with _only_warning(f"{run_folder.REPORT} could not be written"):
        home.write(spent={part: round(seconds, 3) for part, seconds in spent.ledger().seconds().items()})
        if config.get("report"):
            from align_kit.report.run_page import write as write_page

            page = write_page(home.path)
    asked = config.get("report_to") or ()
    if "wandb" in asked or "all" in asked:
        from align_kit.telemetry import trackers

        with _only_warning("wandb was not told how the run ended"):
            trackers.hand_over(home.path, page, failed=failed)
    return page


@contextmanager
def _only_warning(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        log.warn(f"{what} ({kind}{first_line(error)})")


@contextmanager
def of_a_failure(home: RunFolder) -> Iterator[None]:
    """Write the page of a run that fails once it has trained a few steps: its curves may tell why."""
    try:
        yield
    except Exception:
        if home.begun and (home.path / run_folder.METRICS).is_file():
            write(home, failed=True)
        raise

"""Where the data folders are: inside an installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """Return the folder `name` (`ds_configs`, `data_cards` or `recipes`).

    A wheel carries it as `align_kit/<name>`; an editable install does not see mapped packages, so the
    checkout's own top-level folder is the fallback.
    """
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name

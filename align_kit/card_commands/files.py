"""Text files that are changed in place: read with their line ends, replaced whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from align_kit.errors import UserError


def text_of(file: Path) -> str:
    """Return what is in a file, line ends as they are; raises UserError where it cannot be read."""
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None


def replace_text(file: Path, text: str) -> None:
    """Put `text` in place of what a file holds, whole or not at all; raises UserError where it cannot be written."""
    draft = file.with_name(f".{file.name}.draft")
    try:
        draft.write_bytes(text.encode("utf-8"))
        draft.chmod(file.stat().st_mode)
        os.replace(draft, file)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise UserError(f"cannot write {file}: {error.strerror}; it is as it was") from None

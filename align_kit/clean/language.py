"""Which language a text is in, told by py3langid where it is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from align_kit.errors import UserError, unknown

_NEEDED = "--language needs py3langid, which is not installed; pip install 'align-kit[language]'"
_ENOUGH = 2000  # characters: more do not change the answer, and cost time


def language_of(text: str, *, needed: bool = True) -> str | None:
    """Return the ISO 639-1 code of the language of `text`; None without py3langid where it is not `needed`.

    Raises UserError with the command that installs it where it is.
    """
    classify = _classifier()
    if classify is None:
        if needed:
            raise UserError(_NEEDED)
        return None
    return str(classify(text[:_ENOUGH])[0])


def checked(code: str) -> str:
    """Return the code of a language as it is told here; raises UserError for one that never is."""
    if _classifier() is None:
        raise UserError(_NEEDED)
    from py3langid import rank

    known = {str(name) for name, _ in rank("")}
    if code.lower() not in known:
        raise unknown("language", code, known, show=len(known))
    return code.lower()


@functools.cache
def _classifier() -> Callable[[str], Any] | None:
    try:
        import py3langid
    except ImportError:
        return None
    return py3langid.classify  # type: ignore[no-any-return]

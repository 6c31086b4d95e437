"""The one error a user's mistake raises, and the suggestion that goes with a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_CODE = 2


class UserError(Exception):
    """A mistake the user can mend: what was seen, what is allowed, what to do, in one line.

    `run` prints it on one rank without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def unknown(what: str, word: str, known: Iterable[str], *, show: int = 12) -> UserError:
    """Return the error for a name that does not exist, with what does and the nearest to it.

    `unknown("recipe", "dp0", ["dpo", "sft"])` reads
    `unknown recipe 'dp0'; known: dpo, sft (did you mean 'dpo'?)`. Of a long list only the nearest are shown.
    """
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    listed = names if len(names) <= show else near[1:]
    known_part = f"; known: {', '.join(listed)}" if listed else ""
    return UserError(f"unknown {what} {word!r}{known_part}{hint}")

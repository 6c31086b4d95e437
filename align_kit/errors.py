"""The one error a user's mistake raises, and the suggestion that goes with a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

EXIT_CODE = 2
FAULT_CODE = 3  # nobody's mistake; the run may be started again from its last checkpoint


class UserError(Exception):
    """A mistake the user can mend: what was seen, what is allowed, what to do, in one line.

    `run` prints it on one rank without a traceback and exits with `code`.
    """

    code = EXIT_CODE

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Fault(UserError):
    """What ends a run in one line without being the user's mistake: a NaN, a flipped bit, ranks that disagree.

    The run may be started again from its last checkpoint; `skip_steps` are those it should not train on then.
    """

    code = FAULT_CODE

    def __init__(self, message: str, skip_steps: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.skip_steps = tuple(skip_steps)


def first_line(error: BaseException, clean: Callable[[str], str] = str, *, length: int = 200) -> str:
    """Return the first line of what an error says, its type's name where it says nothing; at most `length` characters.

    `clean` takes out what must not be said, before anything is cut.
    """
    lines = clean(str(error)).strip().splitlines()
    return lines[0][:length] if lines else type(error).__name__


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

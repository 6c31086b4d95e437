"""What a check found: a state, what was seen, what to do, and what `--fix` may do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from align_kit.errors import first_line
from align_kit.scrub import scrubbed

OK, NOTE, WARN, BAD = "ok", "note", "warn", "bad"
STATES = (OK, NOTE, WARN, BAD)
WIDTH = 16  # characters of the longest name of a check


@dataclass(frozen=True)
class Finding:
    """The answer of one check: `bad` stops runs or spoils them, `warn` may, a `note` is to be known.

    `fix` does what is safe and returns what it did, in the past tense; it raises OSError where it cannot.
    """

    state: str
    what: str
    remedy: str = ""
    fix: Callable[[], str] | None = None
    name: str = ""

    def line(self) -> str:
        """Return the line that is printed, without line breaks or secrets."""
        said = f"{self.what}; {self.remedy}" if self.remedy else self.what
        return f"{self.state:<4}  {self.name:<{WIDTH}}  {' '.join(str(scrubbed(said)).split())}"

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as plain values."""
        said = {"name": self.name, "state": self.state, "what": self.what, "remedy": self.remedy}
        return {**{key: scrubbed(value) for key, value in said.items()}, "fixable": self.fix is not None}

    def fixed(self) -> Finding:
        """Do what is safe about it, where there is such a thing, and return what is to be said then."""
        if self.fix is None:
            return self
        try:
            return replace(self, state=NOTE, what=f"{self.what}; fixed: {self.fix()}", remedy="", fix=None)
        except OSError as error:
            return replace(self, what=f"{self.what}; could not be fixed: {first_line(error)}")


def ok(what: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding(OK, what)


@dataclass(frozen=True)
class Check:
    """One row of the table of checks: what it is called and what looks."""

    name: str
    look: Callable[[], Finding]

    def run(self) -> Finding:
        """Return what the check finds; one that fails is a finding too."""
        try:
            return replace(self.look(), name=self.name)
        except Exception as error:  # whatever it is, the other checks go on
            why = f"{type(error).__name__}: {first_line(error)}"
            return Finding(WARN, f"could not be looked at ({why})", "see to it by hand", name=self.name)

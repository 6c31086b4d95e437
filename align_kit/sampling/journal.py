"""Completions on disk while they are drawn, so that a command that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from align_kit.errors import UserError
from align_kit.models.completion import Completion

ASKED, DRAWN = "drawn.json", "completions.jsonl"


class Journal:
    """The completions of each prompt drawn so far, by the prompt's key; every batch is on disk before the next."""

    def __init__(self, stream: IO[bytes], found: dict[int, list[Completion]]) -> None:
        self.found = found
        self._stream = stream

    def add(self, keys: Sequence[int], drawn: Sequence[Sequence[Completion]]) -> None:
        """Store the completions of some prompts."""
        for key, some in zip(keys, drawn, strict=True):
            self.found[key] = list(some)
            self._stream.write(json.dumps([key, some]).encode() + b"\n")
        self._stream.flush()


@contextmanager
def opened(folder: Path, asked: Mapping[str, Any]) -> Iterator[Journal]:
    """Open the journal in `folder`, made where it is missing, for what is drawn as `asked` says.

    Raises `UserError` where another process writes in it, and where it holds completions drawn otherwise.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / DRAWN).open("a+b")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; name another --output") from None
    with stream:
        _lock(stream, folder)
        _hold_to(folder, asked)
        yield Journal(stream, _read(stream))


def _lock(stream: IO[bytes], folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process draws into {folder}; wait for it, or name another --output") from None
    except OSError:  # a file system that knows no locks
        return


def _hold_to(folder: Path, asked: Mapping[str, Any]) -> None:
    """Compare what is asked with what the journal was begun for, or note it there."""
    place = folder / ASKED
    if not place.exists():
        part = place.with_suffix(".part")
        part.write_text(json.dumps(dict(asked), indent=1) + "\n", encoding="utf-8")
        os.replace(part, place)
        return
    try:
        before = dict(json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{place} cannot be read ({error}), so nobody knows how what is beside it was drawn; remove {folder}, or "
            "name another --output"
        ) from None
    for name, value in asked.items():
        if before.get(name) != value:
            raise UserError(
                f"{folder} holds completions with {name} {before.get(name)}, and {value} is asked for; give the same "
                f"to go on, remove the folder to begin again, or name another --output"
            )


def _read(stream: IO[bytes]) -> dict[int, list[Completion]]:
    """Return what a journal holds; a line that was being written when its process ended is cut off."""
    stream.seek(0)
    found: dict[int, list[Completion]] = {}
    good = 0
    for line in stream:
        try:
            key, some = json.loads(line)
            found[key] = [Completion(*one) for one in some]
        except (ValueError, TypeError):
            break
        if not line.endswith(b"\n"):
            del found[key]  # it may go on
            break
        good += len(line)
    stream.truncate(good)
    stream.seek(0, os.SEEK_END)
    return found


def remove(folder: Path) -> None:
    """Remove a journal whose completions are where they belong."""
    for name in (DRAWN, ASKED):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # somebody keeps something else there
        folder.rmdir()


# --- completions that a finished command left -----------------------------------------------------------------------


def completed_lines(
    rows: Sequence[Mapping[str, Any]], drawn: Sequence[Sequence[Completion]], scores: Sequence[Sequence[float | None]]
) -> Iterator[bytes]:
    """Yield a line for each prompt: prompt, answer, and its completions with what they scored."""
    for row, some, given in zip(rows, drawn, scores, strict=True):
        told = [
            {"text": one.text, "tokens": one.tokens, "ended": one.ended, "control": one.control, "score": score}
            for one, score in zip(some, given, strict=True)
        ]
        yield json.dumps({**row, "completions": told}, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def finished(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[list[Completion]]]:
    """Return how the completions in a finished folder were drawn, their prompts, and themselves.

    Raises `UserError` for a folder without them.
    """
    try:
        asked = dict(json.loads((folder / ASKED).read_text(encoding="utf-8")))
        # Not `splitlines`: U+2028 and its like end a line for it, and stand in texts.
        text = (folder / DRAWN).read_text(encoding="utf-8", errors="surrogatepass")
        told = [json.loads(line) for line in text.split("\n") if line]
        if missing := {"model", "seed", "from", "licences", "checker"} - asked.keys():
            raise ValueError(f"{ASKED} does not say {sorted(missing)[0]}")
        rows = [{name: value for name, value in line.items() if name != "completions"} for line in told]
        drawn = [[_completion(one) for one in line["completions"]] for line in told]
        if not all("prompt" in row for row in rows):
            raise ValueError("a line has no prompt")
    except FileNotFoundError:
        raise UserError(
            f"--from {folder}: no {ASKED} and {DRAWN} there; name a folder that align-kit sample wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--from {folder}: its {ASKED} or {DRAWN} cannot be read ({type(error).__name__}: {error}); draw the "
            "completions anew"
        ) from None
    return asked, rows, drawn


def _completion(told: Mapping[str, Any]) -> Completion:
    if not isinstance(told["text"], str):
        raise ValueError(f"a completion's text is {told['text']!r:.40}")
    return Completion(told["text"], told["tokens"], told["ended"], told["control"])

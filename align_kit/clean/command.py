"""`align-kit data clean` and `align-kit data stats`."""

from __future__ import annotations

import errno
import json
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from align_kit import log
from align_kit.clean import options, pool, told
from align_kit.clean.chain import Judged, encoded
from align_kit.clean.cleaning import Cleaning
from align_kit.clean.options import Asked
from align_kit.clean.source import Source
from align_kit.data import made
from align_kit.errors import UserError

DROPPED = "dropped.jsonl"


def clean(words: Sequence[str]) -> int:
    """Clean the sources that a command line names, print what was dropped and why, and return 0.

    Raises UserError for a mistake in the command line or a file, and where no row is left; nothing is written then.
    """
    given = options.clean_words().parse_args(list(words))
    folder = given.output.resolve()
    name = given.name or folder.name
    made.check_name(name)
    made.check_free(folder, overwrite=given.overwrite)
    asked = options.asked(given)
    _keep_apart(folder, asked.sources)
    parent = _existing(folder)
    with _ending_well(parent), Cleaning(asked.plan, asked.sources, parent, exact=asked.exact) as work:
        began = time.monotonic()
        workers = _workers(given.workers, asked)
        with _progress(asked.sources) as tell:
            found = work.run(workers, tell)
        log.say(told.table(found, asked))
        for line in told.remarks(found, asked, time.monotonic() - began, workers):
            log.say(line)
        if not found.kept:
            raise UserError(f"no row is left of {found.rows:,}; nothing was written: see the table for what drops them")
        facts = told.made_set(name, found, asked, ["align-kit", "data", "clean", *words], given.seed)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=parent) as aside:
            beside = {DROPPED: _write_dropped(Path(aside) / DROPPED, work)} if given.keep_dropped else {}
            card = made.write_made(folder, facts, {"train": work.kept()}, overwrite=given.overwrite, beside=beside)
    log.say(f"written: {card} ({found.kept:,} rows)" + (f" and {folder / DROPPED}" if given.keep_dropped else ""))
    log.say(f"train on it: --datasets {shlex.quote(json.dumps([{'path': str(card)}]))}")
    return 0


def stats(words: Sequence[str]) -> int:
    """Print what is in the sources that a command line names, and what cleaning would drop; return 0."""
    given = options.stats_words().parse_args(list(words))
    asked = options.asked(given, survey=True)
    scratch = Path(tempfile.gettempdir())
    with _ending_well(scratch), Cleaning(asked.plan, asked.sources, scratch, exact=asked.exact) as work:
        with _progress(asked.sources) as tell:
            work.run(_workers(given.workers, asked), tell)
        figures = told.figures(work, asked)
    print(json.dumps(figures, indent=2) if given.json else told.page(figures))
    return 0


def _workers(given: int | None, asked: Asked) -> int:
    return pool.workers_for(given, sum(source.size for source in asked.sources))


def _existing(folder: Path) -> Path:
    """Return the folder that will hold `folder`, made where it is missing: what is stored meanwhile lies beside it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()
    except OSError as error:
        raise UserError(f"cannot write beside {folder} ({error.strerror}); name another --output") from None
    return folder.parent


def _keep_apart(folder: Path, sources: Sequence[Source]) -> None:
    for source in sources:
        if source.file is not None and folder in source.file.resolve().parents:
            raise UserError(f"{source.file} lies in the output folder {folder}; name another --output")


def _write_dropped(file: Path, work: Cleaning) -> Path:
    with file.open("wb") as stream:
        for row in work.dropped():
            stream.write(encoded(row) + b"\n")
    return file


@contextmanager
def _ending_well(folder: Path) -> Iterator[None]:
    """Say in one line that the disk is full, or that it was stopped: Ctrl-C and SIGTERM clear up what was begun."""
    asked = False

    def stop(*_: object) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        _stopped()
    except UserError:  # where it was raised, the interrupt may be lost: in a worker's start, which fails by that
        if asked:
            _stopped()
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk of {folder} is full; nothing was written: cleaning needs twice the size of its input there"
        ) from None
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _stopped() -> NoReturn:
    log.say("\nstopped; nothing was written")
    raise SystemExit(128 + signal.SIGINT) from None


@contextmanager
def _progress(sources: Sequence[Source]) -> Iterator[Callable[[Judged], None]]:
    """Give what is told of each batch; on a terminal a bar shows bytes read, rows a second and the time left."""
    if not sys.stderr.isatty():
        yield lambda judged: None
        return
    from tqdm import tqdm

    total, rows, began = sum(source.size for source in sources), 0, time.monotonic()
    with tqdm(total=total or None, desc="clean", unit="B", unit_scale=True, leave=False) as bar:

        def tell(judged: Judged) -> None:
            nonlocal rows
            rows += judged.rows
            bar.set_postfix_str(f"{rows:,} rows, {rows / (time.monotonic() - began):,.0f} rows/s", refresh=False)
            bar.update(judged.size)

        yield tell

"""`align-kit doctor`: look at this machine before it is trained on, one line for each thing looked at."""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NoReturn

from align_kit import log, machine
from align_kit.doctor.finding import BAD, NOTE, OK, STATES, WARN, Check, Finding
from align_kit.doctor.ranks import all_reduce, is_launched, start
from align_kit.errors import EXIT_CODE, UserError

USAGE = """usage: align-kit doctor [--fix] [--json] [--ranks N]

Looks at this machine and says in a line each what is ok, to be known (note), likely to hurt (warn) or bound to (bad):
packages, memory, cores, limits, GPUs, folders and disk, locks of dead builds, host name and port, engine
configurations, data, and an all-reduce of real ranks, whose clocks are compared. Nothing is fetched. Exit code 2 where
something is bad.

  --fix      do what is safe: remove the locks of dead builds, make missing folders that a variable names
  --json     all of it as one JSON object
  --ranks N  ranks of the all-reduce; default: one for each GPU, at least 2

On several machines start it under a launcher, on each of them, and the ranks meet as those of a run do:
    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 1 --master-addr ADDRESS -m align_kit doctor"""
MOST_RANKS = 64


class Parser(argparse.ArgumentParser):
    """The options; a mistake in them is one line like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"align-kit doctor: {message}; `align-kit doctor --help` says what it takes")


def doctor(words: Sequence[str]) -> int:
    """Look at everything, print what is found and return 0, or 2 where something is bad.

    Under a launcher every rank takes part, and one of each machine speaks.
    """
    if {"-h", "--help", "help"} & set(words):
        print(USAGE)
        return 0
    begun, environ = time.perf_counter(), dict(os.environ)
    asked = _parsed(words, environ)
    log.quiet()
    speaks = environ.get("LOCAL_RANK", "0") == "0"
    prefix = f"rank {environ['RANK']}: " if is_launched(environ) else ""
    findings = []
    for finding in look(environ, asked.ranks, everything=speaks):
        findings.append(finding.fixed() if asked.fix else finding)
        if speaks and not asked.json:
            print(f"{prefix}{findings[-1].line()}", flush=True)
    if speaks:
        seconds = time.perf_counter() - begun
        print(_as_json(findings) if asked.json else f"{prefix}{_counted(findings)} ({seconds:.1f} s)", flush=True)
    return EXIT_CODE if any(finding.state == BAD for finding in findings) else 0


def _parsed(words: Sequence[str], environ: Mapping[str, str]) -> argparse.Namespace:
    parser = Parser("align-kit doctor", add_help=False, allow_abbrev=False)
    parser.add_argument("--fix", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ranks", type=int)
    asked = parser.parse_args(words)
    if asked.ranks is not None and not 1 <= asked.ranks <= MOST_RANKS:
        parser.error(f"--ranks {asked.ranks}: give a number from 1 to {MOST_RANKS}")
    if asked.ranks is not None and is_launched(environ):
        parser.error(f"--ranks {asked.ranks}: the launcher has started {environ['WORLD_SIZE']} already, drop it")
    return asked


def look(environ: Mapping[str, str], ranks: int | None = None, *, everything: bool = True) -> Iterator[Finding]:
    """Yield what each check finds; only the check that all ranks take part in where not `everything` is asked for."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a GPU that cannot be used: a check says so
        machine.choose_accelerator(os.environ)
    group = start(ranks or max(2, torch.cuda.device_count()), environ)
    try:
        if not everything:
            yield Check("all-reduce", partial(all_reduce, group)).run()
            return
        from align_kit.doctor.checks import checks

        for check in checks(environ, group):
            yield check.run()
    finally:
        group.close()


def _counted(findings: Sequence[Finding]) -> str:
    """Return how many findings there are of each kind, in words."""
    words = {OK: ("ok", "ok"), NOTE: ("note", "notes"), WARN: ("warning", "warnings"), BAD: ("bad", "bad")}
    counts = {state: sum(finding.state == state for finding in findings) for state in STATES}
    said = ", ".join(f"{count} {words[state][count != 1]}" for state, count in counts.items())
    fixable = sum(finding.fix is not None for finding in findings)
    return f"{said}{f'; --fix mends {fixable}' if fixable else ''}"


def _as_json(findings: Sequence[Finding]) -> str:
    from align_kit import __version__

    told = {"align_kit": __version__, "findings": [finding.as_dict() for finding in findings]}
    return json.dumps({**told, "bad": sum(finding.state == BAD for finding in findings)}, indent=2)

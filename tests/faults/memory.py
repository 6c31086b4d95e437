"""Bits flipped in a rank's memory by another process, thousands of them, and how many the guards find.

A rank shows where its weights, masters, moments and frozen models lie; `tests.faults.inject_memory` flips a bit there
through the kernel; the guard looks; the bit is flipped back. So one run serves for all flips, and must end as a run
nobody touched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.harness import ROOT

Region = tuple[int, int]  # address and bytes
A_STEP = 25  # flips in each class at each step


class Flipper:
    """The other process, as the rank that it flips bits of speaks with it."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.faults.inject_memory", str(os.getpid())]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **words: Any) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer


def run(argv: Sequence[str], report: str, flips: int, seed: int = 0) -> int:
    """Run the command line with `flips` of each class on the last rank; write {class: [done, found]} to `report`."""
    from align_kit.cli import main

    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        Count(Path(report), flips, seed).watch()
    return int(main(list(argv)) or 0)


class Count:
    """What was flipped and what was found, by class."""

    def __init__(self, report: Path, flips: int, seed: int) -> None:
        self.report, self.flips = report, flips
        self.done: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.flipper = Flipper()
        self.flipper.ask(seed=seed)

    def watch(self) -> None:
        """Put the flips where the guards look: just before each update, and at each look at a frozen model."""
        from align_kit.frozen import Frozen
        from align_kit.telemetry.at_rest import AtRest

        changed, check = AtRest.changed, Frozen.check

        def flipped(rest: Any, holdings: Any) -> Any:
            def found() -> bool:
                return bool(changed(rest, holdings))

            for name, regions in by_class(holdings()).items():
                self.try_some(name, regions, found)
            return changed(rest, holdings)

        def flipped_frozen(frozen: Any, policy: Any, when: str) -> None:
            from align_kit.errors import UserError

            def found() -> bool:
                try:
                    check(frozen, policy, when)
                except UserError:
                    return True
                return False

            if frozen.model is not None and frozen._sums is not None:
                regions = [where(tensor) for tensor in frozen._shards(policy).values()]
                self.try_some(f"frozen {frozen.identity.role}", regions, found)
            check(frozen, policy, when)

        AtRest.changed, Frozen.check = flipped, flipped_frozen  # type: ignore[method-assign]

    def try_some(self, name: str, regions: Sequence[Region], found: Callable[[], bool]) -> None:
        for _ in range(min(A_STEP, self.flips - self.done[name])):
            self.flipper.ask(regions=regions)
            self.done[name] += 1
            self.found[name] += found()
            self.flipper.ask(undo=True)
        self.report.write_text(json.dumps({name: [self.done[name], self.found[name]] for name in self.done}))


def where(tensor: Any) -> Region:
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def by_class(holdings: Mapping[str, Any]) -> dict[str, list[Region]]:
    """Return where what a rank holds lies, by what it is."""
    found: dict[str, list[Region]] = {}
    for name, held in holdings.items():
        kind = name.partition(" of ")[0]
        kind = "frozen base" if kind.startswith("the frozen") else kind.removeprefix("the ")
        found.setdefault(kind, []).append(where(held.tensor))
    return found

"""A run that faults are done to, the same run undisturbed, and whether they are equal at the end."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_kit import run_folder
from align_kit.telemetry.meters import repeatable
from tests.harness import ROOT, Result
from tests.small import Lab, Run, read_weights, words

STEPS, EVERY = 6, 2
# Accumulation, dropout and an end of the epoch in between: what a resume can get wrong.
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": EVERY,
    "save_total_limit": 2,
}
TOLD = ("pid.*", "struck.json", "heartbeat.*", "failure.*")  # by victims and the injector, in the home of a victim
LORA = {"use_peft": True, "lora_dropout": 0.1}


@dataclass
class Victim:
    """One run in `home/run`, struck as often as one likes."""

    lab: Lab
    phase: str
    home: Path
    changes: dict[str, Any]
    folder: Path = Path()  # of the run; below `home` where none is given

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self.folder = self.home / "run" if self.folder == Path() else self.folder
        self.options = self.lab.options(self.phase, output_dir=self.folder, **{**OPTIONS, **self.changes})

    def go(
        self,
        *,
        lingers: Sequence[str] = (),
        strike: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        **more: Any,
    ) -> Result:
        """Run until it ends or is ended; `strike` is what `tests.faults.inject` is told beside the home."""
        for stale in [path for name in TOLD for path in self.home.glob(name)]:
            stale.unlink()
        injector, beats = None, {"ALIGN_KIT_SUPERVISED": str(self.home)} if strike else {}
        if strike is not None:
            spec = json.dumps({"home": str(self.home), **strike})
            injector = subprocess.Popen([sys.executable, "-m", "tests.faults.inject", spec], cwd=ROOT)
        try:
            return self.lab.ranks.run(
                function="tests.faults.victims:run",
                argv=[self.phase, *words({**self.options, **more})],
                home=str(self.home),
                lingers=list(lingers),
                env={**(env or {}), **beats},
            )
        finally:
            if injector is not None:
                injector.wait(timeout=120)

    def again(self, **more: Any) -> Result:
        """Go on from the newest checkpoint that verifies."""
        return self.go(resume="auto", **more)

    @property
    def failures(self) -> list[str]:
        """Return what ranks said of how they ended, where it was not the echo of another's end."""
        said = [json.loads(path.read_text()) for path in sorted(self.home.glob("failure.*.json"))]
        return [f"{one['kind']}: {one['line']}" for one in said if one["kind"] not in ("peer", "late")]

    @property
    def struck(self) -> bool:
        place = self.home / "struck.json"
        return place.exists() and bool(json.loads(place.read_text())["struck"])

    @property
    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that stand."""
        return [int(path.name.rpartition("-")[2]) for path in run_folder.checkpoints(self.folder)]

    @property
    def torn(self) -> list[str]:
        """Return the names of what was set aside."""
        return sorted(path.name for path in (self.folder / "torn").glob("*"))


def undisturbed(lab: Lab, phase: str, **changes: Any) -> Run:
    """Return the same run with nothing done to it, made once."""
    return lab.train(phase, **{**OPTIONS, **changes})


def assert_equal(victim: Victim, whole: Run) -> None:
    """The run that was struck ends in the bits of the other: the weights, and every step's numbers, once each."""
    lost, equal = differences(victim, whole)
    assert lost == 0, "steps were left out, or trained on other rows"
    assert equal, "the weights differ"


def differences(victim: Victim, whole: Run) -> tuple[int, bool]:
    """Return how many steps were lost, done twice or done otherwise, and whether the final weights are equal."""
    place = victim.folder / "metrics.jsonl"
    mine = trained([json.loads(line) for line in place.read_text().splitlines()])
    theirs = trained(whole.metrics)
    lost = abs(len(theirs) - len(mine)) + sum(a != b for a, b in zip(mine, theirs, strict=False))
    ours = read_weights(victim.folder)
    equal = ours.keys() == whole.weights.keys() and all(
        bool((ours[name] == tensor).all()) for name, tensor in whole.weights.items()
    )
    return lost, equal


def flip(path: Path, draw: random.Random) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as stream:
        at = draw.randrange(path.stat().st_size)
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1 << draw.randrange(8)]))




def trained(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the logged steps without what is measured by a clock."""
    return [repeatable(line) for line in lines if "loss" in line]

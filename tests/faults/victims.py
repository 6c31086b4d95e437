"""What a rank does so that a fault can find it: tells its process id, and shows where it is and waits there a while.

A rank that waits at a place waits to be killed; nothing of the run is changed, so that one that is spared goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LINGER = 5.0  # seconds a rank waits to be killed


def run(argv: Sequence[str], home: str, lingers: Sequence[str] = ()) -> int:
    """Run the command line; `lingers` are `<place>@<step>`, of the places that are functions below."""
    from align_kit.cli import main

    folder, rank = Path(home), os.environ["RANK"]
    for linger in lingers:
        place, _, step = linger.partition("@")
        PLACES[place](int(step), _marker(folder / f"{place}.{rank}"))
    draft = folder / f"pid.{rank}.part"
    draft.write_text(str(os.getpid()))
    draft.rename(folder / f"pid.{rank}")
    return int(main(list(argv)) or 0)


def _marker(place: Path) -> Any:
    def show_and_wait() -> None:
        if not place.exists():
            place.touch()
            time.sleep(LINGER)

    return show_and_wait


def in_backward(step: int, linger: Any) -> None:
    """Wait in the middle of the backward pass of optimizer step number `step`."""
    from align_kit.trainers.base import PhaseTrainer

    compute = PhaseTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, model, inputs, *args, **kwargs)
        if self.state.global_step + 1 == step:
            loss.register_hook(lambda gradient: linger())
        return loss

    PhaseTrainer.compute_loss = watched  # type: ignore[method-assign]


def in_write(step: int, linger: Any) -> None:
    """Wait with a shard of the checkpoint of `step` half written."""
    from align_kit.checkpoint import snapshot

    save = snapshot._save

    def halved(state: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(state, path, *args, **kwargs)
        if f"checkpoint-{step}{os.sep}" in str(path) and "optim_states" in str(path):
            with open(path, "r+b") as stream:
                stream.truncate(os.path.getsize(path) // 2)
            linger()
            save(state, path, *args, **kwargs)

    snapshot._save = halved


def before_manifest(step: int, linger: Any) -> None:
    """Wait with everything of the checkpoint of `step` written but its manifest; rank 0 is where that is."""
    from align_kit.checkpoint import commit

    _before(commit.manifest, "seal", step, linger)


def before_rename(step: int, linger: Any) -> None:
    """Wait with the manifest of `step` written and the folder not yet renamed."""
    from align_kit.checkpoint import commit

    _before(commit.os, "rename", step, linger)


def _before(room: Any, name: str, step: int, linger: Any) -> None:
    function = getattr(room, name)

    def watched(place: Any, *args: Any, **kwargs: Any) -> Any:
        if f"checkpoint-{step}" in str(place):
            linger()
        return function(place, *args, **kwargs)

    setattr(room, name, watched)


PLACES = {
    "backward": in_backward,
    "write": in_write,
    "manifest": before_manifest,
    "rename": before_rename,
}

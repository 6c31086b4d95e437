"""What Weights & Biases is told beside transformers' own metrics: what the run is made from, answers, its page."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from align_kit.errors import UserError, first_line
from align_kit.run_folder import ANSWERS
from align_kit.scrub import scrubbed

TOLD = ("phase", "config", "policy", "frozen", "data", "derived", "forward", "batch", "world_size", "versions", "git")


def attach(trainer: Any, facts: Callable[[], Mapping[str, Any]]) -> None:
    """Let wandb know the run by more than transformers' arguments, by no secret, and let its refusals be a line."""
    from transformers.integrations import WandbCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, WandbCallback):
            vars(callback)["setup"] = _careful(callback.setup)
    trainer.add_callback(WandbConfig(facts))


def _careful(setup: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(setup)
    def begun(*args: Any, **kwargs: Any) -> None:
        words = sys.argv
        try:
            sys.argv = scrubbed(words)  # wandb keeps the command line
            setup(*args, **kwargs)
        except Exception as error:
            if not type(error).__module__.startswith("wandb"):
                raise
            raise UserError(
                f"report_to wandb: {first_line(error)} Or set WANDB_MODE=offline, or leave report_to out"
            ) from None
        finally:
            sys.argv = words

    return begun


class WandbConfig(TrainerCallback):
    """Lays the resolved configuration and the identities of the run beside transformers' arguments.

    `facts` gives the run's manifest without secrets.
    """

    def __init__(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        self.facts = facts

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if (run := _run()) is not None:
            told = self.facts()
            run.config.update({"align_kit": {name: told[name] for name in TOLD if name in told}}, allow_val_change=True)


def hand_over(folder: Path, page: Path | None, *, failed: bool = False) -> None:
    """Give the run's answers as a table and its page as an artifact to wandb, where it listens, and end its run."""
    if (run := _run()) is None:
        return
    import wandb

    if (folder / ANSWERS).is_file():
        lines = [json.loads(line) for line in (folder / ANSWERS).read_text(encoding="utf-8").splitlines()]
        columns: Any = ["prompt", "before", "after"]
        run.log({"samples": wandb.Table(columns=columns, data=[[line[name] for name in columns] for line in lines])})
    if page is not None:
        artifact = wandb.Artifact(name=f"report-{run.id}", type="report")
        artifact.add_file(str(page))
        run.log_artifact(artifact)
    run.finish(exit_code=int(failed))


def _run() -> Any:
    """Return wandb's run of this process, `None` where there is none: only rank 0 has one, and only if asked for."""
    wandb = sys.modules.get("wandb")
    return getattr(wandb, "run", None)

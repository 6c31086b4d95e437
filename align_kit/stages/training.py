"""What follows from data and machine, and the trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from align_kit import cards, run_folder
from align_kit import frozen as frozen_models
from align_kit.checkpoint.contract import BY_CONTENT
from align_kit.config import Config
from align_kit.data.prepare import Prepared
from align_kit.registry import Recipe
from align_kit.run_folder import RunFolder
from align_kit.stages.resume import facts_of
from align_kit.stages.saving import save_points

CARD = "card:"


def derived(
    recipe: Recipe, rows: Prepared, policy: Any, config: Config, args: Any, home: RunFolder
) -> dict[str, tuple[Any, str]]:
    """Set the options that follow from the data or the machine, and return them with the reason for each.

    A run that goes on takes them from its manifest, but for those that are now said, where that is allowed.
    """
    from align_kit.trainers.base import Known

    if home.resume_from is not None and "derived" in home.manifest:
        before = home.manifest["derived"].items()
        changed = {name for name, _ in before if home.has_changed(name, BY_CONTENT.get(name, name))}
        decided = {name: (value, why) for name, (value, why) in before if name not in changed}
    else:
        known = Known(rows.train.rows, policy, config.given, _checker(config), _finished_beside(home))
        decided = recipe.trainer_class().derive(args, known)
    for name, (value, _) in decided.items():
        setattr(args, name, value)
    return decided


def _checker(config: Config) -> str | None:
    """Return the checker that the first card of the training data names, as a dotted path."""
    named = [entry.path.removeprefix(CARD) for entry in config.data.datasets if entry.path.startswith(CARD)]
    return next((checker for name in named if (checker := cards.load_card(name).block.checker)), None)


def _finished_beside(home: RunFolder) -> Callable[[str], Path | None]:
    def newest(phase: str) -> Path | None:
        found = run_folder.predecessor(home.path, (phase,))
        return found[0] if found else None

    return newest


def trainer(
    recipe: Recipe,
    policy: Any,
    words: Any,
    rows: Prepared,
    frozen: dict[str, Any],
    config: Config,
    args: Any,
    home: RunFolder,
) -> Any:
    """Return the phase's trainer with our progress and metrics in place of transformers' printer."""
    from transformers import EarlyStoppingCallback, PrinterCallback

    from align_kit.telemetry import trackers
    from align_kit.telemetry.progress import Fingerprints, MetricsFile, Progress
    from align_kit.trainers.other_world import TakenOver

    made = recipe.trainer_class()(
        model=policy,
        args=args,
        train_dataset=rows.train.rows,
        eval_dataset=rows.eval.rows if rows.eval else None,
        processing_class=words,
        frozen=frozen,
    )
    made.source_names = rows.train.source_names()
    made.saver.background = config.run.async_save
    made.saver.stop_when_full = config.run.full_disk == "stop"
    made.trust_checkpoint = config.run.trust_checkpoint
    if home.recut:
        made.add_callback(TakenOver(made, home.recut, home.manifest.get("recuts", [])))
    made.forward_is_ours = config.run.forward == "auto"
    if args.process_index == 0:
        made.note = home.write
        made.gates = list(home.manifest.get("gates", []) if home.resume_from else [])
        made.record = home.plain
        made.facts = lambda: facts_of(home, args.seed if args.data_seed is None else args.data_seed)
    made.guard.follow(config.run, home.manifest.get("skip_steps", ()))
    made.remove_callback(PrinterCallback)
    made.add_callback(MetricsFile(home.path / run_folder.METRICS))
    made.progress = Progress(recipe.name)
    made.add_callback(made.progress)
    if frozen:
        every = 1 if config.run.memory_check == "full" else config.run.fingerprint_steps
        made.add_callback(Fingerprints(made.check_frozen, every))
        made.add_callback(frozen_models.Following(made.move_frozen))
    if "wandb" in args.report_to:
        trackers.attach(made, home.plain)
    save_points(made, config, home, args)
    if config.run.early_stopping_patience:
        made.add_callback(EarlyStoppingCallback(config.run.early_stopping_patience))
    return made

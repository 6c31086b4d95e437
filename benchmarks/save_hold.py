"""How long a save holds the training loop: ours against transformers' own synchronous save of the same engine.

    OMP_NUM_THREADS=1 python -m benchmarks.save_hold [--model 30M] [--rounds 7] [--steps_between 2]

SFT on two ranks with ZeRO-3 and AdamW. The two take turns in one run: a save of ours, some steps, a save of theirs,
some steps. Held is the time until the slowest rank may go on. What is being written in the background is waited for
before either is timed; the steps that run beside it are timed too, against steps with nothing beside them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks._ranks import ranks_in_a_folder
from benchmarks._world import SIZES, write_model
from tests.small import SETTINGS, words, write_rows

TOKENS = 64


def measured(argv: list[str], report: str) -> int:
    """Run `align-kit argv…`, whose saves are ours and theirs in turn; write what each held to `report`.<rank>."""
    from align_kit.cli import main
    from align_kit.trainers.base import PhaseTrainer

    found: dict[str, list[float]] = {"ours": [], "theirs": [], "beside": [], "alone": []}
    step, ours = PhaseTrainer.training_step, PhaseTrainer._save_checkpoint
    latest = {"name": "alone"}

    def save(trainer: Any, model: Any, trial: Any) -> None:
        trainer.saver.join()
        trainer.accelerator.wait_for_everyone()
        name = "ours" if len(found["ours"]) == len(found["theirs"]) else "theirs"
        began = time.perf_counter()
        ours(trainer, model, trial) if name == "ours" else stock_save(trainer, model)
        trainer.accelerator.wait_for_everyone()
        found[name].append(time.perf_counter() - began)
        latest["name"] = "beside" if name == "ours" else "alone"
        if name == "theirs" and trainer.args.should_save:
            for old in Path(trainer.args.output_dir).glob("checkpoint-*"):
                shutil.rmtree(old)

    def timed_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        outcome = step(trainer, *args, **kwargs)
        found[latest["name"]].append(time.perf_counter() - began)
        latest["name"] = "alone"
        Path(f"{report}.{trainer.args.process_index}").write_text(json.dumps(found))
        return outcome

    PhaseTrainer._save_checkpoint = save  # type: ignore[method-assign]
    PhaseTrainer.training_step = timed_step  # type: ignore[method-assign,assignment]
    return int(main(argv) or 0)


def stock_save(trainer: Any, model: Any) -> None:
    """Save as transformers and DeepSpeed do: gather, write and wait, one file after the other."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from transformers import Trainer

    engine = trainer.model_wrapped
    engine.checkpoint_engine, kept = TorchCheckpointEngine(engine._config), engine.checkpoint_engine
    try:
        Trainer._save_checkpoint(trainer, model, None)
    finally:
        engine.checkpoint_engine = kept


def random_rows(size: str, count: int) -> list[dict[str, str]]:
    """Return rows of `TOKENS` random tokens."""
    draw, vocabulary = random.Random(0), SIZES[size]["vocab_size"]
    sides = [[f"t{draw.randrange(2, vocabulary)}" for _ in range(TOKENS // 2)] for _ in range(2 * count)]
    return [
        {"prompt": " ".join(a), "completion": " " + " ".join(b)} for a, b in zip(sides[::2], sides[1::2], strict=True)
    ]


def spread(values: list[float]) -> str:
    """Return median, least and greatest."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main() -> None:
    """Print seconds held and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES), default="30M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps_between", type=int, default=2)
    asked = parser.parse_args()
    with ranks_in_a_folder() as (ranks, home):
        model, every = write_model(home / "model", asked.model, seed=0), asked.steps_between
        steps = (2 * asked.rounds + 2) * every  # the first of each fills memory and is not counted
        (home / "blank.yaml").write_text("")
        options = {
            **SETTINGS, "config": home / "blank.yaml", "model_name_or_path": model, "max_length": TOKENS + 2,
            "datasets": [{"path": write_rows(home / "rows.jsonl", random_rows(asked.model, 4 * steps))}],
            "max_steps": steps, "save_strategy": "steps", "save_steps": every, "per_device_train_batch_size": 2,
            "deepspeed": "zero3", "output_dir": home / "run",
        }  # fmt: skip
        argv = ["sft", *words(options)]
        ranks.run(function="benchmarks.save_hold:measured", argv=argv, report=str(home / "found"), timeout=3600).ok()
        each = [json.loads(Path(f"{home}/found.{rank}").read_text()) for rank in range(2)]
        size = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6
    slowest = {name: [max(pair) for pair in zip(*(one[name] for one in each), strict=True)] for name in each[0]}
    ours, theirs = slowest["ours"][1:], slowest["theirs"][1:]
    print(
        f"{asked.model}: {size:.0f} MB of weights, two ranks, ZeRO-3; seconds, median (least-greatest) of {len(ours)}"
    )
    print(f"held by our save    {spread(ours)}")
    print(f"held by theirs      {spread(theirs)}")
    print(f"the step beside our writing {spread(slowest['beside'])}, other steps {spread(slowest['alone'][2:])}")
    print(f"ours / theirs {statistics.median(a / b for a, b in zip(ours, theirs, strict=False)):.2f}")


if __name__ == "__main__":
    main()

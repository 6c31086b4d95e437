"""What each place of a frozen reference costs: bytes on each rank, seconds of a step, and how exact it is.

    OMP_NUM_THREADS=1 python -m benchmarks.frozen_placements [--hidden 192] [--layers 6] [--steps 8]

DPO on two ranks with ZeRO-3 and persistence threshold 0, a random Llama. Every number is a ratio to the `sharded`
reference of the same kind of run (full, or LoRA) in the same call; the filling of `cached` is not part of its steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks._ranks import ranks_in_a_folder
from tests.harness import Ranks
from tests.small import SETTINGS, make_rows, words, write_model, write_rows

FULL = ("sharded", "offloaded", "quantised", "cached")
LORA = ("sharded", "adapter", "cached")


def watched(argv: list[str], report: str) -> int:
    """Run `align-kit argv…` and write what its reference stores on this rank, and the seconds of each step."""
    from align_kit.cli import main
    from align_kit.trainers.base import PhaseTrainer

    train, step = PhaseTrainer.train, PhaseTrainer.training_step
    seconds: list[float] = []

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        outcome = step(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return outcome

    def reported(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = train(trainer, *args, **kwargs)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found = {"bytes": stored_bytes(trainer.frozen["reference"].model), "seconds": seconds, "losses": losses}
        Path(f"{report}.{trainer.args.process_index}").write_text(json.dumps(found))
        return outcome

    PhaseTrainer.train, PhaseTrainer.training_step = reported, timed_step  # type: ignore[method-assign,assignment]
    return int(main(argv) or 0)


def stored_bytes(model: Any) -> int:
    """Return the bytes of a frozen model that this rank stores, 0 where it has none of its own."""
    parameters = [] if model is None else list(model.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in (getattr(p, "ds_tensor", p) for p in parameters))


def measure(ranks: Ranks, model: Path, placement: str, steps: int, lora: bool) -> dict[str, Any]:
    """Return the bytes of the reference on each rank, the median seconds of a step, and all losses."""
    home = model.parent
    place = home / f"{placement}{'-lora' * lora}"
    engine = json.loads((Path("ds_configs") / "zero3.json").read_text())
    engine["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (home / "engine.json").write_text(json.dumps(engine))
    (home / "blank.yaml").write_text("")
    rows = write_rows(home / "pairs.jsonl", make_rows("preference", 8 * steps))
    options = {
        **SETTINGS, "config": home / "blank.yaml", "model_name_or_path": model, "datasets": [{"path": rows}],
        "max_steps": steps, "per_device_train_batch_size": 4, "deepspeed": home / "engine.json", "output_dir": place,
        "reference_placement": placement, **({"use_peft": True, "lora_dropout": 0.0} if lora else {}),
    }  # fmt: skip
    argv = ["dpo", *words(options)]
    ranks.run(function="benchmarks.frozen_placements:watched", argv=argv, report=str(place), timeout=600).ok()
    found = [json.loads(Path(f"{place}.{rank}").read_text()) for rank in range(2)]
    return {
        "bytes": max(one["bytes"] for one in found),
        "seconds": statistics.median(found[0]["seconds"][1:]),
        "losses": found[0]["losses"],
    }


def table(ranks: Ranks, model: Path, placements: tuple[str, ...], steps: int, lora: bool) -> None:
    """Print one line for each placement, against the first."""
    base: dict[str, Any] = {}
    for placement in placements:
        found = measure(ranks, model, placement, steps, lora)
        base = base or found
        gap = max(abs(ours - theirs) for ours, theirs in zip(found["losses"], base["losses"], strict=True))
        size, pace = found["bytes"] / base["bytes"], found["seconds"] / base["seconds"]
        print(
            f"{'LoRA' if lora else 'full':5} {placement:10} {size:12.2f} {found['bytes']:14,} {pace:8.2f} {gap:12.1e}"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    asked = parser.parse_args()
    with ranks_in_a_folder() as (ranks, home):
        sizes = {"hidden_size": asked.hidden, "intermediate_size": 4 * asked.hidden, "num_hidden_layers": asked.layers}
        model = write_model(home / "model", **sizes)
        print("run   reference  bytes/sharded  bytes per rank  seconds/sharded  loss gap")
        for placements, lora in ((FULL, False), (LORA, True)):
            table(ranks, model, placements, asked.steps, lora)


if __name__ == "__main__":
    main()

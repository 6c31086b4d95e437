"""What watching frozen weights costs: one comparison against one training step, at the default interval.

    OMP_NUM_THREADS=1 python -m benchmarks.fingerprints [--hidden 256] [--layers 8] [--steps 12]

The baseline is a DPO step of the same run: one rank, a random Llama, short pairs, the engine and the trainer of any
run. Both frozen copies are as large as the policy, and a comparison reads every byte of one; a step's cost grows with
its tokens, a comparison's does not, so that the short rows here are the worst case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from align_kit.config import RunFields
from align_kit.run import run
from tests.small import make_rows, write_model, write_rows

LIMIT = 0.005  # of the time of the steps between two comparisons


def timed(cls: type, name: str, seconds: list[float]) -> None:
    """Let every call of a method add its seconds to a list."""
    plain: Callable[..., Any] = getattr(cls, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        outcome = plain(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return outcome

    setattr(cls, name, call)


def measure(hidden: int, layers: int, steps: int, home: Path) -> tuple[float, float, int]:
    """Return the median seconds of a comparison and of a step, and the bytes that are compared."""
    from align_kit.frozen import Frozen
    from align_kit.trainers.base import PhaseTrainer

    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    model = write_model(home / "model", **sizes)
    data = write_rows(home / "pairs.jsonl", make_rows("preference", 8 * steps))
    checks: list[float] = []
    micro_steps: list[float] = []
    timed(Frozen, "check", checks)
    timed(PhaseTrainer, "training_step", micro_steps)
    (home / "blank.yaml").write_text("")
    options = {
        "model_name_or_path": model, "datasets": json.dumps([{"path": str(data)}]), "output_dir": home / "run",
        "max_steps": steps, "per_device_train_batch_size": 8, "max_length": 64, "fingerprint_steps": 1,
        "save_strategy": "no", "gradient_checkpointing": "false",
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    assert run("dpo", config=home / "blank.yaml", argv=words) == 0
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return statistics.median(checks[1:]), statistics.median(micro_steps[1:]), size


def main() -> None:
    """Print the ratio, and end with code 1 where it is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        check, step, size = measure(asked.hidden, asked.layers, asked.steps, Path(home))
    every = next(field.default for field in fields(RunFields) if field.name == "fingerprint_steps")
    share = check / (every * step)
    print(
        f"one comparison / one step: {check / step:.4f} ({size / 1e6:.0f} MB; {check * 1e3:.1f} / {step * 1e3:.0f} ms)"
    )
    print(f"every {every} steps: {share:.4%} of step time (limit {LIMIT:.1%})")
    raise SystemExit(share > LIMIT)


if __name__ == "__main__":
    main()

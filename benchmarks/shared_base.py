"""What PPO costs on one shared base against models of their own: bytes on each rank, seconds, and switching adapters.

    OMP_NUM_THREADS=1 python -m benchmarks.shared_base [--hidden 192] [--layers 6] [--iterations 4]

PPO with LoRA on two ranks, ZeRO-3 with persistence threshold 0, a random Llama. The baseline of the first table is the
same run with the reference and the reward model sharded apart; the baseline of the second is a forward that follows
one of the same role, whose order of modules ZeRO-3 has traced.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks._ranks import ranks_in_a_folder
from benchmarks.frozen_placements import stored_bytes
from tests.harness import Ranks
from tests.small import MORE, SETTINGS, make_rows, words, write_model, write_rows

FORWARDS = 24
APART = {"reference_placement": "sharded", "reward_placement": "sharded"}
SHARED = {"reference_placement": "adapter", "reward_placement": "shared"}


def watched(argv: list[str], report: str) -> int:
    """Run `align-kit argv…`; write bytes, seconds by part, and the cost of switching roles on this rank."""
    from align_kit.cli import main
    from align_kit.trainers.ppo import PPO

    train = PPO.train

    def reported(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = train(trainer, *args, **kwargs)
        models = [trainer.model, *(held.model for held in trainer.frozen.values())]
        found = {
            "bytes": sum(stored_bytes(model) for model in models),
            "seconds": trainer.seconds,
            "switching": switching(trainer) if trainer.model.is_shared else {},
        }
        Path(f"{report}.{trainer.args.process_index}").write_text(json.dumps(found))
        return outcome

    PPO.train = reported  # type: ignore[method-assign]
    return int(main(argv) or 0)


def switching(trainer: Any) -> dict[str, float]:
    """Return the median seconds of a policy forward after another one, and after one of the value function."""
    import torch

    engine = trainer.model_wrapped
    ids = torch.arange(8 * 32).reshape(8, 32) % 300 + 4
    engine.eval()

    def forward(role: str) -> float:
        began = time.perf_counter()
        with torch.no_grad():
            engine(input_ids=ids, attention_mask=torch.ones_like(ids), role=role)
        return time.perf_counter() - began

    same, switched = [], []
    for _ in range(FORWARDS):
        forward("policy")
        same.append(forward("policy"))
        forward("value")
        switched.append(forward("policy"))
    return {"same": statistics.median(same), "switched": statistics.median(switched)}


def measure(ranks: Ranks, home: Path, name: str, iterations: int, places: dict[str, str]) -> list[dict[str, Any]]:
    """Return what each rank of one PPO run found."""
    options = {
        **SETTINGS, **MORE["ppo"], "config": home / "blank.yaml", "model_name_or_path": home / "model",
        "datasets": [{"path": home / "prompts.jsonl"}], "max_steps": 3 * iterations, "per_device_train_batch_size": 8,
        "deepspeed": home / "engine.json", "output_dir": home / name, "use_peft": True, "lora_dropout": 0.0,
        "reward_model_name_or_path": str(home / "reward"), "reward_funcs": None, **places,
    }  # fmt: skip
    argv = ["ppo", *words({key: value for key, value in options.items() if value is not None})]
    ranks.run(function="benchmarks.shared_base:watched", argv=argv, report=str(home / name), timeout=600).ok()
    return [json.loads(Path(f"{home / name}.{rank}").read_text()) for rank in range(2)]


def train_reward(ranks: Ranks, home: Path) -> None:
    """Leave a reward adapter of the model in `home / "reward"`."""
    options = {
        **SETTINGS, "config": home / "blank.yaml", "model_name_or_path": home / "model", "use_peft": True,
        "datasets": [{"path": write_rows(home / "pairs.jsonl", make_rows("preference", 16))}],
        "output_dir": home / "reward",
    }  # fmt: skip
    ranks.run("reward", *words(options), timeout=600).ok()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=4)
    asked = parser.parse_args()
    with ranks_in_a_folder() as (ranks, home):
        sizes = {"hidden_size": asked.hidden, "intermediate_size": 4 * asked.hidden, "num_hidden_layers": asked.layers}
        write_model(home / "model", **sizes)
        write_rows(home / "prompts.jsonl", make_rows("prompt", 64))
        engine = json.loads((Path("ds_configs") / "zero3.json").read_text())
        engine["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (home / "engine.json").write_text(json.dumps(engine))
        (home / "blank.yaml").write_text("")
        train_reward(ranks, home)
        apart = measure(ranks, home, "apart", asked.iterations, APART)
        shared = measure(ranks, home, "shared", asked.iterations, SHARED)
    print("layout  bytes/apart  bytes per rank  rollout/apart  score/apart  update/apart")
    for name, found in (("apart", apart), ("shared", shared)):
        size = max(one["bytes"] for one in found)
        paces = [found[0]["seconds"][part] / apart[0]["seconds"][part] for part in ("rollout", "score", "update")]
        ratio = size / max(one["bytes"] for one in apart)
        print(f"{name:7} {ratio:11.2f} {size:15,} {paces[0]:14.2f} {paces[1]:12.2f} {paces[2]:13.2f}")
    costs = shared[0]["switching"]
    print(
        f"a policy forward after a value forward / after a policy forward: {costs['switched'] / costs['same']:.2f}  "
        f"({costs['switched'] * 1e3:.1f} against {costs['same'] * 1e3:.1f} ms)"
    )


if __name__ == "__main__":
    main()

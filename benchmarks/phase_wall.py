"""A whole DPO phase, from the command to the stored model: ours against an equal script on TRL, by wall time.

    python -m benchmarks.phase_wall [--model 4M] [--steps 200] [--pairs 4] [--tokens 128] [--rounds 1]

Both are started by `accelerate launch` with ds_configs/launch_cpu2.yaml, two ranks of one thread, in which the engine's
configuration is ds_configs/zero3.json. Ours is recipes/dpo.py; the other is the script below, TRL's DPOTrainer as its
documents show it with what suits it on a CPU. Model, data, batch arithmetic, logging and checkpoints (at half of the
steps and at the end) are the same; nothing is cached from run to run but compiled extensions and the system's file
cache, which an untimed start of each fills. The first step is done when its line is logged. CPU seconds of all
processes are shown beside: others on the machine disturb them less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from align_kit import log
from benchmarks._world import RATIOS, SIZES, log_normal, made_rows, write_model
from tests.harness import ROOT
from tests.small import words, write_rows

STOCK = '''\
"""DPO with TRL: argv[1] holds model, data, the options of DPOConfig, and where to tell that the first step is done."""

import json
import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

given = json.loads(Path(sys.argv[1]).read_text())


class FirstStep(TrainerCallback):
    def on_log(self, args, state, control, **_):
        if state.is_world_process_zero and state.global_step == 1:
            Path(given["first"]).write_text("done")


trainer = DPOTrainer(
    model=given["model"],
    args=DPOConfig(**given["options"]),
    train_dataset=load_dataset("json", data_files=given["data"], split="train"),
    processing_class=AutoTokenizer.from_pretrained(given["model"]),
    callbacks=[FirstStep()],
)
trainer.train()
assert trainer.accelerator.num_processes == 2 and trainer.model_wrapped.zero_optimization_stage() == 3
trainer.save_model()
'''
SAME = {
    "learning_rate": 1e-5, "lr_scheduler_type": "linear", "warmup_steps": 0, "optim": "adamw_torch_fused",
    "weight_decay": 0.0, "max_grad_norm": 1.0, "max_length": 1024, "beta": 0.1, "gradient_checkpointing": False,
    "logging_steps": 10, "logging_first_step": True, "save_strategy": "steps", "seed": 42,
}  # fmt: skip
POLL_SECONDS = 0.02


class Seconds(NamedTuple):
    """What a phase took: until its first step, until its end, and of CPU."""

    first: float
    whole: float
    busy: float


def _busy() -> float:
    """Return the CPU seconds of all processes that this one has started and that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


class Phase:
    """The world of the benchmark in `home`: a model, its data, and both ways to train on them."""

    def __init__(self, home: Path, asked: argparse.Namespace) -> None:
        self.home, self.asked = home, asked
        self.model = write_model(home / "model", asked.model, seed=0)
        draw = random.Random(0)
        lengths = log_normal(RATIOS["1:1"], asked.tokens, 1000, draw)
        rows = made_rows(lengths, SIZES[asked.model]["vocab_size"], draw)
        self.data = write_rows(home / "pairs.jsonl", itertools.islice(rows, 2 * asked.pairs * asked.steps))
        (home / "stock.py").write_text(STOCK)
        (home / "blank.yaml").write_text("")
        launch = yaml.safe_load((ROOT / "ds_configs" / "launch_cpu2.yaml").read_text())
        engine = {"deepspeed_config_file": str(ROOT / "ds_configs" / "zero3.json"), "zero3_init_flag": True}
        self.launch = home / "launch.yaml"  # stock refuses a stage in the launch file beside a configuration
        self.launch.write_text(yaml.safe_dump({**_without_precision(launch), "deepspeed_config": engine}))

    def ours(self, place: Path, steps: int) -> Seconds:
        """Run our recipe and return what it took."""
        options = {
            **self._options(steps), "config": self.home / "blank.yaml", "model_name_or_path": self.model,
            "datasets": [{"path": str(self.data)}], "output_dir": place / "run",
        }  # fmt: skip
        argv = [ROOT / "recipes" / "dpo.py", *words(options)]
        took = self._timed(place, argv, first=place / "run" / "metrics.jsonl")
        forward = json.loads((place / "run" / "manifest.json").read_text())["forward"]
        if forward["mode"] != "shared":
            raise SystemExit(f"our run was not walked shared but {forward['mode']}: {forward['why']}")
        return took

    def stock(self, place: Path, steps: int) -> Seconds:
        """Run the script on TRL and return what it took."""
        own = {"output_dir": str(place / "run"), "use_cpu": True, "bf16": False, "report_to": "none"}
        options = {**self._options(steps), **own}
        first = place / "first"
        given = {"model": str(self.model), "data": str(self.data), "options": options, "first": str(first)}
        (place / "given.json").write_text(json.dumps(given))
        return self._timed(place, [self.home / "stock.py", place / "given.json"], first)

    def _options(self, steps: int) -> dict[str, Any]:
        batch = {"per_device_train_batch_size": self.asked.pairs, "gradient_accumulation_steps": 1}
        return {**SAME, **batch, "max_steps": steps, "save_steps": max(1, steps // 2)}

    def _timed(self, place: Path, argv: Sequence[str | Path], first: Path) -> Seconds:
        """Launch `argv` and return the seconds until `first` holds something and until the end, and the CPU seconds."""
        launch = [sys.executable, "-m", "accelerate.commands.launch"]
        launch += ["--config_file", str(self.launch), *map(str, argv)]
        began, busy, reached = time.monotonic(), _busy(), None
        with (place / "output").open("w") as output:
            running = subprocess.Popen(launch, cwd=place, env=self._environment(place), stdout=output, stderr=output)
            while running.poll() is None:
                if reached is None and first.is_file() and first.stat().st_size:
                    reached = time.monotonic() - began
                time.sleep(POLL_SECONDS)
        if running.returncode or reached is None:
            raise SystemExit(f"{argv[0]} ended with {running.returncode}\n{(place / 'output').read_text()[-4000:]}")
        return Seconds(reached, time.monotonic() - began, _busy() - busy)

    def _environment(self, place: Path) -> dict[str, str]:
        """Return an environment in which nothing is remembered of other runs but compiled extensions."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"HF_HOME": place / "huggingface", "ALIGN_KIT_CACHE": place / "cache"}
        compiled = os.environ.get("TORCH_EXTENSIONS_DIR", self.home / "extensions")
        shared = {"TORCH_EXTENSIONS_DIR": compiled, "PYTHONPATH": path}
        fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TRL_DISABLE_TELEMETRY": "1"}
        return {**os.environ, **fixed, **{name: str(value) for name, value in {**own, **shared}.items()}}


def _without_precision(launch: dict[str, Any]) -> dict[str, Any]:
    """Return a launch file without what the engine's configuration decides."""
    return {name: value for name, value in launch.items() if name != "mixed_precision"}


def measure(phase: Phase, asked: argparse.Namespace) -> dict[str, list[Seconds]]:
    """Return what each way took in every round, after an untimed start of each."""
    ways = {"stock": phase.stock, "ours": phase.ours}
    found: dict[str, list[Seconds]] = {name: [] for name in ways}
    for number in range(asked.rounds + 1):
        for name, run in ways.items():
            place = phase.home / f"{name}-{number}"
            place.mkdir()
            took = run(place, asked.steps if number else 2)
            if number:
                found[name].append(took)
                shown = f"first step {took.first:.1f} s, whole {took.whole:.1f} s, CPU {took.busy:.1f} s"
                print(f"  {name:5} {shown}", flush=True)
    return found


def main() -> None:
    """Print the seconds of each run and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=SIZES, default="4M")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a rank's micro-batch")
    parser.add_argument("--tokens", type=int, default=128, help="mean prompt and completion together")
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    log.quiet()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    print(f"{asked.model}, {asked.steps} steps of 2 x {asked.pairs} pairs, {asked.tokens} tokens each", flush=True)
    with tempfile.TemporaryDirectory() as home:
        found = measure(Phase(Path(home), asked), asked)
    rounds = list(zip(found["stock"], found["ours"], strict=True))
    whole = [stock.whole / ours.whole for stock, ours in rounds]
    first = [ours.first / stock.first for stock, ours in rounds]
    busy = [stock.busy / ours.busy for stock, ours in rounds]
    print(f"stock / ours: whole phase {_shown(whole)}, CPU {_shown(busy)}; first step, ours / stock: {_shown(first)}")
    print(f"wall time {statistics.median(whole):.2f}, time to first step {statistics.median(first):.2f}")


def _shown(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    main()

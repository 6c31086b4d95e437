"""The demo's steps: pretrain -> SFT -> pairs from the SFT model, ranked by the checker -> DPO -> one table."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align_kit import cards, log
from align_kit.data import embedded
from align_kit.data.checkers import rank_pairs
from align_kit.data.embedded import sums
from align_kit.demo import table
from align_kit.demo.score import CARD, Score, score
from align_kit.demo.workers import spread
from align_kit.errors import EXIT_CODE, UserError
from align_kit.resources import folder

PROMPTS, DRAWS = 512, 4  # training problems for the preference pairs, and answers drawn to each
PHASES = ("pretrain", "sft", "dpo")
CONTROL = "control"


@dataclass(frozen=True)
class Options:
    """What `align-kit demo` was asked for."""

    seeds: tuple[int, ...]
    output: Path
    ranks: int
    split: str
    control: bool
    scale: float


def demo(argv: Sequence[str]) -> int:
    """Run the demo for each seed, print the tables, and return the exit code."""
    options = parse(argv)
    log.quiet()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = time.monotonic()
    results = {seed: one_seed(seed, options) for seed in options.seeds}
    text = table.report(results, options.output, time.monotonic() - began, options.split)
    (options.output / "report.md").write_text(text + "\n")
    log.say("\n" + text)
    return 0


def parse(argv: Sequence[str]) -> Options:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser("align-kit demo", description=(__doc__ or "").strip())
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several; default 0")
    parser.add_argument("--output_dir", type=Path, default=Path(os.environ.get("ALIGN_KIT_RUNS") or "runs") / "demo")
    parser.add_argument("--ranks", type=int, default=2, help="ranks per phase; default 2")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="problems scored; default test")
    parser.add_argument(
        "--control", action="store_true", help="also run DPO on shuffled preferences, which must not help"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of each phase's steps: faster, and weaker")
    given = parser.parse_args(list(argv))
    if given.ranks < 1:
        raise UserError(f"--ranks {given.ranks}: give 1 or more")
    if not 0 < given.scale <= 1:
        raise UserError(f"--scale {given.scale}: give a share above 0, at most 1")
    return Options(tuple(given.seed), given.output_dir, given.ranks, given.split, given.control, given.scale)


def one_seed(seed: int, options: Options) -> dict[str, Score]:
    """Run all phases with one seed and return the score of the model each phase left."""
    home = options.output / f"seed{seed}"
    home.mkdir(parents=True, exist_ok=True)
    phase("pretrain", home, seed, options)
    phase("sft", home, seed, options)
    pairs = draw_pairs(home, seed, options.ranks)
    phase("dpo", home, seed, options, data=pairs)
    arms = list(PHASES)
    if options.control:
        phase("dpo", home, seed, options, data=shuffled(pairs, seed), name=CONTROL)
        arms.append(CONTROL)
    problems = embedded.rows(CARD, options.split)
    log.say(f"scoring {len(problems)} held-out problems ({options.split})")
    scores = {arm: score(home / arm, problems, processes=options.ranks, seed=seed) for arm in arms}
    (home / "scores.json").write_text(json.dumps({arm: one.as_dict() for arm, one in scores.items()}))
    return scores


def phase(recipe: str, home: Path, seed: int, options: Options, *, data: Path | None = None, name: str = "") -> None:
    """Run one recipe on its ranks, as a user would: `align-kit launch <recipe> …`."""
    output = home / (name or recipe)
    words = [recipe, "--seed", str(seed), "--output_dir", str(output)]
    words += ["--overwrite"] if output.exists() else []
    words += ["--max_steps", str(scaled_steps(recipe, options.scale))] if options.scale < 1 else []
    words += ["--datasets", json.dumps([{"path": str(data)}])] if data else []
    command = [sys.executable, "-m", "align_kit", "launch", "--nproc_per_node", str(options.ranks), *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL)
    if done.returncode == EXIT_CODE:
        raise SystemExit(EXIT_CODE)  # the run has said why
    if done.returncode:
        raise UserError(f"the {recipe} phase ended with exit code {done.returncode}; its output is above")


def scaled_steps(recipe: str, scale: float) -> int:
    """Return a share of the steps in the recipe's YAML, at least 1."""
    import yaml

    steps = yaml.safe_load((folder("recipes") / f"{recipe}.yaml").read_text())["max_steps"]
    return max(1, round(steps * scale))


def draw_pairs(home: Path, seed: int, processes: int) -> Path:
    """Sample answers to training problems from the SFT model, rank them by the checker, store the pairs."""
    began = time.monotonic()
    problems = sums.prompts("train", PROMPTS, seed=1000 + seed)
    prompts = [row["prompt"] for row in problems]
    drawn = spread(home / "sft", prompts, processes, samples=DRAWS, temperature=1.0, seed=seed)
    check = cards.checker(cards.load_card(CARD))
    place, count = home / "pairs.jsonl", 0
    with place.open("w") as stream:
        for row, texts in zip(problems, drawn.completions, strict=True):
            verdicts = [check(row["prompt"], text, row["answer"]) for text in texts]
            for pair in rank_pairs(texts, verdicts):
                line = {"prompt": row["prompt"], "chosen": pair.chosen, "rejected": pair.rejected}
                print(json.dumps(line), file=stream)
                count += 1
    if not count:
        raise UserError("the SFT model gave no answer that the checker prefers to another: no pairs to train on")
    seconds = time.monotonic() - began
    log.say(f"pairs: {count} from {PROMPTS} training problems x {DRAWS} samples of the SFT model, {seconds:.0f} s")
    return place


def shuffled(pairs: Path, seed: int) -> Path:
    """Store the same pairs with chosen and rejected swapped at random: the control arm's data."""
    generator = random.Random(f"control {seed}")
    place = pairs.with_name("pairs_shuffled.jsonl")
    with place.open("w") as stream:
        for line in pairs.read_text().splitlines():
            row = json.loads(line)
            if generator.random() < 0.5:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            print(json.dumps(row), file=stream)
    return place

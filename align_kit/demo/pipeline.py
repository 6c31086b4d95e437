"""The demo's steps: pretrain -> SFT -> its answers, ranked by the checker -> one arm for each method -> a table.

Every arm is a recipe run as a user would run it. DPO, KTO and the reward model learn from the SFT model's own answers
to training problems; PPO writes its own; ORPO does without SFT and starts from the base model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from align_kit import log, run_folder, supervised
from align_kit.data import embedded
from align_kit.data.embedded import sums
from align_kit.demo import samples as own
from align_kit.demo import table
from align_kit.demo.score import CARD, Score, score
from align_kit.errors import EXIT_CODE, UserError
from align_kit.resources import folder

PROBLEMS = 512  # training problems the SFT model answers
DRAWS = 4  # answers drawn to each problem, at temperature 1
PAIRS = 2  # pairs of one problem a reward model learns from
EASY = ("reward", "dpo", "orpo", "kto", "ppo")


@dataclass(frozen=True)
class Options:
    """What `align-kit demo` was asked for."""

    seeds: tuple[int, ...]
    output: Path
    ranks: int
    split: str
    arms: tuple[str, ...]
    control: bool
    scale: float


def demo(argv: Sequence[str]) -> int:
    """Run the demo for each seed, print the tables, and return the exit code."""
    options = parse(argv)
    log.quiet()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = time.monotonic()
    results = {seed: Seed(seed, options).run() for seed in options.seeds}
    text = table.report(results, options.output, time.monotonic() - began, options.split)
    (options.output / "report.md").write_text(text + "\n")
    log.say("\n" + text)
    return 0


def parse(argv: Sequence[str]) -> Options:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser("align-kit demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several; default 0")
    parser.add_argument("--output_dir", type=Path, default=Path(os.environ.get("ALIGN_KIT_RUNS") or "runs") / "demo")
    parser.add_argument("--ranks", type=int, default=2, help="ranks per phase; default 2")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="problems scored; default test")
    parser.add_argument(
        "--arms", nargs="+", choices=tuple(ARMS), default=list(EASY), help=f"what follows SFT; default {' '.join(EASY)}"
    )
    parser.add_argument(
        "--control", action="store_true", help="also run DPO, KTO and PPO on shuffled preferences, which must not help"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of each phase's steps: faster, and weaker")
    given = parser.parse_args(list(argv))
    if given.ranks < 1:
        raise UserError(f"--ranks {given.ranks}: give 1 or more")
    if not 0 < given.scale <= 1:
        raise UserError(f"--scale {given.scale}: give a share above 0, at most 1")
    before = {"ppo_model": "reward", "dpo_again": "dpo"}
    arms = tuple(dict.fromkeys([*(before[arm] for arm in given.arms if arm in before), *given.arms]))
    return Options(tuple(given.seed), given.output_dir, given.ranks, given.split, arms, given.control, given.scale)


class Seed:
    """All phases with one seed, in a folder of their own."""

    def __init__(self, seed: int, options: Options) -> None:
        self.seed = seed
        self.options = options
        self.home = options.output / f"seed{seed}"
        run_folder.make_private(self.home)

    def run(self) -> dict[str, Score]:
        """Run every phase and return the score of each model that answers problems."""
        self.phase("pretrain")
        self.phase("sft")
        chosen = [ARMS[name] for name in ARMS if name in self.options.arms]
        controls = [CONTROLS[arm.name] for arm in chosen if self.options.control and arm.name in CONTROLS]
        for arm in [*chosen, *controls]:
            self.phase(arm.recipe, name=arm.name, more=arm.more(self))
        problems = embedded.rows(CARD, self.options.split)
        log.say(f"scoring {len(problems)} held-out problems ({self.options.split})")
        starts = {"pretrain": None, "sft": "pretrain"} | {
            arm.name: arm.start for arm in [*chosen, *controls] if arm.start
        }
        scores = {
            name: score(
                self.home / name, problems, start=self.home / start if start else None,
                processes=self.options.ranks, seed=self.seed,
            )
            for name, start in starts.items()
        }  # fmt: skip
        (self.home / "scores.json").write_text(json.dumps({name: one.as_dict() for name, one in scores.items()}))
        return scores

    def phase(self, recipe: str, *, name: str = "", more: Sequence[str] = ()) -> None:
        """Run one recipe on its ranks, as a user would: `align-kit launch <recipe> …`."""
        output = self.home / (name or recipe)
        words = [recipe, "--seed", str(self.seed), "--output_dir", str(output), *more]
        words += ["--overwrite"] if output.exists() else []
        words += ["--max_steps", str(scaled_steps(recipe, self.options.scale))] if self.options.scale < 1 else []
        command = [sys.executable, "-m", "align_kit", "launch", "--nproc_per_node", str(self.options.ranks), *words]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, preexec_fn=supervised.dying_with_us())
        if done.returncode == EXIT_CODE:
            raise SystemExit(EXIT_CODE)  # the run has said why
        if done.returncode:
            raise UserError(f"the {recipe} phase ended with exit code {done.returncode}; its output is above")

    @cached_property
    def pairs(self) -> Path:
        """One pair of each training problem, where the SFT model's answers allow one."""
        return self._pairs("sft", "pairs", "train", 1000)

    @cached_property
    def held_out(self) -> Path:
        """Pairs of the SFT model's answers to problems whose numbers no training problem has."""
        return self._pairs("sft", "held_out_pairs", self.options.split, 2000)

    @cached_property
    def second_pairs(self) -> Path:
        """Pairs of the DPO model's own answers to other training problems: more of them, as fewer are wrong."""
        return self._pairs("dpo", "second_pairs", "train", 3000, samples=2 * DRAWS)

    def _pairs(self, model: str, name: str, split: str, base: int, samples: int = DRAWS) -> Path:
        problems = sums.prompts(split, PROBLEMS, seed=base + self.seed)
        return own.pairs(
            self.home / model, problems, self.home / name, samples=samples, seed=self.seed,
            processes=self.options.ranks,
        )  # fmt: skip

    @cached_property
    def labels(self) -> Path:
        """Every different answer of those the pairs were chosen from, marked good or bad."""
        return own.chosen_anew(self.pairs, self.home / "labels", "--keep", "rejection", "--write", "binary")


def data(place: Path, option: str = "datasets") -> list[str]:
    """Return the words that name a file, or a card with training rows alone, as the data of a run."""
    return [f"--{option}", json.dumps([{"path": str(place), "split": "train"}])]


# --- the arms ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way on from a start: its name and folder, its recipe, the words that recipe is given."""

    name: str
    recipe: str
    start: str  # the model it starts from; none where what comes out does not answer problems
    more: Callable[[Seed], list[str]]


def _reward_data(run: Seed) -> list[str]:
    train = own.chosen_anew(run.pairs, run.home / "reward_pairs", "--per-prompt", PAIRS)
    test = own.chosen_anew(run.held_out, run.home / "held_out_reward_pairs", "--per-prompt", PAIRS)
    return data(train) + data(test, "eval_datasets")


def _second_round(run: Seed) -> list[str]:
    # The first round taught the form; its pairs differ in a digit now, and at the first round's rate the model would
    # unlearn more of its right digits than it learns.
    gently = ["--learning_rate", "2e-5", "--loss_weights", "[1.0, 1.0]"]
    return [*data(run.second_pairs), "--model_name_or_path", str(run.home / "dpo"), *gently]


def _arms(*arms: Arm) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms}


ARMS = _arms(
    Arm("reward", "reward", "", _reward_data),
    Arm("dpo", "dpo", "sft", lambda run: data(run.pairs)),
    Arm("dpo_again", "dpo", "dpo", _second_round),
    Arm("orpo", "orpo", "pretrain", lambda run: []),
    Arm("kto", "kto", "sft", lambda run: data(run.labels)),
    Arm("ppo", "ppo", "sft", lambda run: ["--reward_funcs", "checker"]),
    # judged by the trained reward model, as `make ppo` is
    Arm("ppo_model", "ppo", "sft", lambda run: ["--reward_model_name_or_path", str(run.home / "reward")]),
)
# What an arm learns from, its meaning shuffled away: an arm that gains so gains by something else.
CONTROLS = {
    "dpo": Arm("dpo_control", "dpo", "sft", lambda run: data(own.shuffled_pairs(run.pairs, run.seed))),
    "kto": Arm("kto_control", "kto", "sft", lambda run: data(own.shuffled_labels(run.labels, run.seed))),
    "ppo": Arm("ppo_control", "ppo", "sft", lambda run: ["--reward_funcs", "align_kit.demo.control:shuffled_reward"]),
}


def scaled_steps(recipe: str, scale: float) -> int:
    """Return a share of the steps in the recipe's YAML, at least 1."""
    import yaml

    steps = yaml.safe_load((folder("recipes") / f"{recipe}.yaml").read_text())["max_steps"]
    return max(1, round(steps * scale))

"""What guards cost: steps of one run with each guard, against steps of the same run without any.

    OMP_NUM_THREADS=1 python -m benchmarks.guards_cost [--sizes 4M 30M] [--rows 4] [--tokens 256] [--rounds 9]

A random Llama trains on two ZeRO-3 ranks as any run does. The guards change every few steps, each adding to the one
before it, and take turns in every round. What counts is processor time of a rank; waiting for the other rank is none.
A guard's cost is taken twice, as parts of a step without any: what is spent in its own code, and by how much steps
with it are longer, which also counts what it does to caches and is as noisy as the machine. Ratios are made within a
round; they are medians over rounds, the second with least and most.

    none     the sums of a step are reduced, and no more
    ranks    they ride on the roll call instead, that finds ranks that disagree
    numbers  and losses and the gradient norm are looked at before the update, finite or a spike
    sampled  and memory at rest is compared, a share of it
    full     and memory at rest is compared, all of it
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import _world
from benchmarks._ranks import ranks_in_a_folder

ARMS = ("none", "ranks", "numbers", "sampled", "full")
DEFAULTS = ("ranks", "numbers", "sampled")  # on where nothing is said
LIMIT = 0.01  # of step time, for each guard that is on by default
BLOCK = 4  # steps of an arm in a round, after one that is not counted
RANKS = 2


# --- in a rank ------------------------------------------------------------------------------------------------


class Turns:
    """Gives each arm its turn in one training run, and adds up processor seconds by arm and round."""

    def __init__(self, trainer: Any, rounds: int) -> None:
        from align_kit.telemetry.at_rest import SHARE, AtRest

        self.trainer, self.rounds = trainer, rounds
        self.summed, self.decides = trainer.roll_call.summed, trainer.guard._decides
        self.rests = {"sampled": AtRest(SHARE), "full": AtRest()}
        self.seconds: dict[str, list[float]] = {arm: [0.0] * rounds for arm in ARMS}  # of whole steps
        self.inside: dict[str, list[float]] = {arm: [0.0] * rounds for arm in ARMS}  # in what the arm adds
        self.shares: list[float] = []  # of what is held, compared at each step of the arm that samples
        self._began, self._spent = 0.0, dict.fromkeys(ARMS, 0.0)
        self.summed, self.decides = self._timed("ranks", self.summed), self._timed("numbers", self.decides)
        self.reduced = self._timed("none", self._reduced)
        for arm, rest in self.rests.items():
            rest.remember, rest.changed = self._timed(arm, rest.remember), self._timed(arm, rest.changed)

    def _timed(self, arm: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            done = act(*args, **kwargs)
            self._spent[arm] += time.process_time() - began
            return done

        return timed

    def place(self, step: int) -> tuple[int, str, int]:
        """Return round, arm and place in its block of the step after `step`; arms change their order by round."""
        turn, inside = divmod(step, BLOCK + 1)
        number, arm = divmod(turn, len(ARMS))
        return number, ARMS[(arm + number) % len(ARMS)], inside

    def after(self, step: int) -> None:
        """Count a step that is done, and make the next one's guards stand."""
        if step:
            number, arm, inside = self.place(step - 1)
            if inside and number < self.rounds:
                self.seconds[arm][number] += time.process_time() - self._began
                self.inside[arm][number] += self._spent[arm]
                self._count_share(arm)
        _, arm, inside = self.place(step)
        if not inside:
            self._stand(arm)
        self._spent = dict.fromkeys(ARMS, 0.0)
        self._began = time.process_time()

    def _count_share(self, arm: str) -> None:
        if arm == "sampled":
            rest = self.rests[arm]
            self.shares.append(rest.compared / rest.held if rest.held else 0.0)
            rest.compared = 0

    def _stand(self, arm: str) -> None:
        trainer, guard = self.trainer, self.trainer.guard
        trainer.roll_call.summed = self.reduced if arm == "none" else self.summed
        guard._decides = self.decides if arm not in ("none", "ranks") else self._lets_pass
        guard.rest = self.rests.get(arm)
        if guard.rest is not None:
            guard.rest.forget()

    def _reduced(self, activity: str, step: int, count: int, mine: Any) -> Any:
        return self.trainer.accelerator.reduce(mine, "sum")

    def _lets_pass(self, engine: Any, norm: float | None) -> bool:
        from align_kit.telemetry.guards import GO, Decision

        self.trainer.guard._losses.clear()
        self.trainer.guard.decision = Decision(GO)
        return True


def measured(argv: list[str], report: str, rounds: int) -> int:
    """Run `align-kit argv…` with the guards taking turns; write the seconds of each arm to `report`.<rank>."""
    from transformers import TrainerCallback

    from align_kit.cli import main
    from align_kit.trainers.base import PhaseTrainer

    train: Callable[..., Any] = PhaseTrainer.train

    def watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        turns = Turns(trainer, rounds)

        class Watch(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 0:
                    turns.after(0)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                turns.after(state.global_step)

        trainer.add_callback(Watch())
        done = train(trainer, *args, **kwargs)
        found = {
            "seconds": turns.seconds,
            "inside": turns.inside,
            "shares": turns.shares,
            "held": turns.rests["full"].held,
        }
        Path(f"{report}.{trainer.args.process_index}").write_text(json.dumps(found))
        return done

    PhaseTrainer.train = watched  # type: ignore[method-assign]
    return int(main(argv) or 0)


# --- the measurement ------------------------------------------------------------------------------------------


def one_size(ranks: Any, home: Path, size: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Return what rank 0 measured on a model of `size`."""
    place, draw = home / size, random.Random(0)
    model = _world.write_model(place / "model", size, seed=0)
    steps = (BLOCK + 1) * len(ARMS) * asked.rounds
    vocabulary = _world.SIZES[size]["vocab_size"]
    count = RANKS * asked.rows * 8
    texts = [_world.text([draw.randrange(2, vocabulary) for _ in range(asked.tokens - 1)]) for _ in range(count)]
    (place / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (place / "blank.yaml").write_text("{}\n")
    options = {
        "config": place / "blank.yaml", "model_name_or_path": model, "output_dir": place / "run", "max_steps": steps,
        "datasets": json.dumps([{"path": str(place / "rows.jsonl")}]), "max_length": asked.tokens, "bf16": "false",
        "per_device_train_batch_size": asked.rows, "save_strategy": "no", "gradient_checkpointing": "false",
        "logging_steps": 10_000, "learning_rate": 1e-5,
    }  # fmt: skip
    argv = ["pretrain", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    ranks.run(
        world_size=RANKS, function="benchmarks.guards_cost:measured", timeout=3600,
        argv=argv, report=str(place / "report"), rounds=asked.rounds,
    ).ok()  # fmt: skip
    return dict(json.loads((place / "report.0").read_text()))


def lines(size: str, found: dict[str, Any]) -> tuple[list[str], bool]:
    """Return what to print of a size, and whether each guard that is on by default costs less than the limit."""
    seconds = found["seconds"]
    step = statistics.median(seconds["none"]) / BLOCK
    said = [f"{size}: {found['held'] / 1e6:.1f} MB at rest on each rank, a step without guards {step * 1e3:.0f} ms"]
    within = True
    for before, arm in zip(ARMS, ARMS[1:], strict=False):
        base = "numbers" if arm == "full" else before
        longer = _parts(seconds[arm], seconds[base], seconds["none"])
        instead = found["inside"]["none"] if arm == "ranks" else [0.0] * len(longer)
        inside = statistics.median(_parts(found["inside"][arm], instead, seconds["none"]))
        within &= inside < LIMIT or arm not in DEFAULTS
        span = f"{statistics.median(longer):+.2%} ({min(longer):+.2%} to {max(longer):+.2%})"
        said.append(f"  {arm:8} {inside:6.2%} of a step in its own code; steps longer than with {base:8} by {span}")
    said.append(f"  sampled compares {statistics.fmean(found['shares']):.1%} of what is at rest at each step")
    return said, within


def _parts(ones: list[float], others: list[float], wholes: list[float]) -> list[float]:
    return [(one - other) / whole for one, other, whole in zip(ones, others, wholes, strict=True)]


def main() -> None:
    """Print what each guard adds, and end with code 1 where one that is on by default adds too much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", default=["4M", "30M"], choices=list(_world.SIZES))
    parser.add_argument("--rows", type=int, default=4, help="rows of a rank's micro-batch")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    verdicts = []
    with ranks_in_a_folder() as (ranks, home):
        for size in asked.sizes:
            said, within = lines(size, one_size(ranks, home, size, asked))
            print("\n".join(said), flush=True)
            verdicts.append(within)
    print(f"guards that are on by default each add less than {LIMIT:.0%}: {'yes' if all(verdicts) else 'no'}")
    raise SystemExit(not all(verdicts))


if __name__ == "__main__":
    main()

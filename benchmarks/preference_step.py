"""One optimizer step of preference training: ours against stock TRL's own trainer, on the same tokens.

    python -m benchmarks.preference_step [--models 4M 100M] [--ranks 1 2] [--rounds 7] [--forward shared]
        [--data-root ../shared/data] [--cached] [--sft]

Both trainers stand in one process on each rank and take turns: TRL's step, ours on the same batch, TRL's next. A step
is a whole iteration of the trainer's own loop: fetch, collate, policy and reference forwards, backward, clipping,
AdamW (fused), schedule. TRL's is its real trainer with what suits it best on a CPU: fp32, no checkpointing, no logging.
Two ranks run ZeRO-3 with the same engine configuration for both; one process runs the engine at stage 0 for both, which
shards nothing. The reference is another random model, so that the losses compared are not ln 2.

Lengths are log-normal (sigma 0.6) around a prompt : completion ratio; with `--data-root` also those of real sets.
Each round has a batch of its own; round i draws from seed i modulo `--seeds`. Columns:

- `time`: seconds of stock over ours, median of the rounds with the least and the greatest; over 1, ours is faster;
- `cpu`: the same of CPU seconds, which others on the machine disturb less;
- `tokens`: tokens of the policy's forward, stock over ours, counted at the embedding;
- `memory`: ours over stock, of the peak above the baseline. Measured in rounds of their own that are not timed: garbage
  is collected, freed memory given back to the system, then the resident size is looked at each millisecond of the step
  and compared with that before it. Weights, optimizer and ZeRO-3's own buffers are in the baseline;
- `floor`: the share of the time that the least arithmetic would take (see `_floor`), ours and in brackets stock's, at
  the speed of a matrix product measured before each step.

Losses must agree to the rounding of the sums they are made of (3e-5), and the tokens counted must be those of the path
asked for, at every step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks._caught import in_place_of_training
from benchmarks._ranks import ranks_in_a_folder
from benchmarks._world import (
    RATIOS,
    SIZES,
    Shape,
    in_tokens,
    log_normal,
    made_rows,
    real_rows,
    real_sets,
    shape_of,
    write_model,
)
from tests.harness import Ranks
from tests.small import words, write_rows

WARM = 3  # steps before the first that counts: the gate, ZeRO-3's trace, the optimizer's state
# A completion of 250 tokens has about -2,300 nats under random weights, which fp32 holds to 1.2e-4; beta / 2 of the
# errors of four such sums stands in the loss of either side.
SAME_LOSS = 3e-5
BOTH = ("stock", "ours")
PATHS = ("shared", "packed", "plain")
# A model this large gets shorter rows and fewer of them, so that a table is measured in minutes on two cores.
SMALLER = {"100M": {"tokens": 128, "pairs": 2}}


@dataclass(frozen=True)
class Contest:
    """One table: a model, a number of ranks, and what is trained on."""

    size: str
    ranks: int
    threads: int
    pairs: int
    tokens: int
    longest: int
    rounds: int
    memory_rounds: int
    seeds: int
    forward: str
    cached: bool
    sft: bool

    def kinds(self, sets: Sequence[str]) -> list[tuple[str, str]]:
        """Return for each step the set it draws from and what it is for."""
        each = ["time"] * self.rounds + ["memory"] * self.memory_rounds
        return [(sets[0], "warm")] * WARM + [(name, kind) for name in sets for kind in each]

    def title(self) -> str:
        """Return the line above the table."""
        engine = "ZeRO-3" if self.ranks > 1 else "ZeRO stage 0"
        words = f"{self.size}, {self.ranks} rank{'s' * (self.ranks > 1)}, {self.threads} threads each, {engine}"
        what = "rows" if self.sft else "pairs"
        stored = ", reference cached" * self.cached
        return f"{words}, {self.pairs} {what} of {self.tokens} tokens where drawn, forward {self.forward}{stored}"


# --- on each rank -----------------------------------------------------------------------------------------


def contest(argv: list[str], report: str, kinds: list[str], shape: dict[str, int], **stock: Any) -> int:
    """Run `align-kit argv…` up to its training, let the duel take that place, and write what it measured."""
    return in_place_of_training(
        argv, report, lambda trainer: measured(trainer, kinds, Shape(**shape), report=report, **stock)
    )


def measured(
    ours: Any, kinds: list[str], shape: Shape, *, report: str, threads: int, path: str, cached: bool, **stock: str
) -> dict[str, Any]:
    """Return this rank's tracks of both trainers, and the floor and the tokens allowed of each step on all ranks."""
    from align_kit.forward.door import door_of
    from benchmarks._duel import duel
    from benchmarks._floor import floor_flops, pairs_of, tokens_of
    from benchmarks._stock import check_same_rows, stock_trainer

    other = stock_trainer(ours, **stock, cached=cached, place=f"{report}-stock")
    check_same_rows(ours, other)
    rows = pairs_of(list(ours.train_dataset))
    size = ours.args.per_device_train_batch_size * ours.args.world_size
    batches = [rows[step * size : (step + 1) * size] for step in range(len(kinds))]
    tracks = duel({"stock": other, "ours": ours}, kinds, shape, threads)
    door = door_of(ours.model)
    return {
        **{name: asdict(track) for name, track in tracks.items()},
        "strayed": door.walked if path == "plain" else door.plain,
        "floor": [floor_flops(batch, shape, reference=bool(stock["reference"]) and not cached) for batch in batches],
        "allowed": [tokens_of(batch, path) for batch in batches],
    }


# --- the tables -------------------------------------------------------------------------------------------


def rows_for(asked: Contest, kinds: Sequence[tuple[str, str]], real: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the rows of all steps in the order both trainers read them; a round draws from its seed."""
    real = {name: in_tokens(rows, SIZES[asked.size]["vocab_size"]) for name, rows in real.items()}
    sources: dict[tuple[str, int], Iterator[dict[str, str]]] = {}
    rounds: dict[str, Iterator[int]] = {}
    for name, _ in kinds:
        seed = next(rounds.setdefault(name, itertools.count())) % asked.seeds
        if (name, seed) not in sources:
            sources[name, seed] = _rows_of(name, asked, real, random.Random(f"{name} {seed}"))
        yield from itertools.islice(sources[name, seed], asked.pairs * asked.ranks)


def _rows_of(name: str, asked: Contest, real: dict[str, Any], draw: random.Random) -> Iterator[dict[str, str]]:
    if name in real:
        found = real_rows(real[name], asked.longest, draw)
    else:
        lengths = log_normal(RATIOS[name], asked.tokens, asked.longest, draw)
        found = made_rows(lengths, SIZES[asked.size]["vocab_size"], draw)
    if not asked.sft:
        return found
    return ({"prompt": row["prompt"], "completion": row["chosen"]} for row in found)


def play(ranks: Ranks, home: Path, asked: Contest, sets: Sequence[str], real: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one contest and return what each rank measured."""
    shape, kinds = shape_of(asked.size), asked.kinds(sets)
    policy, other = (home / f"{asked.size}-{seed}" for seed in range(2))
    for seed, place in enumerate((policy, other)):
        if not place.exists():
            write_model(place, asked.size, seed)
    rows = write_rows(home / "rows.jsonl", rows_for(asked, kinds, real))
    options = _options(asked, home, policy, None if asked.sft else other, rows, len(kinds))
    report = home / f"{asked.size}-{asked.ranks}"
    ranks.run(
        world_size=asked.ranks, function="benchmarks.preference_step:contest", timeout=7200,
        argv=["sft" if asked.sft else "dpo", *words(options)], report=str(report), kinds=[kind for _, kind in kinds],
        shape=asdict(shape), threads=asked.threads, path=asked.forward, cached=asked.cached,
        rows=str(rows), model=str(policy), reference="" if asked.sft else str(other),
    ).ok()  # fmt: skip
    return [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(asked.ranks)]


def _options(
    asked: Contest, home: Path, policy: Path, other: Path | None, rows: Path, steps: int
) -> dict[str, Any]:
    engine = json.loads((Path("ds_configs") / "zero3.json").read_text())
    if asked.ranks == 1:
        engine["zero_optimization"] = {"stage": 0}
    (home / "engine.json").write_text(json.dumps(engine))
    (home / "blank.yaml").write_text("")
    reference = {
        "reference_model_name_or_path": other, "reference_differs": True,
        "reference_placement": "cached" if asked.cached else "sharded", "loss_type": ["sigmoid"], "beta": 0.1,
    }  # fmt: skip
    return {
        "config": home / "blank.yaml", "output_dir": home / f"run-{asked.size}-{asked.ranks}", "overwrite": True,
        "model_name_or_path": policy, "datasets": [{"path": str(rows)}], "deepspeed": home / "engine.json",
        "max_length": 2 * asked.longest, "max_steps": steps, "per_device_train_batch_size": asked.pairs,
        "learning_rate": 1e-6, "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch_fused",
        "weight_decay": 0.0, "max_grad_norm": 1.0, "train_sampling_strategy": "sequential", "forward": asked.forward,
        "gradient_checkpointing": False, "logging_strategy": "no", "save_strategy": "no", "fingerprint_steps": 0,
        **(reference if other else {}),
    }  # fmt: skip


@dataclass(frozen=True)
class Line:
    """What one set of lengths gave: `times` holds a ratio for each round, `ours` and `stock` the floor's share."""

    name: str
    times: list[float]
    cpu: float
    tokens: float
    memory: float
    ours: float
    stock: float

    def text(self) -> str:
        """Return the line of the table."""
        middle, low, high = statistics.median(self.times), min(self.times), max(self.times)
        times = f"{middle:6.2f} ({low:.2f}-{high:.2f})"
        ratios = f"{self.cpu:6.2f}  {self.tokens:6.2f}  {self.memory:6.2f}"
        return f"{self.name:20} {times:22} {ratios}   {self.ours:.2f} ({self.stock:.2f})"


HEADER = f"{'prompt : completion':20} {'  time (min-max)':22}    cpu  tokens  memory   floor"


def lines_of(found: Sequence[dict[str, Any]], kinds: Sequence[tuple[str, str]]) -> Iterator[Line]:
    """Yield a line for each set, from the tracks of all ranks; a step takes as long as its slowest rank."""
    for name in dict.fromkeys(name for name, _ in kinds):
        timed = [step for step, kind in enumerate(kinds) if kind == (name, "time")]
        looked = [str(step) for step, kind in enumerate(kinds) if kind == (name, "memory")]
        seconds = {who: [max(one[who]["seconds"][step] for one in found) for step in timed] for who in BOTH}
        busy = {who: [sum(one[who]["busy"][step] for one in found) for step in timed] for who in BOTH}
        tokens = {who: sum(one[who]["tokens"][step] for one in found for step in timed) for who in BOTH}
        floor = {who: _ratios(_floor_seconds(found, timed, who), seconds[who]) for who in BOTH}
        memory = [_peak(found, "ours", step) / _peak(found, "stock", step) for step in looked]
        yield Line(
            name=name,
            times=_ratios(seconds["stock"], seconds["ours"]),
            cpu=statistics.median(_ratios(busy["stock"], busy["ours"])),
            tokens=tokens["stock"] / tokens["ours"],
            memory=statistics.median(memory) if memory else float("nan"),
            ours=statistics.median(floor["ours"]),
            stock=statistics.median(floor["stock"]),
        )


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(above, below, strict=True)]


def _floor_seconds(found: Sequence[dict[str, Any]], steps: Sequence[int], who: str) -> list[float]:
    """Return the seconds the floor of each step takes at all ranks' measured speed together."""
    return [found[0]["floor"][step] / sum(one[who]["flops"][step] for one in found) for step in steps]


def _peak(found: Sequence[dict[str, Any]], who: str, step: str) -> int:
    return max(one[who]["peaks"][step] for one in found)


def check(found: Sequence[dict[str, Any]], path: str) -> None:
    """Exit where the losses differ, or where a step of ours was not on the path that was asked for."""
    if strayed := sum(one["strayed"] for one in found):
        raise SystemExit(f"{strayed} forwards of ours were not {path}")
    for step, (least, most) in enumerate(found[0]["allowed"]):
        theirs, ours = (statistics.fmean(one[who]["losses"][step] for one in found) for who in BOTH)
        if not abs(ours - theirs) <= SAME_LOSS * abs(theirs):
            raise SystemExit(f"step {step}: our loss is {ours:.8f} and TRL's {theirs:.8f}")
        tokens = sum(one["ours"]["tokens"][step] for one in found)
        if not least <= tokens <= most:
            raise SystemExit(f"step {step} computed {tokens} tokens, and {path} computes {least} to {most}")


def contests(asked: argparse.Namespace) -> Iterator[Contest]:
    """Yield the tables asked for."""
    for size, ranks in itertools.product(asked.models, asked.ranks):
        own = {"tokens": 256, "pairs": 4, **SMALLER.get(size, {})}
        yield Contest(
            size=size, ranks=ranks, threads=asked.threads or max(1, len(os.sched_getaffinity(0)) // ranks),
            pairs=asked.pairs or own["pairs"], tokens=asked.tokens or own["tokens"], longest=asked.longest,
            rounds=asked.rounds, memory_rounds=asked.memory_rounds, seeds=asked.seeds, forward=asked.forward,
            cached=asked.cached, sft=asked.sft,
        )  # fmt: skip


def table(ranks: Ranks, home: Path, asked: Contest, sets: Sequence[str], real: dict[str, Any]) -> float:
    """Print one table and return the geometric mean of its times, of the log-normal sets where there are any."""
    print(f"{asked.title()}\n{HEADER}", flush=True)
    found = play(ranks, home, asked, sets, real)
    check(found, asked.forward)
    lines = list(lines_of(found, asked.kinds(sets)))
    for line in lines:
        print(line.text())
    drawn = [line for line in lines if line.name in RATIOS] or lines
    mean = statistics.geometric_mean([statistics.median(line.times) for line in drawn])
    print(f"{asked.size}, {asked.ranks} rank{'s' * (asked.ranks > 1)}: geometric mean {mean:.2f}\n", flush=True)
    return mean


def options() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["4M", "100M"])
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each set")
    parser.add_argument("--memory-rounds", type=int, default=1, help="steps of each set whose memory is looked at")
    parser.add_argument("--seeds", type=int, default=3, help="seeds that the rounds draw their lengths from")
    parser.add_argument("--distributions", nargs="*", choices=RATIOS, default=list(RATIOS))
    parser.add_argument("--data-root", type=Path, help="folder of real data sets, for their lengths")
    parser.add_argument("--forward", choices=PATHS, default="shared", help="the path our steps must take")
    parser.add_argument("--cached", action="store_true", help="the reference's log-probabilities are stored, for both")
    parser.add_argument("--sft", action="store_true", help="supervised fine-tuning on one completion instead of pairs")
    parser.add_argument("--pairs", type=int, help="pairs of a micro-batch (default: 4, 2 at 100M)")
    parser.add_argument("--tokens", type=int, help="mean prompt and completion together (default: 256, 128 at 100M)")
    parser.add_argument("--longest", type=int, default=512, help="longest prompt and completion together")
    parser.add_argument("--threads", type=int, help="threads of a rank (default: the cores, shared out)")
    return parser


def main() -> None:
    """Print the tables and the geometric mean of the last."""
    asked = options().parse_args()
    if asked.sft and asked.cached:
        raise SystemExit("--sft has no reference to cache; drop one of them")
    real = real_sets(asked.data_root, asked.sft)
    sets = [*asked.distributions, *real]
    if not sets:
        raise SystemExit("nothing to measure: give --distributions, or --data-root with a set in it")
    with ranks_in_a_folder() as (ranks, folder):
        for one in contests(asked):
            mean = table(ranks, folder, one, sets, real)
    print(f"geometric mean {mean:.2f}")


if __name__ == "__main__":
    main()

"""Where the time of a PPO iteration goes, and what computing each prompt once for its completions saves of it.

    python -m benchmarks.ppo_iteration [--models 4M 30M] [--ranks 1 2] [--generations 8] [--ratios 4:1 1:1] [--rounds 7]

One real run of the recipe on each rank: policy, value model of its own, reference and reward model, all of one size.
Two ranks run ZeRO-3; one process runs the engine at stage 0, which shards nothing. Iterations come in pairs, one
walked as `--forward` says and one plain (each sequence padded and computed for itself), the first of the two in turn.
At a learning rate of 0, with everything an update does still done, both write the same completions and must find the
same losses. Every forward of every model is counted: one on another path than the iteration's ends the benchmark.

Prompts are log-normal in length (sigma 0.6). So many tokens end a completion that lengths are geometric, cut at twice
the mean; prompt : completion is the ratio of the means, which together are `--tokens`. Lines:

- `rollout`: weights gathered, completions written; `score`: log-probabilities of policy and reference, values and
  rewards, each computed once; `update`: the optimizer steps; `iteration`: the three together;
- columns: seconds of plain, seconds as asked, plain over asked with the least and the greatest of the rounds; over 1,
  the shared forward is faster;
- `tokens`: the policy's tokens given over those computed, padding not counted;
- `generate`: the rollout over `generate` of plain transformers on an unsharded model of the same weights, for the same
  prompts in the same batch, sampling at the same temperature with the same ends; seconds for each token of a row.

`--update-only` compares with TRL 1.16 instead: its GRPO trainer's own update of a policy alone, on stored completions,
against the same trainer, loop and loss with log-probabilities by our forward (see `_grpo`); seconds are of whole steps.

A part takes as long as on its slowest rank. The last line is the geometric mean of the update's column.
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

from benchmarks._pairs import PLAIN, Iteration
from benchmarks._ranks import ranks_in_a_folder
from benchmarks._world import SIZES, log_normal, shape_of, text, write_model
from tests.harness import Ranks
from tests.small import words, write_rows

WARM = 2  # pairs of iterations before the first that counts: the gate, ZeRO-3's traces, the optimizer's state
SAME_LOSS = 1e-5
PARTS = ("rollout", "score", "update")
CUT = 1.594  # x where (1 - e^-x) / x = 1/2: geometric lengths cut at twice their mean end with probability x / cut


@dataclass(frozen=True)
class Setting:
    """One table: a model, a number of ranks, and what is written."""

    size: str
    ranks: int
    generations: int
    ratio: str
    tokens: int
    rows: int
    mini_batches: int
    epochs: int
    rounds: int
    threads: int
    forward: str

    @property
    def completion(self) -> int:
        """Tokens of a completion, on average."""
        prompt, completion = map(float, self.ratio.split(":"))
        return max(1, round(self.tokens * completion / (prompt + completion)))

    @property
    def longest(self) -> int:
        """Tokens of the longest completion."""
        return 2 * self.completion

    @property
    def ends(self) -> list[int]:
        """Tokens that end a completion: of a model that has learnt nothing each is as likely as any."""
        vocab_size = SIZES[self.size]["vocab_size"]
        count = round(CUT / self.longest * vocab_size)
        return [0, *range(vocab_size - count + 1, vocab_size)]

    @property
    def prompts(self) -> int:
        """Prompts of an iteration."""
        return self.rows * self.ranks * self.mini_batches // self.generations

    @property
    def steps(self) -> int:
        """Steps of each trainer where only updates are measured."""
        return WARM + self.rounds

    def title(self) -> str:
        engine = "ZeRO-3" if self.ranks > 1 else "ZeRO stage 0"
        where = f"{self.size}, {self.ranks} rank{'s' * (self.ranks > 1)}, {self.threads} threads each, {engine}"
        return (
            f"{where}, {self.prompts} prompts x {self.generations} completions, prompt : completion {self.ratio} of "
            f"about {self.tokens} tokens, {self.epochs} x {self.mini_batches} updates, {self.rows} rows a micro-batch"
        )


# --- the tables -------------------------------------------------------------------------------------------


def prompts_for(asked: Setting) -> Iterator[dict[str, str]]:
    """Yield the prompts of all pairs of iterations in the order they are taken; no pair sees another's."""
    draw, vocab_size = random.Random(f"{asked.ratio} {asked.tokens}"), SIZES[asked.size]["vocab_size"]
    mean = asked.tokens - asked.completion
    lengths = log_normal(mean, mean + 1, 4 * asked.tokens, draw)  # prompts of `mean` tokens, and completions of one
    for prompt, *_ in itertools.islice(lengths, asked.prompts * (WARM + asked.rounds)):
        yield {"prompt": text([draw.randrange(2, vocab_size) for _ in range(prompt)])}


def write_models(home: Path, asked: Setting) -> tuple[Path, Path]:
    """Save the policy, ending completions as asked, and a reward model of the same size; return both places."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForSequenceClassification

    policy, scorer = home / asked.size, home / f"{asked.size}-scorer"
    if not scorer.exists():
        write_model(policy, asked.size, seed=0)
        config = AutoConfig.from_pretrained(policy, num_labels=1)
        LlamaForSequenceClassification(config).save_pretrained(scorer)
        AutoTokenizer.from_pretrained(policy).save_pretrained(scorer)
    GenerationConfig(eos_token_id=asked.ends, pad_token_id=1).save_pretrained(policy)
    return policy, scorer


def play(ranks: Ranks, home: Path, asked: Setting) -> list[list[Iteration]]:
    """Run one setting and return what each rank measured."""
    policy, scorer = write_models(home, asked)
    rows = write_rows(home / "prompts.jsonl", prompts_for(asked))
    return launched(
        ranks, home, asked, _options(asked, home, policy, scorer, rows), "benchmarks._pairs:iterations"
    )


def launched(
    ranks: Ranks, home: Path, asked: Setting, options: dict[str, Any], function: str, **kwargs: Any
) -> list[Any]:
    """Run `function` on all ranks of a setting and return what each wrote."""
    report = home / f"{asked.size}-{asked.ranks}"
    ranks.run(
        world_size=asked.ranks, function=function, timeout=7200, argv=["ppo", *words(options)], report=str(report),
        model=str(options["model_name_or_path"]), forward=asked.forward, threads=asked.threads, **kwargs,
    ).ok()  # fmt: skip
    return [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(asked.ranks)]


def _options(asked: Setting, home: Path, policy: Path, scorer: Path, rows: Path) -> dict[str, Any]:
    engine = json.loads((Path("ds_configs") / "zero3.json").read_text())
    if asked.ranks == 1:
        engine["zero_optimization"] = {"stage": 0}
    (home / "engine.json").write_text(json.dumps(engine))
    (home / "blank.yaml").write_text("")
    return {
        "config": home / "blank.yaml", "output_dir": home / f"run-{asked.size}-{asked.ranks}", "overwrite": True,
        "model_name_or_path": policy, "datasets": [{"path": str(rows)}], "deepspeed": home / "engine.json",
        "reward_model_name_or_path": str(scorer), "reward_placement": "sharded", "reference_placement": "sharded",
        "max_length": 4 * asked.tokens + asked.longest, "response_length": asked.longest,
        "num_generations": asked.generations, "per_device_train_batch_size": asked.rows,
        "rollout_batch_size": asked.rows * asked.mini_batches, "num_mini_batches": asked.mini_batches,
        "num_ppo_epochs": asked.epochs, "max_steps": 2 * (WARM + asked.rounds) * asked.epochs * asked.mini_batches,
        "learning_rate": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch_fused",
        "weight_decay": 0.0, "max_grad_norm": 1.0, "train_sampling_strategy": "sequential", "forward": asked.forward,
        "gradient_checkpointing": False, "logging_strategy": "no", "save_strategy": "no", "fingerprint_steps": 0,
        "num_sample_completions": 0,
    }  # fmt: skip


def check(found: Sequence[Sequence[Iteration]]) -> None:
    """Exit where a forward strayed from its iteration's path, or where the two of a pair found different losses."""
    for rank in found:
        for number, one in enumerate(rank):
            for name, counts in one["doors"].items():
                right, wrong = ("plain", "walked") if one["mode"] == PLAIN else ("walked", "plain")
                if counts[wrong] or not counts[right]:
                    raise SystemExit(f"iteration {number} is {one['mode']}, and its {name} counted {counts}")
    for first, second in zip(_added(found)[::2], _added(found)[1::2], strict=True):
        for one, other in zip(first, second, strict=True):
            if not abs(one - other) <= SAME_LOSS * max(1.0, abs(other)):
                raise SystemExit(f"the losses of a pair of iterations differ: {first} and {second}")


def _added(found: Sequence[Sequence[Iteration]]) -> list[list[float]]:
    """Return the losses of each iteration, means over the ranks; micro-batches are dealt alike on both paths."""
    return [
        [statistics.fmean(step) for step in zip(*(one["losses"] for one in ranks), strict=True)]
        for ranks in zip(*found, strict=True)
    ]


def seconds_of(found: Sequence[Sequence[Iteration]], mode: str) -> dict[str, list[float]]:
    """Return for each part the seconds of the counted iterations of `mode`, on the slowest rank of each."""
    timed = [ranks for ranks in zip(*found, strict=True) if ranks[0]["mode"] == mode][WARM:]
    parts = {part: [max(one["seconds"][part] for one in ranks) for ranks in timed] for part in PARTS}
    return {**parts, "iteration": [sum(each) for each in zip(*parts.values(), strict=True)]}


def ratios_line(name: str, plain: Sequence[float], asked: Sequence[float]) -> tuple[str, float]:
    """Return a line of the table and the median ratio."""
    ratios = [theirs / ours for theirs, ours in zip(plain, asked, strict=True)]
    middle = statistics.median(ratios)
    seconds = f"{statistics.median(plain):9.3f}  {statistics.median(asked):9.3f}"
    return f"{name:10} {seconds}  {middle:6.2f} ({min(ratios):.2f}-{max(ratios):.2f})", middle


def table(ranks: Ranks, home: Path, asked: Setting) -> float:
    """Print one table and return how many times as fast the update is."""
    print(f"{asked.title()}\n{'':10} {'plain':>9}  {asked.forward:>9}  {'ratio (min-max)':>15}", flush=True)
    found = play(ranks, home, asked)
    check(found)
    plain, ours = seconds_of(found, PLAIN), seconds_of(found, asked.forward)
    middles = {}
    for name in (*PARTS, "iteration"):
        line, middles[name] = ratios_line(name, plain[name], ours[name])
        print(line)
    print(f"tokens given / computed {_tokens(found, asked.forward):.2f}")
    low, middle, high = _generation(found)
    print(f"rollout / generate of plain transformers {middle:.2f} ({low:.2f}-{high:.2f})\n", flush=True)
    return middles["update"]


def update_table(ranks: Ranks, home: Path, asked: Setting) -> float:
    """Print what TRL's update of a policy takes against the same by our forward, and return the ratio."""
    from benchmarks import _grpo

    print(f"{asked.title()}\n{'':10} {'TRL':>9}  {asked.forward:>9}  {'ratio (min-max)':>15}", flush=True)
    policy, scorer = write_models(home, asked)
    rows = write_rows(home / "prompts.jsonl", prompts_for(asked))
    draw, vocab_size = random.Random(0), SIZES[asked.size]["vocab_size"]
    lengths = (line["prompt"].count("t") for line in prompts_for(asked))
    made = _grpo.rollout(lengths, CUT, asked.longest, asked.generations, vocab_size, draw)
    steps = [[list(itertools.islice(made, asked.rows)) for _ in range(asked.ranks)] for _ in range(asked.steps)]
    found = launched(
        ranks, home, asked, _options(asked, home, policy, scorer, rows), "benchmarks._grpo:updates",
        steps=steps, shape=asdict(shape_of(asked.size)),
    )  # fmt: skip
    line, middle = ratios_line("update", *_grpo.seconds_of(found, WARM))
    print(f"{line}\n", flush=True)
    return middle


def _tokens(found: Sequence[Sequence[Iteration]], mode: str) -> float:
    counts = [one["doors"]["policy"] for rank in found for one in rank if one["mode"] == mode]
    return sum(one["given"] for one in counts) / sum(one["computed"] for one in counts)


def _generation(found: Sequence[Sequence[Iteration]]) -> tuple[float, float, float]:
    """Return the least, the median and the greatest ratio over all counted iterations, whatever their path."""
    ratios = []
    for each in list(zip(*found, strict=True))[2 * WARM :]:
        ours = max(one["seconds"]["rollout"] for one in each) / max(one["written"] for one in each)
        theirs = max(one["generate"][0] for one in each) / max(one["generate"][1] for one in each)
        ratios.append(ours / theirs)
    return min(ratios), statistics.median(ratios), max(ratios)


def settings(asked: argparse.Namespace) -> Iterator[Setting]:
    """Yield the tables asked for."""
    for size, ranks, each, ratio in itertools.product(asked.models, asked.ranks, asked.generations, asked.ratios):
        made = Setting(
            size=size, ranks=ranks, generations=each, ratio=ratio, tokens=asked.tokens, rows=asked.rows,
            mini_batches=asked.mini_batches, epochs=asked.epochs, rounds=asked.rounds, forward=asked.forward,
            threads=asked.threads or max(1, len(os.sched_getaffinity(0)) // ranks),
        )  # fmt: skip
        if made.rows * ranks * made.mini_batches % each:
            raise SystemExit(f"{made.rows} rows on {ranks} ranks cannot be {each} completions of each prompt")
        yield made


def options() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["4M"])
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--generations", nargs="+", type=int, default=[8], help="completions written to each prompt")
    parser.add_argument("--ratios", nargs="+", default=["4:1", "1:1"], help="prompt : completion")
    parser.add_argument("--tokens", type=int, default=256, help="mean prompt and completion together")
    parser.add_argument("--rows", type=int, default=8, help="completions of a micro-batch")
    parser.add_argument("--mini-batches", type=int, default=1, help="optimizer steps in each pass over an iteration")
    parser.add_argument("--epochs", type=int, default=1, help="passes over an iteration")
    parser.add_argument("--rounds", type=int, default=7, help="timed pairs of iterations")
    parser.add_argument("--forward", choices=("shared", "packed"), default="shared", help="the path beside plain")
    parser.add_argument("--update-only", action="store_true", help="TRL's update of a policy instead of our plain path")
    parser.add_argument("--threads", type=int, help="threads of a rank (default: the cores, shared out)")
    return parser


def main() -> None:
    """Print the tables, and the geometric mean of how many times as fast their updates are."""
    asked = options().parse_args()
    show = update_table if asked.update_only else table
    with ranks_in_a_folder() as (ranks, folder):
        found = [show(ranks, folder, one) for one in settings(asked)]
    print(f"geometric mean {statistics.geometric_mean(found):.2f}")


if __name__ == "__main__":
    main()

"""What ZeRO-3 costs on a CPU: an optimizer step against DDP on as many ranks, and against one process without ranks.

    python -m benchmarks.zero3_cost [--sizes 4M 30M 100M] [--ways shipped ...] [--clip 0 1] [--rounds 7]

A random Llama with a vocabulary of 32,000 in fp32; one step is forward, backward, clipping and fused AdamW on one
micro-batch a rank, the same batch and one thread for every contender. Each contender lives in processes of its own (two
for gloo ranks), forked from one that has imported everything; they take turns, a block of steps each, and those whose
turn it is not sleep on a pipe. Every ratio is made within a round and is the median over rounds (least-most). The
losses of ZeRO-3 must be those of DDP, and the first one that of the process alone.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import math
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from align_kit import log, machine, zero

RANKS = 2
VOCABULARY = 32_000
RATE = 1e-4
TOLERANCE = 1e-4  # relative, of a loss after a few steps; the order of sums differs
BASELINES = ("one", "ddp")
TRACED = 3  # steps after which an engine knows the order of its modules and gathers ahead

# hidden size, layers, MLP width, heads, rows of a rank's micro-batch, tokens of a row
SHAPES = {
    "tiny": (32, 2, 64, 2, 2, 16),
    "4M": (96, 6, 256, 4, 4, 128),
    "30M": (384, 10, 1024, 6, 2, 256),
    "100M": (768, 11, 2048, 12, 2, 256),
}

# What is changed in `zero_optimization` of the shipped zero3; `layers_as_leaves` makes one gather of each layer.
Change = dict[str, Any]
WAYS: dict[str, Change] = {
    "shipped": {},
    "plain_linear": {"memory_efficient_linear": False},
    "allreduce_grads": {"reduce_scatter": False},
    "allreduce_fetch": {"stage3_use_all_reduce_for_fetch_params": True},
    "allreduce": {"reduce_scatter": False, "stage3_use_all_reduce_for_fetch_params": True},
    "no_copy": {"contiguous_gradients": False},
    "leaves": {"layers_as_leaves": True},
    "persist_0": {"stage3_param_persistence_threshold": 0},
    "all_three": {
        "reduce_scatter": False,
        "stage3_use_all_reduce_for_fetch_params": True,
        "stage3_param_persistence_threshold": 0,
    },
    "persist_1M": {"stage3_param_persistence_threshold": 1_000_000},
    "persist_all": {"stage3_param_persistence_threshold": 10**9},
    "big_reduce": {"reduce_bucket_size": 1 << 26},
    "big_prefetch": {"stage3_prefetch_bucket_size": 1 << 26},
    "no_prefetch": {"stage3_prefetch_bucket_size": 0},
    "no_overlap": {"overlap_comm": False},
    "round_robin": {"round_robin_gradients": True},
    "small_live": {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
}


@dataclass
class Case:
    """One table: a size, a clipping threshold (0 for none), steps to a block, recomputed layers, rows x tokens."""

    size: str
    clip: float
    steps: int
    checkpointing: bool = False
    given: tuple[int, int] | None = None

    @property
    def batch(self) -> tuple[int, int]:
        rows, tokens = SHAPES[self.size][-2:]
        return self.given or (rows, tokens)


# --- in a contender's process -----------------------------------------------------------------------------


def build_model(case: Case) -> Any:
    """Return the random model of `case`, the same in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, width, heads = SHAPES[case.size][:4]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=case.batch[1], tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def batches(case: Case, rank: int) -> Callable[[], Any]:
    """Return what gives a rank its next micro-batch of token ids."""
    import torch

    rows, tokens = case.batch
    source = torch.Generator().manual_seed(1 + rank)
    return lambda: torch.randint(VOCABULARY, (rows, tokens), generator=source)


def engine_config(case: Case, change: Change) -> dict[str, Any]:
    """Return the shipped ZeRO-3 configuration with `change`, as a run of this model would fill it in."""
    config = zero.load("zero3")
    config["zero_optimization"] |= {key: value for key, value in change.items() if key != "layers_as_leaves"}
    zero.fill_sizes(config, SHAPES[case.size][0])
    values = {
        "train_micro_batch_size_per_gpu": case.batch[0],
        "train_batch_size": case.batch[0] * RANKS,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": case.clip,
        "bf16.enabled": False,
        "fp16.enabled": False,
    }
    return zero.filled(config, values)


def adamw(model: Any) -> Any:
    import torch

    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)


def plain_step(case: Case, model: Any) -> Callable[[Any], Any]:
    """Return one step of `model` by torch alone."""
    import torch

    optimizer = adamw(model)

    def step(ids: Any) -> Any:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if case.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def ddp_step(case: Case) -> Callable[[Any], Any]:
    """Return one step of DDP, with the settings that make the fewest copies."""
    from torch.nn.parallel import DistributedDataParallel

    return plain_step(case, DistributedDataParallel(build_model(case), gradient_as_bucket_view=True))


def zero_step(case: Case, change: Change) -> Callable[[Any], Any]:
    """Return one step of a ZeRO-3 engine."""
    import deepspeed

    model, config = build_model(case), engine_config(case, change)
    if change.get("layers_as_leaves"):
        zero.set_leaf_modules(model, lambda model: list(model.model.layers), config)
    engine = deepspeed.initialize(model=model, optimizer=adamw(model), config=config)[0]

    def step(ids: Any) -> Any:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def make_step(case: Case, name: str) -> Callable[[Any], Any]:
    if name == "one":
        return plain_step(case, build_model(case))
    zero.join_ranks()
    return ddp_step(case) if name == "ddp" else zero_step(case, copy.deepcopy(WAYS[name]))


def serve(case: Case, name: str, rank: int, port: int, pipe: Connection) -> None:
    """Build a contender's rank, then answer every number of steps with seconds and losses."""
    world = 1 if name == "one" else RANKS
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(address)
    machine.prepare_process(os.environ)
    import torch

    torch.set_num_threads(1)
    try:
        step, batch = make_step(case, name), batches(case, rank)
        pipe.send("ready")
        while steps := pipe.recv():
            ids = [batch() for _ in range(steps)]
            began, used = time.perf_counter(), time.process_time()
            losses = [float(step(one)) for one in ids]
            pipe.send((time.perf_counter() - began, time.process_time() - used, losses))
    except Exception:
        pipe.send(traceback.format_exc())


# --- taking turns -----------------------------------------------------------------------------------------


@dataclass
class Contender:
    """The processes of one way to train, what a block took in each round, and rank 0's losses."""

    name: str
    pipes: list[Connection]
    processes: list[Any]
    seconds: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def run(self, steps: int, *, keep: bool) -> None:
        """Take a block of steps on all ranks; the slowest rank's time counts."""
        for pipe in self.pipes:
            pipe.send(steps)
        answers = [answer(pipe, self.name) for pipe in self.pipes]
        self.losses += answers[0][2]
        if keep:
            self.seconds.append(max(seconds for seconds, _, _ in answers))
            self.used.append(max(used for _, used, _ in answers))

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(0)
            process.join(10)
            if process.is_alive():
                process.kill()


def answer(pipe: Connection, name: str) -> Any:
    """Return what a rank sends; raise `RuntimeError` with its traceback where it failed."""
    got = pipe.recv()
    if isinstance(got, str) and got != "ready":
        raise RuntimeError(f"{name}: {got}")
    return got


def start(case: Case, name: str) -> Contender:
    """Fork a contender's processes and wait until they have built their model."""
    fork, port = multiprocessing.get_context("fork"), machine.free_port()
    made = Contender(name, [], [])
    for rank in range(1 if name == "one" else RANKS):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=serve, args=(case, name, rank, port, theirs), daemon=True)
        process.start()
        made.pipes.append(ours)
        made.processes.append(process)
    for pipe in made.pipes:
        answer(pipe, name)
    return made


def compare(case: Case, names: list[str], rounds: int) -> dict[str, Contender]:
    """Run all contenders in turn, a block each `rounds` times, after as many steps as an engine needs to warm up."""
    running = {name: start(case, name) for name in names}
    try:
        for number in range(rounds + 1):
            order = list(running.values())
            for contender in order if number % 2 else reversed(order):
                contender.run(case.steps if number else TRACED, keep=number > 0)
    finally:
        for contender in running.values():
            contender.close()
    return running


# --- what is printed --------------------------------------------------------------------------------------


def ratios(over: list[float], under: list[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):5.2f} ({min(values):.2f}-{max(values):.2f})"


def line(over: Contender, under: Contender) -> str:
    """Return the ratios of two contenders: of wall time, then of processor time, which other work disturbs less."""
    wall, used = ratios(over.seconds, under.seconds), ratios(over.used, under.used)
    return f"  {over.name + ' / ' + under.name:34} {spread(wall)}   {spread(used)}"


def check_losses(found: dict[str, Contender]) -> float:
    """Return the largest relative difference of a loss from DDP's; the first of `one` must be DDP's too.

    Raises `SystemExit` where one is beyond `TOLERANCE`: times of different computations are not compared.
    """
    ddp = found["ddp"].losses
    worst = abs(found["one"].losses[0] / ddp[0] - 1)
    for name in (name for name in found if name not in BASELINES):
        gaps = [abs(ours / theirs - 1) for ours, theirs in zip(found[name].losses, ddp, strict=True)]
        if not all(gap <= TOLERANCE for gap in gaps):  # a NaN is not
            raise SystemExit(f"{name}: a loss differs from DDP's by {max(gaps):.1e}")
        worst = max(worst, *gaps)
    if not worst <= TOLERANCE:
        raise SystemExit(f"the first loss of one process differs from DDP's by {worst:.1e}")
    return worst


def report(case: Case, found: dict[str, Contender]) -> dict[str, float]:
    """Print one table and return the median ratio of each ZeRO-3 contender to DDP."""
    hidden, layers = SHAPES[case.size][:2]
    rows, tokens = case.batch
    ways = [name for name in found if name not in BASELINES]
    seconds = statistics.median(found["ddp"].seconds) / case.steps
    print(
        f"\n{case.size}: hidden {hidden}, {layers} layers, {rows} x {tokens} tokens a rank, clipping "
        f"{case.clip or 'off'}, layers {'recomputed' if case.checkpointing else 'kept'}; a DDP step {seconds:.3f} s; "
        f"losses agree to {check_losses(found):.0e}"
    )
    print(f"  {'':34}  wall time           processor time of a rank")
    print(line(found["ddp"], found["one"]))
    for name in ways:
        print(line(found[name], found["ddp"]))
    for name in ways[1:]:
        print(line(found[name], found[ways[0]]), flush=True)
    return {name: statistics.median(ratios(found[name].seconds, found["ddp"].seconds)) for name in ways}


def warm() -> None:
    """Import what the contenders need, so that a fork has it; nothing here may start a thread."""
    log.quiet()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    machine.use_huge_pages(os.environ)
    for name in (
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # the engine's optimizer check imports it
        "torch.nn.parallel",
        "transformers.models.llama.modeling_llama",
    ):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def main(argv: list[str] | None = None) -> int:
    """Print a table for each size and clipping, and in the last line each contender's geometric mean over all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", default=["4M", "30M", "100M"], choices=list(SHAPES))
    parser.add_argument("--ways", nargs="+", default=["shipped"], choices=list(WAYS))
    parser.add_argument("--clip", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of a block")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the layers' activations")
    parser.add_argument("--batch", nargs=2, type=int, metavar=("ROWS", "TOKENS"), help="instead of the size's own")
    asked = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    warm()
    means: dict[str, list[float]] = {}
    for size in asked.sizes:
        for clip in asked.clip:
            case = Case(size, clip, asked.steps, asked.checkpointing, asked.batch and tuple(asked.batch))
            found = report(case, compare(case, [*BASELINES, *asked.ways], asked.rounds))
            for name, ratio in found.items():
                means.setdefault(name, []).append(ratio)
    means_of = {name: math.exp(statistics.fmean(map(math.log, values))) for name, values in means.items()}
    print("\ngeometric mean / ddp: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means_of.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

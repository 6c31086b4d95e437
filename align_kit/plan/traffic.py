"""What ranks send each other in an optimizer step, by collective, as DeepSpeed's comms logger counts it.

Source: DeepSpeed 0.19.8, `runtime/zero/{stage3,stage_1_and_2}.py` and `runtime/engine.py`. Bytes are those of the
tensor a rank hands in: a shard to an all-gather, the whole to a reduction. Evaluations and saves are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from align_kit.plan.engines import Gathered, played, without_sizes
from align_kit.plan.facts import Run, Weight
from align_kit.plan.state import NO_DECAY
from align_kit.plan.wire import on_wire

GATHER, SCATTER, REDUCE, AGREE = "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast"
ALIGNED = 2  # elements a rank that ZeRO-1 and 2 pad a group to (`nccl_start_alignment_factor`)
NORM_BYTES = {0: 4, 1: 4, 2: 4, 3: 8}  # of a gradient's norm, by stage
INT_BYTES = 8


@dataclass(frozen=True)
class Sent:
    """Calls of one collective and the bytes a rank hands in, per optimizer step."""

    calls: float
    bytes: float


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in an optimizer step; of an online phase a mean over the steps of an iteration."""

    by: dict[str, Sent] = field(default_factory=dict)
    ranks: int = 1

    @property
    def link_bytes(self) -> float:
        """Bytes a rank puts on the wire."""
        return sum(on_wire(name, sent.bytes, self.ranks) for name, sent in self.by.items())

    @property
    def calls(self) -> float:
        """Collectives in all."""
        return sum(sent.calls for sent in self.by.values())


def traffic(run: Run) -> Traffic:
    """Return what `run` sends in an optimizer step."""
    if run.world_size == 1:
        return Traffic()
    sent = _split(run) if run.engine.stage == 3 else _whole(run)
    return Traffic(dict(sorted(sent.items())), run.world_size)


# --- stages 0 to 2 ----------------------------------------------------------------------------------------------------


def _whole(run: Run) -> dict[str, Sent]:
    """Whole gradients are reduced, at stage 2 those of each micro-batch; updated shares are gathered."""
    size, stage, groups = run.engine.element_bytes, run.engine.stage, _groups(run)
    times = run.accumulation if stage == 2 else 1
    buckets = _buckets((weight for group in groups for weight in group), run.engine.reduce_bucket)
    norms = len(groups) if stage else int(run.engine.precision == "fp32")
    checks = int(stage > 0 and run.engine.precision != "fp32")  # a byte that tells of an overflow
    reduced = times * run.policy.trained_size * size + norms * NORM_BYTES[stage] + checks
    sent = {REDUCE: Sent(times * buckets + norms + checks, reduced)}
    if stage:
        shares = [-(-_elements(group) // (ALIGNED * run.world_size)) * ALIGNED for group in groups]
        calls = sum(max(1, -(-share * run.world_size // run.engine.allgather_bucket)) for share in shares)
        sent[GATHER] = Sent(calls, sum(shares) * size)
    return sent


def _groups(run: Run) -> list[list[Weight]]:
    """Return the trained parameters by optimizer group: with weight decay, and without."""
    groups: tuple[list[Weight], list[Weight]] = ([], [])
    for weight in run.policy.weights:
        if weight.trained:
            groups[NO_DECAY.search(weight.name.lower()) is not None].append(weight)
    return [group for group in groups if group]


def _elements(weights: Iterable[Weight]) -> int:
    return sum(weight.size for weight in weights)


def _buckets(weights: Iterable[Weight], room: int) -> int:
    """Return in how many buckets gradients are reduced: one is sent when the next gradient would not fit in."""
    count, filled = 0, 0
    for weight in reversed(list(weights)):
        if filled and filled + weight.size > room:
            count, filled = count + 1, 0
        filled += weight.size
    return count + bool(filled)


# --- stage 3 ----------------------------------------------------------------------------------------------------------


def _split(run: Run) -> dict[str, Sent]:
    """Shards are gathered for each pass, gradients scattered in each micro-batch."""
    sent = _gathered(run)
    trained = [weight for weight in run.policy.weights if weight.trained]
    whole = sum(run.world_size * _share(weight, run) for weight in trained) * run.engine.element_bytes
    buckets, norms = _buckets(trained, run.engine.reduce_bucket), len(_groups(run))
    sent[SCATTER] = Sent(run.accumulation * buckets, run.accumulation * whole)
    sent[REDUCE] = Sent(norms, norms * NORM_BYTES[3])
    return sent


def _gathered(run: Run) -> dict[str, Sent]:
    """Return the all-gathers of a step, and the broadcasts that keep traces in step."""
    steps = run.rollout.steps if run.rollout else 1
    found = _totals(played(without_sizes(run), run.accumulation), run)
    calls, sent, agreements, told = (found / steps).tolist()
    return {GATHER: Sent(calls, sent), **({AGREE: Sent(agreements, told)} if agreements else {})}


def _totals(models: Iterable[Gathered], run: Run) -> Any:
    """Return calls and bytes of all-gathers, then of broadcasts, as an array."""
    import numpy as np

    total = np.zeros(4)
    for model in models:
        total += (model.calls, 0.0, len(model.agreed), INT_BYTES * sum(model.agreed))
        for place, times in model.times.items():
            weight = model.shape.weights[place]
            total[1] += times * _share(weight, run) * (weight.element_bytes or run.engine.element_bytes)
    return total


def _share(weight: Weight, run: Run) -> int:
    """Return the elements of a rank's shard of a parameter."""
    return -(-weight.size // run.world_size)

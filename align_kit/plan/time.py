"""How long a step takes and a run, what bounds it, and what it costs.

A step computes at the calibrated share of the peak (MFU counts model operations; what is recomputed takes as long a
token). The engine hides a calibrated share of its traffic behind computing where it overlaps the two; nothing hides
the optimizer's trip to the host. Writing token by token reads all weights and the cache for each token of a batch:
its memory's bandwidth bounds it, or arithmetic where a batch is large.
"""

from __future__ import annotations

from dataclasses import dataclass

from align_kit.plan.facts import Run
from align_kit.plan.hardware import Hardware
from align_kit.plan.state import moved_shards
from align_kit.plan.traffic import Traffic
from align_kit.plan.work import Work

FP32 = 4
HOUR = 3600.0


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step by what they go to, and of the run; `exposed` is traffic that nothing hides.

    `link` is what all traffic takes, hidden or not; `once` is a step's share of what a run does once, as filling the
    store of a cached reference. `dollars` is None where no price is known.
    """

    compute: float
    link: float
    exposed: float
    offload: float
    generation: float
    steps: int
    devices: int
    dollars_per_hour: float | None = None
    once: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of an optimizer step; of an online phase a mean over an iteration's."""
        return self.compute + self.exposed + self.offload + self.generation

    @property
    def hours(self) -> float:
        """Hours of the run's steps with what it does once for them, without its start, evaluations and saves."""
        return (self.seconds + self.once) * self.steps / HOUR

    @property
    def dollars(self) -> float | None:
        """What the devices cost for those hours."""
        return None if self.dollars_per_hour is None else self.hours * self.devices * self.dollars_per_hour

    @property
    def bound(self) -> str:
        """What takes most of a step, be it hidden or not: "compute", "link", "offload" or "generation"."""
        parts = {
            "compute": self.compute,
            "link": self.link,
            "offload": self.offload,
            "generation": self.generation,
        }
        return max(parts, key=lambda name: parts[name])


def timed(run: Run, traffic: Traffic, work: Work, hardware: Hardware) -> Time:
    """Return how long a step of `run` takes on `hardware`, and the run."""
    compute = _compute(run, work, hardware)
    link = traffic.link_bytes / _link(run, hardware) if run.world_size > 1 else 0.0
    hidden = min(link * hardware.calibration.overlap, compute) if run.engine.overlap_comm else 0.0
    return Time(
        compute,
        link,
        link - hidden,
        _offload(run, hardware),
        _generation(run, hardware),
        run.steps,
        run.world_size,
        hardware.dollars_per_hour,
    )


def _compute(run: Run, work: Work, hardware: Hardware) -> float:
    """Seconds of arithmetic, without a rollout's: that has its own bound."""
    operations = work.flops - work.by.get("rollout", 0.0)
    return operations / (hardware.flops[run.engine.precision] * hardware.calibration.mfu)


def _link(run: Run, hardware: Hardware) -> float:
    """Return the bytes a second a rank gets out.

    Across nodes as many rings run as a node has ranks, each leaves it by a network link of its own with its share.
    """
    wire = hardware.node_link
    if run.nodes > 1:
        wire = min(wire, run.ranks_per_node * hardware.network_link)
    return wire * hardware.calibration.link_share


def _offload(run: Run, hardware: Hardware) -> float:
    """Seconds in which gradients go to the host and weights come back, and the host updates its masters.

    The update reads and writes master, two moments and gradient: bound by the host's memory, taken at the link's rate
    to it, for want of a better number.
    """
    owned = run.policy.trained_size / run.world_size
    seconds = 0.0
    if run.engine.offload_optimizer != "none":
        seconds += 2 * owned * run.engine.element_bytes / hardware.host_link + 7 * owned * FP32 / hardware.host_link
    if run.engine.offload_param != "none":
        shards = run.policy.size / run.world_size * run.engine.element_bytes
        seconds += 2 * run.accumulation * shards / hardware.host_link
    return seconds + _fetched(run) / hardware.host_link


def _fetched(run: Run) -> float:
    """Return the bytes of frozen models that come from the host in a step: each shard once for each forward."""
    forwards: float = run.accumulation * (2 if run.phase == "kto" else 1)  # by its reference the baseline's, too
    if run.rollout is not None:
        forwards = -(-run.rollout.completions // run.rollout.score_batch_size) / run.rollout.steps
    return forwards * sum(moved_shards(held, run) for held in run.frozen)


def _generation(run: Run, hardware: Hardware) -> float:
    """Seconds of an iteration's writing, for each of its steps."""
    rollout, policy = run.rollout, run.policy
    if rollout is None:
        return 0.0
    size, calibration = run.engine.element_bytes, hardware.calibration
    written, batches = rollout.response_tokens, -(-rollout.completions // rollout.batch_size)
    at_once = rollout.completions / batches
    context = rollout.prompt_tokens + written / 2
    read = _writer(run) * size + at_once * context * 2 * policy.layers * policy.kv_heads * policy.head_dim * size
    by_memory = read / (hardware.bandwidth * calibration.memory_share)
    by_arithmetic = 2 * _writer(run) * at_once / (hardware.flops[run.engine.precision] * calibration.mfu)
    return batches * written * max(by_memory, by_arithmetic) / rollout.steps


def _writer(run: Run) -> float:
    """Return the elements of the model that writes: the policy without what stands beside it."""
    beside = ("value.", "value_head.", "reward_heads.")
    return float(sum(weight.size for weight in run.policy.weights if not weight.name.startswith(beside)))

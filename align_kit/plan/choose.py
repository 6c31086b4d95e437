"""Ways to carry out a run that take the same steps on the same data, those that fit, and which of them is cheapest.

What is chosen between moves memory and time and no result but by rounding: the ZeRO stage, what is offloaded, how a
global batch is cut, whether activations are recomputed, where frozen models live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

from align_kit.plan.facts import EngineFacts, Held, Micro, Placement, Run
from align_kit.plan.hardware import Hardware
from align_kit.plan.memory import Memory, memory
from align_kit.plan.plan import Plan
from align_kit.plan.plan import plan as plan_of
from align_kit.plan.state import PASSING

LARGEST = 64  # rows a rank takes at a time, at the most that is tried
MOST_RANKS = 4096
SPARE = 0.05  # of a device, left by what is proposed: an allocator cannot use every piece of it
NEAR = 1.01  # times within this factor of the least are the same: the arithmetic knows no better
MOVABLE = ("sharded", "offloaded")  # placements of a frozen model of its own, in the run's precision


@dataclass(frozen=True)
class Limits:
    """What there is of memory, in bytes: on each rank's device, and on each node; `one` where both are the same RAM."""

    device: int
    host: int
    one: bool = False

    def needed(self, run: Run, memory: Memory) -> tuple[int, int]:
        """Return what a run takes of each rank's device, and of each node beside."""
        passing = sum(size for name, size in memory.host.items() if name in PASSING)
        lasting = sum(memory.host.values()) - passing
        if self.one:  # where what passes is not there at the peak, which knows of the final save too
            fullest = max(memory.peak, memory.persistent + passing // run.ranks_per_node)
            return fullest + lasting // run.ranks_per_node, 0
        return memory.peak, lasting + passing

    def fits(self, run: Run, memory: Memory, spare: float = 0.0) -> bool:
        """Tell whether there is enough of both, with a share of the device to `spare`."""
        device, host = self.needed(run, memory)
        return device <= self.device * (1 - spare) and host <= self.host


@dataclass(frozen=True)
class Engine:
    """An engine to choose: what `deepspeed:` says then, and what follows from it."""

    name: str
    facts: EngineFacts


@dataclass(frozen=True)
class Setting:
    """What differs from the configuration; None, or nothing, where it stays as configured."""

    engine: Engine | None = None
    checkpointing: bool | None = None
    placements: tuple[tuple[str, str], ...] = ()  # (role, placement)
    per_device: int | None = None
    evaluates: int | None = None  # rows a rank evaluates on at a time

    @property
    def parts(self) -> int:
        """How many choices differ from the configuration."""
        said = (self.engine, self.placements, self.per_device, self.evaluates)
        return sum(bool(part) for part in said) + (self.checkpointing is not None)


@dataclass(frozen=True)
class Space:
    """The run as configured, and what may be changed of it.

    `sized` gives a run at another micro-batch and accumulation, `evaluated` the heaviest micro-batch of so many rows in
    an evaluation; `cut_is_free` tells that the loss is the same however a global batch is cut, `by_global_batch` that
    the accumulation follows from `global_batch_size`, `cached` that the reference may be computed once and stored,
    `passes` how often the run goes through its data.
    """

    run: Run
    engines: Sequence[Engine]
    sized: Callable[[Run, int, int], Run]
    evaluated: Callable[[int], Micro] | None = None
    cut_is_free: bool = True
    by_global_batch: bool = False
    cached: bool = False
    passes: float = 1.0


@dataclass(frozen=True)
class Way:
    """One way to carry out the run: what it changes of the configuration, what it takes, whether that fits."""

    setting: Setting
    changes: Mapping[str, Any]  # option: value
    plan: Plan
    fits: bool
    barely: bool = False  # it fits, and less is free than what is proposed leaves

    @property
    def seconds(self) -> float:
        """What an optimizer step takes, with its share of what is done once."""
        return self.plan.time.seconds + self.plan.time.once

    def words(self) -> str:
        """Return the changes as they stand on a command line; empty where there are none."""
        return words(self.changes)


def words(changes: Mapping[str, Any]) -> str:
    """Return options as they stand on a command line."""
    return " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())


@dataclass(frozen=True)
class Wider:
    """So many ranks that the run would fit on, with what has to be changed beside, and the rows of a step then."""

    ranks: int
    changes: Mapping[str, Any]
    batch: int  # the configured one, or the least above it that so many ranks can share


@dataclass(frozen=True)
class Choice:
    """The run as configured, the ways that fit (cheapest first), and the smallest change that makes it fit."""

    configured: Way
    fitting: tuple[Way, ...]
    smallest: Way | None  # None where it fits as it is, or where nothing helps
    wider: Wider | None = None  # where nothing else helps

    @property
    def best(self) -> Way | None:
        """The cheapest way that fits."""
        return self.fitting[0] if self.fitting else None


def choose(space: Space, hardware: Hardware, limits: Limits) -> Choice:
    """Try the ways in `space` on `hardware` and return those that fit within `limits`.

    Of each combination of engine, checkpointing and placements the largest micro-batch that fits is taken: it gathers
    weights the fewest times. What is moved out to the host is waited for: that is tried where nothing else fits.
    """
    tried = _Tried(space, hardware, limits)
    configured = tried(Setting())
    found = [configured] if configured.fits else []
    for offloads in (False, True):
        if not (found and offloads):
            some = [one for one in combinations(space) if _offloads(applied(space, one)) == offloads]
            found += map(tried, filter(None, map(tried.largest, some)))
    least = min((way.seconds for way in found), default=0.0)
    ranked = sorted(found, key=lambda way: (max(way.seconds, least * NEAR), way.setting.parts, way.plan.memory.peak))
    smallest = None if configured.fits else smallest_change(space, tried)
    helpless = not configured.fits and smallest is None
    return Choice(configured, tuple(ranked), smallest, _wider(space, tried) if helpless else None)


class _Tried:
    """The ways that were tried, each planned once; whether one fits is known without planning all of it."""

    def __init__(self, space: Space, hardware: Hardware, limits: Limits) -> None:
        self.space, self.hardware, self.limits = space, hardware, limits
        self._ways: dict[Setting, Way] = {}

    def memory(self, run: Run) -> Memory:
        return memory(run, self.hardware.kind)

    def fits(self, run: Run) -> bool:
        """Tell whether a way fits well enough to be proposed."""
        return self.limits.fits(run, self.memory(run), SPARE)

    def largest(self, combination: Setting, *, below: int | None = None) -> Setting | None:
        """Return `combination` with the largest micro-batch that fits (and is below `below`), unless none does.

        None too where that is the run as configured.
        """
        sizes = [size for size in _sizes(self.space) if below is None or (size is not None and size < below)]
        settings = (self.lighter(replace(combination, per_device=size)) for size in sizes)
        return next((one for one in settings if one is not None and one.parts), None)

    def lighter(self, setting: Setting) -> Setting | None:
        """Return `setting` where it fits, else with the largest micro-batch of evaluations that it fits with, if any.

        The sums of an evaluation do not depend on its batches.
        """
        rows = self.space.run.per_device_eval
        while True:
            run = applied(self.space, setting)
            needs = self.memory(run)
            if self.limits.fits(run, needs, SPARE):
                return setting
            if needs.at != "evaluation" or rows < 2:
                return None
            rows //= 2
            setting = replace(setting, evaluates=rows)

    def __call__(self, setting: Setting) -> Way:
        if setting not in self._ways:
            self._ways[setting] = self._way(setting)
        return self._ways[setting]

    def _way(self, setting: Setting) -> Way:
        run = applied(self.space, setting)
        plan = plan_of(run, self.hardware)
        if "cached" in dict(setting.placements).values():  # computed once in place of once an epoch
            kept = self(replace(setting, placements=()))
            once = max(0.0, kept.seconds - plan.time.seconds) / max(1.0, self.space.passes)
            plan = replace(plan, time=replace(plan.time, once=once))
        fits = self.limits.fits(run, plan.memory)
        barely = fits and not self.limits.fits(run, plan.memory, SPARE)
        return Way(setting, changes(self.space, setting), plan, fits, barely)


# --- what may be changed ----------------------------------------------------------------------------------------------


def combinations(space: Space) -> Iterator[Setting]:
    """Yield every combination of engine, checkpointing and placements, the configured one first."""
    engines = [None, *(engine for engine in space.engines if engine.facts != space.run.engine)]
    for engine, checkpointing, placements in product(
        engines, (None, not space.run.checkpointing), _placements(space)
    ):
        setting = Setting(engine, checkpointing, placements)
        if _allowed(space, setting):
            yield setting


def _placements(space: Space) -> Iterator[tuple[tuple[str, str], ...]]:
    """Yield what may be said about frozen models: of the reference and of the reward models, which move together."""
    own = {_option(held): held.placement for held in space.run.frozen if held.placement in MOVABLE}
    options: list[list[tuple[str, str] | None]] = []
    for role, now in own.items():
        others = [one for one in MOVABLE if one != now] + ["cached"] * (role == "reference" and space.cached)
        options.append([None, *((role, one) for one in others)])
    for said in product(*options):
        yield tuple(one for one in said if one is not None)


def _offloads(run: Run) -> bool:
    """Tell whether anything of the run lies in the host's memory."""
    moved = {run.engine.offload_optimizer, run.engine.offload_param} != {"none"}
    return moved or any(held.placement == "offloaded" for held in run.frozen)


def _option(held: Held) -> str:
    """Return the role as its option names it: several reward models share one."""
    return held.role.partition("_")[0]


def _allowed(space: Space, setting: Setting) -> bool:
    """Tell whether the engine can hold the frozen models so: only ZeRO-3 offloads a frozen model."""
    run = applied(space, setting)
    return run.engine.stage == 3 or all(held.placement != "offloaded" for held in run.frozen)


def _sizes(space: Space) -> list[int | None]:
    """Return the micro-batches that keep the loss, the largest first; None for the one configured."""
    if not space.cut_is_free:
        return [None]
    run = space.run
    share = run.per_device * run.accumulation
    sizes = [size for size in range(min(share, max(LARGEST, run.per_device)), 0, -1) if share % size == 0]
    return [None if size == run.per_device else size for size in sizes]


def applied(space: Space, setting: Setting) -> Run:
    """Return the run with the changes of `setting`."""
    run, said = space.run, cast("dict[str, Placement]", dict(setting.placements))
    frozen = tuple(replace(held, placement=said.get(_option(held), held.placement)) for held in run.frozen)
    run = replace(run, frozen=frozen)
    if setting.engine is not None:
        run = replace(run, engine=setting.engine.facts)
    if setting.checkpointing is not None:
        run = replace(run, checkpointing=setting.checkpointing)
    if setting.evaluates and space.evaluated:
        run = replace(run, evaluated=space.evaluated(setting.evaluates), per_device_eval=setting.evaluates)
    if setting.per_device is None:
        return run
    return space.sized(run, setting.per_device, run.per_device * run.accumulation // setting.per_device)


def changes(space: Space, setting: Setting) -> dict[str, Any]:
    """Return what the configuration has to say for `setting`: option and value."""
    said: dict[str, Any] = {}
    if setting.engine is not None:
        said["deepspeed"] = setting.engine.name
    if setting.per_device is not None:
        said["per_device_train_batch_size"] = setting.per_device
        if not space.by_global_batch:
            share = space.run.per_device * space.run.accumulation
            said["gradient_accumulation_steps"] = share // setting.per_device
    if setting.evaluates is not None:
        said["per_device_eval_batch_size"] = setting.evaluates
    if setting.checkpointing is not None:
        said["gradient_checkpointing"] = setting.checkpointing
    return said | {f"{role}_placement": placement for role, placement in setting.placements}


# --- where it does not fit --------------------------------------------------------------------------------------------


def smallest_change(space: Space, tried: _Tried) -> Way | None:
    """Return the way that fits with the fewest choices changed, of these the quickest; None where none fits."""
    known = list(combinations(space))
    for count in range(1, 6):
        alone = [one for one in known if one.parts == count and tried.fits(applied(space, one))]
        fewer = [one for one in known if one.parts == count - 1]
        smaller = [tried.largest(one, below=space.run.per_device) for one in fewer]
        lighter = [tried.lighter(one) for one in fewer]
        if fitting := [*alone, *(one for one in [*lighter, *smaller] if one is not None and one.parts >= count)]:
            return min(map(tried, fitting), key=lambda way: (way.setting.parts, way.seconds))
    return None


def _wider(space: Space, tried: _Tried) -> Wider | None:
    """Return on how many ranks the run would fit, in the ways that take least of these; None if none help.

    The global batch stays as long as the ranks can share it evenly; beyond that each has one micro-batch.
    """
    smallest, least = _sizes(space)[-1], 1 if tried.memory(space.run).at == "evaluation" else None
    settings = [replace(combination, per_device=smallest, evaluates=least) for combination in combinations(space)]
    runs = [applied(space, setting) for setting in settings]
    needs = [tried.limits.needed(run, tried.memory(run)) for run in runs]
    leanest = [min(range(len(runs)), key=lambda way: (needs[way][first], needs[way][1 - first])) for first in (0, 1)]
    growth = 2
    while (ranks := growth * space.run.world_size) <= MOST_RANKS:
        for way in leanest:
            run = _spread_over(runs[way], growth)
            if tried.fits(run):
                return Wider(ranks, _changes_over(space, settings[way], run), global_batch(run))
        growth *= 2
    return None


def _spread_over(run: Run, growth: int) -> Run:
    """Return the run on so many times its ranks, each accumulating so much less, but a micro-batch at least."""
    ranks = growth * run.world_size
    accumulation = -(-run.accumulation // growth)
    return replace(run, world_size=ranks, nodes=-(-ranks // run.ranks_per_node), accumulation=accumulation)


def _changes_over(space: Space, setting: Setting, run: Run) -> dict[str, Any]:
    """Return what the configuration has to say for `setting` on more ranks: what it accumulates too."""
    said = changes(space, setting)
    if space.by_global_batch:
        same = global_batch(run) == global_batch(space.run)
        return said if same else said | {"global_batch_size": global_batch(run)}
    said.pop("gradient_accumulation_steps", None)
    same = run.accumulation == space.run.accumulation
    return said if same else said | {"gradient_accumulation_steps": run.accumulation}


def global_batch(run: Run) -> int:
    """Return the rows or pairs of an optimizer step over all ranks."""
    return run.per_device * run.accumulation * run.world_size

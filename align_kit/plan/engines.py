"""The passes a step makes through the engines of a run, one after the other, as the trainers make them.

The policy's engine and each frozen model of its own under ZeRO-3 have a `gathers.Coordinator`. What comes before the
first step is played too: the coordinator remembers what it let go in the forwards that settle a run.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

from align_kit.plan.facts import EngineFacts, Held, Micro, Run, Shape
from align_kit.plan.gathers import Coordinator, InMemory
from align_kit.plan.visits import EMBEDDING, HEADS, Call, Module, called, carry, modules

SETTLED_BY = 4  # sequences that are computed plain, to compare the run's way with; further ones change nothing
POLICY = "policy"
REFERENCE, VALUE = "reference", "value"


@dataclass
class Gathered:
    """How often each parameter of a model was gathered, by its place in the shape, and in how many all-gathers.

    `agreed` are the broadcasts by which ranks compare their traces, by the numbers in each; `most` are the elements
    that are whole at once in a "forward" and a "backward", those that always are left out.
    """

    shape: Shape
    times: Counter[int] = field(default_factory=Counter)
    calls: float = 0.0
    agreed: list[int] = field(default_factory=list)
    most: dict[str, int] = field(default_factory=dict)
    memory: InMemory = field(default_factory=InMemory)


class Engine:
    """A model in a ZeRO-3 engine: its coordinator, and the calls that each of its roles makes."""

    def __init__(self, shape: Shape, facts: EngineFacts) -> None:
        self.shape = shape
        self.root = modules(shape)
        self.trained = [weight.trained for weight in shape.weights]
        self.coordinator = Coordinator(
            [weight.size for weight in shape.weights],
            self.trained,
            threshold=facts.persistence_threshold,
            bucket=facts.prefetch_bucket,
            max_live=facts.max_live,
            reuse=facts.max_reuse,
        )
        self._calls: dict[str, list[Call]] = {}

    def forward(self, role: str = POLICY, *, learns: bool = False, recompute: bool = False) -> None:
        """Run a forward as `role`; where layers are to be computed again their inputs carry gradients."""
        calls = self.calls(role)
        for call in calls if learns else []:
            carry(call, self.trained, opened=recompute)
        self.coordinator.forward(calls, learns=learns)

    def backward(self, role: str, *, recompute: bool) -> None:
        """Run the backward of the last forward that learns, as `role`."""
        self.coordinator.backward(self.calls(role), recompute=recompute)

    def calls(self, role: str) -> list[Call]:
        """Return the calls that a forward as `role` makes."""
        if role not in self._calls:
            self._calls[role] = self._of(role)
        return self._calls[role]

    def _of(self, role: str) -> list[Call]:
        inner = self.root.inner
        copied = any(".lora_" in weight.name and f".{REFERENCE}." in weight.name for weight in self.shape.weights)
        frozen = REFERENCE if copied else None  # the adapter that a reference on the policy's base computes with
        if not {"value", "value_head"} & inner.keys():
            return called(self.root, adapter=frozen if role == REFERENCE else "default", head=role != "trunk")
        made: list[Call] = []
        if role in (POLICY, "both"):
            made += called(inner[POLICY])
        if role == REFERENCE:
            made += called(inner[POLICY], adapter=frozen)
        if role in (VALUE, "both", "states"):
            made += self._valued(head=role != "states")
        if not made:
            made = called(_trunk(inner[POLICY]), adapter=role) + called(inner["reward_heads"].inner[role])
        return [Call(self.root, made)]

    def _valued(self, *, head: bool) -> list[Call]:
        """Return the calls of the value function: its own trunk, or the policy's with its adapter; then its head."""
        inner = self.root.inner
        own = inner.get("value")
        over = inner["value_head"] if own is None else next(own.inner[word] for word in HEADS if word in own.inner)
        return called(_trunk(own or inner[POLICY]), adapter=VALUE) + (called(over) if head else [])


def _trunk(module: Module) -> Module:
    """Return the module that holds the embedding."""
    return next(m for m in module.walk() if any(EMBEDDING.search(inner.name) for inner in m.inner.values()))


def has_engine(held: Held) -> bool:
    """Tell whether ZeRO-3 splits a frozen model of its own."""
    return held.shape is not None and held.placement in ("sharded", "offloaded")


# --- a run ------------------------------------------------------------------------------------------------------------


class Played:
    """A run's engines, and its start and steps played on them."""

    def __init__(self, run: Run, micros: int) -> None:
        self.run, self.micros, self.begun = run, micros, False
        self.policy = Engine(run.policy, run.engine)
        self.frozen = {
            held.role: Engine(held.shape, run.engine)
            for held in run.frozen
            if held.shape is not None and has_engine(held)
        }

    @property
    def engines(self) -> list[Engine]:
        """The policy's engine and those of frozen models."""
        return [self.policy, *self.frozen.values()]

    def start(self) -> None:
        """Play what comes before the first step: the way of computing is settled, gates are passed."""
        run = self.run
        for frozen in self.frozen.values() if run.forward != "plain" else ():
            self._repeat(SETTLED_BY, frozen.forward)
        if run.resumed:
            return
        if run.forward != "plain":
            self._answers("trunk" if run.phase == "reward" else POLICY)
            self._repeat(SETTLED_BY, lambda: self._answers(POLICY))
        if run.rollout is None and run.gated and (self._has(REFERENCE) or run.policy.head == "score"):
            self._ratio()

    def _answers(self, role: str) -> None:
        """Play what two ways of computing are compared by: PPO's value function is asked for its states, too."""
        for one in (role, "states") if self.run.phase == "ppo" else (role,):
            self.policy.forward(one)

    def cycle(self) -> None:
        """Play an optimizer step, or an iteration of an online phase with all its steps."""
        rollout = self.run.rollout
        if rollout is not None:
            self._iterate()
            if not (self.begun or self.run.resumed):
                self.policy.forward()  # the gate before the first step
            self.begun = True
        self._repeat(rollout.steps if rollout else 1, self._step)

    def _repeat(self, times: int, play: Callable[[], None]) -> None:
        """Play the same so often; once it leaves the engines as it found them the rest is counted and not played."""
        did = [engine.coordinator for engine in self.engines]
        for left in reversed(range(times)):
            standing, counts = self.standing(), [coordinator.counts() for coordinator in did]
            play()
            if self.standing() == standing:
                for coordinator, before in zip(did, counts, strict=True):
                    coordinator.count_again(before, left)
                return

    def standing(self) -> Hashable:
        """Return all that what comes next depends on."""
        return self.begun, *(engine.coordinator.standing() for engine in self.engines)

    def _step(self) -> None:
        if self.run.phase == "kto":
            self._repeat(self.micros, self._ratio)
        self._repeat(self.micros, self._micro)
        self.policy.coordinator.update()

    def _ratio(self) -> None:
        """Play how policy and reference look at a batch without learning from it; a score needs no reference."""
        self.policy.forward()
        self._answer(REFERENCE)

    def _micro(self) -> None:
        role = POLICY if self.run.rollout is None else "both"
        recompute = self.run.checkpointing
        self.policy.forward(role, learns=True, recompute=recompute)
        if self.run.rollout is None:
            for held in self.run.frozen:
                self._answer(held.role)
        self.policy.backward(role, recompute=recompute)

    def _iterate(self) -> None:
        """Play how an iteration's completions are written and judged."""
        run, rollout = self.run, self.run.rollout
        assert rollout is not None
        beside = ("value.", "value_head.", "reward_heads.")
        self.policy.coordinator.gather_all(
            place
            for place, weight in enumerate(run.policy.weights)
            if not weight.name.startswith(beside) and (".lora_" not in weight.name or ".default." in weight.name)
        )
        batches = math.ceil(rollout.completions / rollout.score_batch_size)
        self._repeat(batches, lambda: self.policy.forward("both"))
        for held in run.frozen:
            self._repeat(batches, functools.partial(self._answer, held.role))

    def _has(self, role: str) -> bool:
        return any(held.role == role for held in self.run.frozen)

    def look(self) -> None:
        """Play an evaluation: each forward finds what the one before has left."""
        self._repeat(LOOKED, self._ratio)

    def _answer(self, role: str) -> None:
        """Play a forward of a frozen role, in whichever engine computes it."""
        held: Held | None = next((held for held in self.run.frozen if held.role == role), None)
        if held is None or held.placement in ("cached", "quantised"):
            return
        if role in self.frozen:
            self.frozen[role].forward()
        else:
            self.policy.forward(role)

    def forget(self) -> None:
        """Count from here."""
        for engine in self.engines:
            engine.coordinator.forget()

    def gathered(self) -> list[Gathered]:
        """Return what every engine gathered since `forget`."""
        pairs = [(engine.shape, engine.coordinator) for engine in self.engines]
        return [
            Gathered(shape, Counter(did.gathered), did.calls, list(did.agreed), dict(did.most), did.memory)
            for shape, did in pairs
        ]


def without_sizes(run: Run) -> Run:
    """Return the run without what gathers do not depend on, so that candidates of a plan share what was played."""
    nothing = Micro(0, 0, 0, 0, 0)
    alike = {"mean": nothing, "worst": nothing, "steps": 0, "accumulation": 1, "per_device": 1, "world_size": 1}
    alike |= dict.fromkeys(("checkpoints_made", "checkpoints_kept", "checkpoints_lasting"), 0)
    return replace(run, **alike, nodes=1, evaluated=None, per_device_eval=0, checkpoints_limit=None, notes=())  # type: ignore[arg-type]


LOOKED = 4  # batches of an evaluation: further ones find what the last did
LEARNT_BY = 8  # steps (or iterations) by which ZeRO-3 has learnt the order of the modules, if it ever does


@functools.lru_cache(maxsize=64)
def played(run: Run, micros: int, begun: int | None = None, evaluates: bool = False) -> list[Gathered]:
    """Return what one step (or iteration) of `run` gathers with `micros` micro-batches, once it is as the one before.

    Or after as many steps (or iterations) as have `begun`. Where it `evaluates`, what an evaluation in place of the
    step does.
    """
    play = Played(run, micros)
    play.start()
    for _ in range(LEARNT_BY if begun is None else begun):
        standing = play.standing()
        play.cycle()
        if begun is None and play.standing() == standing:
            break
    play.forget()
    play.look() if evaluates else play.cycle()
    return play.gathered()

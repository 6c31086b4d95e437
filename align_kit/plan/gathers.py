"""Which parameters ZeRO-3 gathers, when, and how many at a time: its coordinator, played through without tensors.

Source: DeepSpeed 0.19.8, `runtime/zero/partitioned_param_coordinator.py` and `parameter_offload.py`. The coordinator
records in which order modules run between two forwards of an engine, and from then on gathers ahead by that trace and
keeps what comes again soon. A trace that does not fit is dropped and recorded anew.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from align_kit.plan.visits import Call, Module

INVALID, RECORDING, COMPLETE = range(3)
EMBEDS = -1  # in place of the layers that have run, before the first is entered
FORWARD, LEARNING, BACKWARD = "forward", "learning", "backward"  # of which the second is followed by the third
NEVER = -(10**10)
GLOO_THREADS = 2  # of a process group (torch: `ProcessGroupGloo::Options`)
At = tuple[str, int, bool]  # a pass, how many layers have run in it (in a backward: are left), and whether a head runs


@dataclass
class Bucket:
    """An all-gather of several parameters that are not used yet, and the elements of the buffer it fills.

    Once the first is used all are joined of their shards; the buffer goes with the last (`AllGatherCoalescedHandle`).
    """

    waiting: set[int]
    elements: int
    joined: bool = False


class Counts(NamedTuple):
    """How often each parameter was gathered, in how many all-gathers, and how many broadcasts there were."""

    gathered: Counter[int]
    calls: int
    agreed: int


@dataclass
class InMemory:
    """Elements that are in memory beside those that always are: the most at each place of a pass.

    `held` while modules compute: whole parameters, and the buffers of all-gathers. Gloo receives in copies (see
    `Coordinator.copies`): `copied` are the same with those, `arriving` the most there was just before.
    """

    held: dict[At, int] = field(default_factory=lambda: defaultdict(int))
    copied: dict[At, int] = field(default_factory=lambda: defaultdict(int))
    arriving: dict[At, int] = field(default_factory=lambda: defaultdict(int))

    def note(self, at: At, held: int, copies: int, arriving: int) -> None:
        """Note what is there `at` a place of a pass."""
        self.held[at] = max(self.held[at], held)
        self.copied[at] = max(self.copied[at], held + copies)
        self.arriving[at] = max(self.arriving[at], arriving)


class Coordinator:
    """Gathers and releases parameters as modules run; `sizes` are their elements, places tell them apart.

    `gathered` counts how often each was gathered, `calls` in how many all-gathers, and `agreed` lists the broadcasts
    that compare the ranks' traces by the numbers in them, `most` the elements whole at once in each pass, and `memory`
    what of them lies in memory; since `forget`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        trained: Sequence[bool],
        *,
        threshold: int,
        bucket: int,
        max_live: int,
        reuse: int,
    ) -> None:
        self.sizes, self.trained = sizes, trained
        self.persistent = [size <= threshold for size in sizes]
        self.bucket, self.max_live, self.reuse = bucket, max_live, reuse
        self.here = [False] * len(sizes)
        self.active: list[set[int]] = [set() for _ in sizes]
        self.in_flight: set[int] = set()
        self.buckets: dict[int, Bucket] = {}  # by place, of what is in flight
        self.twice = 0  # elements that lie in a bucket and joined, too
        self.flying: dict[int, int] = {}  # elements of all-gathers that need not be through, by their number
        self.number = 0
        self.numbers: dict[int, int] = {}  # of the latest all-gather of each place
        self.arriving = 0  # the most elements in memory while the latest module was fetched
        self.depth = 0
        self.live = 0  # DeepSpeed's own count, which begins anew with each forward
        self.whole = 0
        self.passing = FORWARD
        self.mode = INVALID
        self.order: list[Module] = []
        self.queue: deque[tuple[int, int]] = deque()
        self.seen: dict[int, int] = defaultdict(lambda: NEVER)
        self.step = 0
        self.kept: dict[tuple[int, int], set[int]] = {}  # DeepSpeed remembers these beyond the trace they are of
        self.backward_of: dict[int, Module] = {}
        self.recomputed: dict[int, set[int]] = defaultdict(set)
        self.recomputing = False
        self.awaited: dict[int, int] = {}  # by module: gradients of its input that are to come
        self.forget()

    def forget(self) -> None:
        """Count from here."""
        self.gathered: Counter[int] = Counter()
        self.calls = 0
        self.agreed: list[int] = []  # numbers in each broadcast by which ranks agree on a trace
        self.most = {FORWARD: 0, BACKWARD: 0}  # elements whole at once, but for those that always are
        self.memory = InMemory()

    def standing(self) -> Hashable:
        """Return all that the next pass depends on: two that are equal are followed by the same."""
        waits = tuple((place, frozenset(at)) for place, at in enumerate(self.active) if at)
        return tuple(self.here), waits, frozenset(self.in_flight), self.mode, tuple(map(id, self.order)), len(self.kept)

    def counts(self) -> Counts:
        """Return what was counted so far."""
        return Counts(Counter(self.gathered), self.calls, len(self.agreed))

    def count_again(self, since: Counts, times: int) -> None:
        """Count what was done `since` so many times more."""
        for place, count in self.gathered.items():
            self.gathered[place] += times * (count - since.gathered[place])
        self.calls += times * (self.calls - since.calls)
        self.agreed += times * self.agreed[since.agreed :]

    # --- the passes of an engine ---

    def forward(self, calls: Iterable[Call], *, learns: bool = False) -> None:
        """Run a forward of the whole engine; where it `learns` a backward follows, sooner or later."""
        self.passing, self.depth = LEARNING if learns else FORWARD, EMBEDS
        self._begin()
        for call in calls:
            self._forward(call, learns)

    def backward(self, calls: Sequence[Call], *, recompute: bool = False) -> None:
        """Run its backward; with `recompute`, layers are computed again when the gradient reaches them."""
        self.passing, self.depth = BACKWARD, sum(map(_layers, calls))
        for call in reversed(calls):
            self._backward(call, recompute)
        for module in [*self.backward_of.values()][::-1]:
            self._end_backward(module, leftover=True)
        self.backward_of.clear()

    def gather_all(self, places: Iterable[int]) -> None:
        """Gather parameters one by one, as `GatheredParameters` does, and let them go."""
        places = list(places)
        for place in places:
            if not self.here[place]:
                self._gather([place])
        for place in places:
            self._set(place, False)
        self.flying.clear()

    def update(self) -> None:
        """Take an optimizer step: everything is let go, then the small parameters are gathered one by one."""
        for place in range(len(self.sizes)):
            self.active[place].clear()
            self._release(place)
        self._arrive()
        for place, stays in enumerate(self.persistent):
            if stays:
                live = self.live
                self._gather([place])
                self.live = live  # not by the coordinator
        self.flying.clear()

    # --- the trace ---

    def _begin(self) -> None:
        self._land()
        if self.mode == RECORDING:
            self.mode = COMPLETE
            self._index()
            self.agreed += [1, len(self.order), *[1, len(self.trace)] * 2]
        elif self.mode == INVALID:
            self.mode, self.order = RECORDING, []
            self.agreed += [1, 0]
        self.queue = deque(self.trace) if self.mode == COMPLETE else deque()
        self.seen.clear()
        self.step, self.live = 0, 0

    def _index(self) -> None:
        """Lay out the finished trace: parameters in order, where each comes again, and elements up to each module."""
        self.trace = [(place, step) for step, module in enumerate(self.order) for place in sorted(set(module.own))]
        self.places: dict[int, list[int]] = defaultdict(list)
        for place, step in self.trace:
            self.places[place].append(step)
        self.traversed = [0, *accumulate(sum(self.sizes[place] for place in module.own) for module in self.order)]

    def _land(self) -> None:
        for place in self.in_flight:
            self._release(place)
        self._arrive()

    def _arrive(self) -> None:
        """Have nothing in flight any more."""
        self.in_flight.clear()
        self.buckets.clear()
        self.flying.clear()
        self.twice = 0

    def _enter(self, module: Module) -> None:
        if self.mode == COMPLETE and (self.step >= len(self.order) or self.order[self.step] is not module):
            self.mode, self.order, self.queue = INVALID, [], deque()
            self.seen.clear()
            self._land()  # what was gathered ahead is lost
        if self.mode == RECORDING:
            self.order.append(module)

    # --- modules ---

    def _forward(self, call: Call, learns: bool, stop_at: Call | None = None) -> bool:
        """Run a forward of `call`; return whether it ended, which a recomputation does not past `stop_at`.

        A forward without gradients makes DeepSpeed forget that an earlier one's are to come (`ds_grads_remaining`).
        """
        self._enter(call.module)
        if call.module.is_layer:
            self.depth = max(self.depth, 0)
        self.awaited[id(call.module)] = int(learns and call.takes)
        self._fetch(call.module)
        self._weigh(call.module)
        if call is stop_at or not all(self._forward(inner, learns, stop_at) for inner in call.calls):
            return False
        self._leave(call.module)
        self.depth += call.module.is_layer and not self.recomputing
        return True

    def _backward(self, call: Call, recompute: bool, waiting: Call | None = None) -> Call | None:
        """Run the backward of `call`; `waiting` is the layer around it that is not computed again yet, returned so."""
        if not call.gives:
            self.depth -= _layers(call)
            return waiting
        self._enter(call.module)
        self.backward_of[id(call.module)] = call.module
        self._fetch(call.module)
        self._weigh(call.module)
        if recompute and call.module.is_layer and waiting is None:
            waiting = call
        if waiting is not None and not call.calls:
            self._recompute(waiting, call)
            waiting = None
        outer = waiting
        for inner in reversed(call.calls):
            outer = self._backward(inner, recompute and not call.module.is_layer, outer)
        self.depth -= call.module.is_layer
        if call.takes:
            self.awaited[id(call.module)] -= 1
            if self.awaited[id(call.module)] == 0:
                self._end_backward(call.module)
        return outer

    def _recompute(self, layer: Call, last: Call) -> None:
        self.recomputing = True
        self._forward(layer, True, stop_at=last)
        self.recomputing = False

    def _end_backward(self, module: Module, *, leftover: bool = False) -> None:
        if not leftover:
            self.backward_of.pop(id(module), None)
        own = set(module.own)
        going = {p for p in own if not self.persistent[p]} if leftover else set(self._to_release(module))
        again = self.recomputed.pop(id(module), set())
        going |= {place for place in again if leftover or not self.persistent[place]}
        for place in own | again:
            self.active[place].discard(id(module))
            if place in going:
                self._release(place)

    def _leave(self, module: Module) -> None:
        going = self._to_release(module)
        for place in module.own:
            self.active[place].discard(id(module))
            if place in going:
                self._release(place)

    def _fetch(self, module: Module) -> None:
        """Gather what a module needs, then ahead of it what comes next in the trace."""
        own = set(module.own)
        self.arriving = 0
        self._gather([place for place in own if not self.here[place]])
        for place in own:
            self.active[place].add(id(module))
            self._use(place)
            if self.recomputing and self.backward_of and not self.trained[place]:
                owner = next(reversed(self.backward_of))
                self.recomputed[owner].add(place)
                self.active[place].add(owner)
        if self.mode == COMPLETE:
            self._skip(own)
            self._prefetch()
        self.step += 1

    def _skip(self, own: set[int]) -> None:
        """Take what a module needs off the queue of what is to be gathered ahead."""
        wanted = {place for place in own if self.seen[place] < self.step}
        skipped: set[int] = set()
        while self.queue and len(skipped) < len(wanted):
            place, step = self.queue.popleft()
            self.seen[place] = step
            skipped.add(place)

    def _prefetch(self) -> None:
        room, ahead, elements = min(self.max_live - self.live, self.bucket), set[int](), 0
        while self.bucket and self.queue and elements < room:
            place, step = self.queue.popleft()
            self.seen[place] = max(self.seen[place], step)
            if not self.here[place] and place not in ahead:
                ahead.add(place)
                elements += self.sizes[place]
        self._gather(ahead)
        self.in_flight |= ahead
        if len(ahead) > 1:
            self.buckets.update(dict.fromkeys(ahead, Bucket(set(ahead), elements)))

    # --- parameters ---

    def _weigh(self, module: Module) -> None:
        """Note what is held while `module` computes."""
        at = self.passing, self.depth, module.is_head
        self.memory.note(at, self.whole + self.twice, self.copies(), self.arriving)

    def copies(self) -> int:
        """Return the elements of copies in which gloo receives: one for each of its threads.

        One more is made, and gone again, as a collective is handed in. What was asked for is received in order.
        """
        return sum(sorted(self.flying.values())[-GLOO_THREADS:])

    def _use(self, place: int) -> None:
        """Take a parameter out of flight."""
        self.in_flight.discard(place)
        if number := self.numbers.pop(place, 0):
            self.flying = {later: elements for later, elements in self.flying.items() if later > number}
        bucket = self.buckets.pop(place, None)
        if bucket is None:
            return
        self.twice += 0 if bucket.joined else bucket.elements
        bucket.joined = True
        self.arriving = max(self.arriving, self.whole + self.twice)
        bucket.waiting.discard(place)
        self.twice -= 0 if bucket.waiting else bucket.elements

    def _gather(self, places: Iterable[int]) -> None:
        places = list(places)
        if not places:
            return
        self.calls += 1
        self.number += 1
        elements, copies = sum(self.sizes[place] for place in places), self.copies()
        self.flying[self.number] = elements
        self.numbers.update(dict.fromkeys(places, self.number))
        self.arriving = max(self.arriving, self.whole + self.twice + 2 * elements + copies)
        for place in places:
            self.gathered[place] += 1
            self._set(place, True)
            self.live += self.sizes[place]
        passing = BACKWARD if self.passing == BACKWARD else FORWARD
        self.most[passing] = max(self.most[passing], self.whole)

    def _release(self, place: int) -> None:
        if self.here[place] and not self.active[place]:
            self._set(place, False)
            self.live -= self.sizes[place]

    def _set(self, place: int, here: bool) -> None:
        if self.here[place] != here and not self.persistent[place]:
            self.whole += self.sizes[place] if here else -self.sizes[place]
        self.here[place] = here

    def _to_release(self, module: Module) -> set[int]:
        """Return which of a module's parameters go now: not those that stay, or come again soon by the trace."""
        if self.mode != COMPLETE:
            return set(module.own)
        key = (id(module), self.step)
        if key not in self.kept:
            self.kept[key] = {place for place in module.own if not self._stays(place)}
        return self.kept[key]

    def _stays(self, place: int) -> bool:
        if self.persistent[place] or self.seen[place] > self.step:
            return True
        steps = self.places[place]
        again = bisect_left(steps, self.step)
        if again == len(steps):
            return False
        return self.traversed[steps[again]] - self.traversed[min(self.step, len(self.order))] < self.reuse


def _layers(call: Call) -> int:
    """Return how many layers run in a call."""
    return int(call.module.is_layer) + sum(map(_layers, call.calls))

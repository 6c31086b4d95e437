"""Which bytes of weights ZeRO-3 holds whole at each place of a micro-batch, beside those that always are whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from align_kit.plan.engines import has_engine, played, without_sizes
from align_kit.plan.facts import Run
from align_kit.plan.gathers import At

PLAYED = 4  # micro-batches of a step that are played through: a further one holds what the last did


@dataclass(frozen=True)
class Whole:
    """What was found by playing a run's coordinators, in elements; nothing below ZeRO-3.

    Of the policy, and by role of frozen models with an engine of their own, while modules compute; `arriving` are the
    policy's before a module computes, with the copy that gloo receives in. Numbers are asked for in bytes.
    """

    policy: Mapping[At, int]
    frozen: Mapping[str, Mapping[At, int]]
    arriving: Mapping[At, int]
    element_bytes: int

    @classmethod
    def of(cls, run: Run, device: str, begun: int | None = None, *, evaluates: bool = False) -> Whole:
        """Play an optimizer step of `run`, or an iteration of an online phase, or an evaluation: see `played`."""
        alone = run.world_size == 1
        if run.engine.stage != 3 or (alone and run.engine.offload_param == "none"):  # a lone rank's shards are whole
            return cls({}, {}, {}, 0)
        copies = device == "cpu" and not alone
        models = played(without_sizes(run), min(run.accumulation, PLAYED), begun, evaluates)
        policy, *frozen = (one.memory.copied if copies else one.memory.held for one in models)
        roles = [held.role for held in run.frozen if has_engine(held)]
        arriving = models[0].memory.arriving if copies else {}
        return cls(policy, dict(zip(roles, frozen, strict=True)), arriving, run.engine.element_bytes)

    def by(self, passing: str, *, head: bool = False, role: str | None = None) -> dict[int, int]:
        """Return the bytes in a pass, by the layers that have run (backward: that are left), at a head or outside."""
        return self._of_pass(self.frozen.get(role or "", self.policy), passing, head)

    def come(self, passing: str, *, head: bool = False) -> dict[int, int]:
        """Return the same of what arrives."""
        return self._of_pass(self.arriving, passing, head)

    def at_head(self, passing: str, *, role: str | None = None) -> int:
        """Return the most bytes in a pass while a head computes."""
        return max(self.by(passing, head=True, role=role).values(), default=0)

    def _of_pass(self, found: Mapping[At, int], passing: str, head: bool) -> dict[int, int]:
        kept = {depth: n for (passed, depth, is_head), n in found.items() if (passed, is_head) == (passing, head)}
        return {depth: self.element_bytes * elements for depth, elements in kept.items()}

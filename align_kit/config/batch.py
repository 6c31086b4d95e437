"""Batch arithmetic: how many pairs or rows an optimizer step takes, and what to do where that does not divide."""

from __future__ import annotations

from dataclasses import dataclass

from align_kit.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step: `global_batch = per_device x world_size x accumulation`, in pairs or rows."""

    per_device: int
    world_size: int
    accumulation: int
    rows: int | None = None  # training rows, where they are known

    @property
    def global_batch(self) -> int:
        """Pairs or rows per optimizer step over all ranks."""
        return self.per_device * self.world_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps per epoch as the Trainer counts them: a last, partial one included."""
        if self.rows is None:
            return None
        batches = -(-self.rows // (self.per_device * self.world_size))
        return max(1, -(-batches // self.accumulation))

    def smaller(self) -> BatchPlan | None:
        """Return the plan with the next smaller micro-batch that keeps the global batch, None where there is none."""
        return smaller(self)

    def sentence(self, unit: str = "pairs") -> str:
        """Return `64 pairs = 2 per rank x 2 ranks x 16 accumulation steps`."""
        ranks = _count(self.world_size, "rank")
        steps = _count(self.accumulation, "accumulation step")
        return f"{self.global_batch} {unit} = {self.per_device} per rank x {ranks} x {steps}"


def derive(
    per_device: int,
    world_size: int,
    accumulation: int | None = None,
    global_batch_size: int | None = None,
    rows: int | None = None,
) -> BatchPlan:
    """Return the plan of one optimizer step; accumulation follows from `global_batch_size` where that is given.

    Raises `UserError` where it does not divide, naming the nearest values that do, and where there are no rows.
    """
    if rows is not None and rows < world_size:
        few = f"{_count(rows, 'training row')} for {_count(world_size, 'rank')}"
        raise UserError(f"{few}; every rank needs at least one")
    if global_batch_size is None:
        return BatchPlan(per_device, world_size, accumulation or 1, rows)
    together = per_device * world_size
    if global_batch_size % together:
        raise UserError(_does_not_divide(global_batch_size, per_device, world_size))
    return BatchPlan(per_device, world_size, global_batch_size // together, rows)


def smaller(plan: BatchPlan) -> BatchPlan | None:
    """Return the plan with the next smaller micro-batch that keeps the global batch, None where there is none."""
    share = plan.per_device * plan.accumulation
    for per_device in range(plan.per_device - 1, 0, -1):
        if share % per_device == 0:
            return BatchPlan(per_device, plan.world_size, share // per_device, plan.rows)
    return None


def _does_not_divide(global_batch: int, per_device: int, world_size: int) -> str:
    """Return the message with two ways out: another global batch, or another micro-batch."""
    together = per_device * world_size
    below = global_batch - global_batch % together
    globals_ = " or ".join(str(value) for value in (below, below + together) if value)
    message = (
        f"global_batch_size={global_batch} does not divide into {per_device} per rank x {_count(world_size, 'rank')}"
        f" = {together}; use global_batch_size {globals_}"
    )
    if global_batch % world_size:
        return message
    share = global_batch // world_size
    fits = [size for size in range(1, share + 1) if share % size == 0]
    nearest = sorted(sorted(fits, key=lambda size: abs(size - per_device))[:2])
    return message + f", or per_device_train_batch_size {' or '.join(map(str, nearest))}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

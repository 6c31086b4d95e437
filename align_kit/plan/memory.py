"""What a run takes of each rank's memory, of the host's, and of the disk, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from align_kit.plan.disk import checkpoint_bytes, disk_bytes
from align_kit.plan.facts import Run
from align_kit.plan.peak import moments
from align_kit.plan.state import host, persistent


@dataclass(frozen=True)
class Memory:
    """Bytes of a run, by component.

    `state` lies on the fullest rank's device from one step to the next; `moments` gives, for each moment of the run,
    what lies there beside it; `host` is of a node's memory; `checkpoint_bytes` is one checkpoint, `disk_bytes` all
    that lies on the disk at most.
    """

    state: Mapping[str, int]
    moments: Mapping[str, Mapping[str, int]]
    host: Mapping[str, int]
    checkpoint_bytes: int
    disk_bytes: int

    @property
    def persistent(self) -> int:
        """Bytes on the fullest rank's device from one step to the next."""
        return sum(self.state.values())

    @property
    def at(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> int:
        """Bytes on the fullest rank's device at the most."""
        return self.persistent + sum(self.moments[self.at].values())


def memory(run: Run, device: str = "cpu") -> Memory:
    """Return what `run` takes on ranks whose device is a "cpu" or "cuda"."""
    return Memory(
        state=persistent(run),
        moments=moments(run, device=device),
        host=host(run),
        checkpoint_bytes=checkpoint_bytes(run),
        disk_bytes=disk_bytes(run),
    )

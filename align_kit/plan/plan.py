"""What a run will take, all told: memory, traffic, work and time on a given machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from align_kit.plan.facts import Run
from align_kit.plan.memory import Memory, memory
from align_kit.plan.time import Time, timed
from align_kit.plan.traffic import Traffic, traffic
from align_kit.plan.work import Work, work

if TYPE_CHECKING:
    from align_kit.plan.hardware import Hardware


@dataclass(frozen=True)
class Plan:
    """A run, and what it takes."""

    run: Run
    memory: Memory
    traffic: Traffic
    work: Work
    time: Time

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as plain values: bytes a rank, operations and seconds a step."""
        return {
            "peak_bytes": self.memory.peak,
            "peak_at": self.memory.at,
            "persistent_bytes": self.memory.persistent,
            "state_bytes": dict(self.memory.state),
            "moment_bytes": {name: dict(parts) for name, parts in self.memory.moments.items()},
            "host_bytes": dict(self.memory.host),
            "checkpoint_bytes": self.memory.checkpoint_bytes,
            "disk_bytes": self.memory.disk_bytes,
            "traffic": {name: asdict(sent) for name, sent in self.traffic.by.items()},
            "link_bytes": self.traffic.link_bytes,
            "flops": self.work.flops,
            "model_flops": self.work.model_flops,
            "tokens": self.work.tokens,
            "seconds": self.time.seconds,
            "time": asdict(self.time),
            "hours": self.time.hours,
            "dollars": self.time.dollars,
            "bound": self.time.bound,
            "notes": list(self.run.notes),
        }


def plan(run: Run, hardware: Hardware) -> Plan:
    """Return what `run` takes on ranks of `hardware`, one device each."""
    sent, done = traffic(run), work(run, hardware.kind)
    return Plan(run, memory(run, hardware.kind), sent, done, timed(run, sent, done, hardware))

"""Machines, prices and what a step gets out of a machine: from data files, or from the machine at hand."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align_kit import machine
from align_kit.errors import UserError, unknown
from align_kit.plan.facts import BYTES

FILES = Path(__file__).parent
GIB, GIGA, TERA = 1 << 30, 1e9, 1e12
CPU = "cpu"
LINKS = ("node", "network", "host")
COPIES = 4  # of a message between processes: out of a tensor, into the kernel, out of it, into a tensor
NETWORK = 0.125 * GIGA  # bytes/s between machines that nothing is known of: a gigabit


@dataclass(frozen=True)
class Calibration:
    """What share of a machine's rates a run gets; `how` says whether that was measured, and where."""

    mfu: float
    memory_share: float
    link_share: float
    overlap: float
    how: str = "assumed"


@dataclass(frozen=True)
class Hardware:
    """A device, its links and its host: bytes, bytes/s and operations/s, as plain numbers.

    `memory` and `host_memory` are what a device and a device's share of its host have; `flops` goes by precision.
    """

    name: str
    memory: int
    flops: Mapping[str, float]
    bandwidth: float
    node_link: float
    network_link: float
    host_link: float
    host_memory: int
    calibration: Calibration
    dollars_per_hour: float | None = None
    source: str = ""

    @property
    def kind(self) -> str:
        """The kind of device that computes: "cpu" or "cuda"."""
        return CPU if self.name == CPU else "cuda"

    def with_mfu(self, mfu: float) -> Hardware:
        """Return the same machine with a share of its operations that somebody states."""
        if not 0 < mfu <= 1:
            raise UserError(f"mfu {mfu} is no share of a device's operations; give one above 0 and at most 1, as 0.4")
        return replace(self, calibration=replace(self.calibration, mfu=mfu, how="stated"))


def named(name: str, *, hardware_file: str | None = None, prices_file: str | None = None) -> Hardware:
    """Return the machine `name` of `hardware.yaml`, or of a file laid over it; "here" is this one.

    Raises `UserError` for a name that is not there, and for a file that is none of machines.
    """
    if name.lower() in ("here", CPU):
        return here(hardware_file=hardware_file, prices_file=prices_file)
    known = table(hardware_file)
    name = _spelt(name, known)
    if name not in known:
        raise unknown("gpu", name, sorted([*known, "here"]))
    return _made(name, known[name], prices(prices_file, known))


def _spelt(name: str, known: Mapping[str, Any]) -> str:
    """Return a machine's name as the files spell it, whatever its case is here."""
    return name if name in known else next((one for one in known if str(one).lower() == name.lower()), name)


def table(hardware_file: str | None = None) -> dict[str, dict[str, Any]]:
    """Return all machines that are known, by name, as their files have them."""
    known = _read(FILES / "hardware.yaml")
    for name, entry in (_read(Path(hardware_file)) if hardware_file else {}).items():
        if not isinstance(entry, Mapping):
            raise UserError(f"{hardware_file}: {name} is no machine; write it as align_kit/plan/hardware.yaml does")
        known[name] = {**known.get(name, {}), **entry}
    return known


def here(*, hardware_file: str | None = None, prices_file: str | None = None) -> Hardware:
    """Return this rank's share of the machine it runs on.

    The rates of a CPU, and of a device that the files do not know, are measured once, in less than 50 ms.
    """
    import torch

    known = table(hardware_file)
    if not torch.cuda.is_available():
        return replace(_measured(CPU, None), dollars_per_hour=prices(prices_file, known).get(CPU))
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = next((name for name, entry in known.items() if _is(device.name, device.total_memory, entry)), None)
    if name is None:
        return _measured(str(device.name), int(device.total_memory))
    return replace(_made(name, known[name], prices(prices_file, known)), memory=int(device.total_memory))


def _is(device: str, memory: int, entry: Mapping[str, Any]) -> bool:
    """Tell whether a device's own name is that of a machine: two of one name differ in memory."""
    try:
        return str(entry["device"]).lower() in device.lower() and 0.8 < memory / (entry["memory_gib"] * GIB) < 1.2
    except (KeyError, TypeError):  # a user's own, not to be looked for here
        return False


def _made(name: str, entry: Mapping[str, Any], dollars: Mapping[str, float]) -> Hardware:
    try:
        links = {f"{link}_link": float(entry["link_gb_per_s"][link]) * GIGA for link in LINKS}
        return Hardware(
            name=name,
            memory=int(float(entry["memory_gib"]) * GIB),
            flops={precision: float(entry["teraflops"][precision]) * TERA for precision in BYTES},
            bandwidth=float(entry["memory_gb_per_s"]) * GIGA,
            **links,
            host_memory=int(float(entry["host_gib"]) * GIB),
            calibration=calibration(name),
            dollars_per_hour=dollars.get(name),
            source=str(entry.get("source", "")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the machine {name} cannot be read ({error!r}); write it as align_kit/plan/hardware.yaml does"
        ) from None


# --- the machine at hand ----------------------------------------------------------------------------------------------


def _measured(name: str, memory: int | None) -> Hardware:
    """Return a machine by what it does here: ranks of a CPU share its memory (`memory` None) and talk through it."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = machine.memory().total // ranks
    copied = _copy_rate()
    return Hardware(
        name=name,
        memory=memory or share,
        flops=_Rates(),
        bandwidth=2 * copied,  # a copy reads and writes
        node_link=copied / COPIES,
        network_link=min(copied, NETWORK),
        host_link=copied,
        host_memory=share,
        calibration=calibration(name),
        source="measured here",
    )


class _Rates(Mapping[str, float]):
    """Operations a second of this process's threads by precision, each measured when it is first asked for."""

    def __getitem__(self, precision: str) -> float:
        return _matmul_rate(precision)

    def __iter__(self) -> Any:
        return iter(BYTES)

    def __len__(self) -> int:
        return len(BYTES)


@functools.cache
def _matmul_rate(precision: str, size: int = 384, seconds: float = 0.02) -> float:
    """Return operations a second of matrix products in this process: the best of as many as fit in `seconds`."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 16 * size if torch.cuda.is_available() else size  # products that fill the device
    a, b = (torch.ones(size, size, dtype=dtype, device=_device()) for _ in range(2))
    return 2 * size**3 / _best(lambda: torch.mm(a, b), seconds)


@functools.cache
def _copy_rate(size: int = 64 << 20, seconds: float = 0.01) -> float:
    """Return bytes a second of this process's copies in memory."""
    import torch

    a = torch.ones(size, dtype=torch.uint8, device=_device())
    b = torch.empty_like(a)
    return size / _best(lambda: b.copy_(a), seconds)


def _best(act: Callable[[], object], seconds: float) -> float:
    """Return the least seconds that `act` took, of as many times as fit in `seconds`; once before to warm up."""
    _timed(act)
    best, end = _timed(act), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _timed(act))
    return best


def _timed(act: Callable[[], object]) -> float:
    import torch

    began = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else CPU


# --- data files -------------------------------------------------------------------------------------------------------


def prices(prices_file: str | None = None, known: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return dollars for a device and an hour, by machine; those of `prices_file` over the shipped ones.

    Raises `UserError` for what is no price, and for a machine of `prices_file` that is not `known`.
    """
    machines = [*(table() if known is None else known), CPU]
    found = _listed(FILES / "prices.yaml")
    for name, price in (_listed(Path(prices_file)) if prices_file else {}).items():
        spelt = _spelt(name, dict.fromkeys(machines))
        if spelt not in machines:
            raise UserError(f"{prices_file}: {name} is no machine that is known; give one of {', '.join(machines)}")
        found[spelt] = price
    return found


def _listed(path: Path) -> dict[str, float]:
    """Return the prices that a file lists, by machine."""
    listed = _read(path).get("dollars_per_hour")
    if not isinstance(listed, Mapping):
        raise UserError(f"{path} holds no prices; write it as align_kit/plan/prices.yaml does")
    for name, price in listed.items():
        number = isinstance(price, int | float) and not isinstance(price, bool)
        if not (number and 0 <= price < math.inf):
            raise UserError(f"{path}: {price!r} dollars an hour for {name} is no price; give a number, 0 or more")
    return {str(name): float(price) for name, price in listed.items()}


def calibration(name: str) -> Calibration:
    """Return what share of its rates the machine `name` gives a run: measured where it was, else assumed."""
    data = _read(FILES / "calibration.yaml")
    measured = [entry for entry in data["measured"] or [] if entry["machine"] == name]
    shares = dict(data["assumed"])
    if not measured:
        return Calibration(**shares)
    last = measured[-1]
    shares |= {share: last[share] for share in shares if share in last}
    return Calibration(**shares, how=f"measured {last['date']}")


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"cannot read {path}: {problem}; it must be YAML as in align_kit/plan") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no mapping; write it as the files in align_kit/plan are")
    return data

"""GPUs where there are any: the driver, torch's build for them, room on them, the way between them, compilers."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align_kit import machine
from align_kit.doctor.finding import BAD, NOTE, WARN, Finding, ok
from align_kit.errors import first_line

MIB = 1 << 20
BROKEN = "ecc.errors.uncorrected.volatile.total"
QUERY = ("index", "uuid", "name", "driver_version", "memory.used", "memory.total", BROKEN)
QUERY_SECONDS = 5.0
TAKEN = 0.05  # share of a GPU's memory that a desktop or a monitor may hold
DEVICES = Path("/dev")


@dataclass(frozen=True)
class Card:
    """What the driver says of one GPU; memory in bytes."""

    index: int
    uuid: str
    name: str
    driver: str
    used: int
    total: int
    broken: int  # memory errors since the last reset that could not be corrected


def cards() -> list[Card]:
    """Return the GPUs the driver knows, by nvidia-smi; none where that is not there or does not answer in time."""
    if shutil.which("nvidia-smi") is None:
        return []
    words = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=QUERY_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[word.strip() for word in row] for row in csv.reader(done.stdout.splitlines())]
    return [_card(row) for row in rows if len(row) == len(QUERY)] if done.returncode == 0 else []


def _card(row: Sequence[str]) -> Card:
    index, used, total, broken = (int(word) if word.isdigit() else 0 for word in (row[0], *row[4:]))  # else "[N/A]"
    return Card(index, row[1], row[2], row[3], used * MIB, total * MIB, broken)


def present(devices: Path = DEVICES) -> bool:
    """Tell whether a GPU of NVIDIA's is attached, whatever torch makes of it."""
    return any(path.name[6:].isdigit() for path in devices.glob("nvidia*"))


def device(environ: Mapping[str, str], *, attached: bool | None = None) -> Finding:
    """What will ranks compute on, and is that what is here? `attached`: whether a GPU is; looked up where `None`."""
    import torch

    attached = present() if attached is None else attached
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        driver = next((f", driver {card.driver}" for card in cards()), "")
        listed = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        return ok(f"{listed}{driver}, torch {torch.__version__}, {machine.hardware_precision()}")
    if not attached:
        return ok(f"no GPU: ranks compute on the CPU in {machine.hardware_precision()}")
    if torch.version.cuda is None:
        what = f"a GPU is here, and torch {torch.__version__} is built without CUDA"
        return Finding(WARN, what, f"install the CUDA build of torch {torch.__version__.partition('+')[0]}")
    if environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return Finding(NOTE, "CUDA_VISIBLE_DEVICES hides every GPU", "unset it to use them")
    remedy = f"is the driver new enough for CUDA {torch.version.cuda}, and is /dev/nvidiactl open to this user?"
    return Finding(BAD, f"a GPU is here, and torch cannot use it ({_why_unusable()})", remedy)


def _why_unusable() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "it does not say why"


def kernels() -> Finding:
    """Does this build of torch hold code for each GPU?"""
    import torch

    built = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not runs(capability, built):
            name = f"GPU {index} ({torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]})"
            said = f"torch {torch.__version__} holds code for {', '.join(built)}, which {name} does not run"
            return Finding(BAD, said, "install a build of torch for it")
    return ok(f"torch's code fits: {', '.join(built)}")


def runs(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Tell whether a GPU of a compute capability runs one of what was built: `sm_90`, `sm_90a`, `compute_90`.

    Machine code runs on the same major capability from its minor on, that of `a` on that very one; what is kept as
    `compute_` is translated for any later one (CUDA C++ Programming Guide, binary and PTX compatibility).
    """
    for name in built:
        kind, _, number = name.partition("_")
        exact, digits = number.endswith("a"), number.rstrip("af")
        made = (int(digits[:-1]), int(digits[-1]))
        if made == capability or (not exact and kind == "sm" and made[0] == capability[0] and made <= capability):
            return True
        if kind == "compute" and not exact and made <= capability:
            return True
    return False


def room(environ: Mapping[str, str]) -> Finding:
    """Are the GPUs that ranks will see free, and is their memory sound?"""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    found = [card for card in cards() if visible is None or _is_among(card, visible.split(","))]
    if not found:
        return Finding(NOTE, "not known: nvidia-smi is not here or does not answer")
    broken = [f"GPU {card.index}: {card.broken}" for card in found if card.broken]
    if broken:
        return Finding(BAD, f"memory errors that could not be corrected: {', '.join(broken)}", "reset or replace it")
    taken = [
        f"GPU {card.index}: {card.used / card.total:.0%} of {card.total / (1 << 30):.0f} GiB"
        for card in found
        if card.used > TAKEN * card.total
    ]
    if taken:
        return Finding(WARN, f"memory is taken: {', '.join(taken)}", "nvidia-smi says by whom; end it, or use others")
    return ok(f"memory is free on {'it' if len(found) == 1 else f'all {len(found)}'}")


def _is_among(card: Card, visible: Sequence[str]) -> bool:
    """Tell whether CUDA_VISIBLE_DEVICES names a GPU, by number or by the beginning of its UUID."""
    return any(word == str(card.index) or (word and card.uuid.startswith(word)) for word in map(str.strip, visible))


def links() -> Finding:
    """Do the GPUs of this machine reach each other's memory, or does what they exchange go through the host's?"""
    import torch

    count = torch.cuda.device_count()
    version = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "is missing"
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        what = f"{len(apart)} of {len(pairs)} ways between GPUs lead through the host's memory (first: {apart[0]})"
        return Finding(NOTE, f"{what}, NCCL {version}", "slower, not wrong; `nvidia-smi topo -m` shows the links")
    return ok(f"{'one GPU' if count == 1 else f'{count} GPUs reach each other'}, NCCL {version}")


def compiler() -> Finding:
    """Can DeepSpeed build an operator when a configuration asks for one (cpu_adam, async_io)?"""
    missing = [name for name in ("c++", "ninja") if shutil.which(name) is None and not _in_package(name)]
    if missing:
        said = f"no {' and no '.join(missing)}: DeepSpeed builds no operators (async_io, cpu_adam)"
        return Finding(NOTE, said, "only offload to NVMe and DeepSpeed's own optimizers need them")
    return _cuda_compiler()


def _in_package(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _cuda_compiler() -> Finding:
    import torch

    if torch.version.cuda is None:
        return ok("c++ and ninja are here")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return Finding(NOTE, "no nvcc: DeepSpeed builds no GPU operators", "the shipped configurations need none")
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=QUERY_SECONDS)
    found = done.stdout.partition("release ")[2].partition(",")[0]
    if found.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        said = f"nvcc is CUDA {found}, torch is built for {torch.version.cuda}"
        return Finding(NOTE, said, "DeepSpeed refuses to build GPU operators with another major version")
    return ok(f"c++, ninja and nvcc {found} are here")

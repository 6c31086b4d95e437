"""This process and this machine: ranks, threads, precision, build locks, versions."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from align_kit import control_groups
from align_kit.errors import UserError
from align_kit.resources import PACKAGE

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STACK = ("torch", "deepspeed", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


def prepare_process(environ: MutableMapping[str, str]) -> None:
    """Set what a launcher has not: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    DeepSpeed looks for MPI where one is missing. Call it before anything imports torch or DeepSpeed. Raises
    `UserError` where a launcher set some of them and not others, or a rank outside the world.
    """
    if "RANK" not in environ:
        environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if problem := _rank_problem(environ):
        environ.pop("RANK")  # no rank of any group: it speaks for itself
        raise UserError(f"{problem}; start ranks by align-kit launch, torchrun or accelerate, or unset RANK to run one")
    environ.setdefault("LOCAL_RANK", "0")
    environ.setdefault("LOCAL_WORLD_SIZE", environ.get("WORLD_SIZE", "1"))
    # DeepSpeed's own launcher sets it; without it a CPU rank forks `numactl` at every gradient reduction to count.
    environ.setdefault("LOCAL_SIZE", environ["LOCAL_WORLD_SIZE"])
    use_huge_pages(environ)


def use_huge_pages(environ: MutableMapping[str, str]) -> None:
    """Let torch ask the kernel for 2 MB pages behind large CPU tensors; it reads this at its first allocation.

    The allocator returns large tensors to the system when they are freed, and every step pays for its pages anew:
    with 4 KB pages up to a third of a small model's step. No effect where the kernel's transparent huge pages are off.
    """
    environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _rank_problem(environ: Mapping[str, str]) -> str | None:
    missing = [name for name in LAUNCHER if name not in environ]
    if missing:
        return f"RANK is set in the environment without {', '.join(missing)}"
    rank, world = environ["RANK"], environ["WORLD_SIZE"]
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        return f"RANK={rank} is no rank of WORLD_SIZE={world}"
    return None


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def world_size() -> int:
    """Return the number of ranks, as the launcher set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of ranks on this machine, as the launcher set it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_accelerator(environ: MutableMapping[str, str]) -> None:
    """Tell DeepSpeed that this machine has only a CPU where that is so, and give each rank its share of the cores.

    Two ranks with all cores each collapse; a launcher's own OMP_NUM_THREADS is left alone.
    """
    import torch

    if not torch.cuda.is_available():
        environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_NUM_THREADS" not in environ:
        threads = max(1, cores() // int(environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(threads)
        environ["OMP_NUM_THREADS"] = str(threads)  # accelerate warns, and chooses, where it is unset


def cores() -> int:
    """Return the CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(processes: int) -> int:
    """Return the threads that each of so many processes computes with: its share of the cores, or OMP_NUM_THREADS."""
    share = max(1, cores() // processes)
    return min(share, int(os.environ.get("OMP_NUM_THREADS") or share))


def beginning(threads: int) -> str:
    """Return how processes that compute with so many threads on a CPU are begun, by multiprocessing's name for it.

    A fork has everything imported; but where OpenMP has worked in this process, a fork of it that computes with more
    than one thread waits for threads it has not.
    """
    return "fork" if threads == 1 else "spawn"


@dataclass(frozen=True)
class Memory:
    """Memory of this machine in bytes: all of it, and what is free; `group` where a control group allows less."""

    total: int
    left: int
    group: bool = False


def memory(process: Path = control_groups.PROCESS) -> Memory:
    """Return the memory that this process and those beside it may use: a container sees more than it may have."""
    import psutil

    seen, allowed = psutil.virtual_memory(), control_groups.read(process)
    if allowed.memory is None or allowed.memory_left is None or allowed.memory >= seen.total:
        return Memory(seen.total, seen.available)
    return Memory(allowed.memory, min(seen.available, allowed.memory_left), group=True)


def hardware_precision() -> str:
    """Return `bf16` where the hardware multiplies it natively, else `fp32`.

    A CPU without AMX emulates bf16 2.5 to 4 times slower than fp32.
    """
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return "bf16" if amx is not None and amx() else "fp32"


def device_name() -> str:
    """Return what this rank computes on, for the header."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


# --- just-in-time builds ----------------------------------------------------------------------------------


def check_locks(operators: list[str], environ: Mapping[str, str]) -> list[str]:
    """Return a line for each lock a killed just-in-time build left; raise `UserError` where this run would wait on it.

    `operators` are the DeepSpeed extensions this run builds or loads.
    """
    lines = []
    for lock in stale_locks(environ):
        line = f"{lock} is the lock of a just-in-time build that no longer runs; remove the file"
        if lock.parent.name in operators:
            raise UserError(f"{line}, or the start waits for ever")
        lines.append(line)
    return lines


def stale_locks(environ: Mapping[str, str]) -> list[Path]:
    """Return the lock files of torch extension builds with no process behind them.

    torch's build lock is the bare existence of `<extension>/lock`; ninja works inside the folder it builds in.
    """
    root = environ.get("TORCH_EXTENSIONS_DIR")
    base = Path(root) if root else Path(environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    return sorted(path for path in base.glob("**/lock") if not _somebody_works_in(path.parent)) if base.is_dir() else []


def _somebody_works_in(folder: Path) -> bool:
    for process in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if process.resolve() == folder.resolve():
                return True
        except OSError:  # another user's process, or one that has just ended
            continue
    return False


# --- what the manifest records ----------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Return the versions of Python, align_kit and the packages a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("align-kit", *STACK):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_revision() -> dict[str, str | bool] | None:
    """Return the revision of the checkout align_kit runs from and whether it was changed; `None` outside one."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None
    revision = _git(root, "rev-parse", "HEAD")
    return {"revision": revision, "changed": bool(_git(root, "status", "--porcelain"))} if revision else None


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

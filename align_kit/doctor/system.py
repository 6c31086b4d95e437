"""The machine itself: memory, cores, limits of a process, the kernel's settings, the locale."""

from __future__ import annotations

import locale
import os
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

from align_kit import control_groups, machine
from align_kit.doctor.finding import BAD, NOTE, WARN, Finding, ok

GIB, MIB = 1 << 30, 1 << 20
OLD_KERNEL = (5, 5)  # below it accelerate warns that a process may hang (accelerate.utils.other.check_os_kernel)
# Measured in the embedded pretraining, a 4 MB model on two CPU ranks of one thread: 25 files, 12 threads, 745 MiB.
FILES_OF_RANK = 256  # ten times that: data files, loader workers and further ranks come on top
THREADS_OF_RANK = 12  # and one for each core
RANK_MEMORY = 512 * MIB  # of it when the libraries are loaded and no model is
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")


def memory(ranks: int, process: Path = control_groups.PROCESS) -> Finding:
    """Is there memory for the ranks before any model is in them?"""
    found = machine.memory(process)
    left, what = found.left, f"{_gib(found.left)} of {_gib(found.total)} free"
    if found.group:
        what = f"{_gib(left)} free of the {_gib(found.total)} that the control group allows"
    need = f"{ranks} x {_gib(RANK_MEMORY)} go to the ranks before any model"
    if left < ranks * RANK_MEMORY:
        return Finding(BAD, f"{what}; {need}", "stop other processes, take fewer ranks, or raise the limit")
    if left < 2 * ranks * RANK_MEMORY:
        return Finding(WARN, f"{what}; {need}", "`align-kit plan <recipe>` says what a run takes")
    return ok(f"{what}; {need}")


def cores(environ: Mapping[str, str], ranks: int, process: Path = control_groups.PROCESS) -> Finding:
    """May this process use the cores it sees, and do the ranks' threads fit them?"""
    mine, there, quota = machine.cores(), os.cpu_count() or 1, control_groups.read(process).cores
    what = f"{mine} of {there} cores by affinity" if mine < there else f"{mine} cores"
    if quota is not None and quota < mine:
        threads = max(1, int(quota) // ranks)
        what = f"{what}, but the control group allows the time of {quota:g}"
        return Finding(WARN, what, f"set OMP_NUM_THREADS={threads}, or threads wait for their turn")
    asked = environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) * ranks > mine and int(asked) > 1:
        what = f"{what}, and OMP_NUM_THREADS={asked} makes {int(asked) * ranks} threads of {ranks} ranks"
        return Finding(WARN, what, "unset it: each rank then gets its share")
    busy = os.getloadavg()[0]
    if busy > mine:
        return Finding(NOTE, f"{what}, {busy:.1f} processes want them", "times measured now say little")
    return ok(what)


def open_files() -> Finding:
    """May a rank open as many files and sockets as it will?"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= 4 * FILES_OF_RANK:
        return ok("no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} for a process")
    state, enough = BAD if soft < FILES_OF_RANK else WARN, 4 * FILES_OF_RANK
    remedy = f"ulimit -n {enough}"
    if hard != resource.RLIM_INFINITY and hard < enough:
        remedy = f"the hard limit is {hard}: raise it in /etc/security/limits.conf or by --ulimit nofile={enough}"
    return Finding(state, f"only {soft} for a process", remedy)


def threads(ranks: int, process: Path = control_groups.PROCESS) -> Finding:
    """May the ranks start as many threads as they will?"""
    need, (soft, _) = ranks * (THREADS_OF_RANK + machine.cores()), resource.getrlimit(resource.RLIMIT_NPROC)
    left = control_groups.read(process).processes_left
    what = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} processes and threads of this user"
    if left is not None:
        what = f"{what}, {left:,} more in the control group"
    if left is not None and left < need:
        return Finding(WARN, what, f"{ranks} ranks may start {need}: raise the group's pids.max (--pids-limit)")
    if soft != resource.RLIM_INFINITY and soft < need:
        return Finding(WARN, what, f"{ranks} ranks may start {need}: ulimit -u")
    return ok(what)


def core_dumps(pattern: Path = CORE_PATTERN) -> Finding:
    """Would a rank that crashes write all its memory into the folder it runs in?"""
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    if soft == 0:
        return ok("off")
    if pattern.is_file() and pattern.read_text().startswith("|"):
        return ok("handed to the system's collector")
    return Finding(NOTE, "on: a rank that crashes writes its whole memory to disk", "ulimit -c 0")


def huge_pages(switch: Path = HUGE_PAGES) -> Finding:
    """Does the kernel give large tensors large pages? Measured: up to a third of a small model's step on a CPU."""
    if not switch.is_file():
        return ok("not a setting of this kernel")
    chosen = switch.read_text().partition("[")[2].partition("]")[0]
    if chosen == "never":
        return Finding(NOTE, "never: a step on the CPU pays for each page anew", f"as root: echo madvise > {switch}")
    return ok(chosen)


def kernel() -> Finding:
    """Is the kernel one that processes do not hang under?"""
    name = f"{platform.system()} {platform.release()}"
    numbers = platform.release().split("-")[0].split(".")[:2]
    if platform.system() == "Linux" and all(part.isdigit() for part in numbers):
        old = tuple(int(part) for part in numbers) < OLD_KERNEL
        limit = ".".join(map(str, OLD_KERNEL))
        return Finding(WARN, name, f"below {limit} processes may hang, says accelerate") if old else ok(name)
    return Finding(NOTE, name, "align_kit is tested on Linux")


def text() -> Finding:
    """Is text read and written as UTF-8 where no encoding is named?"""
    found = {
        "files": locale.getpreferredencoding(False),
        "file names": sys.getfilesystemencoding(),
        "output": sys.stdout.encoding or "utf-8",
    }
    other = {what: how for what, how in found.items() if how.lower().replace("-", "") not in ("utf8", "cp65001")}
    if other:
        said = ", ".join(f"{what} as {how}" for what, how in other.items())
        return Finding(WARN, said, "set PYTHONUTF8=1, or LC_ALL=C.UTF-8, or text is misread or cannot be printed")
    return ok("UTF-8")


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"

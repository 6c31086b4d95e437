"""Where runs write: folders, room, speed, shared memory, and locks that dead builds left."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from align_kit import machine
from align_kit.doctor.finding import BAD, NOTE, WARN, Finding, ok
from align_kit.run_folder import make_private

GIB, MIB = 1 << 30, 1 << 20
CHECKPOINT = 14 * 1_000_000_000  # bytes of a checkpoint of 10^9 parameters: bf16 weights, fp32 master and two moments
NO_ROOM = 256 * MIB  # a few checkpoints of the embedded default's 0.8 million parameters and the data it tokenises
FEW_FILES = 10_000  # inodes
CONTAINER_SHM = 64 * MIB  # docker's and Kubernetes' default
SHM = Path("/dev/shm")
QUIET = 300.0  # s without a change in a build's folder until it counts as dead
SAMPLE, CHUNK, SPEED_SECONDS = 64 * MIB, 4 * MIB, 1.0
SLOW_CHECKPOINT = 600  # s


def writable(place: Path, variable: str = "", *, checkpoints: bool = False) -> Finding:
    """Can a run write to a folder, or make it, and is there room, for `checkpoints` too where those go there?

    `variable` is what named the folder, if anything did.
    """
    existing = _nearest(place)
    if not existing.is_dir():
        return Finding(BAD, f"{place}: {existing} is no folder", _elsewhere(variable))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding(BAD, f"{place} cannot be written ({error.strerror})", _elsewhere(variable))
    if existing != place.absolute() and variable:
        said = f"{place}, named by {variable}, is not there"
        return Finding(NOTE, said, "right if it is to be made; --fix makes it", lambda: _made(place))
    return _room(place, existing, checkpoints)


def _nearest(place: Path) -> Path:
    return next(path for path in (place.absolute(), *place.absolute().parents) if path.exists() or path.is_symlink())


def _elsewhere(variable: str) -> str:
    return f"let {variable} name another folder" if variable else "change into another folder, or mend its permissions"


def _made(place: Path) -> str:
    make_private(place)
    return f"made {place}"


def _room(place: Path, existing: Path, checkpoints: bool) -> Finding:
    free, inodes = shutil.disk_usage(existing).free, os.statvfs(existing)
    what = f"{place}{'' if place.absolute() == existing else ' (not there yet)'}, {_size(free)} free"
    if inodes.f_files > 0 and inodes.f_favail < FEW_FILES:
        return Finding(WARN, f"{what}, room for {inodes.f_favail} files only", "remove many small files")
    if free < NO_ROOM:
        return Finding(BAD, what, "make room: what does not fit ends the run")
    if checkpoints and free < CHECKPOINT:
        said = f"{what}, less than a checkpoint of 1 B parameters ({CHECKPOINT / 1e9:.0f} GB)"
        return Finding(WARN, said, "`align-kit plan <recipe>` says what yours take")
    return ok(what)


def speed(place: Path) -> Finding:
    """How fast does the disk of a folder write, down to the disk itself, and read? Takes about a second."""
    existing = _nearest(place)
    if shutil.disk_usage(existing).free < NO_ROOM:
        return Finding(NOTE, f"not measured: {existing} has no room", "make room")
    try:
        with tempfile.TemporaryFile(dir=existing, buffering=0) as file:
            written, writing = _write(file.fileno())
            reading = _read(file.fileno())
    except OSError as error:
        return Finding(NOTE, f"not measured: {existing} cannot be written ({error.strerror})")
    whole = CHECKPOINT / (written / writing)
    what = f"{_rate(written / writing)} written and synced, {_rate(written / reading)} read ({written // MIB} MiB)"
    what = f"{what}: a checkpoint of 1 B parameters (14 GB) takes {_duration(whole)}"
    return Finding(WARN, what, "let output_dir lie on a faster disk") if whole > SLOW_CHECKPOINT else ok(what)


def _write(file: int) -> tuple[int, float]:
    """Write and sync until the sample is whole or the time is up; return bytes and seconds."""
    chunk, written, begun = os.urandom(CHUNK), 0, time.perf_counter()
    while written < SAMPLE and time.perf_counter() - begun < SPEED_SECONDS:
        written += os.write(file, chunk)
        os.fsync(file)
    return written, time.perf_counter() - begun


def _read(file: int) -> float:
    """Read what was written and return the seconds it took."""
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # else memory is what is read
    begun = time.perf_counter()
    os.lseek(file, 0, os.SEEK_SET)
    while os.read(file, CHUNK):
        pass
    return time.perf_counter() - begun


def shared_memory(gpus: int, place: Path = SHM) -> Finding:
    """Is there shared memory for what ranks and loader workers of one machine pass to each other?"""
    if not place.is_dir():
        return Finding(WARN, f"there is no {place}", "loader workers and NCCL need it: mount a tmpfs there")
    found = shutil.disk_usage(place)
    what = f"{_size(found.free)} of {_size(found.total)} free"
    if found.free > CONTAINER_SHM:
        return ok(what)
    who = "NCCL and loader workers run out of it" if gpus > 1 else "loader workers (dataloader_num_workers) run out"
    more = "start the container with --shm-size=1g or --ipc=host" if found.total <= CONTAINER_SHM else f"clear {place}"
    return Finding(WARN, f"{what}: {who}", more)


def locks(environ: Mapping[str, str]) -> Finding:
    """Did a build that was killed leave a lock that every later start waits on?"""
    left = machine.stale_locks(environ)
    if not left:
        return ok("no just-in-time build left one")
    listed = ", ".join(map(str, left))
    what = f"{listed}: {'a lock' if len(left) == 1 else 'locks'} of no build that runs here, a start waits for ever"
    still = [lock for lock in left if time.time() - _last_change(lock.parent) < QUIET]
    if still:
        said = f"remove it if nothing builds: {still[0].parent} changed in the last {QUIET / 60:.0f} minutes"
        return Finding(BAD, what, f"{said}, maybe by another container or machine")
    return Finding(BAD, what, "--fix removes it", lambda: _unlocked(left))


def _last_change(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _unlocked(left: list[Path]) -> str:
    for lock in left:
        lock.unlink(missing_ok=True)
    return f"removed {len(left)} {'lock' if len(left) == 1 else 'locks'}"


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def _rate(count: float) -> str:
    return f"{count / 1e9:.1f} GB/s" if count >= 1e9 else f"{count / 1e6:.0f} MB/s"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

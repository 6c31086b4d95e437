"""What `align-kit doctor` says of the machine: memory and cores, limits, folders, disk, locks, GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align_kit import control_groups, machine
from align_kit.control_groups import Limits
from align_kit.doctor import gpu, storage, system
from align_kit.doctor.finding import BAD, NOTE, OK, WARN
from tests.harness import ROOT
from tests.namespaces import apart

GIB = 1 << 30

# --- control groups ---------------------------------------------------------------------------------------------------


def process(folder: Path, groups: str, mounts: list[tuple[str, Path, str, str]]) -> Path:
    """Lay down what /proc says of a process: its groups, and where hierarchies are mounted (root, place, kind, how)."""
    (folder / "cgroup").write_text(groups)
    lines = [f"31 23 0:28 {root} {place} rw - {kind} {kind} rw,{how}" for root, place, kind, how in mounts]
    (folder / "mountinfo").write_text("1 0 8:1 / / rw - ext4 /dev/vda rw\n" + "\n".join(lines) + "\n")
    return folder


def group(folder: Path, **files: str) -> None:
    """Lay down a control group: a file's name with its first _ for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)


def test_version_2_takes_the_tightest_of_all_groups_above(tmp_path: Path) -> None:
    mount = tmp_path / "groups"
    group(mount, cpu_max="max 100000", memory_max=str(16 * GIB), memory_current=str(5 * GIB))
    group(mount / "job", memory_max=f"{8 * GIB}\n", memory_current=f"{5 * GIB}", memory_stat=f"inactive_file {GIB}\n")
    group(mount / "job" / "step", memory_max="max\n", cpu_max="150000 100000", pids_max="100", pids_current="40")
    seen = control_groups.read(process(tmp_path, "0::/job/step\n", [("/", mount, "cgroup2", "nsdelegate")]))
    assert seen == Limits(8 * GIB, 4 * GIB, 1.5, 60)


def test_version_1_in_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    memory, cpu = tmp_path / "memory", tmp_path / "cpu"
    used, cached = {"memory_usage_in_bytes": "1000"}, {"memory_stat": "cache 700\ntotal_inactive_file 400\n"}
    group(memory / "inner", memory_limit_in_bytes=str(GIB), **used, **cached)
    group(cpu, cpu_cfs_quota_us="50000", cpu_cfs_period_us="100000")
    groups = "4:memory:/docker/abc/inner\n1:cpu,cpuacct:/docker/abc\n0::/\n"
    mounts = [("/docker/abc", memory, "cgroup", "memory"), ("/docker/abc", cpu, "cgroup", "cpu,cpuacct")]
    assert control_groups.read(process(tmp_path, groups, mounts)) == Limits(GIB, GIB - 600, 0.5, None)


def test_no_limit_is_none(tmp_path: Path) -> None:
    group(tmp_path / "m", memory_limit_in_bytes="9223372036854771712", cpu_cfs_quota_us="-1", cpu_cfs_period_us="1")
    mounts = [("/", tmp_path / "m", "cgroup", "memory,cpu")]
    assert control_groups.read(process(tmp_path, "1:memory,cpu:/\n", mounts)) == Limits()
    assert control_groups.read(tmp_path / "nowhere") == Limits()


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A real control group of this machine with 300 MB and half a core; skips where none may be made."""
    folders = [Path("/sys/fs/cgroup") / kind / f"align_kit_{os.getpid()}" for kind in ("memory", "cpu")]
    try:
        limits = (("memory.limit_in_bytes", "300000000"), ("cpu.cfs_quota_us", "50000"))
        for folder, (name, value) in zip(folders, limits, strict=True):
            if not folder.parent.joinpath("cgroup.procs").exists():
                pytest.skip("no control groups of version 1")
            folder.mkdir()
            (folder / name).write_text(value)
        yield folders[0]
    except PermissionError:
        pytest.skip("control groups cannot be made here")
    finally:
        for folder in folders:
            if folder.is_dir():
                folder.rmdir()


@pytest.mark.slow
def test_a_real_group(real_group: Path) -> None:
    places = [real_group.parents[1] / kind / real_group.name / "cgroup.procs" for kind in ("memory", "cpu")]
    enter = "; ".join(f"echo $BASHPID > {place}" for place in places)
    look = (
        "from align_kit import control_groups; from align_kit.doctor import system; "
        "from align_kit.plan import hardware; "
        "print(control_groups.read()); print(system.cores({}, 1).line()); print(hardware.here().memory)"
    )
    done = subprocess.run(
        ["bash", "-ec", f"{enter}; exec {sys.executable} -c '{look}'"], capture_output=True, text=True, cwd=ROOT
    )
    seen, cores, planned = done.stdout.splitlines()
    assert "memory=299999232" in seen and "cores=0.5" in seen, done.stderr
    assert "the control group allows the time of 0.5; set OMP_NUM_THREADS=1" in cores
    assert planned == "299999232", "the planner counts on what the group allows, not on the machine's"


def tight(tmp_path: Path, **files: str) -> Path:
    """Lay down a process in one group of version 2."""
    group(tmp_path / "g", **files)
    return process(tmp_path, "0::/\n", [("/", tmp_path / "g", "cgroup2", "x")])


def test_a_process_may_use_what_its_group_allows(tmp_path: Path) -> None:
    inside = machine.memory(tight(tmp_path, memory_max=f"{GIB}", memory_current=f"{GIB // 4}"))
    assert inside == machine.Memory(GIB, GIB - GIB // 4, group=True)
    wide = machine.memory(tight(tmp_path, memory_max=str(1 << 50), memory_current="0"))
    assert wide.total > GIB and not wide.group, "a limit above the machine's memory is none"


def test_memory(tmp_path: Path) -> None:
    rank = system.RANK_MEMORY
    for left, state in ((rank * 3 // 2, BAD), (rank * 3, WARN), (rank * 5, OK)):
        found = system.memory(2, tight(tmp_path, memory_max=str(left), memory_current="0"))
        assert found.state == state and "that the control group allows" in found.what, found.line()
    assert system.memory(10**6).state == BAD


def test_cores(tmp_path: Path) -> None:
    many = str(2 * machine.cores())
    found = system.cores({"OMP_NUM_THREADS": many}, 2, tmp_path)
    assert found.state == WARN and f"makes {4 * machine.cores()} threads of 2 ranks" in found.what
    assert system.cores({"OMP_NUM_THREADS": "1"}, 99, tmp_path).state in (OK, NOTE)


def test_few_threads(tmp_path: Path) -> None:
    found = system.threads(2, tight(tmp_path, pids_max="100", pids_current="90"))
    assert found.state == WARN and "10 more in the control group" in found.what
    assert system.threads(2, tight(tmp_path, pids_max="9000", pids_current="90")).state == OK


# --- limits of a process, the kernel ----------------------------------------------------------------------------------


def limited(limit: str, look: str, *, env: dict[str, str] | None = None) -> str:
    """Return the line of a check in a process of its own, under a shell's `limit`."""
    code = f"from align_kit.doctor import system; print(system.{look}.line())"
    words = ["bash", "-ec", f'{limit}; exec "$0" -c "{code}"', sys.executable]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **(env or {})})
    return done.stdout.strip()


def test_few_open_files() -> None:
    assert limited("ulimit -n 128", "open_files()").startswith("bad")
    assert "only 512 for a process; ulimit -n 1024" in limited("ulimit -Sn 512", "open_files()")
    capped = limited("ulimit -Sn 512; ulimit -Hn 600", "open_files()")
    assert capped.startswith("warn") and "the hard limit is 600" in capped
    assert limited("ulimit -Sn 1024", "open_files()").startswith("ok")


def test_core_dumps(tmp_path: Path) -> None:
    for pattern, state in (("core", "note"), ("|/usr/lib/collector %p", "ok")):
        (tmp_path / "pattern").write_text(pattern)
        look = f"core_dumps(__import__('pathlib').Path('{tmp_path}/pattern'))"
        assert limited("ulimit -Hc unlimited; ulimit -c unlimited", look).startswith(state)
        assert limited("ulimit -c 0", look).startswith("ok")


@pytest.mark.parametrize(("setting", "state"), [("always [madvise] never", OK), ("always madvise [never]", NOTE)])
def test_huge_pages(setting: str, state: str, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text(setting)
    assert system.huge_pages(tmp_path / "enabled").state == state
    assert system.huge_pages(tmp_path / "none").state == OK


@pytest.mark.parametrize(("release", "state"), [("5.4.0-42-generic", WARN), ("5.5.1", OK), ("6.18", OK)])
def test_kernel(release: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.platform, "release", lambda: release)
    assert system.kernel().state == state


def test_text() -> None:
    assert limited("true", "text()").startswith("ok")
    latin = limited("true", "text()", env={"PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"})
    assert latin.startswith("warn") and "output as iso8859-1; set PYTHONUTF8=1" in latin


# --- folders, disk, shared memory -------------------------------------------------------------------------------------


def test_folders(tmp_path: Path) -> None:
    assert storage.writable(tmp_path).state in (OK, WARN)
    below = storage.writable(tmp_path / "a" / "b")
    assert "(not there yet)" in below.what and below.fix is None and not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    blocked = storage.writable(tmp_path / "file" / "runs", "ALIGN_KIT_CACHE")
    assert blocked.state == BAD and blocked.remedy == "let ALIGN_KIT_CACHE name another folder"


def test_a_folder_that_cannot_be_written() -> None:
    found = storage.writable(Path("/proc/align_kit"))
    assert found.state == BAD and "/proc/align_kit cannot be written (" in found.what


def test_a_folder_that_a_variable_names_can_be_made(tmp_path: Path) -> None:
    found = storage.writable(tmp_path / "cache", "HF_HOME")
    assert found.state == NOTE and "named by HF_HOME, is not there" in found.what
    assert "fixed: made" in found.fixed().what and (tmp_path / "cache").is_dir()
    assert storage.writable(tmp_path / "cache", "HF_HOME").fix is None


def small(size: str, script: str, tmp_path: Path, options: str = "") -> str:
    """Return what a script prints where a real file system of `size` is mounted on `tmp_path`/small."""
    (tmp_path / "small").mkdir(exist_ok=True)
    code = f"from pathlib import Path; from align_kit.doctor import storage; place = Path('{tmp_path}/small'); {script}"
    mount = f"mount -t tmpfs -o size={size}{options} tmpfs {tmp_path}/small"
    return apart(f'{mount}; {sys.executable} -c "{code}"')


def test_little_room_is_said(tmp_path: Path) -> None:
    look = "print(storage.writable(place, checkpoints=True).line()); print(storage.speed(place).line())"
    little, speed = small("200m", look, tmp_path).splitlines()
    assert little.startswith("bad") and "200 MiB free; make room" in little
    assert speed.startswith("note") and "has no room" in speed
    assert "less than a checkpoint of 1 B parameters (14 GB)" in small("1g", look, tmp_path)
    assert small("1g", "print(storage.writable(place).line())", tmp_path).startswith("ok")
    assert "room for" in small("15g", look, tmp_path, options=",nr_inodes=50").splitlines()[0]
    assert "cannot be written (Read-only file system)" in small("15g", look, tmp_path, options=",ro")


def test_shared_memory(tmp_path: Path) -> None:
    """Docker gives 64 MB."""
    look = "print(storage.shared_memory({gpus}, place).line())"
    for gpus, said in ((0, "loader workers (dataloader_num_workers) run out"), (2, "NCCL and loader workers run out")):
        line = small("64m", look.format(gpus=gpus), tmp_path)
        assert line.startswith("warn") and f"64 MiB of 64 MiB free: {said}" in line and "--shm-size=1g" in line
    assert small("1g", look.format(gpus=2), tmp_path).startswith("ok")
    filled = "(place / 'x').write_bytes(bytes(100 << 20)); " + look.format(gpus=2)
    assert f"clear {tmp_path}/small" in small("128m", filled, tmp_path)
    assert storage.shared_memory(0, tmp_path / "none").state == WARN


def test_speed_is_measured(tmp_path: Path) -> None:
    found = storage.speed(tmp_path / "not" / "there")
    assert "a checkpoint of 1 B parameters (14 GB) takes" in found.what and not list(tmp_path.iterdir())


def test_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    monkeypatch.setattr(storage.os, "fsync", lambda file: (real(file), time.sleep(0.5)))
    begun = time.monotonic()
    found = storage.speed(tmp_path)
    assert found.state == WARN and "MB/s written" in found.what and time.monotonic() - begun < 10


# --- locks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """The lock of a build that was killed an hour ago."""
    made = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    made.parent.mkdir(parents=True)
    made.touch()
    for path in (made, made.parent):
        os.utime(path, (time.time() - 3600,) * 2)
    return made


def test_a_dead_lock_is_removed(lock: Path, tmp_path: Path) -> None:
    environ = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    found = storage.locks(environ)
    assert found.state == BAD and str(lock) in found.what and found.remedy == "--fix removes it" and lock.exists()
    assert found.fixed().what.endswith("fixed: removed 1 lock") and not lock.exists()
    assert storage.locks(environ).state == OK


def test_a_lock_that_may_be_alive_is_left(lock: Path, tmp_path: Path) -> None:
    """Of a build in another container or on another machine nothing can be seen but its files."""
    environ = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    (lock.parent / "cpu_adam.o").touch()
    found = storage.locks(environ)
    assert found.state == BAD and found.fix is None and "changed in the last 5 minutes" in found.remedy
    with subprocess.Popen(["sleep", "60"], cwd=lock.parent) as builder:
        try:
            assert storage.locks(environ).state == OK
        finally:
            builder.kill()


# --- GPUs: what cannot be had here is stood in for -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "built", "fits"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90a", "compute_90a"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_120"], True),
    ],
)
def test_machine_code_fits(capability: tuple[int, int], built: list[str], fits: bool) -> None:
    assert gpu.runs(capability, built) is fits


def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *rows: str, code: int = 0) -> None:
    """Lay an nvidia-smi before all others that answers with `rows`."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows) + f"exit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, taken = "0, GPU-aa, NVIDIA H200, 570.1, 512, 143771, 0", "1, GPU-bb, NVIDIA H200, 570.1, 90000, 143771, [N/A]"
    driver(tmp_path, monkeypatch, free, taken)
    found = gpu.room({})
    assert found.state == WARN and found.what == "memory is taken: GPU 1: 63% of 140 GiB"
    for visible, state in (("0", OK), ("GPU-a", OK), ("1", WARN), ("GPU-bb", WARN), ("0, 1", WARN), ("", NOTE)):
        assert gpu.room({"CUDA_VISIBLE_DEVICES": visible}).state == state, visible
    driver(tmp_path, monkeypatch, free.replace("143771, 0", "143771, 3"))
    assert gpu.room({}).state == BAD and "GPU 0: 3" in gpu.room({}).what
    driver(tmp_path, monkeypatch, "NVIDIA-SMI has failed", code=9)
    assert gpu.room({}).state == NOTE and gpu.cards() == []


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("it can")
    assert "no GPU: ranks compute on the CPU" in gpu.device({}, attached=False).what
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.device({}, attached=True).state == WARN and "built without CUDA" in gpu.device({}, attached=True).what
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "hides every GPU" in gpu.device({"CUDA_VISIBLE_DEVICES": ""}, attached=True).what

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    found = gpu.device({}, attached=True)
    assert found.state == BAD and "(The NVIDIA driver on your system is too old (found version 11040).)" in found.what


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, peers: bool) -> None:
    """Let torch say that there are GPUs."""
    import torch

    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": count,
        "get_device_name": "NVIDIA H200",
        "get_device_capability": (9, 0),
        "get_arch_list": ["sm_80"],
        "can_device_access_peer": peers,
        "is_bf16_supported": True,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)


def test_gpus_and_their_links(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2, peers=False)
    assert gpu.device({}).state == OK and "2 x NVIDIA H200" in gpu.device({}).what
    found = gpu.kernels()
    assert found.state == BAD and "holds code for sm_80, which GPU 0 (NVIDIA H200, sm_90) does not run" in found.what
    assert gpu.links().state == NOTE and "2 of 2 ways between GPUs lead through the host's memory" in gpu.links().what
    gpus(monkeypatch, 2, peers=True)
    assert gpu.links().state == OK and "2 GPUs reach each other" in gpu.links().what


def test_attached_gpus_are_seen(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    assert not gpu.present(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert gpu.present(tmp_path)


def test_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if gpu.compiler().state == OK:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        nvcc = tmp_path / "nvcc"
        nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.99'\n")
        nvcc.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert gpu.compiler().state == NOTE and "nvcc is CUDA 12.4, torch is built for 13.0" in gpu.compiler().what
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpu.compiler().state == NOTE and "no c++" in gpu.compiler().what

"""This process and this machine: the launcher's variables, threads, precision, stale locks, versions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from align_kit import machine
from align_kit.errors import UserError

RANK_1_OF_2 = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}


def test_a_process_without_a_launcher_is_one_rank() -> None:
    environ: dict[str, str] = {}
    machine.prepare_process(environ)
    assert int(environ.pop("MASTER_PORT")) > 0
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    assert environ.items() >= alone.items()


def test_a_launcher_is_left_alone() -> None:
    environ = {**RANK_1_OF_2, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    before = dict(environ)
    machine.prepare_process(environ)
    assert environ.items() >= before.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": None}, "RANK is set in the environment without WORLD_SIZE; start ranks by"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "without MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "2"}, "RANK=2 is no rank of WORLD_SIZE=2"),
        ({"RANK": "one"}, "RANK=one is no rank of WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "RANK=1 is no rank of WORLD_SIZE=two"),
    ],
)
def test_half_a_launcher_is_refused(changes: dict[str, str | None], message: str) -> None:
    environ = {name: value for name, value in {**RANK_1_OF_2, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        machine.prepare_process(environ)
    assert "RANK" not in environ, "what is no rank may speak for itself"


def faults_of_a_large_tensor(environ: dict[str, str]) -> int:
    """Return how many pages a new process asks for to fill 64 MiB, prepared as a run is."""
    code = (
        "import os, resource\nfrom align_kit import machine\nmachine.prepare_process(os.environ)\nimport torch\n"
        "count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = count()\ntorch.ones(1 << 24)\nprint(count() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_large_tensors_stand_on_huge_pages() -> None:
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.is_file() or "[madvise]" not in switch.read_text():
        pytest.skip("this kernel gives huge pages to nobody, or to everybody")
    pages = (1 << 26) // os.sysconf("SC_PAGE_SIZE")
    assert faults_of_a_large_tensor({"THP_MEM_ALLOC_ENABLE": "0"}) > pages / 2
    assert faults_of_a_large_tensor({}) < pages / 4


def test_free_ports_are_free() -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", machine.free_port()))


def test_world_size_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert machine.world_size() == 8
    monkeypatch.delenv("WORLD_SIZE")
    assert machine.world_size() == 1


# --- threads, precision -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("given", "ranks", "threads"), [(None, 1, machine.cores()), (None, 999, 1), ("3", 1, None)])
def test_each_rank_gets_its_share_of_the_cores(given: str | None, ranks: int, threads: int | None) -> None:
    """In a process of its own: the number of threads is global."""
    environ = {"LOCAL_WORLD_SIZE": str(ranks)} | ({"OMP_NUM_THREADS": given} if given else {})
    code = (
        f"import torch; from align_kit import machine; torch.set_num_threads(7); environ = {environ!r}; "
        "machine.choose_accelerator(environ); print(torch.get_num_threads(), environ.get('DS_ACCELERATOR'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import torch

    accelerator = None if torch.cuda.is_available() else "cpu"
    assert done.stdout.split() == [str(threads or 7), str(accelerator)]


@pytest.mark.parametrize(
    ("given", "processes", "threads"), [(None, 1, 8), (None, 3, 2), (None, 99, 1), ("1", 2, 1), ("16", 2, 4)]
)
def test_processes_share_the_cores(
    given: str | None, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", given) if given else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert machine.threads_of(processes) == threads
    assert machine.beginning(threads) == ("fork" if threads == 1 else "spawn")


def test_precision_follows_the_hardware() -> None:
    import torch

    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = "amx_tile" in Path("/proc/cpuinfo").read_text().split()
    assert machine.hardware_precision() == ("bf16" if native else "fp32")


# --- stale locks ------------------------------------------------------------------------------------------


@pytest.fixture
def locked(tmp_path: Path) -> dict[str, str]:
    """An extensions folder in which a build of cpu_adam was killed."""
    (tmp_path / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    (tmp_path / "py311_cpu" / "cpu_adam" / "lock").touch()
    return {"TORCH_EXTENSIONS_DIR": str(tmp_path)}


def test_a_lock_in_the_way_is_an_error(locked: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"py311_cpu/cpu_adam/lock is the lock .* remove the file, or the start waits"):
        machine.check_locks(["cpu_adam"], locked)


def test_a_lock_out_of_the_way_is_a_line(locked: dict[str, str]) -> None:
    (line,) = machine.check_locks(["async_io"], locked)
    assert line.endswith("cpu_adam/lock is the lock of a just-in-time build that no longer runs; remove the file")


def test_a_lock_somebody_works_under_is_not_stale(locked: dict[str, str]) -> None:
    folder = Path(locked["TORCH_EXTENSIONS_DIR"]) / "py311_cpu" / "cpu_adam"
    with subprocess.Popen(["sleep", "60"], cwd=folder) as builder:
        try:
            assert machine.stale_locks(locked) == []
        finally:
            builder.kill()
    assert machine.stale_locks(locked) == [folder / "lock"]


def test_without_an_extensions_folder_there_is_no_lock(tmp_path: Path) -> None:
    assert machine.check_locks(["cpu_adam"], {"TORCH_EXTENSIONS_DIR": str(tmp_path / "none")}) == []
    assert machine.check_locks(["cpu_adam"], {"XDG_CACHE_HOME": str(tmp_path)}) == []


# --- what the manifest records ----------------------------------------------------------------------------


def test_versions_name_the_stack() -> None:
    from importlib import metadata

    found = machine.versions()
    assert set(found) == {"python", "align-kit", *machine.STACK}
    assert found["deepspeed"] == metadata.version("deepspeed")


def test_the_revision_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.example")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(machine, "PACKAGE", tmp_path / "align_kit")
    assert machine.git_revision() is None
    (tmp_path / "file").write_text("one")
    git("init", "-q")
    git("add", "file")
    git("commit", "-qm", "one")
    clean = machine.git_revision()
    (tmp_path / "file").write_text("two")
    changed = machine.git_revision()
    assert clean and changed and len(str(clean["revision"])) == 40
    assert clean["changed"] is False and changed == {**clean, "changed": True}


def test_no_git_is_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGE", tmp_path / "align_kit")
    monkeypatch.setenv("PATH", os.devnull)
    (tmp_path / ".git").mkdir()
    assert machine.git_revision() is None

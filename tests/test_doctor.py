"""`align-kit doctor`: the command, and what it says of packages, names, engine configurations and keys."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align_kit import cli
from align_kit.doctor import given, network, versions
from align_kit.doctor.finding import BAD, NOTE, OK, STATES, WARN, WIDTH, Check, Finding, ok
from align_kit.errors import UserError
from tests.harness import ROOT
from tests.namespaces import apart

# --- the command ------------------------------------------------------------------------------------------------------


def call(*words: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the doctor as a user does, in a process of its own."""
    command = [sys.executable, "-m", "align_kit", "doctor", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=120)


@pytest.mark.slow
def test_the_doctor_mends_what_is_safe_and_says_the_rest(tmp_path: Path) -> None:
    lock, cache, builds = tmp_path / "builds/cpu_adam/lock", tmp_path / "cache", tmp_path / "builds"
    lock.parent.mkdir(parents=True)
    lock.touch()
    for path in (lock, lock.parent):
        os.utime(path, (time.time() - 3600,) * 2)
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "mine.json").write_text('{"gradient_clippin": 1.0}')
    env = {"TORCH_EXTENSIONS_DIR": str(builds), "ALIGN_KIT_CACHE": str(cache), "WANDB_API_KEY": "0123456789abcdef" * 3}
    env["HF_TOKEN"] = "hf_" + "a" * 34
    done = call("--fix", "--json", cwd=tmp_path, env=env)
    told = json.loads(done.stdout)
    found = {one["name"]: one for one in told["findings"]}
    assert done.returncode == 2 and told["bad"] == 1 and not done.stderr, done.stderr
    assert "gradient_clippin" in next(one for one in told["findings"] if one["state"] == BAD)["what"]
    assert found["build locks"]["what"].endswith("fixed: removed 1 lock") and not lock.exists()
    assert found["cache"]["what"].endswith(f"fixed: made {cache}") and cache.stat().st_mode & 0o777 == 0o700
    assert found["all-reduce"]["state"] == OK and "2 ranks on gloo" in found["all-reduce"]["what"]
    assert found["clocks"]["state"] == OK
    assert not re.search("0123456789abcdef|hf_aaa", done.stdout)


@pytest.mark.slow
def test_lines_are_aligned_and_nothing_is_left(tmp_path: Path) -> None:
    done = call("--ranks", "1", cwd=tmp_path, env={"ALIGN_KIT_CACHE": str(tmp_path)})
    *lines, last = done.stdout.splitlines()
    assert not done.stderr and not list(tmp_path.iterdir()), "it says all on one channel and leaves nothing behind"
    begin = len("note  ") + WIDTH
    for line in lines:
        assert line.split()[0] in STATES and line[begin : begin + 2] == "  " and line[begin + 2] != " ", line
    bad = sum(line.startswith(BAD) for line in lines)
    assert len(lines) > 30 and done.returncode == (2 if bad else 0)
    assert re.fullmatch(rf"\d+ ok, \d+ notes?, \d+ warnings?, {bad} bad(; --fix mends \d+)? \(\d+\.\d s\)", last)


def test_words_it_does_not_know(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["--fxi"], ["--ranks", "0"], ["--ranks", "many"], ["more"]):
        assert cli.main(["doctor", *words]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: align-kit doctor: ") and len(said.err.splitlines()) == 1 and not said.out
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert cli.main(["doctor", "--ranks", "2"]) == 2
    assert "the launcher has started 2 already, drop it" in capsys.readouterr().err
    assert cli.main(["doctor", "--help"]) == 0
    assert "Exit code 2 where" in capsys.readouterr().out


# --- a finding --------------------------------------------------------------------------------------------------------


def test_a_check_that_fails_is_a_finding() -> None:
    def look() -> Finding:
        raise RuntimeError("no such\nthing")

    found = Check("thing", look).run()
    assert found.state == WARN and "could not be looked at (RuntimeError: no such)" in found.line()


def test_a_fix_says_what_it_did_and_why_it_could_not() -> None:
    def refused() -> str:
        raise PermissionError(1, "Operation not permitted")

    mended = Finding(BAD, "a lock", "--fix removes it", lambda: "removed it").fixed()
    assert (mended.state, mended.what, mended.remedy, mended.fix) == (NOTE, "a lock; fixed: removed it", "", None)
    kept = Finding(BAD, "a lock", "--fix removes it", refused).fixed()
    assert kept.state == BAD and "could not be fixed: [Errno 1] Operation not permitted" in kept.what
    assert ok("all is well").fixed() == ok("all is well")


def test_a_line_is_one_line_without_secrets() -> None:
    line = Finding(WARN, "see\nhttps://me:secret-word@host/", "do it", name="proxy").line()
    assert line == "warn  proxy             see https://<hidden>@host/; do it"


# --- versions ---------------------------------------------------------------------------------------------------------


def pretend(folder: Path, name: str, version: str, *requires: str) -> None:
    """Lay an installed package before all others: what pip leaves, without the package."""
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir()
    needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages are found before the installed ones."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_tested_stack_is_ok() -> None:
    """What `make setup` installs has to pass."""
    checks = (versions.python, versions.ranges, versions.tested, versions.declared, versions.copies)
    assert [check().state for check in checks] == [OK] * 5, [check().line() for check in checks]


def test_a_version_out_of_range(before: Path) -> None:
    pretend(before, "transformers", "4.57.0")
    found = versions.ranges()
    assert (found.state, found.what) == (BAD, "transformers 4.57.0 (asked: >=5.0)")
    assert found.remedy == "pip install 'transformers>=5.0'"


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = versions.required()
    monkeypatch.setattr(versions, "required", lambda: {**asked, "no-such-package": ">=2"})
    found = versions.ranges()
    assert found.state == BAD and found.what == "missing: no-such-package>=2"


def test_another_version_than_tested(before: Path) -> None:
    pretend(before, "certifi", "2020.1.1")
    found = versions.tested()
    assert found.state == NOTE and "certifi 2020.1.1 (2026" in found.what
    pretend(before, "peft", "0.19.0")
    found = versions.tested()
    assert found.state == WARN and "(in brackets): peft 0.19.0 (" in found.what


def test_without_the_checkout_there_are_no_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "CHECKOUT", tmp_path)
    assert versions.tested().state == NOTE and "no constraints.txt" in versions.tested().what
    assert versions.required()["torch"] and versions.required_python(), "the installed package says it too"


def test_known_bad_pairs_are_found_by_their_versions(before: Path) -> None:
    assert "LoRA under ZeRO-3" not in versions.pairs().what
    pretend(before, "deepspeed", "0.19.2")
    found = versions.pairs()
    assert found.state == WARN and "deepspeed 0.19.2 and peft" in found.what and "'deepspeed>=0.19.8'" in found.what


def test_each_pair_names_its_source() -> None:
    from packaging.specifiers import SpecifierSet

    for pair in versions.PAIRS:
        assert pair.source and pair.remedy and all(SpecifierSet(asked) is not None for asked in pair.versions.values())


def test_two_copies(before: Path) -> None:
    pretend(before, "trl", "1.16.0")
    found = versions.copies()
    assert found.state == WARN and f"trl in {before}, " in found.what


def test_a_package_that_asks_for_another_version(before: Path) -> None:
    pretend(before, "peft", "0.21.2", "torch>=99", "no-such-package", 'colorama; sys_platform == "win32"')
    found = versions.declared()
    assert found.state == BAD and "peft asks for torch>=99, 2." in found.what
    assert "peft asks for no-such-package, nothing is here" in found.what and "colorama" not in found.what


# --- names, ports, variables ------------------------------------------------------------------------------------------


def test_a_host_name_without_an_address(tmp_path: Path) -> None:
    code = "import os; from align_kit.doctor import network; print(network.hostname(os.environ).line())"
    look = f"{sys.executable} -c '{code}'"
    hosts = tmp_path / "hosts"
    said = apart(
        f"hostname nowhere-at-all; {look}; GLOO_SOCKET_IFNAME=lo {look}; cp /etc/hosts {hosts};"
        f"echo 10.9.8.7 nowhere-at-all >> {hosts}; mount --bind {hosts} /etc/hosts; {look}"
    ).splitlines()
    assert "warn" in said[0] and "nowhere-at-all stands for no address; add it to /etc/hosts" in said[0]
    assert "note" in said[1] and "GLOO_SOCKET_IFNAME is used instead" in said[1]
    assert "warn" in said[2] and "is 10.9.8.7, which is no address of this machine" in said[2]


def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LOOKUP_SECONDS", 0.05)
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_: time.sleep(0.5) or [])
    found = network.hostname({})
    assert found.state == WARN and "no answer within" in found.what
    assert network.hostname({"GLOO_SOCKET_IFNAME": "lo"}).state == NOTE


def test_the_common_port() -> None:
    import socket

    with socket.socket() as listener:
        try:
            listener.bind(("", network.COMMON_PORT))
        except OSError:
            pytest.skip("somebody has it already")
        listener.listen()
        assert network.port().state == NOTE and f"{network.COMMON_PORT} cannot be had" in network.port().what


@pytest.mark.parametrize(
    ("environ", "state", "what"),
    [
        ({}, OK, "none set"),
        ({"RANK": "0"}, BAD, "RANK is set in the environment without WORLD_SIZE"),
        ({"MASTER_PORT": "1"}, NOTE, "MASTER_PORT set without RANK"),
        ({"GLOO_SOCKET_IFNAME": "lo"}, OK, "none set"),
        ({"GLOO_SOCKET_IFNAME": "lo,eth99"}, BAD, "GLOO_SOCKET_IFNAME names eth99, which is no interface"),
        ({"GLOO_SOCKET_IFNAME": "l"}, BAD, "GLOO_SOCKET_IFNAME names l, which is no interface"),
        ({"NCCL_SOCKET_IFNAME": "l"}, OK, "none set"),
        ({"NCCL_SOCKET_IFNAME": "=l"}, BAD, "NCCL_SOCKET_IFNAME names l, which is no interface"),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, OK, "none set"),
    ],
)
def test_variables(environ: dict[str, str], state: str, what: str) -> None:
    found = network.variables(environ)
    assert found.state == state and what in found.what


# --- what a run is given ----------------------------------------------------------------------------------------------


def test_shipped_configurations_are_right() -> None:
    found = given.engine_configs(ROOT / "ds_configs", gpu=False)
    assert found.state in (OK, NOTE), found.line()
    assert found.what.startswith(f"{len(list((ROOT / 'ds_configs').iterdir()))} files")


@pytest.mark.parametrize(
    ("name", "text", "state", "what"),
    [
        ("a.json", '{"zero_optimization": {"stage": 3}}', OK, "1 file in "),
        ("a.json", '{"gradient_clippin": 1}', BAD, "unknown DeepSpeed key in a.json 'gradient_clippin'"),
        ("a.json", "{", BAD, "cannot read the DeepSpeed configuration"),
        ("a.json", '{"fp16": {"enabled": true}}', NOTE, "a.json asks for fp16, which no CPU does"),
        ("a.json", '{"zero_optimization": {"stage": 3, "zero_quantized_gradients": true}}', NOTE, "zero_quantized_gr"),
        ("a.yaml", "distributed_type: FSDP\nnum_processes: 2", BAD, "a.yaml asks for distributed_type FSDP"),
        ("a.yaml", "distributed_type: DEEPSPEED\nnum_process: 2", BAD, "accelerate refuses it (The config file"),
        ("a.yaml", "- a list", BAD, "a.yaml: accelerate refuses it"),
        ("a.yaml", "{", BAD, "a.yaml: accelerate refuses it"),
        (
            "a.yaml",
            "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stagee: 3}",
            BAD,
            "unknown key in deepspeed_config of a.yaml 'zero_stagee'",
        ),
    ],
)
def test_engine_configurations(name: str, text: str, state: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    found = given.engine_configs(tmp_path, gpu=False)
    assert found.state == state and what in found.what, found.line()


def test_data_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGN_KIT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert given.data({}).state == NOTE and "ALIGN_KIT_DATA names no folder" in given.data({}).what
    missing = given.data({"ALIGN_KIT_DATA": str(tmp_path / "none")})
    assert missing.state == BAD and "which is not a folder" in missing.what
    (tmp_path / "data_cards").mkdir()
    (tmp_path / "data_cards" / "mine.md").write_text("no front matter")
    broken = given.data({})
    assert broken.state == BAD and "mine.md: no front matter" in broken.what


def test_real_data_is_counted(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGN_KIT_DATA", raising=False)
    without, found = given.data({}), given.data({"ALIGN_KIT_DATA": str(real_data)})
    assert found.state == OK and int(found.what.split()[0]) > int(without.what.split()[0])


@pytest.mark.parametrize(
    ("environ", "netrc", "state", "what"),
    [
        ({}, None, NOTE, "not logged in"),
        ({"WANDB_API_KEY": "sesame-sesame"}, None, OK, "logged in by WANDB_API_KEY"),
        ({"WANDB_MODE": "offline"}, None, OK, "offline by WANDB_MODE"),
        ({}, "machine api.wandb.ai login user password sesame-sesame", OK, "logged in by"),
        ({"WANDB_BASE_URL": "http://own.example"}, "machine api.wandb.ai login u password sesame", NOTE, "at own.ex"),
        ({}, "machine api.wandb.ai sesame-sesame", WARN, "cannot be read (NetrcParseError)"),
    ],
)
def test_wandb(environ: dict[str, str], netrc: str | None, state: str, what: str, tmp_path: Path) -> None:
    if netrc:
        (tmp_path / ".netrc").touch(0o600)
        (tmp_path / ".netrc").write_text(netrc)
    found = given.wandb(environ, home=tmp_path)
    assert found.state == state and what in found.what and "sesame" not in found.line()


def test_a_key_that_others_may_read(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password sesame-sesame")
    (tmp_path / ".netrc").chmod(0o644)
    found = given.wandb({}, home=tmp_path)
    assert found.state == WARN and "which others may read" in found.what


def test_home_of_data_is_a_user_error() -> None:
    """The check leans on it."""
    from align_kit import cards

    with pytest.raises(UserError):
        cards.data_home("/no/such/folder")

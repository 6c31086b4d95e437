"""Mistakes through launchers, launch files that disagree; tests/test_readme.py starts recipes in every way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from align_kit import launch
from align_kit.errors import UserError
from tests.harness import ROOT, Ranks
from tests.little import little_run

BIN = Path(sys.executable).parent
LAUNCH_FILE = ROOT / "ds_configs" / "launch_cpu2.yaml"

STARTS: dict[str, list[str | Path]] = {
    "align-kit": [BIN / "align-kit", "dpo"],
    "align-kit launch": [BIN / "align-kit", "launch", "dpo"],
}


def start(command: list[str | Path], place: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in `place` as a user would: no launcher's variables, caches of its own, no network."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    env |= {
        "PATH": f"{BIN}{os.pathsep}{env['PATH']}",  # the launcher of deepspeed looks for its own parts there
        "ALIGN_KIT_CACHE": str(place / "cache"),
        "TORCH_EXTENSIONS_DIR": str(place / "extensions"),
        "HF_HOME": str(place / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, cwd=place, env=env, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["align-kit launch", "align-kit"])
def test_a_mistake_through_a_launcher_is_one_line(name: str, tmp_path: Path) -> None:
    done = start([*STARTS[name], "--lerning_rate", "3"], tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: lerning_rate (command line) is an unknown")


# --- a launch file and a run that disagree ----------------------------------------------------------------


def asking_for(stage: int, mixed_precision: str = "no") -> dict[str, str]:
    """Return what `accelerate launch` puts into the environment for a launch file of that stage."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_MIXED_PRECISION": mixed_precision,
    }


DISAGREE = [
    (asking_for(2), "zero3", r"asks for ZeRO stage 2 .* \(zero3\) for stage 3; give the run `--deepspeed zero2`"),
    (asking_for(3), "zero2", r"asks for ZeRO stage 3 .* \(zero2\) for stage 2; give the run `--deepspeed zero3`"),
    (asking_for(3, "bf16"), "zero3", r"mixed_precision bf16 and this run trains in fp32; give the run `--bf16 true`"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("env", "engine", "message"), DISAGREE)
def test_a_disagreement_is_refused(
    env: dict[str, str], engine: str, message: str, ranks: Ranks, tmp_path: Path
) -> None:
    words = little_run("dpo", tmp_path, "--deepspeed", engine, "--bf16", "false")
    line = ranks.run(*words, env=env, cwd=tmp_path).error()
    assert re.search(message, line), line


@pytest.mark.slow
@pytest.mark.parametrize("env", [asking_for(3), {}])
def test_agreement_goes_on(env: dict[str, str], ranks: Ranks, tmp_path: Path) -> None:
    done = ranks.run(*little_run("dpo", tmp_path, "--dry-run"), env=env, cwd=tmp_path).ok()
    assert '"stage": 3' in done.text


# --- the words of `align-kit launch` ----------------------------------------------------------------------


def test_options_come_before_the_recipe() -> None:
    words = ["--nproc_per_node=3", "--nnodes", "2", "dpo", "--max_steps", "3"]
    assert launch.split(words) == ({"nproc_per_node": "3", "nnodes": "2"}, "dpo", ["--max_steps", "3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"which recipe\? known: pretrain, sft, reward, dpo, orpo, kto, ppo"),
        (["dp0"], r"unknown recipe 'dp0'; .*did you mean 'dpo'"),
        (["--nprocs", "2", "dpo"], r"unknown option --nprocs; known: --nproc_per_node, "),
        (["--nproc_per_node"], r"--nproc_per_node needs a value \(ranks on this machine"),
        (["--nproc_per_node", "two", "dpo"], r"--nproc_per_node two: give a number of ranks, 1 or more"),
        (["--nproc_per_node", "0", "dpo"], r"--nproc_per_node 0: give a number of ranks, 1 or more"),
        (["--nnodes", "many", "dpo"], r"--nnodes many: give a number"),
        (["--nnodes", "2", "--node_rank", "2", "dpo"], r"--node_rank 2: .*0 or 1"),
        (["--nnodes", "2", "--node_rank", "0", "dpo"], r"--nnodes 2 needs --master_addr"),
        (["--max_restarts", "-1", "dpo"], r"--max_restarts -1: give a number \(restarts in a row"),
        (["--hang_seconds", "soon", "dpo"], r"--hang_seconds soon: give seconds, 0 or more"),
        (["--grace_seconds=nan", "dpo"], r"--grace_seconds nan: give seconds"),
        (["--skip_poisoned=maybe", "dpo"], r"--skip_poisoned maybe: give true or false"),
    ],
)
def test_wrong_words_of_launch(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch.launch(words)


def test_a_flag_needs_no_value() -> None:
    for words in (["--skip_poisoned", "sft"], ["--skip_poisoned", "true", "sft"], ["--skip_poisoned=true", "sft"]):
        given, recipe, _ = launch.split(words)
        assert recipe == "sft" and launch.parse({**given, "nproc_per_node": "2"}).skip_poisoned
    assert not launch.parse({"skip_poisoned": "false", "nproc_per_node": "2"}).skip_poisoned


def test_the_table_of_options_says_what_holds() -> None:
    text, defaults = launch.help_text(), launch.parse({"nproc_per_node": "2"})
    for name in ("max_restarts", "hang_seconds", "grace_seconds", "skip_poisoned"):
        shown = re.search(rf"--{name} .*default (\w+)", text)
        value = getattr(defaults, name)
        assert shown is not None and shown[1] == (f"{value:g}" if not isinstance(value, bool) else str(value).lower())
    assert defaults == launch.Options(ranks=2)


def test_restarts_get_ports_that_several_machines_agree_on() -> None:
    several = launch.parse({"nnodes": "2", "node_rank": "1", "master_addr": "10.0.0.1", "nproc_per_node": "8"})
    assert [several.port_of(attempt) for attempt in range(3)] == [29500, 29501, 29502]
    alone = launch.parse({"nproc_per_node": "2"})
    assert alone.port_of(0) != 29500

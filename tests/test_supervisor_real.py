"""The supervisor with real ranks on ZeRO-3: one is killed, one is stopped, and nothing of it shows in the result."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from align_kit import supervised
from align_kit.telemetry.meters import repeatable
from tests.harness import ROOT, Ranks
from tests.little import little_run
from tests.small import lab_of, read_weights, words

pytestmark = pytest.mark.slow
RUN = {"max_steps": 40, "save_strategy": "steps", "save_steps": 10, "save_total_limit": 2}


def wait_for(found: Callable[[], object], launcher: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until `found()` is true; fail with what the launcher printed where it ends before."""
    ending = time.monotonic() + seconds
    while not found():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < ending, "it did not come to that"
        time.sleep(0.005)


def rank_pid(launcher: int, rank: int) -> int:
    """Return the process id of a rank of a launcher."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in entries:
            return int(child)
    raise AssertionError(f"rank {rank} does not run")


def numbers(run: Path) -> dict[int, dict[str, float]]:
    """Return the logged numbers of each step, times left out; a step that was trained again counts once, the last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: repeatable(line) for line in lines if "loss" in line}


def test_a_run_survives_a_killed_and_a_stopped_rank(ranks: Ranks, tmp_path: Path) -> None:
    lab = lab_of(ranks)
    undisturbed = lab.train("sft", **RUN)
    out = tmp_path / "disturbed"
    command = [sys.executable, "-m", "align_kit", "launch", "--nproc_per_node", "2", "--hang_seconds", "4", "sft",
               *words(lab.options("sft", output_dir=out, **RUN))]  # fmt: skip
    env = {**ranks.env, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    launcher = subprocess.Popen(command, env=env, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=-1)
    try:
        wait_for((out / "checkpoint-10").exists, launcher)
        os.kill(rank_pid(launcher.pid, 1), signal.SIGKILL)
        wait_for((out / "checkpoint-20").exists, launcher)
        os.kill(rank_pid(launcher.pid, 0), signal.SIGSTOP)
        text = launcher.communicate(timeout=200)[1]
    finally:
        launcher.kill()
    assert launcher.returncode == 0, text
    assert re.search(r"^rank 1 ended with signal 9 at step \d+; starting again from checkpoint-\d0 ", text, re.M), text
    assert re.search(
        r"^rank 0 hangs at step \d+, no progress for \d+ s; starting again from checkpoint-\d0 ", text, re.M
    )
    assert "  rank 0 does not answer" in text
    ours, theirs = read_weights(out), undisturbed.weights
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert numbers(out) == numbers(undisturbed.folder)


def test_a_run_says_that_the_folder_is_its_own_once_it_is(ranks: Ranks, tmp_path: Path) -> None:
    """Not before: a launcher that starts it again would take the run that stands there for this one."""
    words = [str(word) for word in little_run("sft", tmp_path)]

    def told(name: str, *more: str) -> tuple[list[int], Path | None]:
        (tmp_path / name).mkdir()
        done = ranks.run(*words, *more, env={supervised.FOLDER: str(tmp_path / name)}, cwd=tmp_path)
        return done.codes, supervised.read_output(tmp_path / name)

    out = tmp_path / "out"
    assert told("first") == ([0, 0], out)
    stands = sorted(out.rglob("*"))
    assert told("refused") == ([2, 2], None)
    assert told("mistaken", "--overwrite", "--chat_template_path", "no/such") == ([2, 2], None)
    assert sorted(out.rglob("*")) == stands
    assert told("replacing", "--overwrite") == ([0, 0], out)


def test_ranks_do_not_wait_longer_than_they_were_told(ranks: Ranks, tmp_path: Path) -> None:
    """No launcher listens here: `ddp_timeout` itself reaches the groups that ZeRO's collectives run on."""
    words = [str(word) for word in little_run("sft", tmp_path, "--ddp_timeout", "3")]
    done = ranks.run(function="tests.supervised_work:run_where_rank_1_sleeps", words=words, cwd=tmp_path, grace=0.1)
    assert done.codes == [1, -signal.SIGKILL] and done.seconds < 45, (done.codes, done.seconds)
    assert done.output[0].splitlines()[-1] == (
        "rank 0 stopped: it waited 3 s for another rank, which did not come (the limit is ddp_timeout)"
    )
    assert "Traceback" not in done.text


SAVING = ("--save_strategy", "steps", "--save_steps", "2")
LIVES = [
    ("sft", (*SAVING, "--eval_strategy", "steps", "--eval_steps", "1", "--test_split_size", "2"),
     "start train evaluate train evaluate train save train end"),
    ("ppo", SAVING, "start rollout train save train end"),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "more", "activities"), LIVES, ids=[row[0] for row in LIVES])
def test_the_heart_beats_whatever_a_run_does(
    phase: str, more: tuple[str, ...], activities: str, ranks: Ranks, tmp_path: Path
) -> None:
    words = [str(word) for word in little_run(phase, tmp_path, *more)]
    env = {supervised.FOLDER: str(tmp_path)}
    done = ranks.run(function="tests.supervised_work:run_noting_beats", words=words, env=env, cwd=tmp_path).ok()
    assert [line for line in done.output[1].splitlines() if line.startswith("beats:")] == [f"beats: {activities}"]
    last = supervised.read_beat(tmp_path, 1)
    assert last is not None and last.step == 2 and last.activity == "end"
    assert supervised.read_output(tmp_path) == tmp_path / "out"

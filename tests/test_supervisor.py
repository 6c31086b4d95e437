"""The supervisor with ranks that hold no model: real processes that die, hang, report and are asked to stop."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from align_kit import machine
from align_kit.launch import Options, judge, pulse, start, watch
from align_kit.launch.judge import Ended, Verdict
from align_kit.supervised import ATTEMPT, LAUNCHER, RESUME, SKIP_STEPS, STOPPED_CODE, Beat, Failure, beat_file, pack
from tests.harness import ROOT

RANK = ["-m", "tests.launch_rank"]
FINE = [["train", 8]]
Plan = list[list[list[list[Any]]]]  # attempts, ranks, deeds, words


@dataclass
class Launched:
    """What became of a launch: its exit code, what it printed to standard error, what its ranks were told."""

    code: int
    text: str
    told: list[dict[str, Any]]

    @property
    def attempts(self) -> int:
        return 1 + max(int(line[ATTEMPT]) for line in self.told)

    def of(self, attempt: int, name: str) -> set[str | None]:
        """Return what the ranks of an attempt were told under `name`."""
        return {line[name] for line in self.told if line[ATTEMPT] == str(attempt)}


def told(out: Path) -> list[dict[str, Any]]:
    place = out / "told.jsonl"
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


@pytest.fixture
def launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Launched]]:
    """Run a plan under the supervisor, in this process, and leave its environment as it was."""
    before = dict(os.environ)
    monkeypatch.setattr(watch, "ECHO_SECONDS", 0.5)

    def run(plan: Plan, **changes: Any) -> Launched:
        os.environ.update(PLAN=json.dumps(plan), OUT=str(tmp_path), PYTHONPATH=str(ROOT))
        options = replace(Options(ranks=len(plan[0])), **changes)
        code = start(options, RANK)
        return Launched(code, capfd.readouterr().err, told(tmp_path))

    yield run
    os.environ.clear()
    os.environ.update(before)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# --- ranks that die ---------------------------------------------------------------------------------------


def test_a_run_without_failures_is_started_once(launched: Callable[..., Launched]) -> None:
    done = launched([[FINE, FINE]])
    assert (done.code, done.text, done.attempts) == (0, "", 1)
    assert done.of(0, RESUME) == done.of(0, SKIP_STEPS) == {None}


def test_a_killed_rank_starts_the_run_again(launched: Callable[..., Launched]) -> None:
    dies = [["train", 7], ["die", 9]]
    echoes = [["train", 7], ["commit", 6], ["pause", 0.3], ["report", "peer", "another rank ended first"]]
    done = launched([[echoes, dies], [FINE, FINE]])
    assert done.code == 0 and done.attempts == 2 and done.of(1, RESUME) == {"auto"}
    assert done.text == "rank 1 ended with signal 9 at step 7; starting again from checkpoint-6 (restart 1 of 3)\n"


def test_the_first_failing_rank_is_named_whoever_notices_first(launched: Callable[..., Launched]) -> None:
    """The one that has died says nothing; the error that another meets at once is only its echo."""
    done = launched([[[["train", 3], ["pause", 0.3], ["report", "error", "RuntimeError: gloo"]],
                      [["train", 3], ["die", 11]]]], max_restarts=0)  # fmt: skip
    assert done.code == 1 and done.text == "rank 1 ended with signal 11 at step 3, and the others with it\n"


@pytest.mark.slow
def test_the_same_failure_twice_ends_the_run(launched: Callable[..., Launched]) -> None:
    trace = "Traceback (most recent call last):\n  File x\nValueError: a bad row\n"
    fails = [["train", 5], ["report", "error", "ValueError: a bad row", [], trace]]
    echoes = [["say", "chatter"] for _ in range(50)]
    others = [["train", 5], *echoes, ["pause", 0.3], ["report", "peer", "another rank ended first"]]
    done = launched([[fails, others, others]] * 5)
    assert done.code == 1 and done.attempts == 2
    first, rest = done.text.split("\n", 1)
    assert first == "rank 0 failed at step 5: ValueError: a bad row; starting again from the beginning (restart 1 of 3)"
    assert rest.startswith(f"rank 0, at step 5:\n{trace}stopped after 1 restart: the same failure twice without progr")
    assert "chatter" not in done.text


@pytest.mark.slow
def test_progress_in_between_is_no_same_failure(launched: Callable[..., Launched]) -> None:
    dies = [["train", 7], ["die", 9]]
    plan = [[[["commit", step], *dies]] for step in (2, 4, 6)]
    done = launched([*plan, [FINE]], max_restarts=3)
    assert done.code == 0 and done.attempts == 4 and "checkpoint-6 (restart 1 of 3)" in done.text


@pytest.mark.slow
def test_only_restarts_without_progress_are_counted(launched: Callable[..., Launched]) -> None:
    saves = [[[["commit", step], ["train", step + 1], ["die", 9]]] for step in (2, 4, 6)]
    dies = [[[["train", step], ["die", 9]]] for step in (8, 9)]
    done = launched([*saves, *dies, [FINE]], max_restarts=2)
    assert done.code == 1 and done.attempts == 5 and done.text.count("checkpoint-6 (restart 1 of 2)") == 1
    assert done.text.endswith("stopped after 4 restarts: --max_restarts 2 without a newer checkpoint\n")


def test_a_run_that_had_not_begun_is_started_as_it_was(launched: Callable[..., Launched]) -> None:
    """Before it has said that the folder is its own, another run may lie there, which it must not go on with."""
    early, claims, late = [["die", 9]], [["claim"], ["die", 11]], [["die", 9]]
    done = launched([[early], [claims], [late], [FINE]])
    assert done.code == 0 and [done.of(attempt, RESUME) for attempt in range(4)] == [{None}, {None}, {"auto"}, {"auto"}]


def test_what_a_killed_rank_had_started_ends_with_it(launched: Callable[..., Launched], tmp_path: Path) -> None:
    done = launched([[[["train", 3], ["leave_behind"], ["die", 9]]]], max_restarts=0)
    child = int((tmp_path / "child.0").read_text())
    ending = time.monotonic() + 5
    while alive(child) and time.monotonic() < ending:
        time.sleep(0.02)
    left = alive(child)
    if left:
        os.kill(child, signal.SIGKILL)
    assert done.code == 1 and not left


def test_restarts_are_counted(launched: Callable[..., Launched]) -> None:
    done = launched([[[["train", step], ["die", 9]]] for step in (2, 3, 4)], max_restarts=1)
    assert done.code == 1 and done.attempts == 2
    assert done.text.endswith("rank 0 ended with signal 9 at step 3, and the others with it\n"
                              "stopped after 1 restart: --max_restarts 1 without a newer checkpoint\n")  # fmt: skip


def test_what_a_rank_wrote_before_it_broke_is_shown(launched: Callable[..., Launched]) -> None:
    broken = [["train", 2], ["say", "terminate called"], ["leave", 5]]
    done = launched([[[["train", 2], ["say", "live"], ["pause", 30]], broken]], max_restarts=0)
    assert done.code == 1
    assert done.text == (
        "live\nrank 1 wrote last:\nterminate called\nrank 1 ended with exit code 5 at step 2, and the others with it\n"
    )


def test_a_bug_before_the_first_step_is_not_tried_again(launched: Callable[..., Launched]) -> None:
    done = launched([[[["report", "error", "KeyError: 'x'", [], "Traceback\nKeyError: 'x'"]]]])
    assert done.code == 1 and done.attempts == 1
    assert done.text.startswith("rank 0, before the first step:\nTraceback\n") and "nothing was trained y" in done.text


# --- what a run says of itself ----------------------------------------------------------------------------


def test_a_users_mistake_is_one_line_and_never_tried_again(launched: Callable[..., Launched]) -> None:
    mistake = [["train", 4], ["report", "user", "output_dir is full"]]
    done = launched([[[["train", 4], ["report", "peer", "another rank ended first"]], mistake]])
    assert (done.code, done.text, done.attempts) == (2, "error: output_dir is full\n", 1)


@pytest.mark.slow
def test_a_run_that_stopped_on_request_stays_so(launched: Callable[..., Launched]) -> None:
    """The slower rank is still saving when the first has ended, and is left to it."""
    slow = [["train", 3], ["pause", 1.5], ["commit", 3], ["leave", STOPPED_CODE]]
    done = launched([[[["train", 3], ["leave", STOPPED_CODE]], slow]])
    assert (done.code, done.text, done.attempts) == (STOPPED_CODE, "", 1)


@pytest.mark.slow
def test_a_rank_lost_while_the_run_stops_is_a_failure(launched: Callable[..., Launched]) -> None:
    """What was saved may lack a part: the run goes on from what verifies, and stops when it is done."""
    stops, dies = [["train", 3], ["leave", STOPPED_CODE]], [["train", 3], ["pause", 0.5], ["die", 9]]
    done = launched([[stops, dies], [FINE, FINE]])
    assert done.code == 0 and done.text.startswith("rank 1 ended with signal 9 at step 3; starting again")


def test_a_fault_names_the_steps_to_leave_out(launched: Callable[..., Launched]) -> None:
    spike = [["train", 9], ["report", "fault", "the loss spiked at step 9", [8, 9]]]
    done = launched([[spike], [spike], [FINE]])
    assert done.code == 3 and done.attempts == 2, "the same once more, with these steps left out, is no progress"
    assert done.of(1, SKIP_STEPS) == {"8,9"}
    assert "starting again from the beginning, without the batch of step 8, 9 (restart 1 of 3)" in done.text
    assert "error: the loss spiked at step 9\nstopped after 1 restart" in done.text


@pytest.mark.slow
def test_a_poisoned_step_is_left_out_where_that_is_asked_for(launched: Callable[..., Launched]) -> None:
    poisoned = [["train", 5], ["die", 9]]
    assert launched([[poisoned]] * 3).code == 1
    done = launched([[poisoned], [poisoned], [FINE]], skip_poisoned=True)
    assert done.code == 0 and done.of(2, SKIP_STEPS) == {"5"} and "without the batch of step 5 (restart 2" in done.text


# --- ranks that hang --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hung_rank_is_named_with_its_stack(launched: Callable[..., Launched]) -> None:
    hangs, waits = [["train", 4, 0.2], ["stuck"]], [["train", 4, 0.2], ["wait"]]
    began = time.monotonic()
    done = launched([[waits, hangs], [FINE, FINE]], hang_seconds=1.0)
    assert done.code == 0 and time.monotonic() - began < 10
    assert re.search(r"^rank 1 hangs at step 4, no progress for \d s; starting again from the", done.text), done.text
    assert re.search(r"rank 1, innermost call first:\n    File .*tests/launch_rank.py.* in stuck", done.text), done.text
    assert "in wait" not in done.text


@pytest.mark.slow
def test_a_stopped_rank_is_named_though_it_cannot_answer(launched: Callable[..., Launched]) -> None:
    done = launched([[[["train", 4, 0.2], ["wait"]], [["train", 4, 0.2], ["die", signal.SIGSTOP]]]], hang_seconds=0.5,
                    max_restarts=0)  # fmt: skip
    assert done.code == 1 and "rank 1 hangs at step 4" in done.text and "rank 1 does not answer: it is st" in done.text


def test_who_has_given_up_waiting_points_at_who_hangs(launched: Callable[..., Launched]) -> None:
    """A collective's own timeout ends the rank that waits, not the one that hangs."""
    late = [["train", 4], ["report", "late", "it waited 5 s for another rank, which did not come"]]
    done = launched([[late, [["train", 4], ["stuck"]]]], max_restarts=0)
    assert done.code == 1 and "rank 1 hangs at step 4" in done.text and "in stuck" in done.text


@pytest.mark.slow
def test_start_and_evaluation_have_time(launched: Callable[..., Launched]) -> None:
    slow = [["pause", 1.0], ["train", 4], ["beat", "evaluate", 4], ["pause", 1.0], ["train", 4]]
    done = launched([[slow]], hang_seconds=0.3)
    assert (done.code, done.text) == (0, "")


@pytest.mark.slow
def test_a_rank_that_fails_may_write_what_it_has_begun(launched: Callable[..., Launched]) -> None:
    """The others, which wait for it in their step, wait as long as a save may take."""
    fails = [
        ["train", 4],
        ["beat", "save", 4],
        ["pause", 1.5],
        ["report", "error", "ValueError: bad", [], "ValueError"],
    ]
    done = launched([[[["train", 4], ["wait"]], fails]], hang_seconds=0.5, max_restarts=0)
    assert done.code == 1 and "ValueError" in done.text and "hang" not in done.text, done.text


# --- signals to the launcher ------------------------------------------------------------------------------


def in_a_process(out: Path, plan: Plan, **options: Any) -> subprocess.Popen[str]:
    """Start a supervisor in a process of its own and wait until all its ranks have begun."""
    ranks = len(plan[0])
    code = f"import sys; from align_kit.launch import *; sys.exit(start(Options({ranks}, **{options!r}), {RANK!r}))"
    env = {**os.environ, "PLAN": json.dumps(plan), "OUT": str(out), "TMPDIR": str(out), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True, cwd=out)


def pids_of(out: Path, ranks: int) -> list[int]:
    """Return the process ids of all ranks of the first attempt once they train."""
    ending = time.monotonic() + 60
    while len(list(out.glob("align_kit-*/attempt-0/heartbeat.*"))) < ranks:
        assert time.monotonic() < ending, "the ranks did not begin"
        time.sleep(0.05)
    return [line["pid"] for line in told(out)]


LONG = [["train", 2000, 0.05]]


@pytest.mark.slow
def test_ranks_are_asked_to_save_and_stop(tmp_path: Path) -> None:
    heeds = [["heed"], *LONG]
    launcher = in_a_process(tmp_path, [[heeds, heeds]])
    pids = pids_of(tmp_path, 2)
    launcher.send_signal(signal.SIGTERM)
    _, text = launcher.communicate(timeout=30)
    assert (launcher.returncode, text) == (STOPPED_CODE, "") and not any(map(alive, pids))
    assert not list(tmp_path.glob("align_kit-*")), "the private folder is gone"


@pytest.mark.slow
def test_a_save_is_asked_of_ranks_that_train(tmp_path: Path) -> None:
    """SIGUSR1 means save and go on; to a rank that does not listen yet it would be the end."""
    deeds = [["pause", 2], ["train", 3], ["save_on_request"], ["train", 60, 0.05]]
    launcher = in_a_process(tmp_path, [[deeds, deeds]])
    while len(told(tmp_path)) < 2:
        time.sleep(0.02)
    launcher.send_signal(signal.SIGUSR1)  # before the first heartbeat
    pids_of(tmp_path, 2)
    time.sleep(0.5)
    launcher.send_signal(signal.SIGUSR1)
    _, text = launcher.communicate(timeout=30)
    assert (launcher.returncode, text) == (0, "") and (tmp_path / "checkpoint-60").exists()


@pytest.mark.slow
def test_ranks_that_do_not_stop_in_time_are_ended(tmp_path: Path) -> None:
    deaf = [["ignore"], *LONG]
    launcher = in_a_process(tmp_path, [[deaf, deaf]], grace_seconds=0.5)
    pids = pids_of(tmp_path, 2)
    began = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=30) == 128 + signal.SIGTERM and time.monotonic() - began < 5
    assert not any(map(alive, pids)) and len(told(tmp_path)) == 2, "nothing is started again"
    assert launcher.communicate()[1] == "stopped: SIGTERM before it had saved\n"


@pytest.mark.slow
def test_an_error_after_a_signal_is_said(tmp_path: Path) -> None:
    fails = [["ignore"], ["train", 3], ["pause", 2], ["report", "error", "OSError: no", [], "Traceback\nOSError: no"]]
    launcher = in_a_process(tmp_path, [[fails]])
    pids_of(tmp_path, 1)
    launcher.send_signal(signal.SIGTERM)
    _, text = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert text == "rank 0, at step 3:\nTraceback\nOSError: no\nstopped: SIGTERM before it had saved\n"


@pytest.mark.slow
def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launcher = in_a_process(tmp_path, [[LONG, LONG]])
    pids = pids_of(tmp_path, 2)
    assert all(map(alive, pids)) and LAUNCHER not in os.environ
    launcher.kill()
    launcher.wait()
    ending = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < ending:
        time.sleep(0.02)
    left = list(filter(alive, pids))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    launcher.communicate()
    assert not left


@pytest.mark.slow
def test_launchers_of_two_machines_start_again_together(tmp_path: Path) -> None:
    """Two launchers on this machine, a rank each: one dies, both begin anew on the next port."""
    port = machine.free_port()
    dies, echoes = [["train", 3], ["die", 9]], [["train", 3], ["pause", 0.5], ["report", "peer", "another rank ended"]]
    plan = [[echoes, dies], [FINE, FINE]]
    launchers = []
    for node in range(2):
        code = (
            f"import sys; from align_kit.launch import *; "
            f"sys.exit(start(Options(1, nodes=2, node={node}, port={port}), {RANK!r}))"
        )
        env = {**os.environ, "PLAN": json.dumps(plan), "OUT": str(tmp_path), "PYTHONPATH": str(ROOT)}
        launchers.append(subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True))
    texts = [launcher.communicate(timeout=90)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], texts
    assert sorted((line["rank"], line[ATTEMPT]) for line in told(tmp_path)) == [(0, "0"), (0, "1"), (1, "0"), (1, "1")]
    assert "rank 1 ended with signal 9 at step 3; starting again" in texts[1]
    assert "rank 0 failed at step 3: another rank ended; starting again" in texts[0]


# --- what is decided, and what counts as a hang -----------------------------------------------------------


def ended(kind: str = "died", line: str = "ended with signal 9", step: int | None = 5, **more: Any) -> Ended:
    return Ended(
        frozenset({1}), Failure(0, kind, line, step), **{"activity": "train", "commit": "checkpoint-4", **more}
    )


def spiked() -> Ended:
    """Return an end by a fault that names steps to leave out."""
    failed = ended("fault")
    assert failed.failure is not None
    return replace(failed, failure=replace(failed.failure, skip_steps=(4, 5)))


USED_UP, OFF = "--max_restarts 1 without a newer checkpoint", Options(ranks=2, max_restarts=0)
FROM_4 = " before it had saved; --resume goes on from checkpoint-4"
ONCE = Options(ranks=2, max_restarts=1)
VERDICTS = [
    ("nothing left to do", [Ended(frozenset({0}))], ONCE, [], Verdict(0)),
    ("stopped on request", [Ended(frozenset({75, 0}))], ONCE, [], Verdict(75)),
    ("lost a rank while it stopped", [replace(ended(), codes=frozenset({75, -9}))], ONCE, [], Verdict(None)),
    ("died", [ended()], ONCE, [], Verdict(None)),
    ("died, no restarts", [ended()], OFF, [], Verdict(1)),
    ("died twice elsewhere", [ended(), ended(step=6)], ONCE, [], Verdict(1, USED_UP)),
    ("a fault, no restarts", [ended("fault")], OFF, [], Verdict(3)),
    ("asked to end", [ended()], ONCE, [signal.SIGTERM], Verdict(143, f"SIGTERM{FROM_4}")),
    (
        "asked to save, died of it",
        [ended(line="ended with signal 10")],
        ONCE,
        [signal.SIGUSR1],
        Verdict(138, f"SIGUSR1{FROM_4}"),
    ),
    ("asked to save, died later", [ended()], ONCE, [signal.SIGUSR1], Verdict(None)),
    ("a mistake, however late", [ended("user")], ONCE, [], Verdict(2)),
    ("an error in training", [ended("error")], ONCE, [], Verdict(None)),
    (
        "a fault's steps, restarts used up",
        [ended(), spiked()],
        ONCE,
        [],
        Verdict(3, f"{USED_UP}; go on with --resume --skip_steps 4,5"),
    ),
    ("an error before training", [ended("error", activity=None)], Options(2, max_restarts=0), [], Verdict(1)),
    ("an error on the way back", [ended(), ended("error", activity=None)], Options(2), [], Verdict(None)),
    ("died before training", [ended(activity=None, step=None)], ONCE, [], Verdict(None)),
]


@pytest.mark.parametrize(("history", "options", "asked", "verdict"), [row[1:] for row in VERDICTS],
                         ids=[row[0] for row in VERDICTS])  # fmt: skip
def test_verdicts(history: list[Ended], options: Options, asked: list[int], verdict: Verdict) -> None:
    assert judge.judge(history, options, frozenset(), asked) == verdict


def beating(folder: Path, rank: int, number: int, activity: str, step: int, seconds: float = 0.0) -> None:
    beat_file(folder, rank).write_bytes(pack(Beat(number, step, 0, activity, seconds)))


def test_limits_follow_the_pace_of_the_run(tmp_path: Path) -> None:
    watched = pulse.Pulse(tmp_path, [0], hang_seconds=60.0)
    watched.look(0.0)
    assert watched.limit(0) == 120 * 60  # imports, loads, tokenises
    for step in range(1, 8):
        beating(tmp_path, 0, step, "train", step, 10.0 * step)
        watched.look(float(step))
        assert step > 1 or watched.limit(0) == 30 * 60  # the first step
    assert watched.limit(0) == 20 * 10.0
    beating(tmp_path, 0, 99, "evaluate", 7, 71.0)
    watched.look(8.0)
    assert watched.limit(0) == 30 * 60
    assert pulse.Pulse(tmp_path, [0], hang_seconds=0).late([0]) is False


def test_a_launcher_that_was_stopped_itself_finds_nobody_late(tmp_path: Path) -> None:
    watched = pulse.Pulse(tmp_path, [0], hang_seconds=5.0)
    for step in range(1, 4):
        beating(tmp_path, 0, step, "train", step, 0.1 * step)
        watched.look(float(step))
    watched.look(1000.0)
    assert watched.silent_for(0) == 1.0 and not watched.late([0])
    for second in range(1001, 1006):
        watched.look(float(second))
    assert watched.late([0])


IN_COLLECTIVE = ('File "/x/torch/distributed/distributed_c10d.py", line 3 in all_reduce',)
ELSEWHERE = ('File "/x/model.py", line 3 in forward',)


@pytest.mark.parametrize(
    ("steps", "stacks", "hung"),
    [
        ((7, 7), (IN_COLLECTIVE, ELSEWHERE), (1,)),
        ((7, 8), (ELSEWHERE, ELSEWHERE), (0,)),  # the further behind
        ((7, 6), (ELSEWHERE, IN_COLLECTIVE), (0,)),  # who waits for others does not hang
        ((7, 7), (IN_COLLECTIVE, ()), (1,)),  # no answer
        ((7, 7), (ELSEWHERE, ()), (1,)),  # who answers lives
        ((7, 7), ((), ()), (0, 1)),
        ((7, 7), (IN_COLLECTIVE, IN_COLLECTIVE), (0, 1)),
    ],
)
def test_who_hangs(steps: tuple[int, ...], stacks: tuple[tuple[str, ...], ...], hung: tuple[int, ...]) -> None:
    beats = [Beat(1, step, 0, "train", 0.0) for step in steps]
    assert pulse.name_hung(range(2), lambda rank: beats[rank], dict(enumerate(stacks))) == hung

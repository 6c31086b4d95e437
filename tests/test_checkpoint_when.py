"""Save points beside every so many steps: minutes, signals, a walltime; all ranks at the same step, and bitwise on."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl

from align_kit.checkpoint import commit, manifest, when
from align_kit.checkpoint.when import TERMINATED, When
from align_kit.run_folder import checkpoints
from align_kit.telemetry.roll_call import SAVE, STOP, RollCall
from tests.harness import Ranks
from tests.small import Lab, Run, lab_of
from tests.when_work import train

Step = Callable[..., TrainerControl]


class Loop:
    """The training loop as a callback sees it: one rank, steps and saves of given seconds on a clock of its own."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch, **args: Any) -> None:
        self.now, self.step = 1000.0, 0
        monkeypatch.setattr(when.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(when.time, "time", lambda: self.now)
        monkeypatch.setattr(when, "_age", lambda: 5.0)
        strategies = dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "steps")
        self.args = SimpleNamespace(output_dir=str(run), **{**strategies, **args})
        self.trainer = SimpleNamespace(args=self.args, roll_call=RollCall(), resumable=True, stopped_early=None)

    def begin(self, minutes: float | None = None, before: str | None = None) -> When:
        self.when = When(self.trainer, minutes, before)
        self.when.on_train_begin(self.args, None, None)
        return self.when

    def take(
        self, seconds: float = 1.0, *, saves: bool = False, saving: float = 0.0, resumable: bool = True, of: int = 100
    ) -> TrainerControl:
        """Take one step of `seconds`, with a save of `saving` seconds where one is due, and return what was asked."""
        self.trainer.roll_call("step", self.step + 1)
        self.now += seconds
        self.step += 1
        self.trainer.resumable = resumable
        asked = TrainerControl(should_save=saves)
        self.when.on_step_end(
            self.args, SimpleNamespace(global_step=self.step, max_steps=of, epoch=self.step / 4), asked
        )
        if asked.should_save:
            self.now += saving
            place = Path(self.args.output_dir) / f"checkpoint-{self.step}"
            place.mkdir(parents=True)
            (place / manifest.NAME).write_text("")
            os.utime(place / manifest.NAME, (self.now, self.now))
            self.when.on_save(self.args, None, asked)
        return asked


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loop:
    return Loop(tmp_path, monkeypatch)


# --- the clock ------------------------------------------------------------------------------------------------


def saved(loop: Loop, steps: int, **more: Any) -> list[int]:
    return [loop.step for _ in range(steps) if loop.take(**more).should_save]


def test_minutes_count_from_the_last_save(loop: Loop) -> None:
    """A wish is heard in the step after: with steps of 10 s and a minute, every seventh."""
    loop.begin(minutes=1)
    assert saved(loop, 15, seconds=10) == [7, 14]
    loop.take(10, saves=True)
    assert saved(loop, 14, seconds=10) == [23, 30]


def test_nothing_is_asked_without_clock_or_signal(loop: Loop) -> None:
    loop.begin()
    assert saved(loop, 50, seconds=1e6) == [] and loop.trainer.stopped_early is None


@pytest.mark.parametrize(("step", "saving"), [(1.0, 5.0), (10.0, 0.5), (0.1, 60.0), (30.0, 30.0)])
def test_the_run_is_saved_before_its_time_is_up(loop: Loop, step: float, saving: float) -> None:
    """Ten minutes since the process began 5 s ago: the last save stands in time, and not much of it is left unused."""
    began = loop.now - 5
    loop.begin(before="10")
    loop.take(3 * step)  # warms up
    loop.take(step, saves=True, saving=saving)
    while not loop.take(step, of=10**6, saving=saving).should_training_stop:
        assert loop.now - began < 600
    assert loop.trainer.stopped_early == "--save_before 10"
    left = 600 - (loop.now - began)
    assert when.ENDING <= left <= when.ENDING + 2.5 * step + when.SPARE * saving


def test_before_a_save_was_measured_a_share_of_the_time_is_kept_for_it(loop: Loop) -> None:
    began = loop.now - 5
    loop.begin(before="1:40")
    while not loop.take(1.0).should_training_stop:
        pass
    assert 100 - 15 - 4 < loop.now - began < 100 - 12.5


def test_a_save_that_is_still_written_is_allowed_for(loop: Loop) -> None:
    """The last save begins by waiting for the one under way."""
    whens = loop.begin(before="10")
    loop.take(1.0)
    idle = whens._needed(2)
    commit.staging(Path(loop.args.output_dir), 7).mkdir()
    whens.saves.begin(7)
    whens.on_save(loop.args, None, TrainerControl())
    loop.now += 100
    assert whens._needed(2) >= idle + 100 * when.SPARE


def test_a_save_that_came_to_nothing_is_forgotten(loop: Loop) -> None:
    """No room on the disk: nothing is being written, however long ago it was tried."""
    whens = loop.begin(before="10")
    loop.take(1.0)
    idle = whens._needed(2)
    whens.saves.begin(7)
    whens.on_save(loop.args, None, TrainerControl())
    loop.now += 100
    assert whens._needed(2) == idle


def test_a_stop_waits_for_the_end_of_an_iteration(loop: Loop) -> None:
    """A method that cannot go on from a step is neither saved nor stopped there."""
    loop.begin(before="1:40")
    asked = [loop.take(2.0, resumable=number % 4 == 0) for number in range(1, 60)]
    assert {number % 4 for number, control in enumerate(asked, 1) if control.should_training_stop} == {0}
    assert all(control.should_save == control.should_training_stop for control in asked)


def test_a_run_at_its_end_is_finished_not_stopped(loop: Loop) -> None:
    loop.begin(before="0:30")
    loop.now += 100
    assert not loop.take(of=2).should_training_stop
    assert not loop.take(of=2).should_training_stop and loop.trainer.stopped_early is None


@pytest.mark.parametrize("name", ["eval_strategy", "save_strategy", "logging_strategy"])
def test_what_an_epoch_ends_with_is_done_before_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Four steps an epoch: asked to stop in its last, the run evaluates and saves as it would, and stops after one."""
    loop = Loop(tmp_path, monkeypatch, **{name: "epoch"})
    whens = loop.begin()
    for _ in range(3):
        loop.take()
    loop.trainer.roll_call.wish = SAVE | STOP
    assert not loop.take().should_training_stop
    ending = TrainerControl(should_evaluate=True, should_save=True)
    whens.on_epoch_end(loop.args, SimpleNamespace(global_step=4), ending)
    assert ending.should_evaluate and ending.should_save
    loop.trainer.roll_call.wish = SAVE | STOP
    assert loop.take().should_training_stop
    whens.on_epoch_end(loop.args, SimpleNamespace(global_step=5), ending)
    assert not (ending.should_evaluate or ending.should_save), "the epoch has not ended"


def test_the_age_of_a_process() -> None:
    began = when._age()
    time.sleep(0.05)
    assert 0.04 < when._age() - began < 1 and began > 0.05


def test_restarts_are_part_of_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a launcher the time runs from its start."""
    own = when._age()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert when._age() > own
    monkeypatch.setenv("ALIGN_KIT_LAUNCHER", "1")
    assert when._age() > own + 1


# --- signals --------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_signals() -> Iterator[list[int]]:
    """Handlers of this process's own, that must be back afterwards."""
    heard: list[int] = []
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, _: heard.append(got)) for number in numbers}
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_become_wishes_and_handlers_come_back(loop: Loop, quiet_signals: list[int]) -> None:
    whens = loop.begin()
    with whens.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert loop.trainer.roll_call.wish == SAVE and quiet_signals == []
        assert loop.take().should_save and loop.trainer.roll_call.wish == 0
        assert not loop.take().should_save
        os.kill(os.getpid(), signal.SIGTERM)
        assert loop.trainer.roll_call.wish == STOP | TERMINATED
        asked = loop.take()
        assert asked.should_save and asked.should_training_stop and loop.trainer.stopped_early == "SIGTERM"
    os.kill(os.getpid(), signal.SIGTERM)
    assert quiet_signals == [signal.SIGTERM]


def test_handlers_come_back_where_training_fails(loop: Loop, quiet_signals: list[int]) -> None:
    with pytest.raises(ZeroDivisionError), loop.begin().listening():
        1 / 0  # noqa: B018
    os.kill(os.getpid(), signal.SIGUSR1)
    assert quiet_signals == [signal.SIGUSR1]


def test_a_stop_that_comes_during_a_save_is_not_forgotten(loop: Loop, quiet_signals: list[int]) -> None:
    whens = loop.begin()
    with whens.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        whens.on_save(loop.args, None, TrainerControl())
        assert loop.take().should_training_stop


# --- real runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def same_end(run: Run, other: Run) -> bool:
    """Tell whether two runs ended with the same losses and the same bytes."""
    same = all(torch.equal(run.weights[name], tensor) for name, tensor in other.weights.items())
    return same and run.losses == other.losses


def stopped(run: Run, why: str) -> int:
    """Return the step at which a run stopped; fail where it did not, or where it left more than it should."""
    assert set(run.result.codes) == {75} and "Traceback" not in run.result.text, run.result.text
    lines = re.findall(r"^stopped at step (\d+) \((.*)\): go on with --resume$", run.result.text, re.MULTILINE)
    assert len(lines) == 1 and lines[0][1] == why, run.result.text
    step = int(lines[0][0])
    assert run.manifest["status"] == "stopped" and run.manifest["stopped"] == {"step": step, "why": why}
    assert not list(run.folder.glob("*.safetensors")), "a final model of a run that has not ended"
    newest = checkpoints(run.folder)[-1]
    assert newest.name == f"checkpoint-{step}" and not manifest.problems(newest)
    assert json.loads(run.folder.with_suffix(".handlers").read_text()) == [True, True]
    return step


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, "all"])
def test_sigterm_saves_and_stops_and_the_run_goes_on_bitwise(lab: Lab, tmp_path: Path, rank: int | str) -> None:
    """Whichever rank hears it, both stop at the same step; going on ends as if nothing had been."""
    whole = lab.train("sft", deepspeed=lab.sharded, max_steps=5)
    run = train(lab, tmp_path / "run", [[rank, 2, "send", "SIGTERM"]], max_steps=5)
    assert stopped(run, "SIGTERM") == 2
    more = train(lab, tmp_path / "run", max_steps=5, resume="auto")
    more.result.ok()
    assert same_end(more, whole) and more.manifest["status"] == "finished"


@pytest.mark.slow
def test_sigusr1_saves_and_goes_on(lab: Lab, tmp_path: Path) -> None:
    run = train(lab, tmp_path / "run", [[1, 2, "send", "SIGUSR1"]], max_steps=5)
    run.result.ok()
    assert [place.name for place in checkpoints(run.folder)] == ["checkpoint-2"]
    assert same_end(run, lab.train("sft", deepspeed=lab.sharded, max_steps=5))


@pytest.mark.slow
def test_a_second_sigterm_ends_at_once(lab: Lab, tmp_path: Path) -> None:
    """Sent twice within a moment it is one request, as a scheduler and a launcher make it together."""
    run = train(lab, tmp_path / "once", [["all", 2, "send_twice", 0.1]], max_steps=5)
    assert stopped(run, "SIGTERM") == 2
    run = train(lab, tmp_path / "twice", [["all", 2, "send_twice", when.SAME_SIGNAL + 0.2]], max_steps=5)
    assert run.result.codes == [-signal.SIGTERM] * 2 and not checkpoints(run.folder)


@pytest.mark.slow
def test_ppo_stops_at_the_end_of_its_iteration(lab: Lab, tmp_path: Path) -> None:
    """Three updates an iteration: heard in the first, the stop waits for the third."""
    run = train(lab, tmp_path / "run", [[0, 1, "send", "SIGTERM"]], phase="ppo", max_steps=6)
    assert stopped(run, "SIGTERM") == 3
    more = train(lab, tmp_path / "run", phase="ppo", max_steps=6, resume="auto")
    more.result.ok()
    assert same_end(more, lab.train("ppo", deepspeed=lab.sharded, max_steps=6))


@pytest.mark.slow
def test_minutes_on_the_clock(lab: Lab, tmp_path: Path) -> None:
    """Steps of 0.2 s or more on one rank, a save every hundredth of a minute: both ranks save, at the same steps."""
    run = train(lab, tmp_path / "run", [[1, 0, "sleep", 0.2]], max_steps=10, save_minutes=0.01, save_total_limit=50)
    run.result.ok()
    saves = [int(place.name.rpartition("-")[2]) for place in checkpoints(run.folder)]
    assert len(saves) >= 2 and min(later - former for former, later in zip(saves, saves[1:], strict=False)) > 1, saves
    assert all(not manifest.problems(place) for place in checkpoints(run.folder))


@pytest.mark.slow
def test_the_walltime_on_the_clock(lab: Lab, tmp_path: Path) -> None:
    """Far too many steps for ten seconds: saved, stopped and gone before they have passed since the process began."""
    run = train(lab, tmp_path / "run", [[1, 0, "sleep", 0.1]], max_steps=1000, save_before="0:10")
    assert stopped(run, "--save_before 0:10") > 1
    assert run.result.seconds < 10

"""A run says what is its own and nothing else; warnings of the user's own making still show."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from align_kit import log, registry
from tests.harness import Ranks
from tests.little import little_run, strangers

EVALUATE = ("--eval_strategy", "steps", "--eval_steps", "2", "--test_split_size", "2")
SAVE = ("--save_strategy", "steps", "--save_steps", "2")
EVERYTHING = ("--use_peft", *EVALUATE, *SAVE, "--gradient_checkpointing", "true", "--report", "true",
              "--sample_prompts", "2")  # fmt: skip
RUNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(registry.names(), ()),
    **{f"{phase}, everything on": EVERYTHING for phase in ("reward", "dpo", "ppo")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_clean_run_prints_nothing_of_others(name: str, ranks: Ranks, tmp_path: Path) -> None:
    phase = name.partition(",")[0]
    base = from_weights(ranks, tmp_path) if "--use_peft" in RUNS[name] else ()
    words = little_run(phase, tmp_path, "--max_steps", "3", "--logging_steps", "1", *base, *RUNS[name])
    done = ranks.run(*words, cwd=tmp_path).ok()
    assert not strangers(done.text), "\n".join(strangers(done.text))
    assert done.output[1] == "", "rank 0 speaks"
    lines = done.text.splitlines()
    most = 22 if "everything on" in name else 18  # evaluation, its data and the page have lines of their own
    most += phase == "ppo"  # it says where its seconds went
    assert len(lines) < most and lines[-1].startswith("saved and verified: out ")
    assert len([line for line in lines if re.match(r"  step \d/3  loss", line)]) == 3


def from_weights(ranks: Ranks, place: Path) -> tuple[str, ...]:
    """Train a model to put LoRA on, which needs stored weights, and return the words that start from it."""
    ranks.run(*little_run("sft", place, "--output_dir", "base", "--max_steps", "1"), cwd=place).ok()
    return ("--config_name", "null", "--model_name_or_path", "base")


@pytest.mark.slow
def test_a_users_own_warnings_show(ranks: Ranks, tmp_path: Path) -> None:
    kinds = ("UserWarning", "FutureWarning", "RuntimeWarning")
    lines = [f"warnings.warn('mine: {kind}', {kind}, stacklevel=1)" for kind in kinds]
    (tmp_path / "mine.py").write_text("\n".join(["import logging, warnings", *lines, "logging.warning('mine: log')"]))
    words = [str(word) for word in little_run("sft", tmp_path, "--max_steps", "1")]
    function = "tests.rank_faults:run_with_a_users_module"
    done = ranks.run(cwd=tmp_path, function=function, words=words, module="mine").ok()
    for expected in (*(f"{kind}: mine: {kind}" for kind in kinds), "WARNING:root:mine: log"):
        assert expected in done.output[0], done.text


# --- the filters ------------------------------------------------------------------------------------------

# A module that raises each flood, in the order of `log.FLOODS`.
RAISERS = (
    "torch.distributed.c10d_logger",
    "torch.distributed.distributed_c10d",
    "transformers.trainer",
    "deepspeed.runtime.engine",
    "torch.distributed.c10d_logger",
    "deepspeed.runtime.engine",
    "torch.utils.data.dataloader",
    "peft.tuners.tuners_utils",
    "peft.tuners.tuners_utils",
    "peft.utils.save_and_load",
)


@pytest.mark.parametrize(("flood", "module"), list(zip(log.FLOODS, RAISERS, strict=False)))
def test_a_filter_names_its_source(
    flood: log.Flood, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(raiser: str, text: str) -> bool:
        with warnings.catch_warnings(record=True) as caught:
            warnings.resetwarnings()
            warnings.simplefilter("always")
            log.quiet()
            warnings.warn_explicit(text, flood.category, f"{raiser}.py", 1, module=raiser)
        return bool(caught)

    text = flood.message or "anything"
    assert not shown(module, text)
    assert shown("users_module", text), "the same warning from elsewhere shows"
    assert not flood.message or shown(module, "something else"), "another warning from there shows"


def test_every_filter_has_a_reason_and_a_test() -> None:
    assert len(log.FLOODS) == len(RAISERS)
    assert all(flood.module and flood.why for flood in log.FLOODS)


def test_what_the_user_has_set_is_left_alone(tmp_path: Path) -> None:
    """In a process of its own: `quiet` sets variables and log levels for good."""
    code = "from align_kit import log; log.quiet(); import os; print(*(os.environ[name] for name in log.ENVIRONMENT))"
    env = {name: value for name, value in os.environ.items() if name not in log.ENVIRONMENT}
    env["TRANSFORMERS_VERBOSITY"] = "debug"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["debug", *list(log.ENVIRONMENT.values())[1:]]
    assert next(iter(log.ENVIRONMENT)) == "TRANSFORMERS_VERBOSITY"


def test_only_named_loggers_are_quietened() -> None:
    log.quiet()
    assert logging.getLogger("DeepSpeed").level == logging.ERROR
    assert logging.getLogger().level <= logging.WARNING and logging.getLogger("mine").level == logging.NOTSET


def test_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        log.say(f"from {rank}")
        log.warn(f"from {rank}")
    assert capsys.readouterr() == ("from 0\n", "warning: from 0\n")


def test_native_output_can_be_sent_elsewhere(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with open(tmp_path / "aside", "w") as aside, log.native_output_to(aside.fileno()):
        os.write(1, b"[Gloo] Rank 0 is connected\n")
    os.write(1, b"mine\n")
    assert capfd.readouterr().out == "mine\n"
    assert (tmp_path / "aside").read_text() == "[Gloo] Rank 0 is connected\n"

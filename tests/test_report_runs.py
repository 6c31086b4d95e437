"""What real runs leave for their page: meters, a ledger of time, answers before and after; what trackers are told."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align_kit.telemetry.meters import repeatable
from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, words
from tests.when_work import train as interrupted

pytestmark = pytest.mark.slow
ON = {"report": True, "sample_prompts": 2}
SECRET = "hf_" + "q7Zr" * 8


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


@pytest.fixture(scope="module")
def run(lab: Lab) -> Run:
    """A DPO run with everything a page shows."""
    held_out = [{"path": lab.held_out["preference"]}]
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_datasets": held_out}
    return lab.train("dpo", max_steps=4, save_strategy="steps", save_steps=2, **evaluated, **ON)


def test_every_line_is_metered_and_nothing_else_depends_on_the_machine(lab: Lab, run: Run) -> None:
    """The same run without a page, at another speed, logs the same numbers."""
    lines = [line for line in run.metrics if "loss" in line]
    for line in lines:
        assert line["machine/tokens_per_second"] * line["machine/seconds"] == pytest.approx(line["tokens"])
        assert 0 < line["machine/seconds"] < run.result.seconds and line["machine/peak_gib"] > 0
        assert 0 < line["machine/mfu"] < 1
    plain = lab.start("dpo", lab.home / "plain", max_steps=4)
    plain.result.ok()
    other = [repeatable(line) for line in plain.metrics if "loss" in line]
    assert [repeatable(line) for line in lines] == other and not (plain.folder / "report.html").exists()


def test_a_checkpoint_holds_nothing_of_the_machine(run: Run) -> None:
    state = (run.folder / "checkpoint-4" / "trainer_state.json").read_text()
    assert '"loss"' in state and "machine/" not in state


def test_the_ledger_accounts_for_the_run(run: Run) -> None:
    spent = run.manifest["spent"]
    parts = {"start", "data", "policy", "frozen models", "final save", "samples"}
    parts |= {f"training/{part}" for part in ("engine", "update", "evaluation", "saves")}
    assert parts <= {part for part, seconds in spent.items() if seconds > 0}
    assert run.manifest["seconds"] - 0.2 < sum(spent.values()) < run.result.seconds


def test_ppo_tells_writing_judging_and_learning_apart(lab: Lab) -> None:
    ppo = lab.train("ppo", 1, max_steps=3, report=True)
    assert all(ppo.manifest["spent"][f"training/{part}"] > 0 for part in ("rollout", "score", "update"))
    assert "Written while it trained" in (ppo.folder / "report.html").read_text()


def test_answers_are_those_of_both_models(lab: Lab, run: Run) -> None:
    lines = [json.loads(line) for line in (run.folder / "samples_before_after.jsonl").read_text().splitlines()]
    prompts = [line["prompt"] for line in lines]
    assert len(set(prompts)) == 2 and all(prompt in lab.held_out["preference"].read_text() for prompt in prompts)
    assert [line["before"] for line in lines] == greedy(lab.model, prompts)
    assert [line["after"] for line in lines] == greedy(run.folder, prompts)


def greedy(folder: Path, prompts: list[str]) -> list[str]:
    """Return a model's greedy answers, one prompt at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = GenerationConfig(do_sample=False, max_new_tokens=48, eos_token_id=[0, 3], pad_token_id=1)
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        mask = torch.ones_like(ids)
        wrote = model.generate(input_ids=ids, attention_mask=mask, generation_config=asked)
        found.append(tokenizer.decode(wrote[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def test_the_page_holds_what_was_promised(run: Run) -> None:
    text = (run.folder / "report.html").read_text()
    titles = re.findall(r"<h2>([^<]*)</h2>", text)
    assert titles == [
        "How it went", "Answers before and after", "Speed and memory", "Where the time went", "Plan and measurement",
        "Other numbers", "What was checked, and held", "What it was made from", "Configuration",
    ]  # fmt: skip
    plots = set(re.findall(r"<text[^>]*>([^<]*)</text>", text))
    expected = {"Loss", "Rewards", "Margin", "Learning rate", "Gradient norm", "Speed", "Memory", "training/update"}
    assert expected <= plots
    assert "log-ratio 0 within" in text and "comparisons with their first fingerprint" in text
    assert "the first rows give the same" in text and run.manifest["frozen"]["reference"]["digest"][:16] in text
    assert len(text) < 200_000, "a page is mailed around"
    assert f"report: {run.folder / 'report.html'}" in run.result.text


def test_a_run_from_random_weights_has_no_answers_before(lab: Lab) -> None:
    run = lab.train("sft", 1, model_name_or_path=None, config_name=lab.model, **ON)
    lines = [json.loads(line) for line in (run.folder / "samples_before_after.jsonl").read_text().splitlines()]
    assert [line["before"] for line in lines] == [None, None]
    assert "(random weights)" in (run.folder / "report.html").read_text()


def test_a_reward_model_answers_nothing_and_says_so(lab: Lab) -> None:
    reward = lab.train("reward", 1, **ON)
    assert not (reward.folder / "samples_before_after.jsonl").exists()
    assert "There are none: a reward model gives scores, not words." in (reward.folder / "report.html").read_text()


def test_a_run_that_fails_has_a_page_up_to_there(lab: Lab, tmp_path: Path) -> None:
    options = lab.options("dpo", output_dir=tmp_path / "run", max_steps=6, fingerprint_steps=1, report=True)
    done = lab.ranks.run(
        function="tests.rank_work:observed", argv=["dpo", *words(options)], live="", cwd=tmp_path,
        harm="flip_one_bit_of_reference", grace=60,
    )  # fmt: skip
    assert set(done.codes) == {3}, done.text
    text = (tmp_path / "run" / "report.html").read_text()
    assert "The run failed: " in text and "fingerprint" in text and "training/update" in text


def test_a_run_that_is_stopped_has_a_page_and_one_that_goes_on_another(lab: Lab, tmp_path: Path) -> None:
    alone: dict[str, Any] = {"world_size": 1, "max_steps": 5, "report": True}
    run = interrupted(lab, tmp_path / "run", [[0, 2, "send", "SIGTERM"]], **alone)
    assert run.manifest["status"] == "stopped"
    assert "was stopped at step 2: SIGTERM" in (run.folder / "report.html").read_text()
    more = interrupted(lab, tmp_path / "run", resume="auto", **alone)
    more.result.ok()
    text = (run.folder / "report.html").read_text()
    assert "was stopped" not in text and ">finished<" in text and len(more.losses) == 5


def test_a_page_that_cannot_be_written_is_a_warning(lab: Lab, tmp_path: Path) -> None:
    harm = "tests.report_work:leave_no_room_for_the_page"
    run = lab.start("sft", tmp_path / "run", 1, report=True, harm=harm)
    run.result.ok()
    (line,) = [line for line in run.result.text.splitlines() if line.startswith("warning: report.html")]
    assert "could not be written (" in line and "(Is a directory)" in line
    assert run.manifest["status"] == "finished" and "saved and verified" in run.result.text


# --- trackers ---------------------------------------------------------------------------------------------------------


def test_wandb_and_tensorboard_are_told(lab: Lab, tmp_path: Path) -> None:
    """Offline, as real runs: configuration, metrics, answers as a table, the page as an artifact, and no secret."""
    places = {f"WANDB_{name}": str(tmp_path / "wandb") for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR")}
    (tmp_path / "wandb").mkdir()
    copies = f"memory://key:{SECRET}@somewhere/copies"  # on the command line, which wandb keeps
    options = {"max_steps": 2, "report_to": ["wandb", "tensorboard"], "save_copy_to": copies, **ON}
    argv = ["dpo", *words(lab.options("dpo", output_dir=tmp_path / "run", **options))]
    env = {**places, "WANDB_MODE": "offline", "WANDB_CONSOLE": "off"}
    lab.ranks.run(*argv, cwd=tmp_path, env=env).ok()
    told = list(records(next((tmp_path / "wandb").glob("wandb/offline-run-*/*.wandb"))))
    configs = {item.key: item.value_json for record in told for item in record.config.update}
    ours = json.loads(configs["align_kit"])
    assert ours["config"]["max_steps"] == 2 and ours["frozen"]["reference"]["digest"] == ours["policy"]["digest"]
    logged = {"/".join(item.nested_key) or item.key for record in told for item in record.history.item}
    assert {"train/loss", "train/machine/tokens_per_second", "samples/ncols"} <= logged
    artifacts = {record.artifact.type: record.artifact for record in told if record.artifact.type}
    assert [entry.path for entry in artifacts["report"].manifest.contents] == ["report.html"]
    (table,) = (tmp_path / "wandb").rglob("samples_*.table.json")
    assert json.loads(table.read_text())["columns"] == ["prompt", "before", "after"]
    (events,) = (tmp_path / "run" / "runs").glob("*/events*")
    assert {"train/loss", "train/machine/tokens_per_second"} <= set(scalars(events))
    leaks = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not leaks


def test_wandb_without_a_key_is_one_line(lab: Lab, tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), "WANDB_API_KEY": "", "WANDB_MODE": "online"}
    run = lab.start("sft", tmp_path / "run", 1, report_to="wandb", env=env)
    assert run.result.error().startswith("error: report_to wandb: No API key configured.")


def records(path: Path) -> Iterator[Any]:
    """Yield the records of wandb's file: a log of LevelDB's format (7 bytes, then blocks of 32 KiB)."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", raw[at + 4 : at + 7])
        whole += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def scalars(path: Path) -> Iterator[str]:
    """Yield the names of the values in TensorBoard's file: records of a length, a checksum, data, a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    raw, at = path.read_bytes(), 0
    while at < len(raw):
        (size,) = struct.unpack("<Q", raw[at : at + 8])
        event = Event()
        event.ParseFromString(raw[at + 12 : at + 12 + size])
        at += 16 + size
        yield from (value.tag for value in event.summary.value)

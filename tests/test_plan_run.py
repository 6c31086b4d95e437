"""A run plans itself before its policy loads: what it says and keeps, what it refuses, what its meters are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness import Ranks, Result
from tests.little import ROWS, little_run, write_rows
from tests.small import write_model

pytestmark = pytest.mark.slow

SEVENTY_BILLION = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out" / "manifest.json").read_text()))


def lean(phase: str, folder: Path, *more: str | Path) -> list[str | Path]:
    """Return the command line of a little run without what comes after training."""
    return little_run(phase, folder, "--report", "false", "--sample_prompts", "0", *more)


@pytest.fixture(scope="module")
def trained(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A DPO run of six steps on two ranks."""
    folder = tmp_path_factory.mktemp("planned")
    words = lean("dpo", folder, "--max_steps", "6", "--logging_steps", "1")
    return folder, ranks.run(*words, cwd=folder).ok()


def test_the_header_says_what_the_run_will_take(trained: tuple[Path, Result]) -> None:
    (line,) = [line for line in trained[1].text.splitlines() if line.startswith("  plan ")]
    assert "at most" in line and " a rank, " in line and "sent and" in line and line.endswith("a step on each")


def test_the_manifest_keeps_plan_and_truth_and_they_agree(trained: tuple[Path, Result]) -> None:
    said = manifest(trained[0])
    plan, truth = said["plan"], said["measured"]
    assert plan["free_bytes"] > plan["peak_bytes"] > plan["persistent_bytes"] > 0
    assert plan["persistent_bytes"] == pytest.approx(sum(truth["state_bytes"].values()), rel=0.01)
    assert plan["link_bytes"] == pytest.approx(truth["link_bytes"], rel=0.02)
    assert truth["steps"] == 6 and truth["peak_bytes"] > 0


def test_meters_know_the_work_of_a_token(trained: tuple[Path, Result]) -> None:
    lines = [json.loads(line) for line in (trained[0] / "out" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["machine/mfu"] for line in lines if "machine/mfu" in line]
    assert shares and all(0 < share < 1.5 for share in shares)


# --- what cannot fit ------------------------------------------------------------------------------------------------


def test_a_run_that_cannot_fit_is_refused_before_its_model_loads(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge" / "config.json").write_text(json.dumps(SEVENTY_BILLION))
    words = lean("sft", tmp_path, "--config_name", "huge", "--tokenizer_name", "builtin:tiny")
    done = ranks.run(*words, cwd=tmp_path)
    line = done.error()
    assert line.startswith("error: sft of huge needs ") and "on each of 2 ranks" in line and line.endswith("--force")
    assert done.text.count("\n") == 1 and not (tmp_path / "out" / "manifest.json").exists()


def with_little_memory(argv: list[str]) -> int:
    """Run `align-kit argv…` where each rank has 8 MiB free."""
    from align_kit.cli import main
    from align_kit.plan.choose import Limits
    from align_kit.stages import plan

    plan._free = lambda: Limits(8 << 20, 8 << 20, one=True)
    return main(argv)


@pytest.mark.parametrize("forced", [False, True])
def test_force_starts_it_all_the_same(forced: bool, ranks: Ranks, tmp_path: Path) -> None:
    words = [str(word) for word in lean("sft", tmp_path, *(["--force"] if forced else []))]
    done = ranks.run(cwd=tmp_path, function="tests.test_plan_run:with_little_memory", argv=words)
    if forced:
        assert "of 8 MiB a rank" in done.ok().text
    else:
        assert "8 MiB are there" in done.error()


def with_a_model_it_cannot_weigh(argv: list[str]) -> int:
    """Run `align-kit argv…` where what tells the planner of a model fails."""
    from align_kit.cli import main
    from align_kit.plan import describe

    def fails(*_: Any, **__: Any) -> None:
        raise NotImplementedError("a layer nobody has seen")

    describe.describe = fails  # type: ignore[assignment]
    return main(argv)


def test_what_cannot_be_planned_trains_all_the_same(ranks: Ranks, tmp_path: Path) -> None:
    words = [str(word) for word in lean("sft", tmp_path)]
    function = "tests.test_plan_run:with_a_model_it_cannot_weigh"
    done = ranks.run(cwd=tmp_path, function=function, argv=words).ok()
    assert "  plan       not known: NotImplementedError: a layer nobody has seen\n" in done.text
    said = manifest(tmp_path)
    assert said["status"] == "finished" and "a layer" in said["plan"]["unknown"]


# --- the overlay runs -----------------------------------------------------------------------------------------------


def machine_with(memory: float) -> str:
    """Return the file of a machine whose device has so many bytes for tensors."""
    from align_kit.stages.plan import CONTEXT

    links = {"node": 1, "network": 1, "host": 1}
    machine = {
        "names": ["little"], "memory_gib": (memory + CONTEXT) / 2**30, "memory_gb_per_s": 10, "link_gb_per_s": links,
        "teraflops": {"fp32": 1, "bf16": 1, "fp16": 1}, "host_gib": 8, "source": "made up",
    }  # fmt: skip
    return json.dumps({"little": machine})


def test_what_the_planner_writes_runs(ranks: Ranks, tmp_path: Path) -> None:
    """On a device a byte too small for the run as configured, the way that is written fits, and trains for real."""
    words = {
        "model_name_or_path": str(write_model(tmp_path / "model")), "output_dir": "out", "max_steps": 2,
        "datasets": [{"path": str(write_rows(tmp_path / "rows.jsonl", [ROWS["dpo"]] * 64))}], "max_length": 64,
        "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "bf16": False, "report": False,
        "gradient_checkpointing": False, "sample_prompts": 0,
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(words))
    machine = tmp_path / "machine.yaml"
    machine.write_text(machine_with(2**34))
    asked = ("plan", "dpo", "--config", "mine.yaml", "--gpu", "little", "--gpus", "2", "--hardware", machine)
    ranks.run(*asked, "--json", "plan.json", cwd=tmp_path, world_size=1).ok()
    peak = json.loads((tmp_path / "plan.json").read_text())["ways"][0]["peak_bytes"]
    machine.write_text(machine_with(peak - 1))
    refused = ranks.run(*asked, "--write", "best.yaml", cwd=tmp_path, world_size=1).error()
    assert "it fits with --" in refused
    done = ranks.run("dpo", "--config", "mine.yaml", "best.yaml", cwd=tmp_path).ok()
    written, taken = yaml.safe_load((tmp_path / "best.yaml").read_text()), manifest(tmp_path)["config"]
    assert written and {name: taken[name] for name in written} == written
    assert "64 pairs = " in done.text

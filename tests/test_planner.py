"""`align-kit plan` on models of which only the configuration is there: its answer, its files, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align_kit import planner
from align_kit.cli import main
from align_kit.errors import EXIT_CODE, UserError
from tests.small import make_rows, write_rows

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a 7 B Llama without words or weights."""
    place = tmp_path_factory.mktemp("llama-7b")
    (place / "config.json").write_text(json.dumps(LLAMA_7B))
    return place


def words(phase: str, model: Path, folder: Path, *more: str | Path) -> list[str]:
    """Return a command line that plans `phase` on 8 x H200 with rows of 2,048 tokens."""
    on = ("--gpu", "h200", "--gpus", "8", "--config_name", model, "--max_length", "2048")
    return ["plan", phase, *map(str, [*on, "--output_dir", folder / "out", *more])]


def answered(place: Path, *line: str) -> dict[str, Any]:
    """Return what the command wrote as JSON, whether or not it refused the run."""
    assert main([*line, "--json", str(place)]) in (0, EXIT_CODE)
    return dict(json.loads(place.read_text()))


def test_a_7b_dpo_run_is_planned_from_its_configuration(
    seven_billion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words("dpo", seven_billion, tmp_path, "--per_device_train_batch_size", "4")
    assert main([*line, "--html", str(tmp_path / "plan.html")]) == 0
    text = capsys.readouterr().out
    for part in ("6.74 G parameters, bf16, 8 x h200", "32 pairs = 4 per rank x 8 ranks", "GiB on each rank", "█",
                 "runner-up 1", "reduce_scatter", "bound by", "cost", "row is taken to be 2048 tokens"):  # fmt: skip
        assert part in text, f"{part!r} is not in:\n{text}"
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<svg") == 1 and "masters" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_the_state_is_the_published_sixteen_bytes_a_parameter(seven_billion: Path, tmp_path: Path) -> None:
    """Weights and gradients in bf16, master and two moments in fp32: Rajbhandari 2020 (ZeRO), section 3.1."""
    found = answered(tmp_path / "plan.json", *words("sft", seven_billion, tmp_path))
    state = found["ways"][0]["state_bytes"]
    counted = sum(state[name] for name in ("parameters", "masters", "moments", "gradients"))
    assert counted * 8 == pytest.approx(16 * 6_738_415_616, rel=0.001)
    assert found["ranks"] == 8 and found["hardware"] == "h200"


def test_an_adapter_sends_next_to_nothing_of_what_full_training_sends(seven_billion: Path, tmp_path: Path) -> None:
    """Rank 8 on queries and values of 7 B: 4.2 M parameters, 8 MB of bf16 gradients; in full 13.5 GB."""
    adapter = ("--use_peft", "true", "--lora_r", "8", "--lora_target_modules", "q_proj", "v_proj")
    one = ("--per_device_train_batch_size", "1")
    sent = {}
    for name, more in (("full", one), ("lora", (*one, *adapter))):
        way = answered(tmp_path / f"{name}.json", *words("sft", seven_billion, tmp_path, *more))["ways"][0]
        sent[name] = next(each["bytes"] for op, each in way["traffic"].items() if op.startswith("reduce"))
    assert sent["lora"] == pytest.approx(2 * 4_194_304, rel=0.01)
    assert sent["full"] == pytest.approx(2 * 6_738_415_616, rel=0.01)


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_with_the_smallest_change(
    seven_billion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words("dpo", seven_billion, tmp_path, "--per_device_train_batch_size", "64")
    assert main(line) == EXIT_CODE
    said = capsys.readouterr()
    refused = said.err.strip().splitlines()[-1]
    assert refused.startswith(f"error: dpo of {seven_billion} needs ") and "139 GiB are there" in refused
    assert "it fits with --" in refused and refused.endswith("--force")
    assert "= at most" in said.out, "the answer is printed all the same"
    assert main([*line, "--force", "true"]) == 0


def test_precision_and_ranks_follow_from_what_is_planned_for(seven_billion: Path, tmp_path: Path) -> None:
    more = ("--nodes", "2", "--bf16", "false", "--per_device_train_batch_size", "1")
    found = answered(tmp_path / "plan.json", *words("sft", seven_billion, tmp_path, *more))
    assert found["ranks"] == 16 and found["batch"].startswith("16 rows")
    state = found["ways"][0]["state_bytes"]
    assert state["parameters"] * 16 == pytest.approx(4 * 6_738_415_616, rel=0.001)


@pytest.mark.slow
def test_ppo_is_planned_with_its_models_and_what_it_writes(seven_billion: Path, tmp_path: Path) -> None:
    more = ("--reward_funcs", "a:b", "--response_length", "512", "--per_device_train_batch_size", "4")
    found = answered(tmp_path / "plan.json", *words("ppo", seven_billion, tmp_path, *more))
    way = found["ways"][0]
    assert {"rollout", "score"} <= set(way["moment_bytes"]) and way["moment_bytes"]["rollout"]["kv cache"] > 0
    assert way["state_bytes"]["reference"] * 8 == pytest.approx(2 * 6_738_415_616, rel=0.01)
    assert way["time"]["generation"] > 0


# --- the overlay ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_best_way_is_written_as_yaml_that_the_configuration_takes(seven_billion: Path, tmp_path: Path) -> None:
    best = tmp_path / "best.yaml"
    line = words("dpo", seven_billion, tmp_path, "--per_device_train_batch_size", "64", "--write", str(best))
    found = answered(tmp_path / "plan.json", *line)
    written = yaml.safe_load(best.read_text())
    assert written == found["ways"][1]["changes"] and written
    line = [word for word in line if word not in ("--per_device_train_batch_size", "64", "--write", str(best))]
    again = answered(tmp_path / "again.json", *line, "--config", "recipes/dpo.yaml", str(best))
    assert again["ways"][0]["fits"] and again["refused"] is None
    assert again["ways"][0]["peak_bytes"] == found["ways"][1]["peak_bytes"]
    assert again["batch"].startswith("512 pairs")


@pytest.mark.slow
def test_where_nothing_fits_there_is_nothing_to_write(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.mkdir()
    (huge / "config.json").write_text(json.dumps({**LLAMA_7B, "hidden_size": 16384, "num_hidden_layers": 200}))
    line = words("sft", huge, tmp_path, "--write", str(tmp_path / "best.yaml"))
    assert main(line) == EXIT_CODE and not (tmp_path / "best.yaml").exists()


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_planners_words_are_told_from_the_runs() -> None:
    line = ["--gpu", "h100", "--beta", "0.2", "--nodes=3", "--config", "a.yaml", "b.yaml", "--loss_type", "ipo", "sft"]
    options, rest = planner.parted(line)
    assert (options.gpu, options.nodes, options.gpus) == ("h100", 3, 1)
    assert rest == ["--config", "a.yaml", "b.yaml", "--beta", "0.2", "--loss_type", "ipo", "sft"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("--gpus", "many"), "--gpus many: give one positive number"),
        (("--gpus", "0"), "--gpus 0: give one positive number"),
        (("--gpu",), "--gpu (nothing): give one word"),
        (("--mfu", "-1"), "--mfu -1: give one positive number"),
    ],
)
def test_what_is_no_number_is_refused(line: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as error:
        planner.parted(line)
    assert str(error.value) == said


def family(place: Path, **config: Any) -> Path:
    """Return the folder of a model of another family, by its configuration alone."""
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"num_hidden_layers": 2, **config}))
    return place


def test_a_step_larger_than_the_invented_rows_computes_each_of_its_rows(seven_billion: Path, tmp_path: Path) -> None:
    """Rows that come twice in a micro-batch would share all they have: 16 of 64 tokens are about 1,024."""
    line = words("sft", seven_billion, tmp_path, "--per_device_train_batch_size", "16", "--max_length", "64")
    assert answered(tmp_path / "plan.json", *line)["ways"][0]["tokens"] > 0.98 * 16 * 64


def test_a_step_is_no_longer_than_the_epoch_it_ends(tmp_path: Path) -> None:
    """Four rows are two micro-batches of two, however many are asked for."""
    rows = write_rows(tmp_path / "rows.jsonl", make_rows("prompt_completion", 4))
    line = ["plan", "sft", "--config_name", "builtin:tiny", "--datasets", json.dumps([{"path": str(rows)}])]
    line += ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "out")]
    asked = {n: answered(tmp_path / f"{n}.json", *line, "--gradient_accumulation_steps", str(n)) for n in (1, 2, 8)}
    flops = {n: found["ways"][0]["flops"] for n, found in asked.items()}
    assert flops[8] == flops[2] > 1.5 * flops[1]


def test_mistakes_are_one_line(seven_billion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, said in (
        (["plan", "dp0"], "unknown recipe 'dp0'"),
        (words("dpo", seven_billion, tmp_path, "--gpu", "h2000"), "unknown gpu 'h2000'"),
        (words("dpo", tmp_path, tmp_path), "cannot be loaded"),
        (words("dpo", seven_billion, tmp_path, "--mfu", "2"), "mfu 2.0 is no share"),
        (words("dpo", seven_billion, tmp_path, "--html", tmp_path / "nowhere" / "plan.html"), "cannot be written"),
        (words("sft", family(tmp_path / "t5", model_type="t5"), tmp_path), "cannot be loaded: Unrecognized"),
        (words("sft", family(tmp_path / "mamba", model_type="mamba"), tmp_path), "cannot be planned"),
        (["plan", "sft", "--hardware", "nowhere.yaml"], "cannot read nowhere.yaml"),
    ):
        assert main(line) == EXIT_CODE
        assert said in capsys.readouterr().err


def test_help_names_the_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert "h200" in text and "--write FILE" in text

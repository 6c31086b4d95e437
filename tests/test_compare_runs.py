"""A whole comparison: real runs on two ranks of a small model, resumed, refused, and its page drawn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_kit.compare import arms, experiment, options
from align_kit.compare.experiment import Experiment
from align_kit.errors import FAULT_CODE, UserError
from tests.harness import Ranks
from tests.small import Lab, lab_of, words

pytestmark = pytest.mark.slow
TEXT = "Ann had 12 pens and bought 30 more. Ben gave 4 of them away, and nobody knew how many there were. "


class Bench:
    """An experiment in a folder of its own, whose runs are forks of the warm process; it counts them."""

    def __init__(self, lab: Lab, home: Path, phase: str = "sft") -> None:
        self.lab, self.home, self.phase = lab, home, phase
        self.started: list[list[str]] = []
        rows = [{"text": TEXT * 8}] * 4
        (home.parent / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def launch(self, given: list[str], output: Path, look: Callable[[], None]) -> int:
        """Do what `align-kit launch` does, without its half-minute of imports."""
        self.started.append(given)
        result = self.lab.ranks.run(*given[given.index(self.phase) :], world_size=int(given[1]), cwd=self.lab.home)
        output.write_text(result.text)
        look()
        return max(result.codes)

    def experiment(self, *more: str, **changes: Any) -> Experiment:
        held_out = {"eval_strategy": "steps", "eval_steps": 1, "test_split_size": 4}
        little = {"report": False, "max_steps": 2, "lora_r": 2, "seed": None, "learning_rate": None}
        given = self.lab.options(self.phase, **{**held_out, **little, **changes})
        own = ["--output_dir", str(self.home), "--ranks", "2", "--problems", "none"]
        own += ["--forgetting", str(self.home.parent / "text.jsonl")]
        found = options.parse([self.phase, *words(given), *own, *more])
        return Experiment(found, arms.arms_of(found), self.launch)


@pytest.fixture(scope="module")
def bench(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Full against LoRA: two seeds each, at one rate."""
    made = Bench(lab_of(ranks), tmp_path_factory.mktemp("compare") / "home")
    assert made.experiment("--seeds", "2", "--learning_rate", "3e-3").run() == 0
    return made


def values(bench: Bench) -> dict[str, Any]:
    return dict(json.loads((bench.home / "compare.json").read_text()))


def test_arms_differ_in_the_factor_alone(bench: Bench) -> None:
    found = values(bench)
    assert set(found["factor"]) == {"lora_target_modules", "use_peft"} and found["seeds"] == [1, 2]
    assert len(bench.started) == 4
    manifests = [json.loads(file.read_text()) for file in bench.home.glob("*/*/manifest.json")]
    assert {one["config"]["seed"] for one in manifests} == {1, 2}
    assert len({one["policy"]["digest"] for one in manifests}) == 1


def test_what_was_measured_is_of_the_models_that_were_trained(bench: Bench) -> None:
    rows = values(bench)["rows"]
    trained = {arm: one["mean"] for arm, one in rows["trained parameters, k"]["mean"].items()}
    assert trained["full"] == pytest.approx(29.344) and trained["lora"] < trained["full"]
    assert rows["effective rank of the update"]["mean"]["lora"]["mean"] <= 2.001
    assert rows["merged in fp32: largest logit gap"]["mean"]["full"] is None
    assert 0 < rows["merged in fp32: largest logit gap"]["mean"]["lora"]["mean"] < 1e-3
    assert rows["loss on text.jsonl, nats"]["mean"]["full"]["mean"] > 0
    loss = rows["held-out loss"]
    apart = [b - a for a, b in zip(loss["by_seed"]["full"], loss["by_seed"]["lora"], strict=True)]
    assert loss["difference"]["lora"]["mean"] == pytest.approx(sum(apart) / 2)
    wire = rows["on the wire, MB a rank and step"]["mean"]
    assert 0 < wire["lora"]["mean"] < wire["full"]["mean"]
    state = rows["optimizer state, MB a rank"]["mean"]
    assert state["lora"]["mean"] < state["full"]["mean"]


def test_report_is_whole(bench: Bench) -> None:
    page, text = (bench.home / "report.html").read_text(), (bench.home / "report.md").read_text()
    assert page.count("<svg") >= 6 and "<script" not in page and "http-equiv" in page
    assert "| held-out loss" in text and "seeds 1, 2" in text
    assert "tokens and their order" in text


def test_what_is_done_is_not_run_again(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    before, report = len(bench.started), values(bench)
    shutil.rmtree(bench.home / "lora" / "lr0.003-seed2")
    assert bench.experiment("--seeds", "2", "--learning_rate", "3e-3").run() == 0
    assert len(bench.started) == before + 1
    assert capsys.readouterr().out.count("done before") == 3
    again = values(bench)
    assert again["rows"]["held-out loss"] == report["rows"]["held-out loss"]


def test_runs_of_another_configuration_are_not_mixed_in(bench: Bench) -> None:
    before = len(bench.started)
    with pytest.raises(UserError, match="holds a run with weight_decay 0.0, now 0.5; name another --output_dir"):
        bench.experiment("--seeds", "2", "--learning_rate", "3e-3", weight_decay=0.5).run()
    assert len(bench.started) == before


@pytest.mark.parametrize(
    ("damage", "why"),
    [(lambda text: text[: len(text) // 2], "1 of "), (lambda text: "", "it is empty"), (None, "cannot be read")],
)
def test_a_run_whose_log_is_not_whole_is_named(
    bench: Bench, tmp_path: Path, damage: Callable[[str], str] | None, why: str
) -> None:
    home = bench.home / "full" / "lr0.003-seed1"
    log = home / "metrics.jsonl"
    before = log.read_text()
    log.unlink()
    if damage:
        log.write_text(damage(before))
    try:
        with pytest.raises(UserError, match=f"metrics.jsonl .*{why}.*; remove .*lr0.003-seed1 and give the same"):
            bench.experiment("--seeds", "2", "--learning_rate", "3e-3").run()
    finally:
        log.write_text(before)


def test_a_manifest_that_is_torn_is_refused_or_replaced(bench: Bench) -> None:
    started, torn = len(bench.started), bench.home / "full" / "lr0.003-seed2" / "manifest.json"
    torn.write_text(torn.read_text()[:200])
    words = ("--seeds", "2", "--learning_rate", "3e-3")
    with pytest.raises(UserError, match="lr0.003-seed2/manifest.json cannot be read; remove .* or give --overwrite"):
        bench.experiment(*words).run()
    assert len(bench.started) == started
    assert bench.experiment(*words, "--overwrite").run() == 0
    assert len(bench.started) == started + 1 and json.loads(torn.read_text())["status"] == "finished"


def test_a_mistake_in_the_runs_is_the_comparisons(bench: Bench, tmp_path: Path) -> None:
    other = Bench(bench.lab, tmp_path / "home")
    with pytest.raises(UserError, match=r"lora_alpha=2, learning rate 0.001, seed 1: .*no_such_module"):
        other.experiment(
            "--vary", "lora_alpha=2,4", "--learning_rate", "1e-3", lora_target_modules="no_such_module"
        ).run()


def test_a_rate_at_which_a_run_diverges_is_not_chosen(bench: Bench, tmp_path: Path) -> None:
    other = Bench(bench.lab, tmp_path / "home")

    def failing(given: list[str], output: Path, look: Callable[[], None]) -> int:
        if given[given.index("--learning_rate") + 1] != "0.1":
            return other.launch(given, output, look)
        output.write_text("error: the loss is not finite\n")
        return FAULT_CODE

    found = other.experiment("--vary", "lora_r=2,4", "--learning_rates", "1e-3,1e-1", use_peft=True, lora_r=None)
    found.runner.launch = failing
    swept = found._sweep(found.arms[0])
    assert swept.rate == 1e-3 and swept.losses[0.1] == float("inf")
    assert not list(other.home.glob("lora_r=2/*/*.safetensors")), "models of a sweep are not kept"


def test_rows_are_held_out_by_the_experiment_and_not_by_a_seed(bench: Bench) -> None:
    manifests = [json.loads(file.read_text()) for file in bench.home.glob("full/*/manifest.json")]
    assert len(manifests) == 2 and {one["config"]["test_split_seed"] for one in manifests} == {0}
    for split in ("train", "eval"):
        assert len({one["data"][split]["tokenised"]["digest"] for one in manifests}) == 1
    assert "A seed draws the order of the data and what an arm draws" in (bench.home / "report.md").read_text()


def test_ppo_is_judged_by_its_reward_and_trains_a_value_model_too(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Bench(bench.lab, tmp_path / "home", "ppo")
    rates = ("--learning_rates", "1e-3,1e-2", "--seeds", "1")
    assert other.experiment("--vary", "kl_coef=0.01,0.1", *rates, max_steps=3, lora_r=None).run() == 0
    said, text, found = capsys.readouterr().out, (other.home / "report.md").read_text(), values(other)
    assert ": held-out reward 0." in said and ": held-out loss" not in said
    assert "Held-out reward by learning rate" in text and "chosen by the same held-out rows" in text
    assert ">held-out reward<" in (other.home / "report.html").read_text()
    swept = found["sweeps"]["kl_coef=0.01"]
    lines = (other.home / "kl_coef=0.01" / "lr0.001-seed0" / "metrics.jsonl").read_text().splitlines()
    reward = [json.loads(line)["eval_reward"] for line in lines if "eval_reward" in line][-1]
    assert reward > 0 and swept["rewards"]["0.001"] == reward and "losses" not in swept
    assert swept["rewards"][f"{swept['rate']:.2g}"] == max(swept["rewards"].values())
    # The value model has the policy's weights, tied ones once, and a row of 32 numbers for its score.
    assert found["rows"]["trained parameters, k"]["mean"]["kl_coef=0.1"]["mean"] == pytest.approx(2 * 29.344 + 0.032)
    assert "checkpoint (none was kept, save_strategy is no)" in text


def test_a_model_that_scores_has_an_update_and_no_text(bench: Bench, tmp_path: Path) -> None:
    other = Bench(bench.lab, tmp_path / "home", "reward")
    assert other.experiment("--learning_rate", "1e-3", "--seeds", "1").run() == 0
    rank = values(other)["rows"]["effective rank of the update"]["mean"]
    assert 0 < rank["lora"]["mean"] <= 2.001 < rank["full"]["mean"]
    assert "loss on text.jsonl (a model that scores predicts no text)" in (other.home / "report.md").read_text()


def test_a_preference_phase_is_judged_by_its_accuracy(bench: Bench, tmp_path: Path) -> None:
    """The adapter's base is its reference, the full run's a model of its own: the same content, so a fair match."""
    other = Bench(bench.lab, tmp_path / "home", "dpo")
    assert other.experiment("--learning_rate", "1e-3", "--seeds", "1").run() == 0
    accuracy = values(other)["rows"]["preference accuracy, %"]["mean"]
    assert all(0 <= accuracy[arm]["mean"] <= 100 for arm in ("full", "lora"))
    manifests = {file.parts[-3]: json.loads(file.read_text()) for file in other.home.glob("*/*/manifest.json")}
    placed = {arm: one["frozen"]["reference"]["placement"] for arm, one in manifests.items()}
    assert placed == {"full": "sharded", "lora": "adapter"}


def test_a_base_in_4_bits_is_an_arm(bench: Bench, tmp_path: Path) -> None:
    """The adapter that was trained on a base in 4 bits is merged into fp32 weights, which it has never seen."""
    pytest.importorskip("bitsandbytes")
    other = Bench(bench.lab, tmp_path / "home")
    words = ("--vary", "load_in_4bit=false,true", "--learning_rate", "1e-3", "--seeds", "1")
    assert other.experiment(*words).run() == 0
    gap = values(other)["rows"]["merged in fp32: largest logit gap"]["mean"]
    assert gap["load_in_4bit=false"]["mean"] < 1e-4 < gap["load_in_4bit=true"]["mean"]


def test_compare_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    from align_kit.cli import main

    assert main(["compare", "--help"]) == 0
    assert "--vary" in capsys.readouterr().out
    assert experiment.compare.__doc__

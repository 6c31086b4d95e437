"""`align-kit check`: each part of a run says what it came to, all that is wrong is told at once, nothing is made."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from align_kit.check import check
from align_kit.errors import UserError
from tests.harness import Ranks
from tests.small import lab_of, make_rows, words, write_rows
from tests.test_preflight import MODELS, flip, harmed

pytestmark = pytest.mark.slow


def test_a_run_with_nothing_in_its_way(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lab = lab_of(ranks)
    assert check(["dpo", *words(lab.options("dpo", output_dir="a/b/out"))]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("  ", "nothing"))]
    assert [line.split()[0] for line in told] == ["options", "output", "models", "data", "plan", "nothing"]
    assert "every number finite" in told[2] and "48 preference rows -> 48" in told[3] and "at most" in told[4]
    assert not any(tmp_path.iterdir())


def test_everything_wrong_is_told_at_once(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lab = lab_of(ranks)
    model = shutil.copytree(lab.model, tmp_path / "model")
    harmed(flip)(model)
    rows = [{**row, "rejected": row["chosen"]} for row in make_rows("preference", 8)]
    bad = {"datasets": [{"path": write_rows(tmp_path / "rows.jsonl", rows)}], "model_name_or_path": model,
           "loss_type": "sigmoidd", "output_dir": "/proc/out"}  # fmt: skip
    with pytest.raises(UserError, match="dpo would stop at options, output, models, data: see above"):
        check(["dpo", *words(lab.options("dpo", **bad))])
    told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if " wrong: " in line}
    assert "unknown loss_type" in told["options"] and "/proc/out cannot be written" in told["output"]
    assert "is no weight but a damaged file" in told["models"] and "8 of 8 rows" in told["data"]


UNFIT = (
    "a tensor missing", "a tensor of another shape", "fewer words than embeddings", "words beyond the embedding",
    "an empty tokenizer",
)  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_a_run_refuses_is_refused(
    name: str, ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same line that ends a run (tests/test_preflight.py), in the part about models."""
    lab = lab_of(ranks)
    harm, _, line = MODELS[name]
    model = shutil.copytree(lab.model, tmp_path / "model")
    harm(model)
    with pytest.raises(UserError, match="would stop at models"):
        check(["sft", *words(lab.options("sft", model_name_or_path=model, output_dir=tmp_path / "out"))])
    assert re.search(f" models    wrong: .*{line}", capsys.readouterr().out)


def test_models_beside_the_policy_are_held_against_what_they_describe(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reference ends in words, a reward model in a score of its own, a value model in a fresh one."""
    lab = lab_of(ranks)
    output = {"output_dir": tmp_path / "out"}
    scored = {"reward_funcs": None, "reward_model_name_or_path": [lab.scorer], "value_model_name_or_path": lab.model}
    assert check(["ppo", *words(lab.options("ppo", **scored, **output))]) == 0
    assert check(["reward", *words(lab.options("reward", **output))]) == 0
    torn = shutil.copytree(lab.model, tmp_path / "torn")
    MODELS["a tensor missing"][0](torn)
    capsys.readouterr()
    with pytest.raises(UserError, match="would stop at models"):
        check(["dpo", *words(lab.options("dpo", reference_model_name_or_path=torn, **output))])
    assert f"wrong: {torn} lacks 1 tensors of its configuration" in capsys.readouterr().out


def test_a_reward_model_has_to_score(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value model may begin as a language model, what judges may not; and it needs words of its own."""
    monkeypatch.chdir(tmp_path)
    lab = lab_of(ranks)
    shutil.copytree(lab.scorer, tmp_path / "mute")
    for file in (tmp_path / "mute").glob("token*"):
        file.unlink()
    for judge, line in ((lab.model, "is no sequence classifier; give one"), ("mute", "has no tokenizer")):
        options = lab.options("ppo", reward_model_name_or_path=judge, reward_funcs=None, output_dir="out")
        with pytest.raises(UserError, match="ppo would stop at models: see above"):
            check(["ppo", *words(options)])
        assert line in capsys.readouterr().out
    good = {"reward_model_name_or_path": lab.scorer, "value_model_name_or_path": lab.model, "output_dir": "out"}
    assert check(["ppo", *words(lab.options("ppo", **good))]) == 0


def test_an_adapter_is_checked_with_its_base(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = lab_of(ranks)
    adapter = shutil.copytree(lab.train("sft", world_size=1, use_peft=True).folder, tmp_path / "adapter")
    options = words(lab.options("sft", model_name_or_path=adapter, use_peft=True, output_dir=tmp_path / "out"))
    assert check(["sft", *options]) == 0
    torn = shutil.copytree(lab.model, tmp_path / "torn")
    MODELS["a tensor missing"][0](torn)
    told = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": str(torn)}))
    (adapter / "manifest.json").unlink()
    capsys.readouterr()
    with pytest.raises(UserError, match="would stop at models"):
        check(["sft", *options])
    assert f"wrong: {torn} lacks 1 tensors of its configuration" in capsys.readouterr().out


def test_labels_that_are_all_the_same_are_warned_of(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = lab_of(ranks)
    rows = [{**row, "label": True} for row in make_rows("binary", 8)]
    data = [{"path": write_rows(tmp_path / "rows.jsonl", rows)}]
    assert check(["kto", *words(lab.options("kto", datasets=data, output_dir=tmp_path / "out"))]) == 0
    assert "8 desirable and 0 undesirable rows" in capsys.readouterr().err
    assert check(["kto", *words(lab.options("kto", output_dir=tmp_path / "out"))]) == 0
    assert "undesirable rows" not in capsys.readouterr().err


def test_a_configuration_is_no_model(ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = lab_of(ranks)
    model = shutil.copytree(lab.model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="would stop at models"):
        check(["sft", *words(lab.options("sft", model_name_or_path=model, output_dir=tmp_path / "out"))])
    assert " models    wrong: " in capsys.readouterr().out


def test_suspicions_are_warnings(ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = lab_of(ranks)
    rows = write_rows(tmp_path / "rows.jsonl", make_rows("preference", 8) * 2)
    options = lab.options("dpo", datasets=[{"path": rows}], output_dir=tmp_path / "out")
    assert check(["dpo", *words(options)]) == 0
    said = capsys.readouterr()
    assert "8 of 16 rows (50.0%) stand in the data before (the first is row 9)" in said.err
    assert json.dumps(str(rows)).strip('"') in said.out

"""`align-kit check`: each part of a run says what it came to, all that is wrong is told at once, nothing is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from align_kit.check import check
from align_kit.errors import UserError
from tests.harness import Ranks
from tests.small import lab_of, make_rows, words, write_rows
from tests.test_preflight import flip, harmed

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

"""The final model: refused where what was gathered is not whole or not what was trained; then nothing is in place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, read_weights

pytestmark = pytest.mark.slow

HARM = {
    "empty_a_tensor": "did not verify: 1 tensors empty",
    "put_nan": "did not verify: 1 tensors not finite",
    "drop_a_tensor": "did not verify: 1 tensors not gathered whole",
    "stale_weights": "re-opened, its logits differ by up to",
}


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_model_that_is_not_whole_is_not_saved(lab: Lab, tmp_path: Path, form: str, harm: str) -> None:
    """Something went wrong between engine and file: one line, exit code 2, no half-written model, not finished."""
    run = lab.start("sft", tmp_path / "run", harm=harm, deepspeed=lab.sharded, use_peft=form == "lora" or None)
    assert HARM[harm] in run.result.error() and "--resume" in run.result.error()
    assert run.manifest["status"] == "failed" and "result" not in run.manifest
    assert not left(run)


def left(run: Run) -> list[str]:
    """Return the names of what could be taken for a model, or a part of one, in the folder of a run."""
    kinds = ("*.safetensors", "config.json", "adapter_config.json", "tokenizer*", "generation_config.json")
    return [file.name for kind in kinds for file in run.folder.rglob(kind)]


def test_a_failed_save_leaves_the_checkpoint(lab: Lab, tmp_path: Path) -> None:
    """The message sends the user to the last checkpoint: going on from it ends in a finished run."""
    asked = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "deepspeed": lab.sharded}
    broken = lab.start("sft", tmp_path / "run", harm="put_nan", **asked)
    assert "--resume" in broken.result.error()
    assert not list(broken.folder.glob("*.safetensors"))
    whole = lab.start("sft", tmp_path / "run", resume="auto", **asked)
    whole.result.ok()
    assert whole.manifest["status"] == "finished"
    assert read_weights(whole.folder).keys() == read_weights(lab.model).keys()


def test_what_was_saved_says_what_it_is(lab: Lab) -> None:
    """The manifest of a finished run holds the digest, size and logit gap of what lies in the folder."""
    from align_kit.models import source

    run = lab.train("sft", deepspeed=lab.sharded)
    assert run.manifest["status"] == "finished" and not (run.folder / ".saving").exists()
    result = run.manifest["result"]
    assert result["digest"] == source.digest(source.resolve(str(run.folder)))
    assert result["bytes"] == sum(file.stat().st_size for file in run.folder.glob("*.safetensors"))
    assert 0 <= result["logit_gap"] < 1e-5


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_tied_weights_are_stored_once(lab: Lab, engine: str) -> None:
    run = lab.train("sft", deepspeed=engine)
    assert read_weights(run.folder).keys() == read_weights(lab.model).keys()
    before = sum(file.stat().st_size for file in lab.model.glob("*.safetensors"))
    assert run.manifest["result"]["bytes"] == pytest.approx(before, rel=0.01)


def test_no_secret_and_no_pickle_in_the_final_model(lab: Lab) -> None:
    run = lab.train("sft", deepspeed=lab.sharded)
    assert not [file.name for file in run.folder.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]

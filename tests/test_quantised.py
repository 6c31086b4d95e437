"""QLoRA: a base in 4 bits, sharded like any other, trains its adapter as the same base written out would."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from align_kit.config import ModelFields
from align_kit.errors import UserError
from align_kit.models import quantised
from tests.harness import Ranks
from tests.small import Lab, lab_of, read_weights, relative_gap

pytestmark = pytest.mark.slow
BITS = {"use_peft": True, "load_in_4bit": True}


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


@pytest.fixture(scope="module")
def written_out(lab: Lab) -> Path:
    """The small model with the weights that its 4-bit form stands for, each as fp32."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    bits = quantised.settings(ModelFields(load_in_4bit=True), torch.float32)
    small = AutoModelForCausalLM.from_pretrained(lab.model, quantization_config=bits, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(lab.model, dtype=torch.float32)
    layers = {name: module for name, module in small.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert layers and "lm_head" not in layers
    with torch.no_grad():
        for name, module in layers.items():
            whole = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            target = plain.get_submodule(name).weight
            assert 0 < float((whole - target).abs().max()) < 0.2  # coarser than the weights, and of them
            target.copy_(whole)
    place = lab.home / "written-out"
    plain.save_pretrained(place)
    for file in lab.model.glob("tokenizer*"):
        (place / file.name).write_bytes(file.read_bytes())
    return place


@pytest.mark.parametrize("engine", ["sharded", "zero2"])
def test_a_step_is_that_of_the_base_written_out(lab: Lab, written_out: Path, engine: str) -> None:
    asked = {"use_peft": True, "deepspeed": lab.sharded if engine == "sharded" else engine}
    # two steps: B of an adapter starts at 0, so that A has no gradient in the first
    ours = lab.step("sft", 2, **asked, load_in_4bit=True, max_steps=2)
    theirs = lab.step("sft", 2, **asked, model_name_or_path=written_out, max_steps=2)
    gap = relative_gap(ours.weights, theirs.weights, {})
    assert gap < 1e-4 and max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)) < 1e-5
    apart = lab.step("sft", 2, **asked, max_steps=2)
    assert relative_gap(ours.weights, apart.weights, {}) > 10 * gap, "the base was not in 4 bits"


@pytest.mark.parametrize("nested", [False, True])
def test_what_it_takes_is_planned_and_measured_to_the_byte(lab: Lab, nested: bool) -> None:
    run = lab.train("sft", deepspeed=lab.sharded, max_steps=5, use_bnb_nested_quant=nested, **BITS)
    planned, found = run.manifest["plan"]["state_bytes"], run.manifest["measured"]["state_bytes"]
    for kind in ("parameters", "buffers", "masters", "moments"):
        assert planned[kind] == found[kind], kind
    whole = lab.train("sft", deepspeed=lab.sharded, max_steps=5, use_peft=True).manifest["measured"]["state_bytes"]
    assert found["parameters"] < 0.6 * whole["parameters"]  # the embeddings, which stay whole, are half of them


@pytest.mark.parametrize("phase", ["dpo", "reward", "ppo"])
def test_every_head_stands_on_it(lab: Lab, phase: str) -> None:
    run = lab.train(phase, deepspeed=lab.sharded, **BITS)
    assert "), in 4 bits (nf4)\n" in run.result.text and "re-opened logits within" in run.result.text
    if phase == "dpo":
        assert run.losses[0] == pytest.approx(0.693147, abs=1e-5)


def test_a_run_goes_on_bitwise(lab: Lab, tmp_path: Path) -> None:
    place = tmp_path / "run"
    asked = {**BITS, "deepspeed": lab.sharded, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    lab.start("sft", place, **asked).result.ok()
    whole = read_weights(place)
    lab.start("sft", place, resume=place / "checkpoint-2", **asked).result.ok()
    assert (place / "left" / "checkpoint-4").is_dir()  # the last two steps were made again
    for name, tensor in read_weights(place).items():
        assert torch.equal(tensor, whole[name]), name


def test_what_does_not_go_together(lab: Lab, tmp_path: Path) -> None:
    whole = lab.start("sft", tmp_path / "a", load_in_4bit=True, dry_run=True).result.error()
    assert "load_in_4bit" in whole and "use_peft" in whole
    alone = lab.start("sft", tmp_path / "b", use_peft=True, bnb_4bit_quant_type="fp4", dry_run=True).result.error()
    assert "bnb_4bit_quant_type" in alone and "load_in_4bit" in alone


def test_without_bitsandbytes_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(UserError, match="bitsandbytes, which is not installed"):
        quantised.settings(ModelFields(load_in_4bit=True), torch.float32)

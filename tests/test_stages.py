"""Decisions of a run that need no model: its precision."""

from __future__ import annotations

import pytest

from align_kit import machine, registry
from align_kit.config import load
from align_kit.stages import engine

HARDWARE = machine.hardware_precision()
PRECISION = [
    ("", HARDWARE),
    ("--bf16 true", "bf16"),
    ("--bf16 false", "fp32"),
    ("--fp16 true", "fp16"),
    ("--dtype bfloat16", "bf16"),
    ("--dtype float32", "fp32"),
    ("--dtype auto", HARDWARE),
    ("--dtype float32 --bf16 true", "bf16"),  # fp32 masters under bf16 compute: what TRL's defaults mean
]


@pytest.mark.parametrize(("words", "expected"), PRECISION)
def test_precision(words: str, expected: str) -> None:
    assert engine.precision_of(load(registry.get("sft"), words.split())) == expected

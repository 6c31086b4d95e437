"""The benchmark of cleaning runs, and says what it could not compare with."""

from __future__ import annotations

import sys

import pytest

from benchmarks import clean_speed


@pytest.mark.slow
def test_arms_are_compared_and_absent_ones_are_said(capsys: pytest.CaptureFixture) -> None:
    missing = ["--datasketch-python", sys.executable, "--datatrove-python", sys.executable]
    assert clean_speed.main(["--documents", "150", "--growth", "150", "300", "--rounds", "1", *missing]) == 0
    said = capsys.readouterr().out
    assert "150 rows in" in said and "asked for: 2,000 documents/s/core" in said
    assert "datatrove: not measured (ModuleNotFoundError" in said
    assert "2 times the rows take" in said


@pytest.mark.slow
def test_documents_hold_copies_and_are_the_same_each_time() -> None:
    made = list(clean_speed.documents(1000))
    assert made == list(clean_speed.documents(1000))
    assert 0 < 1000 - len(set(made)) < 60
    assert 60 < sum(len(text.split()) for text in made) / len(made) < 130

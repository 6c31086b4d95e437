"""Whole trainers against TRL's own: one step on the same rows, from strings and from conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Ranks
from tests.small import Lab, lab_of, make_rows, read_weights, relative_gap, write_rows

pytestmark = pytest.mark.slow

KINDS = {"sft": "prompt_completion", "reward": "preference", "dpo": "preference", "kto": "binary"}
# Where we would derive from the data what TRL leaves at 1.
SAME = {"kto": {"desirable_weight": 1.5, "undesirable_weight": 0.75}}


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of strings as one of messages."""
    role = lambda name: "user" if name == "prompt" else "assistant"  # noqa: E731
    return {
        name: [{"role": role(name), "content": value.strip()}] if isinstance(value, str) else value
        for name, value in row.items()
    }


@pytest.mark.parametrize("shape", ["strings", "conversations"])
@pytest.mark.parametrize("phase", KINDS)
def test_first_step_is_trls(lab: Lab, tmp_path: Path, phase: str, shape: str) -> None:
    """Data, tokens, loss and gradient of a batch of 8 rows are those of TRL's trainer."""
    rows = make_rows(KINDS[phase], 8, seed=2)
    data = write_rows(tmp_path / "rows.jsonl", [conversation(row) if shape == "conversations" else row for row in rows])
    step = {"optim": "sgd", "learning_rate": 10.0, "max_steps": 1, "max_length": 24, "max_grad_norm": 0.0}
    start = lab.scorer if phase == "reward" else lab.model  # a fresh head would leave the trunk without a gradient
    same = SAME.get(phase, {})
    most = {"max_length": 24, "data_limits": {"dropped": 1}}
    ours = lab.step(phase, 1, datasets=[{"path": data}], model_name_or_path=start, **most, **same)
    stock = tmp_path / "stock"
    lab.ranks.run(
        world_size=1, ranked=False, function="tests.rank_work:stock_step", cwd=tmp_path, phase=phase,
        model=str(start), data=str(data), place=str(stock), per_device_train_batch_size=8,
        lr_scheduler_type="constant", warmup_steps=0, **step, **same,
    ).ok()  # fmt: skip
    assert ours.manifest["forward"]["mode"] == "shared"
    assert ours.losses == pytest.approx(json.loads((stock / "losses.json").read_text()), rel=1e-5)
    assert relative_gap(ours.weights, read_weights(stock), read_weights(start)) < 1e-5

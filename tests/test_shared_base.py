"""PPO with LoRA on one base: policy, value function, reference and reward model stored once, and as exact as apart."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, write_model

pytestmark = pytest.mark.slow

# Wide enough that three adapters of rank 1 are under 3 % of the base.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


@cache
def base(lab: Lab) -> Path:
    return write_model(lab.home / "wide", **WIDE)


@cache
def reward(lab: Lab) -> Run:
    """Return a reward adapter that has learnt something, trained on the base."""
    rate = {"learning_rate": 1e-2, "max_steps": 3}
    return lab.train("reward", 2, model_name_or_path=base(lab), use_peft=True, lora_r=1, **rate)


def shared(lab: Lab, **changes: Any) -> Run:
    place = lab.home / f"shared-{len(changes)}"
    more = {"reward_funcs": None, "reward_model_name_or_path": str(reward(lab).folder), "learning_rate": 1e-2}
    given = {"model_name_or_path": base(lab), "use_peft": True, "lora_r": 1, "deepspeed": lab.sharded, "max_steps": 3}
    return lab.start("ppo", place, 2, harm="measure_roles", overwrite=True, **{**given, **more, **changes})


@cache
def run(lab: Lab) -> Run:
    done = shared(lab)
    done.result.ok()
    return done


def measured(done: Run) -> list[dict[str, Any]]:
    """Return what each rank found after the last step."""
    return [json.loads(Path(f"{done.folder}.{rank}.json").read_text()) for rank in range(2)]


def test_one_base_is_stored(lab: Lab) -> None:
    """Bytes of all roles on a rank are those of its share of the base, and the adapters'."""
    for found in measured(run(lab)):
        assert found["adapters"] < 0.03 * found["whole_base"]
        assert found["stored"] <= 1.15 * found["whole_base"] / 2
        assert found["stored"] >= found["whole_base"] / 2  # nothing is left out of the count
    assert run(lab).manifest["frozen"]["reward"]["placement"] == "shared"
    assert run(lab).manifest["frozen"]["reference"]["placement"] == "adapter"


def test_roles_are_those_of_separate_models(lab: Lab) -> None:
    """After three updates every role's forward is that of a model of its own with the same weights."""
    for found in measured(run(lab)):
        assert found["policy"] < 1e-5 and found["reference"] < 1e-5
        assert found["reward"] < 1e-5 and found["value"] < 1e-5
        assert found["moved"] > 1e-3, "the policy is its reference still: switching adapters would not show"
        assert found["reward_spread"] > 1e-4


def test_an_adapter_of_another_base_is_refused(lab: Lab) -> None:
    other = write_model(lab.home / "wide-other", seed=5, **WIDE)
    line = shared(lab, model_name_or_path=other, reward_placement="shared").result.error()
    assert "was trained on another base" in line and "use sharded" in line


def test_an_adapter_of_another_base_lives_apart(lab: Lab) -> None:
    """Left to itself the run puts it where it is right: merged into its own base, beside the policy's."""
    other = write_model(lab.home / "wide-other", seed=5, **WIDE)
    done = shared(lab, model_name_or_path=other, max_steps=1, reward_placement="auto")
    assert done.manifest["frozen"]["reward"]["placement"] == "sharded"

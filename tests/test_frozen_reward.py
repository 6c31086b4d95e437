"""Reward models as frozen roles: who they are, what they score, and that several of them are watched apart."""

from __future__ import annotations

import math
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_kit import frozen
from align_kit.errors import UserError
from align_kit.models import load, source
from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, make_tokenizer, write_model, write_scorer


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scorer(tmp_path_factory.mktemp("scorers") / "one")


def resolve(place: Path, **changes: Any) -> tuple[source.Source, frozen.Identity]:
    return frozen.resolve_reward(str(place), **{"role": "reward", "placement": "auto", "recorded": None, **changes})


def plain_site() -> frozen.Site:
    """Return a site below ZeRO-3, where a frozen model is whole and on its own."""
    import torch

    engine = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1}
    policy = SimpleNamespace(config=SimpleNamespace(hidden_size=32))
    return frozen.Site(engine, {"dtype": torch.float32, "seed": 0}, policy, make_tokenizer(), [])


def test_identity_and_place(scorer: Path) -> None:
    where, identity = resolve(scorer, role="reward_1")
    assert (identity.role, identity.name, identity.placement) == ("reward_1", str(scorer), "sharded")
    assert identity.digest == source.digest(where) and identity.reason == "a model of its own"


def test_a_changed_reward_model_is_refused_on_resume(scorer: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(scorer, tmp_path / "reward"))
    recorded = resolve(place)[1].as_dict()
    assert resolve(tmp_path / "elsewhere", recorded=recorded)[1].as_dict() == recorded
    write_scorer(place, seed=5)
    with pytest.raises(UserError, match="the reward .* has changed since this run began .* restore it"):
        resolve(place, recorded=recorded)


@pytest.mark.parametrize(("make", "message"), [
    (write_model, "is no sequence classifier; give one with one label"),
    (lambda place: write_scorer(place, num_labels=2), "is a sequence classifier with 2 labels"),
])  # fmt: skip
def test_what_is_no_reward_model_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    where, identity = resolve(make(tmp_path / "other"))
    with pytest.raises(UserError, match=message):
        frozen.load_reward(where, identity, plain_site())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 1, 7])
def test_scores_do_not_depend_on_what_the_policy_pads_with(scorer: Path, side: str, pad: int) -> None:
    """Each row scores what plain transformers gives it alone, be it padded on the left, or with a real token."""
    import torch
    from transformers import AutoModelForSequenceClassification

    held = frozen.load_reward(*resolve(scorer), plain_site())
    rows = [[5, 9, 30, 7], [12, 11, 44, 90, 7, 8, 21], [50]]
    longest = max(map(len, rows))
    filled = [([pad] * (longest - len(row)), row) for row in rows]
    ids = torch.tensor([space + row if side == "left" else row + space for space, row in filled])
    marks = [([0] * len(space), [1] * len(row)) for space, row in filled]
    mask = torch.tensor([space + row if side == "left" else row + space for space, row in marks])
    scores = held.scores(held.model, {"input_ids": ids, "attention_mask": mask})
    plain = AutoModelForSequenceClassification.from_pretrained(scorer).eval()
    with torch.no_grad():
        alone = torch.cat([plain(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
    assert scores.shape == (3,) and scores.dtype == torch.float32 and not scores.requires_grad
    assert scores == pytest.approx(alone, abs=1e-5)


def test_a_reward_model_keeps_its_own_words(scorer: Path) -> None:
    held = frozen.load_reward(*resolve(scorer), plain_site())
    assert held.tokenizer.get_vocab() == load.load_tokenizer(source.resolve(str(scorer))).get_vocab()


# --- two of them on two real ranks ------------------------------------------------------------------------


@cache
def scored(lab: Lab, placement: str) -> Run:
    """Return a PPO run of one iteration with two reward models living there."""
    return lab.train("ppo", **with_two(lab, placement))


def with_two(lab: Lab, placement: str) -> dict[str, Any]:
    other = lab.home / "other-scorer"
    if not other.exists():
        write_scorer(other, seed=3)
    models = [str(lab.scorer), str(other)]
    asked = {"reward_funcs": None, "reward_model_name_or_path": models, "reward_placement": placement}
    return {**asked, "deepspeed": lab.sharded, "max_steps": 3}


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["offloaded", "quantised"])
def test_two_reward_models_score_alike_wherever_they_live(lab: Lab, placement: str) -> None:
    ours, theirs = scored(lab, placement), scored(lab, "sharded")
    roles = ours.manifest["frozen"]
    assert (
        set(roles) == {"reference", "reward", "reward_1"} and roles["reward"]["digest"] != roles["reward_1"]["digest"]
    )
    for role, metric in (("reward", "reward/model"), ("reward_1", "reward/model_1")):
        worst = roles[role]["measured"].get("int8_error_worst", 0)
        assert roles[role]["placement"] == placement and (placement == "quantised") == (worst > 0)
        assert ours.logged(metric) == pytest.approx(theirs.logged(metric), abs=1e-6 + 2 * worst)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["sharded", "quantised"])
def test_a_reward_model_with_fewer_words_of_its_own(lab: Lab, placement: str) -> None:
    """The policy's token ids mean nothing to it: what it scores, and what its int8 copy is measured on, is text."""
    other = lab.home / "byte-scorer"
    if not other.exists():
        write_scorer(other, vocab_size=300)
        words = make_tokenizer(vocab_size=290)
        words.save_pretrained(other)
        assert len(words) <= 300 < len(make_tokenizer())
    asked = {"reward_funcs": None, "reward_model_name_or_path": [str(other)], "reward_placement": placement}
    run = lab.train("ppo", **asked, max_steps=3)
    assert all(math.isfinite(reward) for reward in run.logged("reward"))
    assert run.manifest["frozen"]["reward"]["placement"] == placement


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["sharded", "quantised"])
def test_a_flipped_bit_names_the_reward_model_it_is_in(lab: Lab, tmp_path: Path, placement: str) -> None:
    asked = {**with_two(lab, placement), "fingerprint_steps": 1}
    run = lab.start("ppo", tmp_path / "run", harm="flip_one_bit_of_reward", **asked)
    line = run.result.error(code=3)
    assert "the frozen reward_1" in line and "changed in memory, seen at step 2" in line

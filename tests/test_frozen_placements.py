"""Where frozen models live: what memory chooses, and that each place computes what the others do."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_kit import frozen
from align_kit.errors import UserError
from align_kit.models import load, source
from tests.harness import Ranks
from tests.small import GLOBAL_BATCH, Lab, Run, lab_of, make_rows, write_model, write_rows

if TYPE_CHECKING:
    from torch import Tensor

APART = ("sharded", "offloaded", "quantised", "cached")


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> source.Source:
    return source.resolve(str(write_model(tmp_path_factory.mktemp("models") / "start")))


# --- chosen by memory -------------------------------------------------------------------------------------

ELEMENTS = 29_344  # of the small model


def resolve(start: source.Source, free: int | None, **changes: Any) -> frozen.Identity:
    """Resolve a full policy's reference with `free` bytes on a device where training will take 1 MiB."""
    room = frozen.Room(free, claimed=2**20, element_bytes=4, world_size=2)
    asked = {"use_peft": False, "given": None, "placement": "auto", "differs": False, "recorded": None, "room": room}
    return frozen.resolve_reference(policy=start, policy_digest=source.digest(start), **{**asked, **changes})[1]


@pytest.mark.parametrize(("spare", "chosen", "words"), [
    (0, "sharded", "a copy of 0.1 MiB on each rank fits in 1.1 MiB free, of which training will take 1.0 MiB"),
    (-1, "offloaded", "does not fit"),
])  # fmt: skip
def test_auto_goes_by_memory_and_says_so(start: source.Source, spare: int, chosen: str, words: str) -> None:
    found = resolve(start, free=2**20 + ELEMENTS * 4 // 2 + spare)
    assert found.placement == chosen and words in found.reason


def test_auto_does_not_offload_where_the_device_computes_in_the_hosts_memory(start: source.Source) -> None:
    assert resolve(start, free=None).placement == "sharded"


def test_auto_below_stage_3_has_one_place(start: source.Source) -> None:
    found = resolve(start, free=0, stage=2)
    assert found.placement == "sharded" and "whole on each rank: ZeRO-2 shards no weights" in found.reason


def test_a_resumed_run_keeps_its_place_whatever_the_memory_is_now(start: source.Source) -> None:
    begun = resolve(start, free=0)
    again = resolve(start, free=2**40, recorded=begun.as_dict())
    assert begun.placement == "offloaded" and again == begun


def test_offloading_needs_shards(start: source.Source) -> None:
    with pytest.raises(UserError, match="reference_placement offloaded needs ZeRO-3, this run is ZeRO-2"):
        resolve(start, free=None, placement="offloaded", stage=2)


# --- int8 -------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_int8_rows_are_within_half_a_step(rows: list[list[float]]) -> None:
    """Zeros stay zero, the largest of a row keeps its value, the others lie within half a scale (and rounding)."""
    import torch

    from align_kit.models.int8 import quantised_rows

    weight = torch.tensor(rows)
    small, scale = quantised_rows(weight)
    back = small.double() * scale.double()
    assert small.dtype == torch.int8 and torch.isfinite(back).all()
    assert ((back - weight.double()).abs() <= scale.double() * 0.50001).all()


def test_int8_leaves_heads_and_embeddings_and_shares_what_was_shared(start: source.Source) -> None:
    from align_kit.models.int8 import Int8Linear, quantise_

    model = loaded(start)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    assert quantise_(model) == 2 * 7
    small = layers[0].mlp.up_proj, layers[1].mlp.up_proj
    assert all(isinstance(layer, Int8Linear) for layer in small) and small[0].rows is small[1].rows
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.is_floating_point()
    assert quantise_(model) == 0


def loaded(start: source.Source) -> Any:
    import torch

    return frozen.freeze(load.load_policy(start, dtype=torch.float32, seed=0))


def test_a_flipped_bit_of_an_int8_weight_is_seen(start: source.Source) -> None:
    import torch

    from align_kit.models.int8 import quantise_

    model = loaded(start)
    quantise_(model)
    held = frozen.Frozen(frozen.Identity("reference", "somewhere", "0" * 32, "quantised", "for a test"), model)
    held.watch(model)
    held.check(model, "at step 1")
    model.model.layers[1].self_attn.q_proj.rows.view(-1)[torch.tensor(5)] ^= 1
    with pytest.raises(UserError, match=r"reference \(somewhere\) changed in memory, seen at step 2 in .*q_proj.rows"):
        held.check(model, "at step 2")


# --- on two real ranks ------------------------------------------------------------------------------------


@cache
def placed(lab: Lab, placement: str, phase: str, **changes: Any) -> Run:
    """Return a run of 4 steps on two ranks whose reference lives there; its log-probabilities lie beside it."""
    place = lab.home / f"{phase}-placed-{placement}-{len(changes)}"
    asked = {"deepspeed": lab.sharded, "max_steps": 4, "per_device_train_batch_size": GLOBAL_BATCH // 2}
    run = lab.start(phase, place, harm="keep_reference_logps", **{**asked, "reference_placement": placement, **changes})
    run.result.ok()
    return run


def logps(run: Run) -> Tensor:
    import torch

    return torch.load(run.folder.with_suffix(".logps"))  # type: ignore[no-any-return]


def reference(run: Run) -> dict[str, Any]:
    return dict(run.manifest["frozen"]["reference"])


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["offloaded", "cached"])
@pytest.mark.parametrize("phase", ["dpo", "kto"])
def test_an_exact_place_computes_what_the_sharded_one_does(lab: Lab, phase: str, placement: str) -> None:
    """Log-probabilities within 1e-5 nats, and the same losses; KTO's mismatched completions among them."""
    ours, theirs = placed(lab, placement, phase), placed(lab, "sharded", phase)
    assert reference(ours)["placement"] == placement
    assert float((logps(ours) - logps(theirs)).abs().max()) < 1e-5
    assert ours.losses == pytest.approx(theirs.losses, rel=2e-6)
    assert placement == "cached" or ours.losses == theirs.losses
    if phase == "kto":
        assert ours.logged("kl") == pytest.approx(theirs.logged("kl"), rel=1e-4)


@pytest.mark.slow
def test_the_int8_copy_is_as_far_off_as_it_says(lab: Lab) -> None:
    ours, theirs = placed(lab, "quantised", "dpo"), placed(lab, "sharded", "dpo")
    gap = (logps(ours) - logps(theirs)).abs()
    measured = reference(ours)["measured"]
    assert 0 < float(gap[gap > 0].mean()) < 3 * measured["int8_error_mean"]
    assert float(gap.max()) < 2 * measured["int8_error_worst"] < 0.1
    assert f"{measured['int8_error_mean']:.2g} on average" in reference(ours)["reason"]
    assert ours.losses == pytest.approx(theirs.losses, rel=5e-3) and ours.losses != theirs.losses


@pytest.mark.slow
@pytest.mark.parametrize("placement", APART)
def test_elements_on_each_rank(lab: Lab, tmp_path: Path, placement: str) -> None:
    """With persistence threshold 0: half a copy, a whole one in int8, or nothing of what computed and was let go."""
    asked = {"deepspeed": lab.sharded, "reference_placement": placement}
    run = lab.start("dpo", tmp_path / "run", harm="count_elements", **asked)
    run.result.ok()
    for rank in range(2):
        kept = json.loads((tmp_path / f"run.{rank}.json").read_text())
        share = kept["beside"] / sum(tensor.numel() for tensor in run.weights.values())
        assert share == pytest.approx({"quantised": 1, "cached": 0}.get(placement, 0.5), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["offloaded", "quantised"])
def test_a_flipped_bit_ends_the_run_wherever_it_is(lab: Lab, tmp_path: Path, placement: str) -> None:
    asked = {"deepspeed": lab.sharded, "max_steps": 4, "fingerprint_steps": 1, "reference_placement": placement}
    run = lab.start("dpo", tmp_path / "run", harm="flip_one_bit_of_reference", **asked)
    line = run.result.error(code=3)
    assert "the frozen reference" in line and "changed in memory, seen at step 2" in line


@pytest.mark.slow
def test_a_flipped_bit_of_a_gathered_parameter_ends_the_run(lab: Lab, tmp_path: Path) -> None:
    """Small parameters stay gathered, and that copy computes: intact shards prove nothing about it."""
    asked = {"deepspeed": "zero3", "max_steps": 6, "fingerprint_steps": 1}
    run = lab.start("dpo", tmp_path / "run", harm="flip_one_gathered_bit", **asked)
    line = run.result.error(code=3)
    assert "changed in memory, seen at step 2 in" in line and "(gathered)" in line


# --- cached -----------------------------------------------------------------------------------------------


def computed(run: Run) -> int:
    return int(reference(run)["measured"]["computed"])


@pytest.mark.slow
def test_runs_that_differ_in_the_loss_share_what_was_computed(lab: Lab, tmp_path: Path) -> None:
    """Another beta, learning rate, loss, batch or world size computes nothing; other weights or dtypes everything."""
    shared = {"ALIGN_KIT_CACHE": str(tmp_path / "cache")}
    rows = write_rows(tmp_path / "pairs.jsonl", make_rows("preference", 12, seed=9))

    def run(name: str, world_size: int = 1, **changes: Any) -> int:
        asked = {"datasets": [{"path": rows}], "reference_placement": "cached", "max_steps": 1, **changes}
        done = lab.start("dpo", tmp_path / name, world_size, env=shared, **asked)
        done.result.ok()
        return computed(done)

    assert run("first", world_size=2) == 24
    loss = {"beta": 0.7, "learning_rate": 1e-4, "loss_type": ["ipo"], "per_device_train_batch_size": 2}
    assert run("other-loss", world_size=2, **loss) == 0
    assert run("one-rank") == 0
    assert run("trl-name", reference_placement=None, precompute_ref_log_probs=True) == 0
    assert run("other-weights", model_name_or_path=write_model(tmp_path / "model", seed=4)) == 24
    assert run("other-dtype", bf16=True) == 24
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    other = write_model(tmp_path / "same-weights")
    written = json.loads((other / "tokenizer_config.json").read_text())
    (other / "chat_template.jinja").write_text(template.read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(written))
    assert run("other-template", model_name_or_path=other) == 24


@pytest.mark.slow
def test_evaluation_rows_are_stored_too(lab: Lab) -> None:
    """A part of the training data, in memory and not in a file: TRL's own precomputing ends such a run on two ranks."""
    asked = {"eval_strategy": "steps", "eval_steps": 2, "test_split_size": 5}
    stored, apart = (placed(lab, placement, "dpo", **asked) for placement in ("cached", "sharded"))
    assert stored.logged("eval_loss") == pytest.approx(apart.logged("eval_loss"), rel=2e-6)
    assert len(stored.logged("eval_loss")) == 2


@pytest.mark.slow
def test_changed_numbers_in_the_store_are_found_out(lab: Lab, tmp_path: Path) -> None:
    """A store whose numbers are whole and wrong: the few that are computed again do not fit."""
    import numpy as np

    from align_kit.frozen import chunks

    shared, asked = {"ALIGN_KIT_CACHE": str(tmp_path)}, {"reference_placement": "cached"}
    lab.start("dpo", tmp_path / "first", env=shared, **asked).result.ok()
    for path in tmp_path.glob("reference/*/*.arrow"):
        digests, values = chunks.digests_of(path), chunks.Values(path)
        assert digests is not None
        rows = [values.row(number) + np.float32(0.01) for number in range(len(digests))]
        chunks.write(path.parent, digests.copy(), rows)
        path.unlink()
    again = lab.start("dpo", tmp_path / "again", env=shared, **asked)
    assert "are not what the reference gives: 4 rows computed again differ by up to 0.01" in again.result.error()

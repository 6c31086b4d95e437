"""Frozen models: identity, placement, freezing, sharding, and what happens when their weights have changed."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from align_kit import frozen
from align_kit.errors import UserError
from align_kit.models import load, lora, source
from tests.harness import Ranks
from tests.small import Lab, Run, lab_of, write_model


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two different models on disk."""
    home = tmp_path_factory.mktemp("models")
    return {"start": write_model(home / "start"), "other": write_model(home / "other", seed=1)}


# --- which model, and where -------------------------------------------------------------------------------


def resolve(policy: Path, **changes: Any) -> tuple[source.Source, frozen.Identity]:
    """Resolve the reference of a policy that starts from the folder `policy`."""
    start = source.resolve(str(policy))
    asked = {"use_peft": False, "given": None, "placement": "auto", "differs": False, "recorded": None}
    return frozen.resolve_reference(policy=start, policy_digest=source.digest(start), **{**asked, **changes})


def test_the_reference_is_the_policys_start(places: dict[str, Path]) -> None:
    where, identity = resolve(places["start"])
    assert where.folder == places["start"] and not identity.differs
    assert identity.digest == source.digest(source.resolve(str(places["start"])))


@pytest.mark.parametrize(("asked", "placement", "reason"), [
    ({}, "sharded", "the policy's weights change, so it needs its own"),
    ({"use_peft": True}, "adapter", "the policy's base already holds it"),
    ({"use_peft": True, "placement": "sharded"}, "sharded", "as configured"),
    ({"use_peft": True, "given": "other", "differs": True}, "sharded", "needs its own"),
    ({"use_peft": True, "whole_modules": True}, "sharded", "lora_modules_to_save changes the base itself"),
])  # fmt: skip
def test_placement_and_its_reason(places: dict[str, Path], asked: dict[str, Any], placement: str, reason: str) -> None:
    given = {"given": str(places[asked["given"]])} if "given" in asked else {}
    identity = resolve(places["start"], **{**asked, **given})[1]
    assert identity.placement == placement and reason in identity.reason
    assert identity.differs == ("given" in asked)


def test_another_copy_of_the_start_is_the_start(places: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(places["start"], tmp_path / "copy")
    assert not resolve(places["start"], given=str(copy))[1].differs


@pytest.mark.parametrize(("asked", "message"), [
    ({"given": "other"}, "is not what the policy starts from .* reference_differs: true"),
    ({"placement": "adapter"}, "reference_placement adapter needs use_peft"),
    ({"placement": "adapter", "use_peft": True, "whole_modules": True}, "cannot hold modules that lora_modules"),
    ({"placement": "adapter", "use_peft": True, "given": "other", "differs": True}, "use sharded"),
])  # fmt: skip
def test_refused_references(places: dict[str, Path], asked: dict[str, Any], message: str) -> None:
    given = {"given": str(places[asked["given"]])} if "given" in asked else {}
    with pytest.raises(UserError, match=message):
        resolve(places["start"], **{**asked, **given})


def test_resume_takes_the_recorded_reference(places: dict[str, Path]) -> None:
    """A checkpoint given as the model of a resumed run does not become the reference."""
    recorded = resolve(places["start"])[1].as_dict()
    where, identity = resolve(places["other"], recorded=recorded)
    assert where.folder == places["start"] and identity.digest == recorded["digest"]


def test_resume_refuses_a_changed_reference(places: dict[str, Path], tmp_path: Path) -> None:
    reference = shutil.copytree(places["other"], tmp_path / "reference")
    recorded = resolve(places["start"], given=str(reference), differs=True)[1].as_dict()
    write_model(reference, seed=2)
    with pytest.raises(UserError, match="has changed since this run began"):
        resolve(places["start"], recorded=recorded)


def test_a_checkpoint_of_the_phase_is_refused_as_its_start(places: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = shutil.copytree(places["start"], tmp_path / "checkpoint-3")
    (checkpoint / "trainer_state.json").write_text("{}")
    manifest = {"phase": "dpo", "frozen": {"reference": {"name": "the-sft-model"}}}
    with pytest.raises(UserError, match="whose reference is the-sft-model; .* give --resume"):
        frozen.refuse_checkpoint_of("dpo", source.resolve(str(checkpoint)), manifest)
    frozen.refuse_checkpoint_of("kto", source.resolve(str(checkpoint)), manifest)
    frozen.refuse_checkpoint_of("dpo", source.resolve(str(places["start"])), manifest)


# --- frozen means frozen ----------------------------------------------------------------------------------


def test_freeze_does_all_of_it(places: dict[str, Path]) -> None:
    model = loaded(places["start"], attention_dropout=0.5)
    model.train()
    model.gradient_checkpointing_enable()
    frozen.freeze(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not model.is_gradient_checkpointing
    logps = [frozen.Frozen(identity(), model).token_logps(model, batch()).logps_BT for _ in range(2)]
    assert (logps[0] == logps[1]).all() and not logps[0].requires_grad


def identity() -> frozen.Identity:
    return frozen.Identity("reference", "somewhere", "0" * 32, "sharded", "for a test")


def loaded(place: Path, **config: Any) -> Any:
    """Return the stored model in fp32, its configuration changed."""
    import torch

    model = load.load_policy(source.resolve(str(place)), dtype=torch.float32, seed=0)
    for name, value in config.items():
        setattr(model.config, name, value)
        for module in model.modules():
            if hasattr(module, name):
                setattr(module, name, value)
    return model


def batch() -> dict[str, Any]:
    """Return two rows of 12 tokens, the last 6 of them predicted."""
    import torch

    ids = torch.arange(24).reshape(2, 12) * 11 % 300 + 4
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "loss_mask": torch.where(torch.arange(12) < 6, 0, mask)}


class LoraFields:
    """What `lora.add_lora` reads, with a dropout that would show."""

    lora_r, lora_alpha, lora_dropout, lora_task_type = 4, 8, 0.5, "CAUSAL_LM"
    lora_target_modules = lora_target_parameters = lora_modules_to_save = None
    use_rslora = use_dora = False


def shaken(model: Any) -> Any:
    """Move the trained adapter of `model` away from zero."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{lora.TRAINED}." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def trainable(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_the_base_without_its_adapter_is_the_reference(places: dict[str, Path]) -> None:
    """Placement `adapter`: the log-probabilities of a separate base model, `requires_grad` and mode untouched."""
    policy = shaken(lora.add_lora(loaded(places["start"]), LoraFields()))
    policy.train()
    before = trainable(policy)
    held = frozen.Frozen(identity(), None, adapter=None)
    apart = frozen.Frozen(identity(), frozen.freeze(loaded(places["start"])))
    ours, theirs = (one.token_logps(policy, batch()).logps_BT for one in (held, apart))
    assert (ours - theirs).abs().max() < 1e-6
    assert trainable(policy) == before and before and policy.training
    policy.eval()
    assert (policy_logps(policy) - theirs).abs().max() > 0.01, "the adapter is back on"


def policy_logps(policy: Any) -> Any:
    from align_kit.forward.logprobs import token_logps

    return token_logps(policy, batch()).logps_BT


def test_a_frozen_copy_of_the_adapter_is_the_reference(places: dict[str, Path], tmp_path: Path) -> None:
    """An adapter trained further: its copy from the start stays what base plus stored adapter were, merged."""
    shaken(lora.add_lora(loaded(places["start"]), LoraFields())).save_pretrained(tmp_path / "sft")
    start = source.resolve(str(tmp_path / "sft"))
    policy = lora.load_adapter(loaded(places["start"]), start, frozen_copy=frozen.REFERENCE_ADAPTER)
    policy.eval()
    merged = frozen.Frozen(identity(), frozen.freeze(loaded(tmp_path / "sft"))).token_logps(policy, batch()).logps_BT
    assert (policy_logps(policy) - merged).abs().max() < 1e-5
    shaken(policy)
    held = frozen.Frozen(identity(), None, adapter=frozen.REFERENCE_ADAPTER)
    assert (held.token_logps(policy, batch()).logps_BT - merged).abs().max() < 1e-5
    assert (policy_logps(policy) - merged).abs().max() > 0.01
    assert trainable(policy) and all(f".{lora.TRAINED}." in name for name in trainable(policy))


@pytest.mark.parametrize("adapter", [None, frozen.REFERENCE_ADAPTER])
def test_fingerprint_sees_one_bit_and_no_training(places: dict[str, Path], tmp_path: Path, adapter: str | None) -> None:
    import torch

    shaken(lora.add_lora(loaded(places["start"]), LoraFields())).save_pretrained(tmp_path / "sft")
    policy = lora.load_adapter(loaded(places["start"]), source.resolve(str(tmp_path / "sft")), frozen_copy=adapter)
    held = frozen.Frozen(identity(), None, adapter=adapter)
    held.watch(policy)
    held.check(shaken(policy), "after training the adapter")
    part = "reference.weight" if adapter else "base_layer.weight"
    weight = next(p for name, p in policy.named_parameters() if name.endswith(part))
    weight.data.view(-1).view(torch.int32)[7] ^= 1
    with pytest.raises(UserError, match=r"the frozen reference \(somewhere\) changed in memory, seen at step 5"):
        held.check(policy, "at step 5")


# --- on two real ranks ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_reference_is_sharded(lab: Lab, tmp_path: Path) -> None:
    """With persistence threshold 0 each of two ranks stores half of the policy and half of the reference."""
    run = lab.start("dpo", tmp_path / "run", harm="count_elements", deepspeed=lab.sharded)
    run.result.ok()
    kept = [json.loads((tmp_path / f"run.{rank}.json").read_text()) for rank in range(2)]
    whole = sum(tensor.numel() for tensor in run.weights.values())
    for model in ("policy", "reference"):
        assert kept[0][model] == kept[1][model] == pytest.approx(whole / 2, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_flipped_bit_of_the_reference_ends_the_run(lab: Lab, tmp_path: Path, form: str) -> None:
    """One bit in one rank's shard, at step 2: both ranks end with one line that names the role and the step."""
    asked = {"use_peft": form == "lora" or None, "deepspeed": lab.sharded, "max_steps": 4, "fingerprint_steps": 1}
    run = lab.start("dpo", tmp_path / "run", harm="flip_one_bit_of_reference", **asked)
    line = run.result.error(code=3)
    assert "the frozen reference" in line and "changed in memory, seen at step 2" in line
    assert run.manifest["status"] != "finished"


@pytest.mark.slow
def test_a_wrong_reference_ends_the_run_before_any_update(lab: Lab, tmp_path: Path) -> None:
    run = lab.start("dpo", tmp_path / "run", harm="shift_reference", deepspeed=lab.sharded)
    assert "step-0 identity failed" in run.result.error() and "reference_differs: true" in run.result.error()
    assert not (run.folder / "metrics.jsonl").exists()


@cache
def resumable(lab: Lab) -> tuple[Run, Path]:
    """Return a run with a reference of its own that saved at steps 2 and 4, and that reference's folder."""
    reference = write_model(lab.home / "reference", seed=5)
    return lab.train("dpo", **with_reference(lab, reference)), reference


def with_reference(lab: Lab, reference: Path) -> dict[str, Any]:
    asked = {"reference_model_name_or_path": reference, "reference_differs": True, "deepspeed": lab.sharded}
    return {**asked, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.slow
def test_resume_with_a_checkpoint_as_model_keeps_the_reference(lab: Lab, tmp_path: Path) -> None:
    done, reference = resumable(lab)
    copy = shutil.copytree(done.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-4", "*.tensors"))
    asked = with_reference(lab, reference) | {"reference_model_name_or_path": None, "reference_differs": None}
    again = lab.start("dpo", copy, resume="auto", **{**asked, "model_name_or_path": copy / "checkpoint-2"})
    again.result.ok()
    assert again.losses[-2:] == done.losses[2:]
    assert again.manifest["frozen"]["reference"]["digest"] == done.manifest["frozen"]["reference"]["digest"]


@pytest.mark.slow
def test_resume_with_changed_reference_weights_is_refused(lab: Lab, tmp_path: Path) -> None:
    done, reference = resumable(lab)
    copy = shutil.copytree(done.folder, tmp_path / "run")
    kept = shutil.copytree(reference, tmp_path / "kept")
    write_model(reference, seed=6)
    try:
        again = lab.start("dpo", copy, resume="auto", **with_reference(lab, reference))
        assert re.search(rf"reference was {reference} \(\w{{12}}\), now {reference} \(", again.result.error())
    finally:
        shutil.copytree(kept, reference, dirs_exist_ok=True)

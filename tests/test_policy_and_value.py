"""The module PPO trains: two layouts that compute what hand-built models compute, and adapters that keep apart."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from align_kit.config.fields import ModelFields
from align_kit.errors import UserError
from align_kit.models import lora, source
from align_kit.models.load import evaluating
from align_kit.models.policy_and_value import VALUE_ADAPTER, PolicyAndValue, separate, shared
from tests.small import make_tokenizer, write_model, write_scorer

if TYPE_CHECKING:
    import torch

LAYOUTS = ("separate", "shared")
PAD = 1


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("start") / "model")


def lora_fields(**changes: Any) -> ModelFields:
    return ModelFields(**{"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, **changes})


def plain(place: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(place)


def adapted(place: Path, **changes: Any) -> Any:
    return lora.add_lora(plain(place), lora_fields(**changes))


def made(place: Path, layout: str) -> PolicyAndValue:
    """Return the layout on the model in `place`, every trainable number moved off its start."""
    import torch

    found = shared(adapted(place)) if layout == "shared" else of_its_own(place)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return found


def of_its_own(place: Path) -> PolicyAndValue:
    import torch

    return separate(plain(place), source.resolve(str(place)), dtype=torch.float32, seed=0, pad_token_id=PAD)


def batch() -> dict[str, torch.Tensor]:
    """Return three rows, two of them padded on the right."""
    import torch

    torch.manual_seed(1)
    ids, mask = torch.randint(4, 300, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    for row, length in ((0, 11), (1, 7), (2, 4)):
        ids[row, length:], mask[row, length:] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def merged(model: PolicyAndValue, adapter: str) -> Any:
    """Return a plain copy of the base with one adapter merged into it."""
    alone = copy.deepcopy(model.policy)
    alone.set_adapter(adapter)
    return alone.merge_and_unload()


# --- the forward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_begin_at_zero(start: Path, layout: str) -> None:
    """Exactly, for every token: the head has learnt nothing yet. The policy is the model it came from."""
    import torch

    model = shared(adapted(start)) if layout == "shared" else of_its_own(start)
    with evaluating(model):
        outcome = model(**batch(), role="both")
        expected = plain(start)(**batch()).logits
    assert outcome.values.shape == (3, 11) and not outcome.values.any()
    torch.testing.assert_close(outcome.logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_forwards_are_those_of_models_built_by_hand(start: Path, layout: str) -> None:
    """The policy's logits and the value head on a trunk, of merged weights where adapters share a base."""
    import torch

    model = made(start, layout)
    policy = merged(model, lora.TRAINED) if layout == "shared" else model.policy
    trunk = (merged(model, VALUE_ADAPTER) if layout == "shared" else model.value).model
    head = model.value_head if layout == "shared" else model.value.score
    with evaluating(model):
        both, value, words = (model(**batch(), role=role) for role in ("both", "value", "policy"))
        logits = policy(**batch()).logits
        values = trunk(**batch()).last_hidden_state @ head.weight[0]
    torch.testing.assert_close(both.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.values, values, rtol=1e-5, atol=1e-5)
    assert (value.values == both.values).all() and value.logits is None
    assert (words.logits == both.logits).all() and words.values is None
    assert values.abs().max() > 0.01 and (logits - plain(start)(**batch()).logits).abs().max() > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_changes_no_value(start: Path, layout: str) -> None:
    import torch

    model, whole = made(start, layout), batch()
    with evaluating(model):
        values = model(**whole, role="value").values
        for row, length in ((1, 7), (2, 4)):
            alone = model(**{name: tensor[row : row + 1, :length] for name, tensor in whole.items()}, role="value")
            torch.testing.assert_close(alone.values[0], values[row, :length], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_learns_from_its_own_loss(start: Path, layout: str) -> None:
    """Policy and value function share no trained parameter, and `value_parameters` names the latter's."""
    model = made(start, layout)
    values = {id(p) for p in model.value_parameters() if p.requires_grad}
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert values and values < trained.keys()
    for role, theirs in (("policy", trained.keys() - values), ("value", values)):
        model.zero_grad(set_to_none=True)
        outcome = model(**batch(), role=role)
        (outcome.logits if role == "policy" else outcome.values).square().sum().backward()
        reached = {id(p) for p in model.parameters() if p.grad is not None and p.grad.any()}
        assert reached == theirs, sorted(trained[place] for place in reached ^ theirs if place in trained)


def test_a_module_called_value_is_the_policys(start: Path) -> None:
    """Some models call a projection `value`: its adapter belongs to the policy all the same."""
    from torch import nn

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.ModuleDict({"lora_A": nn.ModuleDict({"default": nn.Linear(2, 2, bias=False)})})
            self.lora_A = nn.ModuleDict({VALUE_ADAPTER: nn.Linear(2, 2, bias=False)})

    model = shared(adapted(start))
    model.policy.odd = Odd()
    mine = set(model.value_parameters())
    assert model.policy.odd.lora_A[VALUE_ADAPTER].weight in mine
    assert model.policy.odd.value["lora_A"]["default"].weight not in mine


# --- adapters ---------------------------------------------------------------------------------------------


def test_switching_leaves_what_trains_alone(start: Path) -> None:
    """Both adapters train, whichever computes; what was active is active again, also after an error."""
    model = made(start, "shared")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name for name, trains in before.items() if trains} == {
        name for name in before if ".lora_" in name or name == "value_head.weight"
    }
    model(**batch(), role="both")
    with pytest.raises(ZeroDivisionError), lora.adapter_active(model.policy, VALUE_ADAPTER):
        assert lora.active_adapter(model.policy) == VALUE_ADAPTER
        with lora.adapter_active(model.policy, None):
            assert lora.active_adapter(model.policy) is None
        assert lora.active_adapter(model.policy) == VALUE_ADAPTER
        raise ZeroDivisionError
    assert lora.active_adapter(model.policy) == lora.TRAINED
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_the_value_adapter_can_start_as_the_policys(start: Path) -> None:
    """Where the policy goes on from a stored adapter, the value function sees the same hidden states."""
    import torch

    stored = made(start, "shared").policy
    parameters = dict(stored.named_parameters())
    fresh = adapted(start)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            parameter.copy_(parameters[name])
    model = shared(fresh, copy_start=True)
    named = dict(model.policy.named_parameters())
    pairs = [(p, named[n.replace(".default.", ".value.")]) for n, p in named.items() if ".default." in n]
    assert pairs and all((one == other).all() and one is not other for one, other in pairs)
    assert all(p.requires_grad for p in model.value_parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputed_activations_give_the_same_gradients(start: Path, layout: str) -> None:
    """Each layer is computed again with the adapter it was computed with, although another one is active by then."""
    import torch

    gradients: list[Mapping[str, torch.Tensor]] = []
    for recompute in (False, True):
        model = made(start, layout).train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        outcome = model(**batch(), role="both")
        loss = outcome.logits.log_softmax(-1)[..., 5].sum() + outcome.values.square().sum()
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        assert gradient.any(), name


def test_recomputation_that_forgets_the_adapter_is_refused(start: Path) -> None:
    model = made(start, "shared")
    with pytest.raises(UserError, match="use_reentrant: true would recompute the value function"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    made(start, "separate").activation_checkpointing_enable({"use_reentrant": True})


def test_whole_modules_beside_an_adapter_are_refused(start: Path) -> None:
    with pytest.raises(UserError, match="lora_modules_to_save changes the base"):
        shared(adapted(start, lora_modules_to_save=["norm"], lora_target_modules=["q_proj"]))


# --- where the value function starts ----------------------------------------------------------------------


def test_a_value_model_starts_from_a_reward_model_with_its_head(start: Path, tmp_path: Path) -> None:
    import torch

    place = write_scorer(tmp_path / "scorer", seed=4)
    model = separate(
        plain(start), source.resolve(str(place)), dtype=torch.float32, seed=0, pad_token_id=PAD
    )  # fmt: skip
    from transformers import AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1).eval()
    with evaluating(model):
        values = model(**batch(), role="value").values
        scores = classifier(**batch()).logits.squeeze(-1)
    last = batch()["attention_mask"].sum(1) - 1
    torch.testing.assert_close(values.gather(1, last[:, None]).squeeze(1), scores, rtol=1e-5, atol=1e-6)


# --- a reward model on the policy's base ------------------------------------------------------------------


def reward_adapter(base: Path, place: Path, *, pad: int = PAD) -> Any:
    """Store the adapter of a reward model on `base` in `place`, as PEFT does; return the classifier."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = pad
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, target_modules="all-linear", task_type="SEQ_CLS")
    torch.manual_seed(9)
    classifier = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    classifier.save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return classifier.eval()


@pytest.mark.parametrize("base_knows_padding", [True, False])
def test_a_held_reward_gives_what_its_own_classifier_gives(tmp_path: Path, base_knows_padding: bool) -> None:
    """Rows padded or not, whatever the policy's adapters are; the policy computes as before."""
    import torch

    base = write_model(tmp_path / "base", **({} if base_knows_padding else {"pad_token_id": None}))
    classifier = reward_adapter(base, tmp_path / "reward")
    model = made(base, "shared")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with evaluating(model):
        words, values = model(**batch()).logits, model(**batch(), role="value").values
    hold(model, "reward_1", tmp_path / "reward")
    with evaluating(model):
        scores = model(**batch(), role="reward_1").scores
        expected = classifier(**batch()).logits.squeeze(-1)
        assert (model(**batch()).logits == words).all()
        assert (model(**batch(), role="value").values == values).all()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    assert len(set(scores.tolist())) == 3
    fresh = {name: p.requires_grad for name, p in model.named_parameters() if name not in before}
    assert fresh and not any(fresh.values()), "the reward model does not train"
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in before} == before


def test_a_held_reward_reads_the_token_its_classifier_reads(tmp_path: Path) -> None:
    """Where padding is the end of a completion, the classifier reads the token before it: so does the held one."""
    import torch

    base = write_model(tmp_path / "base")
    classifier = reward_adapter(base, tmp_path / "reward", pad=0)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "reward")
    model, rows = made(base, "shared"), batch()
    rows["input_ids"][rows["attention_mask"] == 0] = 0
    rows["input_ids"][1, 6] = 0  # it ended
    hold(model, "reward", tmp_path / "reward")
    with evaluating(model):
        scores = model(**rows, role="reward").scores
        expected = classifier(**rows).logits.squeeze(-1)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def hold(model: PolicyAndValue, role: str, place: Path) -> None:
    """Put the reward model stored in `place` on the policy's base."""
    from align_kit.models.load import load_tokenizer

    start = source.resolve(str(place))
    model.hold_reward(role, start, load_tokenizer(start).pad_token_id)


def test_several_rewards_keep_apart(tmp_path: Path) -> None:
    import torch

    base = write_model(tmp_path / "base")
    one = reward_adapter(base, tmp_path / "one")
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if ".lora_" in name:
                parameter.mul_(-1.5)
    one.save_pretrained(tmp_path / "two")
    make_tokenizer().save_pretrained(tmp_path / "two")
    model = made(base, "shared")
    hold(model, "reward", tmp_path / "one")
    hold(model, "reward_1", tmp_path / "two")
    with evaluating(model):
        first, second = (model(**batch(), role=role).scores for role in ("reward", "reward_1"))
        expected = one(**batch()).logits.squeeze(-1)
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-6)
    assert (first - second).abs().min() > 1e-4


def test_a_reward_adapter_with_more_than_a_head_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = write_model(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score", "norm"], task_type="SEQ_CLS")
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    get_peft_model(classifier, config).save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    with pytest.raises(UserError, match="holds whole modules") as error:
        hold(made(base, "shared"), "reward", tmp_path / "reward")
    assert "reward_placement: sharded" in str(error.value)


def test_the_adapter_of_a_language_model_is_no_reward(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    adapted(base).save_pretrained(tmp_path / "sft")
    with pytest.raises(UserError, match="no head"):
        hold(made(base, "shared"), "reward", tmp_path / "sft")


# --- evaluating -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluating_puts_back_what_was(start: Path, was_training: bool) -> None:
    import torch

    model = shared(adapted(start)).train(was_training)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert model.training is was_training and torch.is_grad_enabled()

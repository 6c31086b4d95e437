"""What the routers of a mixture owe: the loss, through every forward, and in a run, against transformers and TRL."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from align_kit.errors import UserError
from align_kit.forward.door import door_of, open_door
from align_kit.forward.logprobs import token_logps
from align_kit.losses import balance_loss
from align_kit.trainers.base import BatchLoss
from align_kit.trainers.routers import charged, router_coefficient
from tests.harness import Ranks
from tests.small import GLOBAL_BATCH, Lab, lab_of, make_rows, read_weights, relative_gap, write_rows
from tests.test_models_moe import build, mixture

MIXTURES = pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
COEFFICIENT = 0.5


def padded(lengths: list[int], shared: int = 0) -> dict[str, Tensor]:
    """Return random sequences of `lengths` whose first `shared` tokens are the same, trained on after those."""
    ids = torch.randint(4, 300, (len(lengths), max(lengths)))
    ids[:, :shared] = ids[:1, :shared]
    columns = torch.arange(max(lengths))
    attention = (columns < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * attention, "attention_mask": attention, "loss_mask": attention * (columns >= shared)}


# --- the loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_it_is_the_equation_of_the_paper(top_k: int) -> None:
    torch.manual_seed(0)
    logits = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    counts = [1, 3, 0, 2, 1, 1]
    sent, owed = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for layer in logits:  # each token written out as often as it counts
        for row, count in zip(layer, counts, strict=True):
            for _ in range(count):
                probabilities = row.exp() / row.exp().sum()
                owed = owed + probabilities
                sent[probabilities.argsort(descending=True)[:top_k]] += 1
    expected = 4 * (sent / (3 * sum(counts)) * owed / (3 * sum(counts))).sum()
    ours = balance_loss(logits, torch.tensor(counts), top_k=top_k)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-15)


def test_it_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    attention = padded([5, 9, 1])["attention_mask"]
    layers = tuple(torch.randn(attention.numel(), 8) for _ in range(4))
    theirs = load_balancing_loss_func(layers, 8, 2, attention)
    torch.testing.assert_close(balance_loss(layers, attention.flatten(), top_k=2), theirs, rtol=1e-6, atol=0)


def test_even_use_owes_top_k() -> None:
    logits = torch.eye(4).mul(2) + torch.eye(4).roll(1, 0)
    assert float(balance_loss([logits], torch.ones(4), top_k=2)) == pytest.approx(2)
    assert float(balance_loss([logits[:1].expand(4, 4)], torch.ones(4), top_k=2)) > 2.5


# --- through the forward --------------------------------------------------------------------------------------


@MIXTURES
@pytest.mark.parametrize("mode", ["shared", "packed", "plain"])
def test_every_way_owes_what_transformers_asks(name: str, mode: str) -> None:
    """A shared prompt counts once for each sequence that has it, and so do tokens that nothing is read from."""
    model = build(name).train()
    torch.manual_seed(1)
    batch = padded([24, 31, 20], shared=17)
    read = {key: batch[key] for key in ("input_ids", "attention_mask")}
    theirs = model(**read, output_router_logits=True).aux_loss
    expected = gradient(model, theirs)
    open_door(model, mode)
    tokens = token_logps(model, batch, routers=True)
    assert tokens.router_loss is not None
    torch.testing.assert_close(tokens.router_loss, theirs, rtol=1e-5, atol=0)
    assert far(gradient(model, tokens.router_loss), expected) < 1e-5
    door = door_of(model)
    assert (door.walked, door.plain) == ((0, 1) if mode == "plain" else (1, 0))
    assert (door.computed < door.given) == (mode == "shared")
    assert token_logps(model, batch).router_loss is None


def gradient(model: Any, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@MIXTURES
def test_log_probabilities_stay_as_they_are(name: str) -> None:
    model = build(name)
    batch = padded([24, 31, 20], shared=17)
    open_door(model, "shared")
    torch.testing.assert_close(token_logps(model, batch, routers=True).logps_BT, token_logps(model, batch).logps_BT)


@pytest.mark.parametrize("mode", ["shared", "plain"])
def test_checkpointed_activations_give_the_same_gradient(mode: str) -> None:
    model = build("mixtral").train()
    batch = padded([24, 31, 20], shared=17)
    open_door(model, mode)

    def owed() -> Tensor:
        found = token_logps(model, batch, routers=True).router_loss
        assert found is not None
        return found

    expected = gradient(model, owed())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert far(gradient(model, owed()), expected) < 1e-6
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    total = token_logps(model, batch).logps_BT.sum()
    with pytest.raises(UserError, match="trains nothing: activations are checkpointed re-entrantly"):
        charged(BatchLoss(total, 3), owed(), COEFFICIENT)


# --- when it is charged ---------------------------------------------------------------------------------------


def test_it_is_charged_for_each_item() -> None:
    total, owed = torch.tensor(5.0, requires_grad=True), torch.tensor(2.5, requires_grad=True)
    outcome = charged(BatchLoss(total, 4, {"other": (1.0, 2)}), owed, COEFFICIENT)
    assert outcome.total.item() == 5 + 4 * COEFFICIENT * 2.5
    assert outcome.tallies == {"other": (1.0, 2), "aux_loss": (10.0, 4)}


def test_it_is_charged_where_it_is_asked_for() -> None:
    model = build("mixtral")
    own = model.config.router_aux_loss_coef
    assert own > 0

    def charged(given: float | None) -> float:
        return router_coefficient(SimpleNamespace(router_aux_loss_coef=given), model)

    assert (charged(None), charged(0.25), charged(0.0)) == (0, 0.25, 0)
    model.config.output_router_logits = True
    assert (charged(None), charged(0.25), charged(0.0)) == (own, 0.25, 0)
    assert router_coefficient(SimpleNamespace(), model) == own, "phases without the option read the configuration"


def test_a_dense_model_has_none() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8))
    assert router_coefficient(SimpleNamespace(router_aux_loss_coef=None), model) == 0
    with pytest.raises(UserError, match="router_aux_loss_coef 0.1: LlamaForCausalLM has no routers"):
        router_coefficient(SimpleNamespace(router_aux_loss_coef=0.1), model)


# --- in a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "kind", "world_size", "checkpointed"),
    [("dpo", "preference", 2, False), ("dpo", "preference", 2, True), ("sft", "prompt_completion", 1, False)],
)
def test_a_step_is_trls(
    lab: Lab, tmp_path: Path, phase: str, kind: str, world_size: int, checkpointed: bool
) -> None:
    """Ranks under ZeRO-3 with every parameter sharded take the step that TRL takes of as many micro-batches."""
    model, rows = mixture(lab, "mixtral"), write_rows(tmp_path / "rows.jsonl", make_rows(kind, 8, seed=2))
    each = GLOBAL_BATCH // world_size
    chosen = {"router_aux_loss_coef": COEFFICIENT, "max_length": 24, "per_device_train_batch_size": each}
    ours = lab.step(
        phase, world_size, datasets=[{"path": rows}], model_name_or_path=model, deepspeed=lab.sharded,
        gradient_checkpointing=checkpointed, **chosen,
    )  # fmt: skip
    stock = tmp_path / "stock"
    lab.ranks.run(
        world_size=1, ranked=False, function="tests.rank_work:stock_step", cwd=tmp_path, phase=phase,
        model=str(model), data=str(rows), place=str(stock), gradient_accumulation_steps=world_size, optim="sgd",
        learning_rate=10.0, max_steps=1, max_grad_norm=0.0, lr_scheduler_type="constant", warmup_steps=0, **chosen,
    ).ok()  # fmt: skip
    theirs = json.loads((stock / "metrics.json").read_text())[0]
    assert ours.manifest["forward"]["mode"] == "shared"
    assert ours.logged("aux_loss") == [pytest.approx(theirs["aux_loss"], rel=1e-5)]
    assert ours.losses == [pytest.approx(theirs["loss"], rel=1e-5)]
    assert relative_gap(ours.weights, read_weights(stock), read_weights(model)) < 1e-5


@pytest.mark.slow
def test_every_form_of_a_model_owes_the_same(lab: Lab) -> None:
    """A fresh adapter changes nothing yet, and how batches are computed never does; the reference owes nothing."""
    chosen = {
        "model_name_or_path": mixture(lab, "qwen3_moe"), "deepspeed": lab.sharded, "per_device_train_batch_size": 4,
        "router_aux_loss_coef": COEFFICIENT,
    }  # fmt: skip
    full = lab.step("dpo", 2, **chosen)
    for form in ({"use_peft": True}, {"forward": "plain"}, {"forward": "packed"}):
        other = lab.step("dpo", 2, **chosen, **form)
        assert other.logged("aux_loss") == [pytest.approx(full.logged("aux_loss")[0], rel=1e-6)]
        assert other.losses == [pytest.approx(full.losses[0], rel=1e-6)]
    assert "aux_loss" not in lab.step("dpo", 2, **{**chosen, "router_aux_loss_coef": 0.0}).metrics[0]


@pytest.mark.slow
def test_ppo_charges_its_policy_where_the_configuration_asks(lab: Lab, tmp_path: Path) -> None:
    chosen = {"model_name_or_path": None, "config_name": mixture(lab, "mixtral"), "max_steps": 1}
    asked = lab.train("ppo", 2, **chosen, per_device_train_batch_size=4, config_overrides="output_router_logits=true")
    assert all(2 <= owed < 4 for owed in asked.logged("aux_loss")) and asked.logged("aux_loss")
    assert json.loads((asked.folder / "config.json").read_text())["output_router_logits"] is True

"""Shared and packed are plain, in values and gradients, for every family, adapter, checkpointing and odd batch.

Between float32 computations of the same number in another order lies some 1e-6 (relative L2, a whole model); asked is
1e-5. Every comparison also asserts that what it compares was walked.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from align_kit.forward.attention import CannotWalk
from align_kit.forward.choose import choose
from align_kit.forward.door import door_of, open_door
from align_kit.forward.logprobs import token_logps, tokens_and_values
from align_kit.forward.scores import last_states, sequence_scores
from align_kit.frozen.hold import SharedReward
from align_kit.frozen.identity import Identity
from tests.families import (
    BATCHES,
    EOS,
    FAMILIES,
    PAD,
    Computed,
    apart,
    batch_of,
    compute,
    gradients,
    tiny,
    tiny_scorer,
    with_lora,
    words,
)
from tests.small import make_tokenizer, write_model

EXACT = 1e-5
MODES = ("shared", "packed")
FORMS = {
    "full": {},
    "lora": {},
    "lora on the head": {"target_modules": ["q_proj", "v_proj", "lm_head"]},
    "lora and a whole head": {"modules_to_save": ["lm_head"]},
}


def made(family: str, form: str, **changes: Any) -> Any:
    """Return a model that trains, full or with an adapter."""
    model = tiny(family, **changes)
    return (model if form == "full" else with_lora(model, **FORMS[form])).train()


@cache
def plain(family: str, form: str, name: str = "pairs", **asked: Any) -> Computed:
    """Return what the plain forward gives on a named batch."""
    return compute(made(family, form), batch_of(BATCHES[name], wider=2), "plain", **asked)


def assert_exact(found: Computed, expected: Computed, tolerance: float = EXACT) -> None:
    """Assert values and gradients, and that all of it came through the door that was asked for."""
    assert (found.door.walked, found.door.plain) == (1, 0)
    assert (expected.door.walked, expected.door.plain) == (0, 1)
    for name, value in expected.values.items():
        assert apart({name: found.values[name]}, {name: value}) <= tolerance, name
    assert apart(found.gradients, expected.gradients) <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["full", "lora"])
@pytest.mark.parametrize("mode", MODES)
def test_families(family: str, form: str, mode: str) -> None:
    found = compute(made(family, form), batch_of(BATCHES["pairs"], wider=2), mode, entropy=True)
    assert_exact(found, plain(family, form, entropy=True))
    assert (found.door.computed < 0.7 * found.door.given) == (mode == "shared")


@pytest.mark.parametrize("form", ["lora on the head", "lora and a whole head"])
@pytest.mark.parametrize("mode", MODES)
def test_adapters_at_the_head(form: str, mode: str) -> None:
    """A head with an adapter in it, and one that is trained whole beside an adapter."""
    found = compute(made("llama", form), batch_of(BATCHES["pairs"], wider=2), mode, entropy=True, temperature=0.8)
    assert_exact(found, plain("llama", form, entropy=True, temperature=0.8))
    assert any("lm_head" in name for name in found.gradients)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("form", ["full", "lora"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(family: str, form: str, reentrant: bool) -> None:
    """Layers are computed again in the backward, after the walk; the gradients are those without."""
    model = made(family, form)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if form == "lora":
        model.enable_input_require_grads()
    assert_exact(compute(model, batch_of(BATCHES["pairs"], wider=2), "shared"), plain(family, form))


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("mode", MODES)
def test_odd_batches(name: str, family: str, mode: str) -> None:
    found = compute(made(family, "full"), batch_of(BATCHES[name], wider=2), mode)
    expected = plain(family, "full", name)
    if name == "nothing predicted":  # every parameter still has its gradient, of zero
        assert not any(gradient.any() for gradient in [*found.gradients.values(), *expected.gradients.values()])
    assert_exact(found, expected)


@pytest.mark.parametrize("count", range(1, 17))
def test_groups_of_any_size(count: int) -> None:
    """One to 16 completions of a prompt, as GRPO and PPO have them."""
    batch = batch_of([(words(9, 1), words(1 + place % 6, 30 + place)) for place in range(count)])
    ours, theirs = (compute(made("llama", "full"), batch, mode, entropy=True) for mode in ("shared", "plain"))
    assert_exact(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere"])
def test_tied_and_untied_heads(family: str, tied: bool) -> None:
    batch = batch_of(BATCHES["pairs"])
    ours, theirs = (
        compute(made(family, "full", tie_word_embeddings=tied), batch, mode) for mode in ("shared", "plain")
    )
    assert_exact(ours, theirs)
    assert any("lm_head" in name for name in ours.gradients) != tied


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "mixtral", "gpt2"])
def test_bf16_is_as_near_to_fp32_as_plain_is(family: str) -> None:
    """Another order of the same roundings: neither way is nearer the truth by more than a half."""
    batch = batch_of(BATCHES["pairs"], wider=2)
    truth, narrow = plain(family, "full"), made(family, "full").to(torch.bfloat16)
    theirs, ours = (compute(copy.deepcopy(narrow), batch, mode) for mode in ("plain", "shared"))
    logps = {"logps": truth.values["logps"]}
    for near, far, exact in (
        ({"logps": ours.values["logps"]}, {"logps": theirs.values["logps"]}, logps),
        (ours.gradients, theirs.gradients, truth.gradients),
    ):
        assert apart(near, exact) <= 1.5 * apart(far, exact) < 1


def test_squares_and_top_1() -> None:
    """What has no gradient: the sums of squares WPO reads, and the share of tokens found most probable."""
    batch, model = batch_of(BATCHES["pairs"], wider=2), tiny("llama")
    with torch.no_grad():
        batch["input_ids"][0, 12] = model(batch["input_ids"]).logits[0, 11].argmax()  # let one be most probable
        theirs = token_logps(model, batch, log_sum_sq=True, temperature=0.7)
        open_door(model, "shared")
        ours = token_logps(model, batch, log_sum_sq=True, temperature=0.7)
    assert ours.log_sum_sq_BT is not None and theirs.log_sum_sq_BT is not None
    assert torch.equal(ours.mask_BT, theirs.mask_BT)
    assert torch.equal(ours.top1_BT, theirs.top1_BT) and ours.top1_BT.any()
    there = ours.mask_BT
    torch.testing.assert_close(ours.log_sum_sq_BT[there], theirs.log_sum_sq_BT[there], rtol=1e-5, atol=1e-5)


# --- scores ---------------------------------------------------------------------------------------------------


def scored() -> dict[str, Tensor]:
    """Return completions that end in EOS, in padding of their own, and one of nothing else."""
    return batch_of([(words(9, 1), [*words(4, 2), EOS]), (words(9, 1), [7, 8, PAD]), ([5], [EOS]), (words(9, 1), [9])])


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "mixtral", "gpt2"])
@pytest.mark.parametrize("form", ["full", "lora"])
@pytest.mark.parametrize("mode", MODES)
def test_sequence_classifiers(family: str, form: str, mode: str) -> None:
    """Scores and gradients; the last token is the rightmost that is not padding, as in plain transformers."""
    model = tiny_scorer(family)
    model = model if form == "full" else with_lora(model, task_type="SEQ_CLS")
    twin, batch, weights_B = copy.deepcopy(model), scored(), torch.tensor([1.0, -2.0, 0.5, 3.0])
    open_door(model, mode)
    open_door(twin, "plain")
    ours_B, theirs_B = (sequence_scores(one, batch) for one in (model, twin))
    torch.testing.assert_close(ours_B, theirs_B, rtol=EXACT, atol=EXACT)
    found, expected = (gradients(one, (s * weights_B).sum()) for one, s in ((model, ours_B), (twin, theirs_B)))
    assert apart(found, expected) <= EXACT
    assert door_of(model).walked == 1 and door_of(model).plain == 0 and door_of(twin).plain == 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_last_states_where_the_head_is_fresh(family: str) -> None:
    """A head of zeros scores everything alike; what it reads still tells whether both ways agree."""
    model, batch = tiny_scorer(family), scored()
    torch.nn.init.zeros_(model.score.weight)
    with torch.no_grad():
        theirs_BH = last_states(model, batch)
        open_door(model, "shared")
        ours_BH = last_states(model, batch)
        assert not sequence_scores(model, batch).any()
    torch.testing.assert_close(ours_BH, theirs_BH, rtol=EXACT, atol=EXACT)
    assert len(set(ours_BH[:, 0].tolist())) == 4
    assert door_of(model).walked == 2


# --- policy and value -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("exact") / "model")


@pytest.fixture(scope="module")
def judge(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model on the same base: an adapter and a scalar head."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1)
    adapted = get_peft_model(base, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    place = tmp_path_factory.mktemp("exact") / "judge"
    adapted.save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return place


def policy_and_value(start: Path, layout: str, judge: Path | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    from align_kit.config.fields import ModelFields
    from align_kit.models import lora, source
    from align_kit.models.policy_and_value import separate, shared

    base = AutoModelForCausalLM.from_pretrained(start)
    if layout == "separate":
        model = separate(base, source.resolve(str(start)), dtype=torch.float32, seed=0, pad_token_id=1)
    else:
        model = shared(lora.add_lora(base, ModelFields(use_peft=True, lora_r=4, lora_dropout=0.0)))
    if judge is not None:
        model.hold_reward("reward", source.resolve(str(judge)), 1)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def both_answers(model: Any, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return log-probabilities, entropies and values, and the gradients of a sum of all of them."""
    tokens, values_BT = tokens_and_values(model, batch, entropy=True, temperature=0.9)
    assert tokens.entropy_BT is not None
    found = {"logps": tokens.logps_BT, "entropy": tokens.entropy_BT, "values": values_BT}
    torch.manual_seed(7)
    loss = sum((value * torch.randn_like(value)).sum() for value in found.values())
    assert isinstance(loss, Tensor)
    return {name: value.detach() for name, value in found.items()}, gradients(model, loss)


@pytest.mark.parametrize("layout", ["separate", "shared"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_policy_and_value(start: Path, layout: str, checkpointing: bool, mode: str) -> None:
    """Two models, or two adapters on one base, walked one after the other over the same row."""
    batch = batch_of(BATCHES["pairs"], wider=2)
    theirs, expected = both_answers(policy_and_value(start, layout), batch)
    model = policy_and_value(start, layout)
    if checkpointing:
        model.activation_checkpointing_enable()
        if layout == "shared":
            model.policy.enable_input_require_grads()
    open_door(model, mode)
    ours, found = both_answers(model, batch)
    assert all(apart({name: ours[name]}, {name: theirs[name]}) <= EXACT for name in theirs)
    assert apart(found, expected) <= EXACT
    assert (door_of(model).walked, door_of(model).plain) == (1, 0)


def test_a_reward_role_on_the_shared_base(start: Path, judge: Path) -> None:
    """It reads the last token that is not the padding of its own tokenizer, whatever the batch is padded with."""
    model, batch = policy_and_value(start, "shared", judge).eval(), scored()
    held = SharedReward(cast(Identity, SimpleNamespace(role="reward")), make_tokenizer())
    theirs_B = held.scores(model, batch)
    open_door(model, "shared")
    ours_B = held.scores(model, batch)
    assert theirs_B.unique().numel() == 4
    torch.testing.assert_close(ours_B, theirs_B, rtol=EXACT, atol=EXACT)
    assert (door_of(model).walked, door_of(model).plain) == (1, 0)


# --- what is not walked ---------------------------------------------------------------------------------------

LINEAR = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
UNWALKED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({}, "not plain causal attention"),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1}, "not plain causal attention"),
    "falcon_mamba": ({}, "not plain causal attention"),
    "qwen3_next": (LINEAR, "not plain causal attention"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "not plain causal attention"),
    "llama4_text": ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention layers"),
    "opt": ({"layerdrop": 0.1, "ffn_dim": 64}, "leaves layers out at random"),
    "gpt2": ({"attn_implementation": "eager", "reorder_and_upcast_attn": True}, "an attention of its own"),
    "bloom": ({}, "does not use transformers' attention interface"),
    "mpt": ({"n_layers": 2, "d_model": 32, "n_heads": 4}, "does not use transformers' attention interface"),
    "bart": ({"encoder_layers": 1, "decoder_layers": 1, "d_model": 32}, "counts them"),
    "modernbert-decoder": (
        {"layer_types": ["sliding_attention", "full_attention"], "bos_token_id": 2}, "beside its trunk and its head",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", UNWALKED)
def test_models_that_are_not_walked(family: str) -> None:
    """Left to itself the choice is plain, with one reason; a way asked for by name is refused with the same."""
    changes, why = UNWALKED[family]
    model = tiny(family, **changes)
    choice = choose(model, trains=True)
    assert choice.mode == "plain" and why in choice.why and "\n" not in choice.why
    for asked in MODES:
        with pytest.raises(CannotWalk, match=why):
            choose(model, trains=True, asked=asked)
    assert choose(model, trains=True, asked="plain").mode == "plain"


@pytest.mark.parametrize("named", ["flash_attention_2", "kernels-community/flash-attn"])
def test_kernels_that_know_no_segments_are_not_walked(named: str) -> None:
    model = tiny("llama")
    model.config._attn_implementation_internal = named
    choice = choose(model, trains=False)
    assert choice.mode == "plain" and f"attn_implementation {named} brings kernels" in choice.why


def test_noise_that_goes_by_the_padded_length_is_not_packed() -> None:
    choice = choose(tiny("llama"), trains=True, noise=5.0)
    assert choice.mode == "plain" and "neftune_noise_alpha" in choice.why
    assert choose(tiny("llama"), trains=True, noise=None).mode == "shared"


def test_an_encoder_is_not_walked() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    assert "has an encoder" in choose(model, trains=False).why


def test_tokens_that_an_adapter_puts_in_front_are_not_walked() -> None:
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert "puts tokens before" in choose(model, trains=True).why


@pytest.mark.parametrize("where", ["adapter", "attention", "activations", "value", "router"])
def test_dropout_switches_off_sharing_alone(start: Path, where: str) -> None:
    """Copies of a prompt that differ by right cannot stand for one another; nothing else stands against packing."""
    model = {
        "adapter": lambda: with_lora(tiny("llama"), dropout=0.05),
        "attention": lambda: tiny("llama", attention_dropout=0.05),
        "activations": lambda: tiny("gpt2", resid_pdrop=0.05),
        "value": lambda: policy_and_value(start, "separate"),
        "router": lambda: tiny("mixtral", router_jitter_noise=0.05),
    }[where]()
    if where == "value":
        model.value.model.layers[0].self_attn.attention_dropout = 0.05
    choice = choose(model, trains=True)
    assert choice.mode == "packed" and "dropout 0.05" in choice.why
    assert choose(model, trains=True, asked="packed").mode == "packed"
    with pytest.raises(CannotWalk, match="dropout 0.05"):
        choose(model, trains=True, asked="shared")
    assert choose(model, trains=False).mode == "shared"


def test_two_drawings_of_dropout_differ_and_their_mean_is_the_value() -> None:
    """Packed with dropout: it is on in the walk, and off where the model does not train."""
    model, batch = tiny("llama", attention_dropout=0.3), batch_of(BATCHES["pairs"])
    open_door(model, "packed")
    with torch.no_grad():
        still = token_logps(model, batch).logps_BT
        assert torch.equal(token_logps(model, batch).logps_BT, still)
        model.train()
        assert not torch.equal(token_logps(model, batch).logps_BT, token_logps(model, batch).logps_BT)

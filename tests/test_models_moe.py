"""Mixtures of experts: blocks are found by structure, and two ranks that choose different experts train as one."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from align_kit.errors import UserError
from align_kit.models.moe import sparse_blocks
from align_kit.registry import RECIPES, Recipe, get
from tests.harness import Ranks
from tests.small import (
    GLOBAL_BATCH,
    SIZES,
    WORDS,
    Lab,
    lab_of,
    make_tokenizer,
    read_weights,
    relative_gap,
    write_model,
    write_rows,
)

EXPERTS = 4
GAP = 1e-5  # of two gradients, relative; seen: 4e-8 to 4e-7
# Four experts of 32 -> 16 -> 32, two a token, in every layer.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS, "intermediate_size": 16}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": EXPERTS, "moe_intermediate_size": 16, "decoder_sparse_step": 1}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": 16, "head_dim": 16}),
    "olmoe": ("Olmoe", {"num_experts": EXPERTS, "intermediate_size": 16}),
    "deepseek_v3": (
        "DeepseekV3",
        {"n_routed_experts": EXPERTS, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
         "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
}  # fmt: skip


def build(name: str, head: str = "lm") -> Any:
    """Return a random mixture of two layers, 32 wide, over the small tokenizer's vocabulary."""
    import transformers

    torch.manual_seed(0)
    prefix, own = MIXTURES[name]
    labels = {"num_labels": 1} if head == "score" else {}
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, "num_experts_per_tok": 2, **own, **labels})
    kind = "SequenceClassification" if head == "score" else "CausalLM"
    return getattr(transformers, f"{prefix}For{kind}")(config)


# A model with a list of experts, of the kind that comes as code beside the weights: the chosen ones alone are called.
LISTED = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class ListedConfig(LlamaConfig):
    model_type = "listed"


class ListedBlock(nn.Module):
    def __init__(self, hidden, count):
        super().__init__()
        self.router = nn.Linear(hidden, count, bias=False)
        self.experts = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(count))

    def forward(self, states):
        flat = states.reshape(-1, states.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).max(-1)
        mixed = torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero()[:, 0]
            mixed = mixed.index_add(0, rows, self.experts[number](flat[rows]) * weights[rows, None])
        return mixed.view_as(states)


class ListedForCausalLM(LlamaForCausalLM):
    config_class = ListedConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListedBlock(config.hidden_size, config.num_experts)
        self.post_init()
"""


@cache
def listed(place: Path) -> Any:
    """Return the module of the model with a list of experts, written to `place`."""
    (place / "modeling_listed.py").write_text(LISTED)
    spec = importlib.util.spec_from_file_location("modeling_listed", place / "modeling_listed.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_listed(place: Path) -> Any:
    """Return the model with a list of 8 experts, one a token, its code in `place`."""
    module = listed(place)
    torch.manual_seed(0)
    auto = {"AutoConfig": "modeling_listed.ListedConfig", "AutoModelForCausalLM": "modeling_listed.ListedForCausalLM"}
    return module.ListedForCausalLM(module.ListedConfig(**SIZES, num_experts=2 * EXPERTS, auto_map=auto))


# --- what is found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_blocks_of_transformers_are_found(name: str) -> None:
    model = build(name)
    layers = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    assert layers and sparse_blocks(model) == layers


def test_blocks_are_found_under_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    model = build("mixtral")
    blocks = [layer.mlp for layer in model.model.layers]
    adapted = get_peft_model(model, LoraConfig(target_parameters=["gate_up_proj", "down_proj"], target_modules=[]))
    assert type(blocks[0].experts).__name__ == "ParamWrapper" and sparse_blocks(adapted) == blocks


def test_a_list_of_experts_is_found(tmp_path: Path) -> None:
    module = listed(tmp_path)
    model = module.ListedForCausalLM(module.ListedConfig(**SIZES, num_experts=EXPERTS))
    assert sparse_blocks(model) == [layer.mlp for layer in model.model.layers]
    del model.config.num_experts  # the structure tells it alone
    assert sparse_blocks(model) == [layer.mlp for layer in model.model.layers]


def test_a_dense_model_has_none() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    assert sparse_blocks(LlamaForCausalLM(LlamaConfig(**SIZES))) == []
    assert sparse_blocks(nn.Linear(2, 2)) == []


class Listless(nn.Module):
    """Experts in a list, and nothing beside them that chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


def _unnamed() -> nn.Module:
    model = build("mixtral")
    for layer in model.model.layers:
        layer.mlp = nn.Linear(32, 32)  # what the configuration calls experts cannot be seen
    return model


@pytest.mark.parametrize(
    "make, said",
    [
        (Listless, "experts is a list of 3 experts and nothing beside it chooses"),
        (_unnamed, "names 4 experts and none"),
    ],
)
def test_an_unknown_block_is_refused_in_one_line(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(UserError, match=rf"sparse block that is not known: .*{said}.*leaf_module.classes") as caught:
        sparse_blocks(make())
    assert "\n" not in str(caught.value)


# --- what trains ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def mixture(lab: Lab, name: str, head: str = "lm") -> Path:
    """Return the folder of a stored mixture and its tokenizer, written once."""
    from transformers import GenerationConfig

    place = lab.home / f"{name}-{head}"
    if not place.exists():
        place.mkdir()
        model = build(name, head) if name in MIXTURES else build_listed(place)
        model.generation_config = GenerationConfig(eos_token_id=[0, 3], pad_token_id=1, max_new_tokens=17)
        model.save_pretrained(place)
        make_tokenizer().save_pretrained(place)
    return place


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapted(recipe: Recipe, form: str) -> dict[str, Any]:
    """Return the options of `form`; two adapters on one base leave its experts alone (see `refuse_adapted_blocks`)."""
    if form == "full":
        return {}
    return {"use_peft": True, **({"lora_target_modules": ATTENTION} if recipe.values else {})}


# Every phase on one family, and the others in one phase: what a phase does to a block does not depend on its family.
TRAINED = [(recipe, "mixtral") for recipe in RECIPES] + [(get("sft"), name) for name in ("qwen2_moe", "qwen3_moe")]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["full", "lora"])
@pytest.mark.parametrize("recipe, name", TRAINED, ids=[f"{recipe.name}-{name}" for recipe, name in TRAINED])
def test_two_ranks_give_the_gradient_of_one(lab: Lab, recipe: Recipe, name: str, form: str) -> None:
    """With every parameter sharded. LoRA adapts attention and, where PEFT can, the stacked experts."""
    model = mixture(lab, name, recipe.head)
    chosen = {"model_name_or_path": model, "deepspeed": lab.sharded, **adapted(recipe, form)}
    one = lab.step(recipe.name, 1, **chosen)
    two = lab.step(recipe.name, 2, per_device_train_batch_size=GLOBAL_BATCH // 2, **chosen)
    assert all(math.isfinite(loss) for loss in two.losses)
    assert relative_gap(two.weights, one.weights, read_weights(model) if form == "full" else {}) < GAP
    on_experts = form == "lora" and name != "qwen2_moe" and not recipe.values  # PEFT leaves Qwen2-MoE's alone
    assert any("experts.lora_B" in weight for weight in two.weights) == on_experts


@pytest.mark.slow
def test_ranks_that_call_different_experts_of_a_list(lab: Lab, tmp_path: Path) -> None:
    """Each rank has one short row a micro-batch, so that most of the eight experts are called by one rank alone."""
    model = mixture(lab, "listed")
    rows = [{"prompt": word, "completion": f" {word}"} for word in WORDS]
    chosen = {
        "model_name_or_path": model, "deepspeed": lab.sharded, "trust_remote_code": True,
        "datasets": [{"path": write_rows(lab.home / "short.jsonl", rows)}],
    }  # fmt: skip
    one = lab.step("sft", 1, **chosen)
    two = lab.step("sft", 2, per_device_train_batch_size=1, gradient_accumulation_steps=4, **chosen)
    assert relative_gap(two.weights, one.weights, read_weights(model)) < GAP


@pytest.mark.slow
def test_a_run_refuses_an_unknown_block(lab: Lab, tmp_path: Path) -> None:
    """A dense model whose configuration names experts: nobody can tell what they are."""
    place = write_model(tmp_path / "model")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "num_local_experts": 4}))
    run = lab.start("sft", tmp_path / "run", 2, model_name_or_path=place, deepspeed=lab.sharded)
    assert "names 4 experts and none are recognised" in run.result.error()
    engine = json.loads(lab.sharded.read_text())
    engine["zero_optimization"]["leaf_module"] = {"classes": ["LlamaMLP"]}  # whoever knows better says so
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    lab.start("sft", tmp_path / "run", 2, model_name_or_path=place, deepspeed=tmp_path / "engine.json").result.ok()


@pytest.mark.slow
def test_ppo_refuses_two_adapters_on_experts(lab: Lab, tmp_path: Path) -> None:
    chosen = {"model_name_or_path": mixture(lab, "mixtral"), "use_peft": True}
    run = lab.start("ppo", tmp_path / "run", 1, deepspeed=lab.sharded, **chosen)
    assert "LoRA on experts cannot be trained under ZeRO-3" in run.result.error()
    lab.start("ppo", tmp_path / "zero2", 1, deepspeed="zero2", **chosen).result.ok()

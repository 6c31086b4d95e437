"""Models from disk: content digests, sources, complete files, seeded random weights, LoRA, dropout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_kit.errors import UserError
from align_kit.models import load, lora, source, stored
from tests.families import FAMILIES, tiny
from tests.small import write_model
from tests.test_models_moe import MIXTURES, build


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model")


def digest(place: Path) -> str:
    return source.digest(source.resolve(str(place)))


# --- identity ---------------------------------------------------------------------------------------------


def test_digest_ignores_how_files_are_cut_and_called(model: Path, tmp_path: Path) -> None:
    cut = write_model(tmp_path / "cut", shard_size="20KB")
    assert len(list(cut.glob("*.safetensors"))) > 2
    assert digest(cut) == digest(model)
    renamed = shutil.copytree(model, tmp_path / "renamed")
    (renamed / "model.safetensors").rename(renamed / "weights.safetensors")
    assert digest(renamed) == digest(model)


def test_digest_changes_with_one_bit(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    blob = bytearray((other / "model.safetensors").read_bytes())
    blob[-1] ^= 1
    (other / "model.safetensors").write_bytes(blob)
    assert digest(other) != digest(model)


def test_digest_changes_with_names_shapes_and_types(model: Path, tmp_path: Path) -> None:
    """The same bytes under another name, in another shape or of another type are another model."""
    import torch
    from safetensors.torch import save_file

    ones = torch.ones(4, 2)
    made = {}
    for case, tensors in {"plain": {"a": ones}, "name": {"b": ones}, "shape": {"a": ones.reshape(2, 4)},
                          "type": {"a": ones.view(torch.int32)}}.items():  # fmt: skip
        (tmp_path / case).mkdir()
        save_file(tensors, tmp_path / case / "model.safetensors")
        made[case] = digest(tmp_path / case)
    assert len(set(made.values())) == 4


def test_digest_of_random_weights_is_configuration_and_seed(model: Path) -> None:
    start = source.resolve(str(model), random=True)
    assert source.digest(start, seed=1) == source.digest(start, seed=1) != source.digest(start, seed=2)


def test_digest_of_an_adapter_covers_its_base(model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(model, tmp_path / "base")
    adapter = tmp_path / "adapter"
    lora.add_lora(policy(base), fields()).save_pretrained(adapter)
    before = digest(adapter)
    write_model(base, seed=3)
    assert source.resolve(str(adapter)).is_adapter and digest(adapter) != before


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "message"), [
    ("{home}/modle", "no such folder .did you mean '.*/model'"),
    ("{home}/model/config.json", "is a file; give the folder"),
    ("{home}/bare", "holds a configuration but no .*--config_name"),
    ("{home}/pickled", "pickled"),
    ("{home}/empty", "no config.json and"),
    ("builtin:huge", "known: builtin:tiny"),
])  # fmt: skip
def test_sources_that_hold_no_model(model: Path, name: str, message: str) -> None:
    home = model.parent
    for place, file in (("bare", "config.json"), ("pickled", "pytorch_model.bin"), ("empty", "notes.txt")):
        (home / place).mkdir(exist_ok=True)
        (home / place / file).write_text("{}")
    with pytest.raises(UserError, match=message):
        source.resolve(name.format(home=home))


def test_a_missing_weight_file_is_named(tmp_path: Path) -> None:
    cut = write_model(tmp_path / "cut", shard_size="20KB")
    gone = sorted(cut.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=f"lacks 1 of its .* {gone.name}"):
        policy(cut)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_model_without_one_of_its_tensors_is_refused(model: Path, tmp_path: Path, change: str) -> None:
    """transformers would draw the tensor at random and say so in one line among many."""
    from safetensors.torch import load_file, save_file

    torn = shutil.copytree(model, tmp_path / "torn")
    tensors = load_file(torn / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    if change == "missing":
        del tensors[name]
    save_file(tensors, torn / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=name):
        policy(torn)


HEADLESS = ("cohere", "granite", "olmoe")  # of which transformers has no sequence classifier


@pytest.mark.parametrize("family", [*FAMILIES, *(f"mixture {name}" for name in MIXTURES)])
def test_whatever_transformers_does_as_it_loads_no_sound_model_is_refused(family: str, tmp_path: Path) -> None:
    """Tied heads, experts stored one by one, weights that are split: none of them is missing or of another shape."""
    name = family.removeprefix("mixture ")
    made = build(name) if family != name else tiny(name)
    made.save_pretrained(tmp_path)
    for head in ("lm", "score")[: 1 if name in HEADLESS else 2]:
        described = stored.check_fit(source.resolve(str(tmp_path)), head)
        assert all(parameter.is_meta for parameter in described.parameters())


@pytest.mark.parametrize(("act", "message"), [
    (lambda tensors, name: tensors.pop(name), "cannot be loaded: "),
    (lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}), "cannot be loaded: "),
])  # fmt: skip
def test_experts_that_cannot_be_joined_are_refused(tmp_path: Path, act: Any, message: str) -> None:
    from safetensors.torch import load_file, save_file

    build("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    act(tensors, next(name for name in tensors if "experts.1." in name))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        policy(tmp_path)


def test_weights_under_a_name_that_is_not_read_are_refused(model: Path, tmp_path: Path) -> None:
    place = shutil.copytree(model, tmp_path / "renamed")
    (place / "model.safetensors").rename(place / "weights.safetensors")
    with pytest.raises(UserError, match="holds neither model.safetensors nor model.safetensors.index.json"):
        policy(place)


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_size": 33}, "hidden size .33. is not a multiple"),
    ({"model_type": 7}, "cannot be loaded: "),
])  # fmt: skip
def test_a_configuration_that_transformers_refuses_is_one_line(
    model: Path, tmp_path: Path, change: Any, message: str
) -> None:
    place = shutil.copytree(model, tmp_path / "odd")
    written = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**written, **change}))
    with pytest.raises(UserError, match=message):
        load.load_config(source.resolve(str(place), random=True), None)


@pytest.mark.parametrize("text", ["{}", "[]", '{"version": "1.0", "added_tokens": [], "model": {"type": "Odd"}}', "{"])
def test_a_tokenizer_that_is_none_is_one_line(model: Path, tmp_path: Path, text: str) -> None:
    place = shutil.copytree(model, tmp_path / "odd")
    (place / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="^the tokenizer of .* cannot be loaded: "):
        load.load_tokenizer(source.resolve(str(place)))


def test_not_a_number_in_the_weights_is_refused(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torn = shutil.copytree(model, tmp_path / "torn")
    tensors = load_file(torn / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, torn / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="model.norm.weight"):
        policy(torn)


@pytest.mark.parametrize(("torn", "message"), [
    (lambda blob: blob[: len(blob) // 2], "bytes, its header says"),
    (lambda blob: b"<!DOCTYPE html>" + blob, "is no safetensors file"),
    (lambda blob: b"", "is no safetensors file"),
])  # fmt: skip
def test_a_torn_weight_file_is_refused(model: Path, tmp_path: Path, torn: Any, message: str) -> None:
    """A download that stopped half way, or a web page saved in its place."""
    place = shutil.copytree(model, tmp_path / "torn")
    file = place / "model.safetensors"
    file.write_bytes(torn(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        digest(place)


def test_a_tokenizer_without_an_end_is_refused(model: Path, tmp_path: Path) -> None:
    endless = shutil.copytree(model, tmp_path / "endless")
    words = json.loads((endless / "tokenizer_config.json").read_text())
    del words["eos_token"]
    (endless / "tokenizer_config.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match="has no EOS token"):
        load.load_tokenizer(source.resolve(str(endless)))
    for file in endless.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer files"):
        load.load_tokenizer(source.resolve(str(endless)))


# --- weights ----------------------------------------------------------------------------------------------


def policy(place: Path, seed: int = 0, *, random: bool = False, **options: Any) -> Any:
    import torch

    where = source.resolve(str(place), random=random)
    return load.load_policy(where, dtype=torch.float32, seed=seed, **options)


def fields(**changes: Any) -> Any:
    """Return what `add_lora` reads."""
    plain = dict.fromkeys(("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"))
    numbers = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.25, "lora_task_type": "CAUSAL_LM"}
    return SimpleNamespace(**{**plain, **numbers, "use_rslora": False, "use_dora": False, **changes})


def test_random_weights_depend_on_the_seed_alone(model: Path) -> None:
    import torch

    def drawn(seed: int) -> Any:
        torch.rand(3)
        return policy(model, seed, random=True).model.layers[0].mlp.up_proj.weight

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_overrides_change_the_random_model_and_no_unknown_field(model: Path) -> None:
    assert len(policy(model, random=True, overrides={"num_hidden_layers": 1}).model.layers) == 1
    with pytest.raises(UserError, match="has no field 'layers'"):
        policy(model, random=True, overrides={"layers": 1})


def test_a_new_adapter_depends_on_the_seed_alone(model: Path) -> None:
    import torch

    def drawn(seed: int) -> Any:
        torch.rand(3)
        adapted = lora.add_lora(policy(model, seed), fields())
        return next(p for name, p in adapted.named_parameters() if "lora_A" in name)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_lora_trains_every_linear_layer_but_the_head(model: Path) -> None:
    adapted = lora.add_lora(policy(model), fields())
    trained = {name.split(".lora_")[0].split(".")[-1] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_lora_on_modules_that_are_not_there_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match="lora_target_modules"):
        lora.add_lora(policy(model), fields(lora_target_modules=["c_attn"]))


def test_disable_dropout_reaches_the_adapter(model: Path) -> None:
    import torch

    adapted = lora.add_lora(policy(model), fields(lora_dropout=0.25))
    rates = lambda: {m.p for m in adapted.modules() if isinstance(m, torch.nn.Dropout)}  # noqa: E731
    assert rates() == {0.25}
    load.disable_dropout(adapted)
    assert rates() == {0.0}

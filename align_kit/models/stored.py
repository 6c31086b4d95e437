"""Whether the files of a model are what its configuration describes, told before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit.errors import UserError
from align_kit.models.how import auto_class, load_config, naming, plain_transformers
from align_kit.models.source import Source, shapes

if TYPE_CHECKING:
    from torch import nn


LARGEST = 1e6  # a weight that trains is far smaller; a flipped high bit of its exponent makes it far larger


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # transformers reads the second without the first


def check_fit(source: Source, head: str, *, trust_remote_code: bool = False) -> Any:
    """Return the model that `source` describes, without a weight, once its stored names and shapes are seen to fit it.

    `head` is what it is to end in: "lm", or "score", which is fresh where the files hold a language model. The
    transformers loader itself is given tensors without bytes, in the shapes that the files' headers say. So tied
    weights, and what it renames, joins and splits as it loads, count as they will. Weights that are stored quantised
    are not compared: their shapes are no parameter's. Raises `UserError` for what does not fit.
    """
    import torch

    check_complete(source)
    config = load_config(source, None, trust_remote_code=trust_remote_code)
    _check_head(source, head, config)
    if head == "score":
        config.num_labels = 1
    with naming(source, (Exception,)), plain_transformers():
        with torch.device("meta"):
            model = auto_class(head).from_config(config, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            return model
        model, loaded = type(model).from_pretrained(
            None,
            config=config,
            state_dict=_without_bytes(source),
            device_map={"": "meta"},
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_loaded(source, loaded, set(head_parameters(model)) if head != source.head else set())
    return model


def _without_bytes(source: Source) -> dict[str, Any]:
    import torch

    return {name: torch.empty(shape, device="meta") for name, shape in shapes(weight_files(source)).items()}


def weight_files(source: Source) -> list[Path]:
    """Return the files that transformers reads the weights from: one, or those its index names.

    Raises `UserError` where there is neither, whatever else lies in the folder.
    """
    if (source.folder / SINGLE).is_file():
        return [source.folder / SINGLE]
    if names := _indexed(source):
        return [source.folder / name for name in names]
    raise UserError(f"{source.name} holds neither {SINGLE} nor {INDEX}, and nothing else is read; rename its file")


def _indexed(source: Source) -> list[str]:
    """Return the names of the files in a sharded model's index, none where there is no index."""
    index = source.folder / INDEX
    if not index.is_file():
        return []
    with naming(source, (Exception,)):
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def check_complete(source: Source) -> None:
    """Raise `UserError` where a sharded model's index names a file that is not there, or one that is not read."""
    files = _indexed(source)
    if strangers := [name for name in files if not name.endswith(".safetensors")]:
        raise UserError(f"{source.name} names {strangers[0]} among its weights; only *.safetensors are read")
    if missing := [name for name in files if not (source.folder / name).is_file()]:
        named = ", ".join(missing[:3])
        raise UserError(f"{source.name} lacks {len(missing)} of its {len(files)} weight files: {named}")


def check_values(source: Source) -> None:
    """Raise `UserError` for a stored tensor with NaN, infinity or a number in it that no weight is.

    The first two would train as a loss of 0 or NaN; the last is what a flipped bit of an exponent leaves.
    """
    import torch
    from safetensors import safe_open

    for file in sorted(source.folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                if not tensor.is_floating_point() or tensor.numel() < 2:  # a number alone may stand for minus infinity
                    continue
                wide = tensor if tensor.element_size() > 1 else tensor.float()
                low, high = (float(bound) for bound in torch.aminmax(wide))  # NaN where there is one
                if not (isfinite(low) and isfinite(high)):
                    raise UserError(f"{source.name} holds NaN or infinity in {name}; copy or download it again")
                if (largest := max(-low, high)) > LARGEST:
                    raise UserError(
                        f"{source.name} holds {largest:.1e} in {name}, which is no weight but a damaged file (none is "
                        f"above {LARGEST:.0e}); copy or download it again"
                    )


def _check_head(source: Source, head: str, config: Any) -> None:
    """Raise `UserError` for a classifier where a language model is asked for, and for one with several labels."""
    if source.head == "lm":
        return
    if head == "lm":
        raise UserError(
            f"{source.name} ends in a score, not in words: it is a sequence classifier, such as a reward model; "
            "give a causal language model"
        )
    if config.num_labels != 1:
        raise UserError(
            f"{source.name} is a sequence classifier with {config.num_labels} labels and a reward model has 1; give a "
            "causal language model, which gets a fresh head, or a classifier with num_labels 1"
        )


def head_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return what a sequence classifier has beside its trunk."""
    trunk = f"{model.base_model_prefix}."
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(trunk)}


def check_loaded(source: Source, loaded: Mapping[str, Any], fresh: set[str]) -> None:
    """Raise `UserError` for tensors that were not there, but for `fresh` ones, or were of another shape.

    transformers draws them at random.
    """
    lacking = sorted(set(loaded["missing_keys"]) - fresh)
    shaped = "{} is {}, wanted is {}"
    wrong = sorted(shaped.format(name, list(seen), list(wanted)) for name, seen, wanted in loaded["mismatched_keys"])
    for what, found in (("lacks", lacking), ("holds in another shape", wrong)):
        if found:
            raise UserError(
                f"{source.name} {what} {len(found)} tensors of its configuration ({', '.join(found[:3])}); they would "
                "be drawn at random: mend the folder, or start from random weights with --config_name"
            )

"""Load a tokenizer and a model with a language or a scalar head: from weights, from random ones, with LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, cast

from align_kit import zero
from align_kit.errors import UserError
from align_kit.models import lora
from align_kit.models.quantised import keep_layout
from align_kit.models.source import Source

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LARGEST = 1e6  # a weight that trains is far smaller; a flipped high bit of its exponent makes it far larger


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside the weights, padding on the right, with a pad token of its own or EOS.

    Raises `UserError` where the folder has none.
    """
    from transformers import AutoTokenizer

    places = [source.folder, source.weights.folder]
    folder = next((f for f in places if any(f.glob("tokenizer*")) or any(f.glob("*.model"))), None)
    if folder is None:
        raise UserError(f"{source.name} has no tokenizer files; give --tokenizer_name")
    with naming(source):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source.name} has no EOS token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def check_one_template(source: Source) -> None:
    """Raise `UserError` where two files of a tokenizer hold chat templates that differ: either may be meant."""
    places = [source.folder / "chat_template.jinja", source.folder / "tokenizer_config.json"]
    if not all(place.is_file() for place in places):
        return
    told = json.loads(places[1].read_text(encoding="utf-8")).get("chat_template")
    if isinstance(told, str) and told.strip() != places[0].read_text(encoding="utf-8").strip():
        raise UserError(
            f"{source.name} has two chat templates that differ, in chat_template.jinja and in tokenizer_config.json; "
            "remove one, or name the one to use with --chat_template_path"
        )


@contextmanager
def naming(source: Source) -> Iterator[None]:
    """Turn what transformers cannot load, code of the model's own that is not trusted included, into one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it comes with code of its own; read that, then give --trust_remote_code true"
        raise UserError(f"{source.name} cannot be loaded: {reason[:200]}") from None


def load_config(source: Source, overrides: Mapping[str, Any] | None, *, trust_remote_code: bool = False) -> Any:
    """Return the model configuration in `source`, with `overrides` (flat names) laid over it."""
    from transformers import AutoConfig

    with naming(source):
        config = AutoConfig.from_pretrained(str(source.folder), trust_remote_code=trust_remote_code)
    for name, value in (overrides or {}).items():
        if not hasattr(config, name):
            raise UserError(f"config_overrides: {type(config).__name__} has no field {name!r}")
        setattr(config, name, value)
    return config


@dataclass(frozen=True)
class How:
    """In which form a model is loaded: see `load_policy`."""

    dtype: torch.dtype
    head: str = "lm"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantised: Any = None  # transformers' configuration of weights stored in fewer bits

    def options(self) -> dict[str, Any]:
        """Return what transformers is told."""
        attention = {"attn_implementation": self.attn_implementation} if self.attn_implementation else {}
        fewer = {"quantization_config": self.quantised} if self.quantised is not None else {}
        return {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code, **attention, **fewer}


def load_policy(
    source: Source,
    *,
    dtype: torch.dtype,
    seed: int,
    head: str = "lm",
    pad_token_id: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantised: Any = None,
) -> PreTrainedModel:
    """Return the model of `source` in `dtype`, sharded as it is built where ZeRO-3 is on.

    `head` "score" gives a sequence classifier with one label: the stored one, or a language model with a fresh head
    of zeros in place of its own (the model's `head_is_fresh` tells). It reads its score off the last token that is
    not `pad_token_id`, or not what its configuration says where that is `None`. `quantised` (`quantised.settings`) is
    for the base of an adapter.

    An adapter's weights are merged into its base (see `lora.load_adapter` for going on with it as an adapter).
    Random weights depend on `seed` and on whether ZeRO-3 is on, not on the number of ranks, and so does what is drawn
    after them. Raises `UserError` where the files lack tensors of the model, or end in another head.
    """
    from transformers import set_seed

    how = How(dtype, head, attn_implementation, trust_remote_code, quantised)
    if source.random:
        model = _random_model(source, seed, overrides, how)
    elif source.is_adapter:
        model = _merged(source, how)
    else:
        model = _stored_model(source, how)
    if head == "score" and pad_token_id is not None:
        set_padding(model, pad_token_id)
    set_seed(seed)  # what is drawn next, such as a new adapter, depends on the seed alone
    return model


def auto_class(head: str) -> Any:
    """Return transformers' class for models that end in `head`."""
    import transformers

    return {"lm": transformers.AutoModelForCausalLM, "score": transformers.AutoModelForSequenceClassification}[head]


def set_padding(model: Any, pad_token_id: int) -> None:
    """Tell a sequence classifier what its batches are padded with: it reads the last token that is something else."""
    model.config.get_text_config().pad_token_id = pad_token_id


def _random_model(source: Source, seed: int, overrides: Mapping[str, Any] | None, how: How) -> PreTrainedModel:
    from transformers import GenerationConfig, set_seed

    config = load_config(source, overrides, trust_remote_code=how.trust_remote_code)
    if how.head == "score":
        config.num_labels = 1
    set_seed(seed)
    model: PreTrainedModel = auto_class(how.head).from_config(config, **how.options())
    if how.head == "score":
        _empty_head(model)
    elif (source.folder / "generation_config.json").is_file():  # where completions end, for one
        model.generation_config = GenerationConfig.from_pretrained(str(source.folder))
    return model


def _stored_model(source: Source, how: How) -> PreTrainedModel:
    from safetensors import SafetensorError

    check_complete(source)
    labels = {"num_labels": 1} if how.head == "score" else {}
    try:
        with naming(source):
            check_values(source)
            _check_head(source, how)
            read: Any = auto_class(how.head).from_pretrained(
                str(source.folder),
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that they are named below, not in a table on standard error
                output_loading_info=True,
                **how.options(),
                **labels,
            )
    except SafetensorError as error:
        raise UserError(f"{source.name} cannot be read ({error}); copy or download it again") from None
    model, loaded = read
    fresh = set(_head_parameters(model)) if how.head != source.head else set()
    _check_loaded(source, {**loaded, "missing_keys": set(loaded["missing_keys"]) - fresh})
    if fresh:
        _empty_head(model)
    model.name_or_path = source.reference  # what PEFT writes into an adapter as the way back to its base
    return model if how.quantised is None else keep_layout(model)  # type: ignore[no-any-return]


def _check_head(source: Source, how: How) -> None:
    """Raise `UserError` for a classifier where a language model is asked for, and for one with several labels."""
    if source.head == "lm":
        return
    if how.head == "lm":
        raise UserError(
            f"{source.name} ends in a score, not in words: it is a sequence classifier, such as a reward model; "
            "give a causal language model"
        )
    labels = load_config(source, None, trust_remote_code=how.trust_remote_code).num_labels
    if labels != 1:
        raise UserError(
            f"{source.name} is a sequence classifier with {labels} labels and a reward model has 1; give a causal "
            "language model, which gets a fresh head, or a classifier with num_labels 1"
        )


def _head_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return what a sequence classifier has beside its trunk."""
    trunk = f"{model.base_model_prefix}."
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(trunk)}


def _empty_head(model: Any) -> None:
    """Set the layer that gives the score to 0, so that training begins at margin 0 and loss ln 2 for every pair.

    A layer before it keeps its random weights: two layers of zeros would have no gradient.
    """
    shape = lambda parameter: getattr(parameter, "ds_shape", parameter.shape)  # noqa: E731
    zero.fill_with_zeros([p for p in _head_parameters(model).values() if shape(p)[0] == 1])
    model.head_is_fresh = True


def _check_loaded(source: Source, loaded: Mapping[str, Any]) -> None:
    """Raise `UserError` for tensors that were not there or of another shape: transformers draws them at random."""
    wrong = sorted(name for name, *_ in loaded["mismatched_keys"])
    for what, names in (("lacks", sorted(loaded["missing_keys"])), ("holds in another shape", wrong)):
        if names:
            raise UserError(
                f"{source.name} {what} {len(names)} tensors of its configuration ({', '.join(names[:3])}); they would "
                "be drawn at random: mend the folder, or start from random weights with --config_name"
            )


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


def check_complete(source: Source) -> None:
    """Raise `UserError` where a sharded model's index names a file or tensor that is not there."""
    index = source.folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    files = set(json.loads(index.read_text())["weight_map"].values())
    if strangers := sorted(name for name in files if not name.endswith(".safetensors")):
        raise UserError(f"{source.name} names {strangers[0]} among its weights; only *.safetensors are read")
    missing = sorted(name for name in files if not (source.folder / name).is_file())
    if missing:
        raise UserError(
            f"{source.name} lacks {len(missing)} of its {len(files)} weight files: {', '.join(missing[:3])}"
        )


def _merged(source: Source, how: How) -> PreTrainedModel:
    """Return base plus adapter as one plain model; merged in fp32 on every rank, sharded afterwards."""
    import torch

    with plain_transformers():
        base = _stored_model(source.weights, replace(how, dtype=torch.float32))
        merged: Any = lora.load_adapter(base, source, head=how.head).merge_and_unload()
    return merged.requires_grad_(True).to(how.dtype)  # type: ignore[no-any-return]  # PEFT has frozen the base


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of `model` to 0, an adapter's too: what TRL's `disable_dropout` does."""
    from torch import nn

    for module in cast("Iterator[Any]", model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):  # not always a module of its own
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Compute without dropout and gradients meanwhile."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Raise `UserError` where the tokenizer has tokens the model has no embedding for."""
    rows = getattr(model.config, "vocab_size", None)
    if rows is not None and len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens and the model embeddings for {rows}; give the "
            "model's own tokenizer, or a model whose embeddings were resized to it"
        )


@contextmanager
def plain_transformers() -> Iterator[None]:
    """Load models unsharded meanwhile, although a ZeRO-3 configuration is alive in this process."""
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference

"""Load a tokenizer and a model with a language or a scalar head: from weights, from random ones, with LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from align_kit import zero
from align_kit.errors import UserError
from align_kit.models import lora
from align_kit.models.how import How, auto_class, load_config, naming, plain_transformers
from align_kit.models.quantised import keep_layout
from align_kit.models.source import Source
from align_kit.models.stored import check_fit, check_loaded, check_values, head_parameters

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside the weights, padding on the right, with a pad token of its own or EOS.

    Raises `UserError` where the folder has none.
    """
    from transformers import AutoTokenizer

    places = [source.folder, source.weights.folder]
    folder = next((f for f in places if any(f.glob("tokenizer*")) or any(f.glob("*.model"))), None)
    if folder is None:
        raise UserError(f"{source.name} has no tokenizer files; give --tokenizer_name")
    with naming(source, (Exception,), part="the tokenizer of "):
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

    check_fit(source, how.head, trust_remote_code=how.trust_remote_code)
    labels = {"num_labels": 1} if how.head == "score" else {}
    try:
        with naming(source):
            check_values(source)
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
    fresh = set(head_parameters(model)) if how.head != source.head else set()
    check_loaded(source, loaded, fresh)
    if fresh:
        _empty_head(model)
    model.name_or_path = source.reference  # what PEFT writes into an adapter as the way back to its base
    return model if how.quantised is None else keep_layout(model)  # type: ignore[no-any-return]


def _empty_head(model: Any) -> None:
    """Set the layer that gives the score to 0, so that training begins at margin 0 and loss ln 2 for every pair.

    A layer before it keeps its random weights: two layers of zeros would have no gradient.
    """
    shape = lambda parameter: getattr(parameter, "ds_shape", parameter.shape)  # noqa: E731
    zero.fill_with_zeros([p for p in head_parameters(model).values() if shape(p)[0] == 1])
    model.head_is_fresh = True


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

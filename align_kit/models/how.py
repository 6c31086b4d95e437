"""In which form a model is loaded, and one line for what transformers cannot make of its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align_kit.errors import UserError
from align_kit.models.source import Source

if TYPE_CHECKING:
    import torch

OF_FILES = (ValueError, OSError)  # what transformers raises of a folder whose files are not what they should be


@contextmanager
def naming(source: Source, kinds: tuple[type[Exception], ...] = OF_FILES, *, part: str = "") -> Iterator[None]:
    """Turn what transformers cannot load, code of the model's own that is not trusted included, into one line.

    Where nothing but files is read, or nothing takes memory, any error is of these files (`kinds` is `Exception`):
    libraries raise what they come across in them. A `UserError` is a line already. `part` says what of it, if not all.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it comes with code of its own; read that, then give --trust_remote_code true"
        elif not isinstance(error, OF_FILES):  # `'model'` says too little
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"{part}{source.name} cannot be loaded: {reason[:200]}") from None


def load_config(source: Source, overrides: Mapping[str, Any] | None, *, trust_remote_code: bool = False) -> Any:
    """Return the model configuration in `source`, with `overrides` (flat names) laid over it."""
    from transformers import AutoConfig

    with naming(source, (Exception,)):
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


def auto_class(head: str) -> Any:
    """Return transformers' class for models that end in `head`."""
    import transformers

    return {"lm": transformers.AutoModelForCausalLM, "score": transformers.AutoModelForSequenceClassification}[head]


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

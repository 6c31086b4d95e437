"""A model without its weights: every parameter with its name, shape and trainability, none of its bytes.

What is planned is built by the same code as what is trained, on torch's meta device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from align_kit.models import load
from align_kit.models.source import Source

if TYPE_CHECKING:
    import torch


@contextmanager
def hollow(dtype: torch.dtype) -> Iterator[None]:
    """Make every tensor that is created meanwhile one without bytes, not sharded where a ZeRO-3 configuration lives.

    `dtype` is what adapters get: PEFT would bring them to their base's only where that has bytes.
    """
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with load.plain_transformers(), torch.device("meta"), warnings.catch_warnings():
            # PEFT fills adapters from their files, which is what a hollow one is there to do without.
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter", category=UserWarning)
            yield
    finally:
        torch.set_default_dtype(before)


def hollow_model(
    source: Source,
    *,
    dtype: torch.dtype,
    head: str = "lm",
    overrides: Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return what `load.load_policy` would return for `source`, without a weight; call it within `hollow`.

    Of an adapter that is the base with the adapter merged. Raises `UserError` where the configuration cannot be read.
    """
    how = load.How(dtype, head, attn_implementation, trust_remote_code)
    config = load.load_config(source.weights, overrides, trust_remote_code=trust_remote_code)
    if head == "score":
        config.num_labels = 1
    with load.naming(source, (Exception,)):
        model = load.auto_class(head).from_config(config, **how.options())
    model.name_or_path = source.weights.reference
    return model

"""A frozen base in 4 bits under an adapter: QLoRA (Dettmers 2023, arXiv 2305.14314), by bitsandbytes.

Linear layers of the base are stored in blocks of 64 weights with one fp32 scale each; the head, embeddings and norms
stay in the precision of the run, and so does the adapter. Weights lie in tensors of the run's own dtype
(`bnb_4bit_quant_storage`), so that ZeRO-3 shards them like any other; the scales stay whole on each rank.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from align_kit.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EXTRA = "pip install 'align-kit[qlora]'"


def settings(fields: Any, dtype: torch.dtype) -> Any:
    """Return transformers' configuration of a base in 4 bits as `fields` (TRL's names) ask for it, else `None`.

    Raises `UserError` where bitsandbytes is not installed.
    """
    if not fields.load_in_4bit:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"load_in_4bit needs bitsandbytes, which is not installed: {EXTRA}")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=fields.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=fields.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def settings_of(model: Any) -> Any:
    """Return the configuration that `model` (or the base of an adapter) was quantised by, else `None`."""
    return getattr(model.config, "quantization_config", None)


def keep_layout(model: PreTrainedModel) -> PreTrainedModel:
    """Return `model` with its 4-bit layers kept as they were stored.

    On CPUs with AVX512-BF16 bitsandbytes would lay the weights out anew at the first evaluation, behind the engine
    that has sharded them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model

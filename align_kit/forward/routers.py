"""What the routers of a mixture of experts owe: the loss that transformers adds for such a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from align_kit.losses import balance_loss


def has_router_loss(model: Any) -> bool:
    """Return whether transformers has a balancing loss for this causal language model."""
    return hasattr(model.config.get_text_config(), "output_router_logits") and hasattr(model, "num_experts_per_tok")


def router_loss(model: Any, router_logits: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the balancing loss of a transformers `model`, each token counted as `weights` says (N; or B, T)."""
    return balance_loss(router_logits, weights.flatten(), top_k=model.num_experts_per_tok)

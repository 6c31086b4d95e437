"""What a mixture of experts is charged for sending many tokens to few experts, beside the loss of its method.

Over a step that is the coefficient times the mean of the micro-batches' losses, weighted by their items. Unlike all
else it depends on which rows share a micro-batch, as in transformers: a product of two means is no sum over tokens.
Rows repeated to fill an epoch's last micro-batch are among them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from align_kit.errors import UserError
from align_kit.forward.choose import walkable
from align_kit.forward.routers import has_router_loss


def router_coefficient(args: Any, model: Any) -> float:
    """Return what a mixture's routers are charged for imbalance, times their loss; 0 for nothing.

    That is `router_aux_loss_coef` where it is set; else the model's own, if its configuration has output_router_logits.
    Raises `UserError` where it is set for a model without a balancing loss.
    """
    part = next(walkable(model))
    config, given = part.config.get_text_config(), getattr(args, "router_aux_loss_coef", None)
    if given and not has_router_loss(part):
        raise UserError(f"router_aux_loss_coef {given:g}: {type(part).__name__} has no routers to balance; drop it")
    if given is not None:
        return float(given)
    asked = has_router_loss(part) and config.output_router_logits
    return float(getattr(config, "router_aux_loss_coef", 0.0)) if asked else 0.0


def charged(outcome: Any, router_loss: Tensor, coefficient: float) -> Any:
    """Return the `BatchLoss` of a micro-batch with what its routers owe, reported as `aux_loss` like TRL's.

    Raises `UserError` where that has no gradient to give.
    """
    if outcome.total.requires_grad and not router_loss.requires_grad:
        raise UserError(
            "router_aux_loss_coef trains nothing: activations are checkpointed re-entrantly, or nothing before a "
            "router is trained; use gradient_checkpointing_kwargs: {use_reentrant: false}, or router_aux_loss_coef: 0.0"
        )
    total = outcome.total + coefficient * router_loss * outcome.items
    tallies = {**outcome.tallies, "aux_loss": (router_loss.detach() * outcome.items, outcome.items)}
    return replace(outcome, total=total, tallies=tallies)

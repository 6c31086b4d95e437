"""The load-balancing loss of a mixture of experts: what its routers owe for sending many tokens to few experts.

Shapes: N tokens that were computed, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def balance_loss(router_logits: Sequence[Tensor], weights_N: Tensor, *, top_k: int) -> Tensor:
    """E * sum over experts of f * P, of all layers together; Fedus 2021 (Switch Transformer), eq. 4-6.

    f is how often a token chooses the expert among its `top_k`, P the probability its router gives it, both means over
    tokens and layers: top_k where all experts are used alike, more where not. `router_logits` has a tensor (N, E, or
    B, T, E) for each layer; `weights_N` says how many tokens of the batch each one stands for, 0 for padding. With the
    attention mask as weights it is transformers' `load_balancing_loss_func`.
    """
    sent: list[Tensor] = []
    probability: list[Tensor] = []
    for logits in router_logits:
        wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
        probability_NE = logits.flatten(0, -2).softmax(-1, dtype=wide)
        chosen_NE = torch.zeros_like(probability_NE).scatter_(1, probability_NE.topk(top_k).indices, 1.0)
        weights = weights_N.to(probability_NE)
        sent.append(weights @ chosen_NE)
        probability.append(weights @ probability_NE)
    tokens = weights_N.sum() * len(sent)
    sent_E, probability_E = torch.stack(sent).sum(0) / tokens, torch.stack(probability).sum(0) / tokens
    return len(sent_E) * (sent_E * probability_E).sum()

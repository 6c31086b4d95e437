"""Make a frozen model four times smaller than in fp32: linear weights as int8 rows with one scale each.

Symmetric absmax quantisation by output row, the vector-wise scheme of Dettmers et al. 2022 ("LLM.int8()", section 2)
without its outlier path. Weights are put back into floating point as each layer runs, so a forward costs a little
more and not less; what it saves is memory.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LEVELS = 127  # int8 without -128, so that a weight and its negative are stored alike


def quantised_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 rows and one fp32 scale per row: `rows * scale` is the weight to within half a scale."""
    wide_OI = weight_OI.detach().float()
    scale_O1 = wide_OI.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
    return (wide_OI / scale_O1).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale_O1


class Int8Linear(nn.Module):
    """A linear layer whose weight is stored in int8; `rows` and `scale` are frozen parameters."""

    def __init__(self, rows_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows_OI, requires_grad=False)
        self.scale = nn.Parameter(scale_O1, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach(), requires_grad=False)
        self.out_features, self.in_features = rows_OI.shape

    def forward(self, input: Tensor) -> Tensor:
        weight_OI = (self.rows * self.scale).to(input.dtype)  # the product in fp32: a scale rounded to bf16 is a bias
        return functional.linear(input, weight_OI, self.bias)


def quantise_(model: Any, *, keep: Collection[str] = ("lm_head", "score")) -> int:
    """Replace every linear layer of a whole (unsharded) `model` in place and return how many there were.

    Modules whose last name is in `keep` stay as they are: a head decides each number directly, and is often tied to
    the embeddings. Layers that share one weight go on sharing its int8 rows.
    """
    shared: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    found = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    found = [(name, module) for name, module in found if name.rpartition(".")[2] not in keep]
    for name, linear in found:
        parent, _, own = name.rpartition(".")
        if (weight := id(linear.weight)) in shared:
            small = Int8Linear(*shared[weight], linear.bias)
            small.rows, small.scale = shared[weight]
        else:
            small = Int8Linear(*quantised_rows(linear.weight), linear.bias)
            shared[weight] = (small.rows, small.scale)
        setattr(model.get_submodule(parent), own, small)
    return len(found)

"""What a language-model head says about given tokens, without ever holding more than a chunk of its logits.

The head multiplies only hidden states that predict something, a chunk of them at a time. The backward computes a
chunk's logits again, but for the last chunk, which is still there: one product more in exchange for P x V floats.

Shapes: P predictions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits in a chunk: 64 MB in fp32 on a CPU; more where large matrix products are what a device is fast at.
CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}
NEAR = 1 << 18  # logits that a CPU's cache holds: 1 MB in fp32


@dataclass(frozen=True)
class Ask:
    """What is asked of the head: the tokens, and what beside their log-probabilities at `temperature`."""

    targets_P: Tensor
    temperature: float = 1.0
    entropy: bool = False
    log_sum_sq: bool = False


class Answer(NamedTuple):
    """Log-probabilities (nats, fp32), whether a token was the most probable, and what else was asked for; P each.

    `log_sum_sq_P` (log of the summed squared probabilities) has no gradient; the entropy (nats) has.
    """

    logps_P: Tensor
    top1_P: Tensor
    entropy_P: Tensor | None = None
    log_sum_sq_P: Tensor | None = None


@dataclass(frozen=True)
class Scaling:
    """How a model turns what its head gives into logits: times `factor`, then soft-capped at `cap` where one is set."""

    factor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Scaling:
        """Read the names in use: logit_scale (Cohere), logits_scaling (Granite), final_logit_softcapping (Gemma)."""
        factor = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(float(factor), getattr(config, "final_logit_softcapping", None))


def read_tokens(head: nn.Module, hidden_PH: Tensor, ask: Ask, scaling: Scaling, chunk: int | None = None) -> Answer:
    """Return what `head` says about the tokens of `ask` after the hidden states `hidden_PH`.

    A linear head goes by chunks of about `chunk` logits; one of another kind (with an adapter in it) is called once.
    """
    weight = getattr(head, "weight", None)
    if type(head) is not nn.Linear or weight is None:
        logits_PV = _scaled(head(hidden_PH).float(), scaling, ask.temperature)
        return _answered(logits_PV, ask)
    rows = max(1, (chunk or CHUNK.get(hidden_PH.device.type, CHUNK["cuda"])) // max(1, weight.shape[0]))
    found = _Chunked.apply(hidden_PH, weight, head.bias, ask, scaling, rows)
    logps_P, top1_P, entropy_P, squares_P = found
    return Answer(logps_P, top1_P, entropy_P if ask.entropy else None, squares_P if ask.log_sum_sq else None)


def _answered(logits_PV: Tensor, ask: Ask) -> Answer:
    """Return the same as the chunked function from whole logits, differentiated by autograd."""
    total_P = logits_PV.logsumexp(-1)
    mine_P = logits_PV.gather(1, ask.targets_P[:, None]).squeeze(1)
    entropy_P = squares_P = None
    if ask.entropy:
        probabilities_PV = (logits_PV - total_P[:, None]).exp()
        entropy_P = total_P - (probabilities_PV * logits_PV).sum(-1)
    with torch.no_grad():
        top1_P = logits_PV.argmax(-1) == ask.targets_P
        if ask.log_sum_sq:
            squares_P = (2 * logits_PV).logsumexp(-1) - 2 * total_P
    return Answer(mine_P - total_P, top1_P, entropy_P, squares_P)


def _scaled(logits_PV: Tensor, scaling: Scaling, temperature: float) -> Tensor:
    """Turn what the head gave into the logits of the tempered distribution."""
    if scaling.factor != 1.0:
        logits_PV = logits_PV * scaling.factor
    if scaling.cap is not None:
        logits_PV = scaling.cap * torch.tanh(logits_PV / scaling.cap)
    return logits_PV / temperature if temperature != 1.0 else logits_PV


def _scale_(logits_PV: Tensor, scaling: Scaling, temperature: float) -> Tensor:
    """Do the same in the memory of `logits_PV`."""
    if scaling.factor != 1.0:
        logits_PV *= scaling.factor
    if scaling.cap is not None:
        logits_PV.div_(scaling.cap).tanh_().mul_(scaling.cap)
    return logits_PV.div_(temperature) if temperature != 1.0 else logits_PV


class _Chunked(torch.autograd.Function):
    """Log-probability, top-1, entropy and squares of given tokens from hidden states and a linear head.

    With logits z, p = softmax(z), y the token and H the entropy: d log p_y / dz = e_y - p, and
    dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, ask: Ask, scaling: Scaling, rows: int
    ) -> tuple[Tensor, ...]:
        count = len(hidden_PH)
        logps_P = hidden_PH.new_empty(count, dtype=_wide(hidden_PH.dtype))
        total_P, entropy_P, squares_P = (torch.empty_like(logps_P) for _ in range(3))
        top1_P = torch.empty(count, dtype=torch.bool, device=hidden_PH.device)
        kept = None
        for cut in _cuts(count, rows):
            kept = None  # before the next chunk takes its memory
            kept = _logits(hidden_PH[cut], weight_VH, bias_V, scaling, ask.temperature)
            for at, near_PV in _near(kept, cut):
                logps_P[at], top1_P[at], total_P[at], entropy_P[at], squares_P[at] = _read(near_PV, ask, at)
            del near_PV  # a view, which would keep its chunk beside the next
        ctx.save_for_backward(hidden_PH, weight_VH, bias_V, total_P, entropy_P)
        ctx.kept, ctx.ask, ctx.scaling, ctx.rows = kept, ask, scaling, rows
        ctx.mark_non_differentiable(top1_P, squares_P)
        return logps_P, top1_P, entropy_P, squares_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_PH, weight_VH, bias_V, total_P, entropy_P = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        by_logps_P, by_entropy_P = grads[0], grads[2]
        cuts = _cuts(len(hidden_PH), ctx.rows)
        into_hidden_PH = torch.empty_like(hidden_PH) if wants_hidden else None
        # Chunks are added up in fp32: a sum of many in bf16 would lose the small ones.
        into_weight_VH = torch.zeros_like(weight_VH, dtype=_wide(weight_VH.dtype)) if wants_weight else None
        into_bias_V = torch.zeros_like(bias_V, dtype=_wide(bias_V.dtype)) if wants_bias and bias_V is not None else None
        for cut in reversed(cuts):  # the last chunk's logits are still there
            logits_PV, ctx.kept = ctx.kept, None
            if logits_PV is None:
                logits_PV = _logits(hidden_PH[cut], weight_VH, bias_V, ctx.scaling, ctx.ask.temperature)
            for at, near_PV in _near(logits_PV, cut):
                by_entropy = (by_entropy_P[at], entropy_P[at]) if ctx.ask.entropy else None
                _differentiate_(near_PV, total_P[at], ctx.ask, at, by_logps_P[at], by_entropy, ctx.scaling)
            into_logits_PV = logits_PV.to(weight_VH.dtype)
            if into_hidden_PH is not None:
                torch.mm(into_logits_PV, weight_VH, out=into_hidden_PH[cut])
            if into_weight_VH is not None:
                if into_weight_VH.dtype == weight_VH.dtype:
                    into_weight_VH.addmm_(into_logits_PV.t(), hidden_PH[cut])
                else:
                    into_weight_VH += into_logits_PV.t() @ hidden_PH[cut]
            if into_bias_V is not None:
                into_bias_V += into_logits_PV.sum(0, dtype=into_bias_V.dtype)
            del logits_PV, near_PV, into_logits_PV  # before the next chunk takes its memory
        found = (into_hidden_PH, into_weight_VH, into_bias_V)
        narrowed = (g if g is None else g.to(weight_VH.dtype) for g in found)
        return (*narrowed, None, None, None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _cuts(count: int, rows: int) -> list[slice]:
    return [slice(at, min(at + rows, count)) for at in range(0, count, rows)]


def _near(logits_PV: Tensor, cut: slice) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a chunk; on a CPU a few at a time: what is done to them in turn finds them in its cache."""
    rows = max(1, NEAR // max(1, logits_PV.shape[1])) if logits_PV.device.type == "cpu" else max(1, len(logits_PV))
    for at in range(0, len(logits_PV), rows):
        some_PV = logits_PV[at : at + rows]
        yield slice(cut.start + at, cut.start + at + len(some_PV)), some_PV


def _logits(
    hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scaling: Scaling, temperature: float
) -> Tensor:
    logits_PV = hidden_PH @ weight_VH.t() if bias_V is None else torch.addmm(bias_V, hidden_PH, weight_VH.t())
    return _scale_(logits_PV.to(_wide(logits_PV.dtype)), scaling, temperature)


def _read(logits_PV: Tensor, ask: Ask, cut: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return of a chunk, by row: log p of the token, whether it is the most probable, logsumexp, entropy, squares.

    What was not asked for stands as something else.
    """
    greatest_P1, place_P1 = logits_PV.max(1, keepdim=True)
    targets_P1 = ask.targets_P[cut, None]
    mine_P = logits_PV.gather(1, targets_P1).squeeze(1)
    probabilities_PV = (logits_PV - greatest_P1).exp_()  # not yet divided by their sum
    sums_P = probabilities_PV.sum(1)
    total_P = entropy_P = squares_P = sums_P.log() + greatest_P1.squeeze(1)
    if ask.log_sum_sq:
        squares_P = 2 * (torch.linalg.vector_norm(probabilities_PV, dim=1).log() - sums_P.log())
    if ask.entropy:
        entropy_P = total_P - probabilities_PV.mul_(logits_PV).sum(1) / sums_P
    return mine_P - total_P, (place_P1 == targets_P1).squeeze(1), total_P, entropy_P, squares_P


def _differentiate_(
    logits_PV: Tensor,
    total_P: Tensor,
    ask: Ask,
    cut: slice,
    by_logps_P: Tensor,
    by_entropy: tuple[Tensor, Tensor] | None,
    scaling: Scaling,
) -> None:
    """Put the gradient at what the head gave in the place of `logits_PV`."""
    slope_PV = None
    if scaling.cap is not None:  # d cap tanh(x / cap) / dx = 1 - tanh^2
        slope_PV = (logits_PV * (ask.temperature / scaling.cap)).square_().neg_().add_(1)
    logits_PV -= total_P[:, None]  # log p
    if by_entropy is None:
        into_PV = logits_PV.exp_().mul_(-by_logps_P[:, None])
    else:
        gradient_P, entropy_P = by_entropy
        slopes_PV = (logits_PV + entropy_P[:, None]).mul_(gradient_P[:, None]).add_(by_logps_P[:, None])
        into_PV = logits_PV.exp_().mul_(slopes_PV).neg_()
    into_PV.scatter_add_(1, ask.targets_P[cut, None], by_logps_P[:, None])
    if slope_PV is not None:
        into_PV *= slope_PV
    constant = scaling.factor / ask.temperature
    if constant != 1.0:
        into_PV *= constant

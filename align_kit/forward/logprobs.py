"""From a batch to per-token log-probabilities: the one way all trainers walk.

Shapes: B sequences, T tokens (padded on the right), V vocabulary. Position t of every result speaks of token t + 1
of the input, so results have T - 1 columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from align_kit.forward.choose import walkable
from align_kit.forward.door import pack_for
from align_kit.forward.head import Answer, Ask
from align_kit.forward.layout import Pack
from align_kit.forward.routers import router_loss
from align_kit.losses import log_sum_sq_probs


@dataclass(frozen=True)
class TokenLogps:
    """Log-probabilities (nats) of the tokens a batch predicts.

    `logps_BT`: log p(token t + 1 | tokens up to t), 0 where masked; `mask_BT`: True where the token counts;
    `top1_BT`: whether the token was the most probable one; `log_sum_sq_BT`: log of the summed squared probabilities,
    where asked for; `entropy_BT`: the entropy (nats) of the distribution the token was drawn from, where asked for;
    `router_loss`: what the routers of a mixture of experts owe for the whole batch (`losses.balance`), where asked for.
    """

    logps_BT: Tensor
    mask_BT: Tensor
    top1_BT: Tensor
    log_sum_sq_BT: Tensor | None = None
    entropy_BT: Tensor | None = None
    router_loss: Tensor | None = None

    def rows(self, start: int, stop: int) -> TokenLogps:
        """Return the sequences from `start` up to `stop`; what the routers owe is the batch's and stays with it."""
        def cut(values_BT: Tensor | None) -> Tensor | None:
            return None if values_BT is None else values_BT[start:stop]

        return TokenLogps(
            self.logps_BT[start:stop],
            self.mask_BT[start:stop],
            self.top1_BT[start:stop],
            cut(self.log_sum_sq_BT),
            cut(self.entropy_BT),
        )


def token_logps(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    log_sum_sq: bool = False,
    entropy: bool = False,
    temperature: float = 1.0,
    routers: bool = False,
) -> TokenLogps:
    """Run `model` on `batch` ("input_ids", "attention_mask", "loss_mask", all B x T) and read off the tokens.

    The model is walked as its door says (`forward.door`); what comes back is the same either way. `routers` asks a
    mixture of experts for its `router_loss`.
    """
    asked: dict[str, Any] = {"log_sum_sq": log_sum_sq, "entropy": entropy, "temperature": temperature}
    return _run(model, batch, asked, routers)[0]


def tokens_and_values(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    entropy: bool = False,
    temperature: float = 1.0,
    routers: bool = False,
) -> tuple[TokenLogps, Tensor]:
    """Return the same of a policy, and of the value function beside it the values (B, T - 1), 0 where masked.

    `values_BT[b, t]` is foreseen once tokens up to t are there, before the token the column speaks of. `model` is a
    `models.policy_and_value.PolicyAndValue`.
    """
    asked: dict[str, Any] = {"entropy": entropy, "temperature": temperature}
    tokens, output, pack = _run(model, batch, asked, routers, role="both")
    if pack is None:
        return tokens, output.values[:, :-1].masked_fill(~tokens.mask_BT, 0.0)
    return tokens, pack.spread(output.values)


def value_states(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return what the value head of a `PolicyAndValue` reads before each predicted token: B, T - 1, H; else 0."""
    pack = pack_for(model, batch)
    if pack is not None:
        return pack.spread(model(pack=pack, role="value", states=True).states)
    ids_BT, attention_BT = batch["input_ids"], batch["attention_mask"]
    output: Any = model(input_ids=ids_BT, attention_mask=attention_BT, role="value", states=True)
    return output.states[:, :-1] * predicted(batch)[..., None]  # type: ignore[no-any-return]


def predicted(batch: Mapping[str, Tensor]) -> Tensor:
    """Return where a batch predicts a token that counts: B, T - 1."""
    return batch["loss_mask"][:, 1:].bool() & batch["attention_mask"][:, 1:].bool()


def _run(
    model: nn.Module, batch: Mapping[str, Tensor], asked: Mapping[str, Any], routers: bool, **how: Any
) -> tuple[TokenLogps, Any, Pack | None]:
    """Run `model` as its door says; return what it says of the tokens, all it gave, and the pack it was given."""
    pack = pack_for(model, batch, whole=routers)  # routers see every token, what it is followed by or not
    if routers:
        how["output_router_logits"] = True
    if pack is not None:
        output: Any = model(pack=pack, ask=Ask(pack.targets_P, **asked), **how)
        tokens = spread(output.tokens, pack, batch)
        return replace(tokens, router_loss=output.router_loss if routers else None), output, pack
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **how)
    tokens = read_logps(output.logits, batch, **asked)
    if routers:
        mixture = next(walkable(getattr(model, "module", model)))
        tokens = replace(tokens, router_loss=router_loss(mixture, output.router_logits, batch["attention_mask"]))
    return tokens, output, None


def spread(tokens: Answer, pack: Pack, batch: Mapping[str, Tensor]) -> TokenLogps:
    """Lay what was read of a packed row where the batch has its tokens."""
    def laid(values_P: Tensor | None) -> Tensor | None:
        return None if values_P is None else pack.spread(values_P)

    return TokenLogps(
        pack.spread(tokens.logps_P),
        predicted(batch),
        pack.spread(tokens.top1_P, fill=False),
        laid(tokens.log_sum_sq_P),
        laid(tokens.entropy_P),
    )


def read_logps(
    logits_BTV: Tensor,
    batch: Mapping[str, Tensor],
    *,
    log_sum_sq: bool = False,
    entropy: bool = False,
    temperature: float = 1.0,
) -> TokenLogps:
    """Read the batch's tokens off the logits a model gave for it.

    log p = the token's logit - logsumexp of all, in fp32 whatever the model computes in; of the tempered distribution
    where `temperature` is not 1.
    """
    logits_BTV = logits_BTV[:, :-1]
    if temperature != 1.0:
        logits_BTV = logits_BTV.float() / temperature
    targets_BT = batch["input_ids"][:, 1:]
    mask_BT = predicted(batch)
    logps_BT = _selected(logits_BTV, targets_BT).masked_fill(~mask_BT, 0.0)
    with torch.no_grad():
        top1_BT = (logits_BTV.argmax(-1) == targets_BT) & mask_BT
        squares = log_sum_sq_probs(logits_BTV) if log_sum_sq else None
    entropy_BT = _entropy(logits_BTV).masked_fill(~mask_BT, 0.0) if entropy else None
    return TokenLogps(logps_BT, mask_BT, top1_BT, squares, entropy_BT)


def _entropy(logits_BTV: Tensor) -> Tensor:
    """Return -sum p log p over the vocabulary, with gradient; 0 log 0 is 0."""
    logp_BTV = logits_BTV.float().log_softmax(-1)
    return -(logp_BTV.exp() * logp_BTV.clamp(min=torch.finfo(logp_BTV.dtype).min)).sum(-1)


def _selected(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    logits_BTV = logits_BTV.float()
    chosen_BT = logits_BTV.gather(-1, targets_BT.unsqueeze(-1)).squeeze(-1)
    return chosen_BT - logits_BTV.logsumexp(-1)

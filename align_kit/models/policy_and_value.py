"""What PPO trains: a policy that writes and a value function that foresees what its completions will be worth.

Two layouts stand behind one module, so that one engine holds all that is trained:

- separate: the value function is a model of its own, a trunk with a scalar head;
- shared: policy, value function, reference and reward models are one stored base with an adapter each, and heads.

Shapes: B sequences, T tokens, H hidden. A scalar head reads a token's hidden state: `values_BT[b, t]` foresees the
reward still to come once tokens up to t are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from align_kit.errors import UserError
from align_kit.models import load, lora, moe
from align_kit.models.source import Source

if TYPE_CHECKING:
    from peft import PeftModel

VALUE_ADAPTER = "value"
OF_VALUE_ADAPTER = re.compile(rf"\.lora_\w+\.{VALUE_ADAPTER}(\.|$)")  # some models call a projection `value`


class Outcome(NamedTuple):
    """What a forward gave: the policy's logits (B, T, V), values (B, T), the scores of a reward role (B).

    `states` are what the value head reads (B, T, H; of a packed row P, H), in place of values where asked for.
    Of a packed row: the policy's answers about tokens (`forward.head.Answer`), values where they are predicted (P).
    Of a policy with routers, where asked for: their logits (a tensor a layer), or what they owe for a packed row.
    """

    logits: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None
    tokens: Any = None
    states: Tensor | None = None
    router_logits: Any = None
    router_loss: Tensor | None = None


class PolicyAndValue(nn.Module):
    """A policy and its value function as one module; `forward` says which of them, or which reward role, computes."""

    def __init__(self, policy: Any, value: Any = None) -> None:
        """Join `policy` with a `value` model of its own, or with an adapter and a head on the policy's base."""
        super().__init__()
        self.policy = policy
        self.value = value
        hidden = policy.config.get_text_config().hidden_size
        if value is None:
            _add_value_adapter(self.policy)
            self.value_head = _scalar_head(hidden, next(policy.parameters()))
        self.reward_heads = nn.ModuleDict()
        self._reward_pads: dict[str, int] = {}

    # What the Trainer asks of a model.

    @property
    def config(self) -> Any:
        return self.policy.config

    @property
    def is_shared(self) -> bool:
        """Whether policy and value function are one base with an adapter each."""
        return self.value is None

    def value_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the value function's own parameters."""
        for name, parameter in self.named_parameters():
            if name.startswith(("value.", "value_head.")) or OF_VALUE_ADAPTER.search(name):
                yield parameter

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Recompute activations in both trunks; with the adapter that was active when they were computed first."""
        # transformers' own default, which it lays down only where it is given no mapping at all.
        chosen = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if self.is_shared:
            if chosen["use_reentrant"]:
                raise UserError(
                    "use_reentrant: true would recompute the value function with the policy's adapter; drop it"
                )
            chosen["context_fn"] = self._recompute_contexts
        for model in filter(None, (self.policy, self.value)):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=chosen, **kwargs)

    def _recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), lora.adapter_active(self.policy, lora.active_adapter(self.policy))

    # The forward.

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        role: str = "policy",
        use_cache: bool = False,
        pack: Any = None,
        ask: Any = None,
        output_router_logits: bool = False,
        states: bool = False,
    ) -> Outcome:
        """Compute as `role`: "policy" (logits), "value" (values), "both", or the name of a shared reward model.

        With a `pack` (`forward.layout.Pack`) in place of ids, the policy answers what `ask` asks (`tokens`), values
        are those at the places that predict (P), and a reward stands on each sequence's last token as the pack has it.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if role in self.reward_heads:
            return Outcome(scores=self._scores(batch, role, pack))
        outcome = Outcome()
        if role in ("policy", "both"):
            given = batch if pack is None else {"pack": pack, "ask": ask}
            made = self.policy(**given, **({"output_router_logits": True} if output_router_logits else {}))
            names = ("logits", "tokens", "router_logits", "router_loss")
            outcome = Outcome(**{name: getattr(made, name, None) for name in names})
        if role in ("value", "both"):
            outcome = outcome._replace(**self._values(batch, pack, states))
        return outcome

    def _values(self, batch: dict[str, Any], pack: Any, states: bool) -> dict[str, Tensor]:
        """Return the values, or with `states` what their head reads."""
        active = nullcontext() if self.value is not None else lora.adapter_active(self.policy, VALUE_ADAPTER)
        head = self.value_head if self.value is None else head_of(self.value)
        with active:
            hidden = self._hidden(self.policy.get_base_model() if self.value is None else self.value, batch, pack)
            return {"states": hidden} if states else {"values": head(hidden).squeeze(-1).float()}

    def _hidden(self, model: Any, batch: dict[str, Any], pack: Any) -> Tensor:
        """Return the last hidden states of a model's trunk: B, T, H, or P, H of what a pack predicts from.

        LoRA's layers stand in the trunk.
        """
        if pack is None:
            return model.base_model(**batch).last_hidden_state  # type: ignore[no-any-return]
        return pack.walk(model)[pack.at_P]  # type: ignore[no-any-return]

    def _scores(self, batch: dict[str, Any], role: str, pack: Any) -> Tensor:
        """Return the reward at each sequence's last token that is not padding, as a Hugging Face classifier pools."""
        head = self.reward_heads[role]
        with lora.adapter_active(self.policy, role):
            if pack is not None:
                return head(pack.walk(self.policy.get_base_model())[pack.last_B]).squeeze(-1).float()  # type: ignore[no-any-return]
            scores_BT = head(self._hidden(self.policy.get_base_model(), batch, None)).squeeze(-1).float()
        places_T = torch.arange(scores_BT.shape[1], device=scores_BT.device)
        last_B = (places_T * (batch["input_ids"] != self._reward_pads[role])).argmax(1)
        return scores_BT.gather(1, last_B[:, None]).squeeze(1)

    def hold_reward(self, role: str, source: Source, pad_token_id: int) -> None:
        """Put the reward model in `source`, an adapter of the policy's own base, on that base as `role`, frozen.

        It reads its score off the last token that is not `pad_token_id`. Call it before the engine is made. Raises
        `UserError` where the adapter carries more than low-rank weights and a scalar head.
        """
        assert self.is_shared, "a reward adapter needs the policy's base unchanged"
        head_H = lora.load_scoring_adapter(self.policy, source, name=role)
        head = _scalar_head(head_H.numel(), next(self.policy.parameters()))
        with torch.no_grad():
            head.weight.copy_(head_H)
        self.reward_heads[role] = head.requires_grad_(False)
        self._reward_pads[role] = pad_token_id


def separate(policy: nn.Module, source: Source, **loading: Any) -> PolicyAndValue:
    """Return `policy` with a value model of its own, started from `source`: its trunk, and its head where it has one.

    `loading` goes to `models.load.load_policy`; what has no scalar head yet gets one that starts at zero.
    """
    return PolicyAndValue(policy, load.load_policy(source, head="score", **loading))


def shared(policy: PeftModel, *, copy_start: bool = False) -> PolicyAndValue:
    """Return `policy`, a base with a LoRA adapter, with a second adapter and a head as its value function.

    With `copy_start` the value adapter starts as the policy's own, which then is a stored one; else fresh.
    """
    made = PolicyAndValue(policy)
    if copy_start:
        lora.copy_adapter(policy, lora.TRAINED, VALUE_ADAPTER)
    return made


def _add_value_adapter(policy: PeftModel) -> None:
    if getattr(policy.peft_config[lora.TRAINED], "modules_to_save", None):
        raise UserError(
            "lora_modules_to_save changes the base that the value function and the reference share; drop it for ppo"
        )
    moe.refuse_adapted_blocks(policy)
    lora.add_adapter_like(policy, lora.TRAINED, VALUE_ADAPTER)


def _scalar_head(hidden: int, like: Tensor) -> nn.Linear:
    """Return a head that gives 0 until it has learnt, in the dtype and on the device of `like`."""
    head = nn.Linear(hidden, 1, bias=False, dtype=like.dtype, device=like.device)
    nn.init.zeros_(head.weight)
    return head


def head_of(model: Any) -> nn.Module:
    """Return the scalar head of a sequence classifier."""
    found = next((getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)), None)
    if found is None:
        raise UserError(f"{type(model).__name__} has no scalar head named score or classifier; use another model")
    return found  # type: ignore[no-any-return]

"""A frozen model in its place: what it computes, and whether its weights are what they were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit.errors import Fault
from align_kit.forward.door import pack_for
from align_kit.forward.logprobs import TokenLogps, token_logps
from align_kit.forward.scores import sequence_scores
from align_kit.frozen.identity import Identity
from align_kit.models import lora
from align_kit.models.load import evaluating
from align_kit.telemetry.at_rest import sums64

if TYPE_CHECKING:
    from torch import Tensor, nn


class Frozen:
    """A frozen model in its place: computes log-probabilities and tells whether its weights are what they were."""

    def __init__(self, identity: Identity, model: nn.Module | None, *, adapter: str | None = None) -> None:
        self.identity = identity
        self.model = model  # None: the policy's own module computes, with `adapter` (None: its bare base) switched on
        self.adapter = adapter
        self._sums: dict[str, int] | None = None

    # --- what it computes ---

    @property
    def token_error(self) -> float:
        """How far (nats) the placement may move a token's log-probability; 0 but for an int8 copy.

        Twice what was measured at worst: the probe is a few rows.
        """
        return 2 * self.identity.measured.get("int8_error_worst", 0.0)

    def token_logps(self, policy: nn.Module, batch: Mapping[str, Tensor], *, temperature: float = 1.0) -> TokenLogps:
        """Return the frozen model's log-probabilities of `batch`: no gradients, no dropout.

        They are of the tempered distribution where `temperature` is not 1.
        """
        import torch

        if self.model is not None:
            with torch.no_grad():
                return token_logps(self.model, batch, temperature=temperature)
        with evaluating(policy), lora.adapter_active(policy, self.adapter):
            return token_logps(policy, batch, temperature=temperature)

    # --- whether it is what it was ---

    def watch(self, policy: nn.Module) -> None:
        """Remember the weights as they are now; call once, after the engines are made."""
        self._sums = self._summed(policy)

    def check(self, policy: nn.Module, when: str) -> None:
        """Raise `Fault` where this rank's share of the frozen weights is not what it was at load."""
        if self._sums is None:
            return
        now = self._summed(policy)
        wrong = [name for name, total in now.items() if self._sums.setdefault(name, total) != total]
        if wrong:
            raise Fault(
                f"the frozen {self.identity.role} ({self.identity.name}) changed in memory, seen {when} in "
                f"{wrong[0]}; its results can no longer be trusted: resume from the last checkpoint and check this "
                "machine's memory"
            )

    def fingerprint(self, policy: nn.Module) -> int:
        """Return a 64-bit sum over this rank's share of the frozen weights."""
        return sum(sums64(self._shards(policy)).values()) % (1 << 64)

    def _summed(self, policy: nn.Module) -> dict[str, int]:
        """Return the 64-bit sum of each tensor of the frozen model that this rank holds.

        Small parameters stay gathered from the first forward on, and that copy is what computes: it is summed beside
        the shard and compared with what it was when it was first seen.
        """
        return sums64({**self._shards(policy), **self._resident(policy)})

    def _shards(self, policy: nn.Module) -> dict[str, Tensor]:
        return {name: getattr(p, "ds_tensor", p.data) for name, p in self._parameters(policy)}

    def _resident(self, policy: nn.Module) -> dict[str, Tensor]:
        found = self._parameters(policy)
        return {f"{name} (gathered)": p.data for name, p in found if hasattr(p, "ds_tensor") and is_resident(p)}

    def _parameters(self, policy: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Return what the frozen role is made of, by name."""
        if self.model is not None:
            return list(bare(self.model).named_parameters())
        named = list(bare(policy).named_parameters())
        mine = [(name, p) for name, p in named if not _foreign(name, self.adapter)]
        return [(name, parameter) for name, parameter in mine if not parameter.requires_grad]

    # --- what a moving reference does beside; a fixed one is in its source ---

    def after_step(self, policy: nn.Module, step: int) -> None:
        """Follow the policy after optimizer step number `step`, where this model moves (`moving.MovingReference`)."""

    def save(self, checkpoint: Path) -> None:
        """Store what a checkpoint must hold of this model; nothing, where its source holds it all."""


class StoredReference(Frozen):
    """The placement `cached`: log-probabilities that were computed before and come with the batch; no model in memory.

    There is nothing to watch: stored numbers are verified when they are read (`store.ReferenceStore`).
    """

    def __init__(self, identity: Identity) -> None:
        super().__init__(identity, None)

    def token_logps(self, policy: nn.Module, batch: Mapping[str, Tensor], *, temperature: float = 1.0) -> TokenLogps:
        """Return what the batch carries as `reference_logps` (B, T - 1); `top1_BT` is not known and False."""
        import torch

        assert temperature == 1.0, "log-probabilities are stored at temperature 1"
        mask_BT = batch["loss_mask"][:, 1:].bool()
        return TokenLogps(batch["reference_logps"], mask_BT, torch.zeros_like(mask_BT))

    def _parameters(self, policy: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return []


class RewardModel(Frozen):
    """A frozen sequence classifier with one label; `tokenizer` is its own, whose words need not be the policy's."""

    def __init__(self, identity: Identity, model: nn.Module, tokenizer: Any) -> None:
        super().__init__(identity, model)
        self.tokenizer = tokenizer
        self.pad_token_id = int(tokenizer.pad_token_id)

    def scores(self, policy: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the scores (B, fp32) of sequences (`input_ids`, `attention_mask`, B x T, in this model's tokens).

        The classifier reads the last token that is not its own padding (transformers' pooling), so what the mask
        leaves out is filled with that, whatever the policy pads with.
        """
        import torch

        assert self.model is not None
        padded = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, self.pad_token_id)
        with torch.no_grad():
            return sequence_scores(self.model, {**batch, "input_ids": padded})


class SharedReward(Frozen):
    """A reward model that is an adapter and a scalar head on the policy's own base (`models.policy_and_value`)."""

    def __init__(self, identity: Identity, tokenizer: Any) -> None:
        super().__init__(identity, None, adapter=identity.role)
        self.tokenizer = tokenizer

    def scores(self, policy: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the scores (B, fp32) that `policy`, the engine of a `PolicyAndValue`, gives in this role."""
        import torch

        padding, role = self.tokenizer.pad_token_id, self.identity.role
        with torch.no_grad():
            pack = pack_for(policy, batch, whole=True, last_not=padding)
            if pack is not None:
                return policy(pack=pack, role=role).scores  # type: ignore[no-any-return]
            padded = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, padding)
            return policy(input_ids=padded, attention_mask=batch["attention_mask"], role=role).scores  # type: ignore[no-any-return]

    def _parameters(self, policy: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Return its own adapter and head; the base beneath is the reference's to watch."""
        return [(name, p) for name, p in bare(policy).named_parameters() if f".{self.identity.role}." in name]


def bare(model: nn.Module) -> Any:
    """Return the model inside an engine, or the model itself."""
    return getattr(model, "module", model)


def is_resident(parameter: nn.Parameter) -> bool:
    """Tell whether ZeRO-3 keeps the whole of a parameter gathered on this rank at the moment."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return getattr(parameter, "ds_persist", False) and parameter.ds_status == ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]


def _foreign(name: str, adapter: str | None) -> bool:
    """Tell whether a parameter belongs to an adapter that the frozen role does not compute with."""
    return "reward_heads." in name or ".lora_" in name and (adapter is None or f".{adapter}." not in name)


def freeze(model: Any) -> Any:
    """Make `model` frozen: evaluation mode (no dropout), no gradients, no activation checkpointing."""
    model.eval()
    model.requires_grad_(False)
    if getattr(model, "is_gradient_checkpointing", False):
        model.gradient_checkpointing_disable()
    return model

"""Frozen models: the reference (and later reward) copies alignment needs, resolved, loaded, frozen and watched.

A role has a source and a digest, resolved once, written to the run's manifest and reused on resume: it is never "the
policy as it is now". It is loaded from its source, never deep-copied. Where it lives is a choice with a reason:

- `adapter`: the policy's own base with the adapter off, or a frozen copy of the adapter the policy started from;
- `sharded`: a ZeRO-3 inference engine of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit import zero
from align_kit.errors import UserError
from align_kit.forward.logprobs import TokenLogps, token_logps
from align_kit.models import load, lora, source

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

REFERENCE_ADAPTER = "reference"


@dataclass(frozen=True)
class Identity:
    """Who a frozen model is: its role, the source it came from, that source's content digest."""

    role: str
    name: str
    digest: str
    placement: str
    reason: str
    differs: bool = False  # from the policy's start, on purpose

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


# --- resolve ----------------------------------------------------------------------------------------------


def resolve_reference(
    *,
    policy: source.Source,
    policy_digest: str,
    use_peft: bool,
    given: str | None,
    placement: str,
    differs: bool,
    recorded: Mapping[str, str] | None,
    stage: int = 3,
    whole_modules: bool = False,
) -> tuple[source.Source, Identity]:
    """Decide which model the reference is and where it lives.

    `given` is `reference_model_name_or_path`; `recorded` is the identity in the manifest of the run that is resumed:
    it wins, and its content must be what it was. Raises `UserError` where the reference is not the policy's start
    (unless `differs`), where it changed since, or where the placement cannot hold it.
    """
    name = recorded["name"] if recorded else given
    start = policy if name in (None, policy.name) else source.resolve(name, option="reference_model_name_or_path")
    identity = policy_digest if start is policy else source.digest(start)
    if recorded and identity != recorded["digest"]:
        raise UserError(
            f"the reference {start.name} has changed since this run began (digest {identity[:12]}, was "
            f"{recorded['digest'][:12]}); restore it, or start anew with --overwrite"
        )
    if not recorded and identity != policy_digest and not differs:
        raise UserError(
            f"the reference {start.name} (digest {identity[:12]}) is not what the policy starts from ({policy.name}, "
            f"{policy_digest[:12]}); drop reference_model_name_or_path, or set reference_differs: true if meant so"
        )
    chosen, reason = _place(placement, use_peft, identity != policy_digest, whole_modules)
    if chosen == "sharded" and stage != 3:
        reason += f" (whole on each rank: ZeRO-{stage} shards no weights)"
    return start, Identity("reference", start.name, identity, chosen, reason, differs=identity != policy_digest)


def _place(placement: str, use_peft: bool, separate: bool, whole_modules: bool) -> tuple[str, str]:
    """Return where the reference lives and why; modules trained whole are not in the base any more."""
    if use_peft and whole_modules and placement != "sharded":
        if placement == "adapter":
            raise UserError("reference_placement adapter cannot hold modules that lora_modules_to_save trains whole")
        return "sharded", "lora_modules_to_save changes the base itself"
    if placement == "auto":
        placement = "adapter" if use_peft and not separate else "sharded"
        if placement == "adapter":
            return placement, "the policy's base already holds it"
        return placement, "the policy's weights change, so it needs its own"
    if placement == "adapter" and (not use_peft or separate):
        raise UserError(
            "reference_placement adapter needs use_peft and the policy's own start as reference; use sharded"
        )
    return placement, "as configured"


def refuse_checkpoint_of(phase: str, policy: source.Source, started_as: Mapping[str, Any] | None) -> None:
    """Refuse a `phase` checkpoint as the start of a `phase` run: it would silently become its own reference.

    `started_as` is the manifest of the run the checkpoint belongs to.
    """
    if (policy.folder / "trainer_state.json").is_file() and started_as and started_as.get("phase") == phase:
        before = started_as.get("frozen", {}).get("reference", {}).get("name", "its own")
        raise UserError(
            f"{policy.name} is a checkpoint of a {phase} run whose reference is {before}; to go on with that run give "
            f"--resume, to start a new one give reference_model_name_or_path and reference_differs: true"
        )


# --- hold -------------------------------------------------------------------------------------------------


class Frozen:
    """A frozen model in its place: computes log-probabilities and tells whether its weights are what they were."""

    def __init__(self, identity: Identity, model: nn.Module | None, *, adapter: str | None = None) -> None:
        self.identity = identity
        self.model = model  # None: the policy's own module computes, with `adapter` (None: its bare base) switched on
        self.adapter = adapter
        self._fingerprint: int | None = None

    def token_logps(self, policy: nn.Module, batch: Mapping[str, Tensor]) -> TokenLogps:
        """Return the frozen model's log-probabilities of `batch`: no gradients, no dropout."""
        import torch

        with torch.no_grad():
            if self.model is not None:
                return token_logps(self.model, batch)
            was_training = policy.training
            policy.eval()
            with lora.adapter_active(policy, self.adapter):
                result = token_logps(policy, batch)
            policy.train(was_training)
            return result

    def watch(self, policy: nn.Module) -> None:
        """Remember the weights as they are now; call once, after the engines are made."""
        self._fingerprint = self.fingerprint(policy)

    def check(self, policy: nn.Module, when: str) -> None:
        """Raise `UserError` where this rank's share of the frozen weights is not what it was at load."""
        if self._fingerprint is not None and self.fingerprint(policy) != self._fingerprint:
            raise UserError(
                f"the frozen {self.identity.role} ({self.identity.name}) changed in memory, seen {when}; its results "
                "can no longer be trusted: resume from the last checkpoint and check this machine's memory"
            )

    def fingerprint(self, policy: nn.Module) -> int:
        """Return a 64-bit sum over this rank's share of the frozen weights."""
        total = 0
        for parameter in _frozen_parameters(self.model or policy, None if self.model is not None else self.adapter):
            total = (total + _sum64(parameter)) % (1 << 64)
        return total


def _frozen_parameters(model: nn.Module, adapter: str | None) -> list[torch.Tensor]:
    """Return what of `model` the frozen role is made of, each the local shard where ZeRO-3 has split it."""
    mine = []
    for name, parameter in model.named_parameters():
        foreign = ".lora_" in name and (adapter is None or f".{adapter}." not in name)
        if not parameter.requires_grad and not foreign:
            mine.append(getattr(parameter, "ds_tensor", parameter.data))
    return mine


def _sum64(tensor: torch.Tensor) -> int:
    import torch

    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].to(torch.int64).sum())


def load_reference(
    start: source.Source,
    identity: Identity,
    policy_is_adapter: bool,
    engine_config: Mapping[str, Any],
    hidden_size: int | None,
    **loading: Any,
) -> Frozen:
    """Return the reference in its place; `loading` goes to `models.load.load_policy`.

    `engine_config` is the policy's; what is "auto" in it follows from `hidden_size`, as it does for the policy.
    """
    if identity.placement == "adapter":
        return Frozen(identity, None, adapter=REFERENCE_ADAPTER if policy_is_adapter else None)
    model = freeze(load.load_policy(start, **loading))
    return Frozen(identity, _sharded(model, zero.frozen_config(engine_config, hidden_size)))


def freeze(model: Any) -> Any:
    """Make `model` frozen: evaluation mode (no dropout), no gradients, no activation checkpointing."""
    model.eval()
    model.requires_grad_(False)
    if getattr(model, "is_gradient_checkpointing", False):
        model.gradient_checkpointing_disable()
    return model


def _sharded(model: Any, config: Mapping[str, Any]) -> nn.Module:
    """Return a ZeRO-3 inference engine around `model`; below stage 3 the model itself, on this rank's device."""
    import deepspeed
    import torch

    if config["zero_optimization"].get("stage") != 3:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return model.to(device)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def of_run(folder: Path) -> Path:
    """Return the run folder a checkpoint folder lies in, or the folder itself."""
    return folder.parent if folder.name.startswith("checkpoint-") else folder

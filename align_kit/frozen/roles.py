"""The frozen models a run asks for, role by role: who they are, where they live, loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align_kit.config import Config
from align_kit.frozen.cached import cached_reference
from align_kit.frozen.hold import Frozen, RewardModel, SharedReward
from align_kit.frozen.identity import resolve_reference, resolve_reward
from align_kit.frozen.moving import MovingReference
from align_kit.frozen.place import Site, engine_of, load_reference, load_reward
from align_kit.models import lora, source

Recorded = Mapping[str, Mapping[str, Any]]  # identities by role, from the manifest of the run that is resumed


def reference(
    config: Config,
    args: Any,
    policy: source.Source,
    policy_digest: str,
    site: Site,
    recorded: Recorded,
    checkpoint: Path | None,
) -> Frozen:
    """Return the run's reference in its place; a moving one as it was in `checkpoint`, where the run goes on.

    `policy` is what the policy starts from, `policy_digest` the digest of its content.
    """
    run, moves = config.run, getattr(args, "sync_ref_model", False)
    stored = getattr(args, "precompute_ref_log_probs", False)
    where, identity = resolve_reference(
        policy=policy,
        policy_digest=policy_digest,
        use_peft=config.model.use_peft,
        given=run.reference_model_name_or_path,
        placement="cached" if stored else run.reference_placement,
        differs=run.reference_differs,
        recorded=recorded.get("reference"),
        stage=site.stage,
        whole_modules=bool(config.model.lora_modules_to_save) or lora.trains_whole_modules(policy),
        moves=moves,
        room=site.room(),
    )
    if identity.placement == "cached":
        rows = getattr(args, "precompute_ref_batch_size", None) or args.per_device_train_batch_size
        return cached_reference(where, identity, site, rows)
    if not moves:
        return load_reference(where, identity, site, policy_is_adapter=policy.is_adapter)
    alpha, every = args.ref_model_mixup_alpha, args.ref_model_sync_steps
    held = MovingReference(identity, engine_of(where, site), alpha=alpha, every=every)
    if checkpoint is not None:
        held.restore(checkpoint)
    return held


def rewards(
    args: Any, site: Site, recorded: Recorded, *, base: source.Source | None = None
) -> dict[str, RewardModel | SharedReward]:
    """Return the run's reward models by role (`reward`, `reward_1`, ...), loaded one after the other.

    `base` is the policy's base where LoRA leaves it as it is. None where rewards are functions only.
    """
    held = {}
    for number, name in enumerate(_reward_names(args, recorded)):
        role = f"reward_{number}" if number else "reward"
        where, identity = resolve_reward(
            name,
            role=role,
            placement=args.reward_placement,
            recorded=recorded.get(role),
            base=base,
            stage=site.stage,
            room=site.room(),  # what the models before have left
        )
        held[role] = load_reward(where, identity, site)
    return held


def _reward_names(args: Any, recorded: Recorded) -> list[str]:
    """Return the reward models that are asked for, or those of the run that goes on."""
    if before := [str(one["name"]) for role, one in recorded.items() if role.partition("_")[0] == "reward"]:
        return before
    given = args.reward_model_name_or_path or []
    return [given] if isinstance(given, str) else list(given)

"""Who a frozen model is: role, source, content digest and placement, decided once and kept in the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from align_kit.errors import UserError
from align_kit.frozen.choice import Room, place_apart, place_reference
from align_kit.models import source


@dataclass(frozen=True)
class Identity:
    """Who a frozen model is: its role, the source it came from, that source's content digest, and where it lives.

    `measured` holds what was found out when it was put there: the error of an int8 copy, for one.
    """

    role: str
    name: str
    digest: str
    placement: str
    reason: str
    differs: bool = False  # from the policy's start, on purpose
    measured: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def found(self, words: str, **measured: float) -> Identity:
        """Return it with `words` added to the reason, and what was measured."""
        return replace(self, reason=f"{self.reason}; {words}", measured={**self.measured, **measured})


def resolve_reference(
    *,
    policy: source.Source,
    policy_digest: str,
    use_peft: bool,
    given: str | None,
    placement: str,
    differs: bool,
    recorded: Mapping[str, Any] | None,
    stage: int = 3,
    whole_modules: bool = False,
    moves: bool = False,
    room: Room | None = None,
) -> tuple[source.Source, Identity]:
    """Decide which model the reference is and where it lives.

    `given` is `reference_model_name_or_path`; `recorded` is the identity in the manifest of the run that is resumed:
    it wins, and its content must be what it was. `moves` says that the reference follows the policy; `room` is what
    `auto` compares. Raises `UserError` where the reference is not the policy's start (unless `differs`), where it
    changed since, or where the placement cannot hold it.
    """
    name = recorded["name"] if recorded else given
    start = policy if name in (None, policy.name) else source.resolve(name, option="reference_model_name_or_path")
    identity = policy_digest if start is policy else source.digest(start)
    _check_unchanged("reference", start, identity, recorded)
    if not recorded and identity != policy_digest and not differs:
        raise UserError(
            f"the reference {start.name} (digest {identity[:12]}) is not what the policy starts from ({policy.name}, "
            f"{policy_digest[:12]}); drop reference_model_name_or_path, or set reference_differs: true if meant so"
        )
    separate = identity != policy_digest
    chosen, reason = place_reference(
        _as_recorded(placement, recorded),
        start,
        use_peft=use_peft,
        separate=separate,
        whole_modules=whole_modules,
        stage=stage,
        moves=moves,
        room=room,
    )
    if recorded and placement == "auto" and not moves:
        reason = recorded["reason"]
    return start, Identity("reference", start.name, identity, chosen, reason, differs=separate)


def resolve_reward(
    name: str,
    *,
    role: str,
    placement: str,
    recorded: Mapping[str, Any] | None,
    base: source.Source | None = None,
    stage: int = 3,
    room: Room | None = None,
) -> tuple[source.Source, Identity]:
    """Decide which model the reward role `role` is and where it lives; `name` is a folder or a hub id.

    `base` is the policy's base where LoRA leaves it as it is, so that an adapter of the same base can be `shared`.
    Raises `UserError` where there is nothing to load, where it changed since the run that is resumed began, or where
    the placement cannot hold it.
    """
    start = source.resolve(recorded["name"] if recorded else name, option="reward_model_name_or_path")
    identity = source.digest(start)
    _check_unchanged(role, start, identity, recorded)
    asked, apart = _as_recorded(placement, recorded), ""
    if asked == "shared" or (asked == "auto" and base is not None and start.is_adapter):
        apart = _not_shared(start, base)
        if asked == "shared" and apart:
            raise UserError(f"reward_placement shared: {apart}; use sharded")
        asked = asked if apart else "shared"
    if asked == "shared":
        chosen, reason = "shared", "an adapter of the policy's own base"
    else:
        chosen, reason = place_apart(asked, start, option="reward_placement", stage=stage, room=room, why=apart)
    if recorded and placement == "auto":
        reason = recorded["reason"]
    return start, Identity(role, start.name, identity, chosen, reason)


def _not_shared(reward: source.Source, base: source.Source | None) -> str:
    """Return why a reward model cannot be an adapter on the policy's base; empty where it can."""
    if base is None:
        return "the policy trains its base itself; only with use_peft does the base stay as it is"
    if reward.base is None:
        return f"{reward.name} is a whole model, not an adapter"
    theirs, ours = source.digest(reward.base), source.digest(base)
    if theirs != ours:
        return (
            f"the adapter {reward.name} was trained on another base ({reward.base.name}, digest {theirs[:12]}) than "
            f"the policy's ({base.name}, {ours[:12]})"
        )
    return ""


def _check_unchanged(role: str, start: source.Source, digest: str, recorded: Mapping[str, Any] | None) -> None:
    if recorded and digest != recorded["digest"]:
        raise UserError(
            f"the {role} {start.name} has changed since this run began (digest {digest[:12]}, was "
            f"{recorded['digest'][:12]}); restore it, or start anew with --overwrite"
        )


def _as_recorded(placement: str, recorded: Mapping[str, Any] | None) -> str:
    """Return the placement `auto` came to when the run began, so that other memory does not change a resumed run."""
    return str(recorded["placement"]) if recorded and placement == "auto" else placement


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


def of_run(folder: Path) -> Path:
    """Return the run folder a checkpoint folder lies in, or the folder itself."""
    return folder.parent if folder.name.startswith("checkpoint-") else folder

"""Whether a run that goes on is the run it was: what it was told, its data and its models, each as soon as it is known.

What differs and may is kept in `RunFolder.changes`: the stages that would take a decision from the manifest look
there, the header says it, and the manifest keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from align_kit import log
from align_kit.checkpoint import contract
from align_kit.checkpoint.contract import Difference
from align_kit.config import BatchPlan, Config
from align_kit.config.resolved import ALWAYS_SO, OUR_DEFAULT
from align_kit.config.schema import namespace
from align_kit.data.prepare import Prepared
from align_kit.models import source
from align_kit.models.source import Source
from align_kit.registry import Recipe
from align_kit.run_folder import RunFolder
from align_kit.scrub import scrubbed
from align_kit.stages.engine import Engine

SHOWN = 12  # digits of a digest in a message
DEFAULT = "the default"  # where a value stands that nobody gives


def allowed(config: Config) -> frozenset[str]:
    """Return what `allow_change` names; raise `UserError` for what is no option and no fact of a run."""
    return contract.names_in(config.run.allow_change, namespace(config.config_class))


def keep(home: RunFolder, config: Config, found: list[Difference]) -> None:
    """Raise `UserError` for what differs and may not; keep the rest in `home.changes`."""
    contract.check(found, allowed(config), home.path)
    home.changes += [one.as_dict() | {"line": one.line + _consequence(one)} for one in found]


def _consequence(one: Difference) -> str:
    return ", and the schedule is that of the new length" if one.name in contract.LENGTH else ""


def keep_options(recipe: Recipe, config: Config, engine: Engine, plan: BatchPlan, home: RunFolder) -> None:
    """Compare every option, the batch arithmetic, the ranks and the engine with those of the run that goes on."""
    home.changes = []
    was, now = _recorded(home.manifest, config), _facts(recipe, config, engine, plan)
    if was.get("world_size") != plan.world_size and "world_size" not in allowed(config):
        now.pop("global_batch_size")  # it is kept where other ranks are allowed
    origin = {**dict.fromkeys(now, DEFAULT), **dict.fromkeys(contract.FACTS, ""), **config.origin}
    for name, (value, _) in home.manifest.get("derived", {}).items():
        if name in contract.BY_CONTENT:
            continue
        if not _overridden(name, was, now, home.manifest, config):
            now[name] = value
        was[name] = value
    keep(home, config, contract.differences(was, now, origin))


def _recorded(manifest: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return the options and facts in a manifest; options that were not there then are at their defaults."""
    defaults = {name: key.default for name, key in namespace(config.config_class).items()}
    batch = manifest.get("batch", {})
    found = {**defaults, "env": {}, **manifest.get("config", {})}
    found |= {name: manifest[name] for name in ("phase", "world_size", "precision") if name in manifest}
    found.pop("deepspeed", None)
    if "asked_engine" in manifest:
        found["deepspeed"] = manifest["asked_engine"]
    if batch:
        found["global_batch_size"] = batch["per_device"] * batch["world_size"] * batch["accumulation"]
    return found


def _facts(recipe: Recipe, config: Config, engine: Engine, plan: BatchPlan) -> dict[str, Any]:
    """Return the options and facts of the run as it is started now, as its manifest would say them."""
    facts = {
        "env": {},
        **config.as_dict(),
        "phase": recipe.name,
        "world_size": plan.world_size,
        "precision": engine.precision,
        "deepspeed": engine.config,
        "global_batch_size": plan.global_batch,
    }
    return dict(scrubbed(json.loads(json.dumps(facts, default=str))))


def _overridden(
    name: str, was: Mapping[str, Any], now: Mapping[str, Any], manifest: Mapping[str, Any], config: Config
) -> bool:
    """Tell whether an option that was derived when the run began is now said, otherwise than it was said then."""
    if now[name] != was[name]:
        return True
    said_before = manifest.get("origin", {}).get(name) not in (None, OUR_DEFAULT, ALWAYS_SO)
    return config.given(name) and not said_before and now[name] != "auto"


# --- what is compared by content --------------------------------------------------------------------------------------


def keep_data(config: Config, rows: Prepared, home: RunFolder) -> None:
    """Compare the tokenised rows, in their order, with those of the run that goes on."""
    if home.resume_from is None:
        return
    recorded, now = home.manifest.get("data", {}), rows.accounts()
    found = []
    for split, name in (("train", "data"), ("eval", "eval_data")):
        if split in recorded and split in now:  # evaluation may begin, or end, with the run that goes on
            was, new = _of_rows(recorded[split]), _of_rows(now[split])
            if was != new:
                found.append(Difference(name, was, new))
    keep(home, config, found)
    if any(one.name == "data" for one in found):
        log.warn("the data has changed: within this epoch some rows may be seen twice, others not at all")


def _of_rows(account: Mapping[str, Any]) -> str:
    made = account["tokenised"]
    return f"{made['rows_out']} rows ({made['digest'][:SHOWN]})"


def keep_length(config: Config, home: RunFolder) -> None:
    """Refuse a run that would end before its checkpoint; the trainer does where its length is told in epochs."""
    if config.value("max_steps") > 0:
        contract.check_length(home.step, config.value("max_steps"))


def keep_policy(config: Config, home: RunFolder, where: Source, digest: str) -> None:
    """Compare what the policy started from with what is named now, wherever it lies."""
    recorded = home.manifest["policy"]
    if digest == recorded["digest"]:
        return
    fixed = "an adapter means nothing without its base" if config.model.use_peft else ""
    was, now = _model(recorded["name"], recorded["digest"]), _model(where.name, digest)
    keep(home, config, [Difference("policy", was, now, config.origin.get("model_name_or_path", ""), fixed=fixed)])


def keep_frozen(config: Config, home: RunFolder, policy: Source, digest: str) -> None:
    """Compare the reference and the reward models with those that are named now, wherever they lie.

    `policy` is what the policy starts from, `digest` that of its content. The manifest in memory then names them where
    they are, and no more where they are others: those are resolved anew.
    """
    recorded: dict[str, Any] = dict(home.manifest.get("frozen", {}))
    _keep_reference(config, home, recorded, policy, digest)
    _keep_rewards(config, home, recorded)
    home.manifest = {**home.manifest, "frozen": recorded}


def _keep_reference(config: Config, home: RunFolder, recorded: dict[str, Any], policy: Source, digest: str) -> None:
    if "reference" not in recorded:
        return
    was, option = recorded["reference"], "reference_model_name_or_path"
    name = config.run.reference_model_name_or_path or was["name"]
    if name in (policy.name, home.manifest["policy"]["name"]):
        where, found = policy, digest
    else:
        where = source.resolve(name, option=option)
        found = source.digest(where)
    if found == was["digest"]:
        recorded["reference"] = {**was, "name": where.name}
        return
    moves = "one that moves is in the checkpoint" if config.training.get("sync_ref_model") else ""
    now = _model(where.name, found)
    difference = Difference(
        "reference", _model(was["name"], was["digest"]), now, config.origin.get(option, ""), "", moves
    )
    keep(home, config, [difference])
    del recorded["reference"]


def _keep_rewards(config: Config, home: RunFolder, recorded: dict[str, Any]) -> None:
    roles = [role for role in recorded if role.partition("_")[0] == "reward"]
    option = "reward_model_name_or_path"
    if option not in namespace(config.config_class):
        return
    named = config.value(option) or [recorded[role]["name"] for role in roles]
    found = [source.resolve(name, option=option) for name in ([named] if isinstance(named, str) else named)]
    digests = [source.digest(where) for where in found]
    if digests == [recorded[role]["digest"] for role in roles]:
        for role, where in zip(roles, found, strict=True):
            recorded[role] = {**recorded[role], "name": where.name}
        return
    was = ", ".join(_model(recorded[role]["name"], recorded[role]["digest"]) for role in roles) or "none"
    now = ", ".join(_model(where.name, one) for where, one in zip(found, digests, strict=True))
    keep(home, config, [Difference("reward", was, now, config.origin.get(option, ""))])
    for role in roles:
        del recorded[role]


def _model(name: str, digest: str) -> str:
    return f"{name} ({digest[:SHOWN]})"

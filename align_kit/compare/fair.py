"""Finished runs held against each other: equal in all but what is compared, or the comparison is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align_kit import registry
from align_kit.compare.arms import ADAPTER
from align_kit.compare.reading import Ran
from align_kit.errors import UserError

# Facts that may follow from a key that is compared. Nothing follows from the others.
FOLLOWS = {
    **dict.fromkeys(("max_steps", "num_train_epochs"), {"steps", "tokens"}),
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"),
        {"batch", "steps", "tokens"},
    ),
    **dict.fromkeys(
        ("max_length", "truncation_mode", "control_tokens", "completion_only_loss", "assistant_only_loss",
         "chat_template_path", "eos_token", "pad_token", "datasets", "packing"),
        {"data", "held-out data", "steps", "tokens"},
    ),
    **dict.fromkeys(
        ("model_name_or_path", "model_revision", "starts_from", "config_name", "config_overrides", "tokenizer_name"),
        {"start", "frozen models", "data", "held-out data", "steps", "tokens"},
    ),
    **dict.fromkeys(("deepspeed",), {"engine"}),
    **dict.fromkeys(("bf16", "fp16", "dtype"), {"precision"}),
    **dict.fromkeys(("train_sampling_strategy", "group_by_length", "skip_steps"), {"tokens"}),
    **dict.fromkeys(("reference_model_name_or_path", "reward_model_name_or_path"), {"frozen models"}),
}  # fmt: skip


def facts(ran: Ran) -> dict[str, Any]:
    """Return what of a run must be equal in every arm with the same seed.

    "tokens" are those of each logged stretch: the same batches in the same order. A phase that trains on what its
    policy writes has no such order.
    """
    manifest = ran.manifest
    splits = {name: _digests(account) for name, account in manifest["data"].items()}
    tokens = None if registry.get(manifest["phase"]).writes else ran.tokens_by_step
    return {
        "start": manifest["policy"]["digest"],
        "frozen models": {role: one["digest"] for role, one in manifest["frozen"].items()},
        "data": splits.get("train"),
        "held-out data": splits.get("eval"),
        "batch": manifest["batch"],
        "steps": manifest["steps"],
        "tokens": tokens,
        "engine": manifest["asked_engine"],
        "precision": manifest["precision"],
        "world size": manifest["world_size"],
        "versions": manifest["versions"],
        "git revision": manifest["git"],
    }


def _digests(account: dict[str, Any]) -> tuple[str, str]:
    return account["digest"], account["tokenised"]["digest"]


def check(runs: Sequence[Ran], factor: Sequence[str]) -> None:
    """Raise `UserError` for the first fact in which runs with one seed differ and which `factor` does not explain."""
    explained = set().union(*(FOLLOWS.get(key, set()) for key in factor if key not in ADAPTER))
    first: dict[int, tuple[Ran, dict[str, Any]]] = {}
    for ran in runs:
        mine = facts(ran)
        other, theirs = first.setdefault(ran.seed, (ran, mine))
        for name in mine:
            if mine[name] != theirs[name] and name not in explained:
                raise UserError(
                    f"the runs {other.home} and {ran.home} differ in {name} ({_short(theirs[name], mine[name])}), "
                    f"which {', '.join(factor[:3])} does not explain: no comparison; remove the older"
                )


def equal(runs: Sequence[Ran]) -> list[str]:
    """Return the names of the facts that are equal in all runs with one seed."""
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for ran in runs:
        by_seed.setdefault(ran.seed, []).append(facts(ran))
    names = by_seed[runs[0].seed][0]
    alike = [
        name for name in names if all(one[name] == some[0][name] for some in by_seed.values() for one in some)
    ]
    return [{"tokens": "tokens and their order"}.get(name, name) for name in alike]


def drawn_by_seeds(runs: Sequence[Ran]) -> list[str]:
    """Return which of a run's rows, "data" or "held-out data", are others where an arm has another seed."""
    first: dict[str, dict[str, Any]] = {}
    pairs = [(facts(ran), first.setdefault(ran.arm, facts(ran))) for ran in runs]
    return [name for name in ("data", "held-out data") if any(one[name] != other[name] for one, other in pairs)]


def same_held_out(runs: Sequence[Ran], others: Sequence[Ran]) -> bool:
    """Tell whether a run of `runs` was evaluated on the very rows that one of `others` was."""
    before, after = ([facts(ran)["held-out data"] for ran in some] for some in (runs, others))
    return any(one in after for one in before)


def _short(before: Any, after: Any) -> str:
    """Return what differs, in a few words."""
    if isinstance(before, dict) and isinstance(after, dict):
        key = next(key for key in {**before, **after} if before.get(key) != after.get(key))
        return f"{key}: {str(before.get(key))[:40]}, {str(after.get(key))[:40]}"
    if isinstance(before, list) and isinstance(after, list):
        pairs = [(a, b) for a, b in zip(before, after, strict=False) if a != b]
        a, b = pairs[0] if pairs else (len(before), len(after))
        return f"{a}, {b}"
    return f"{str(before)[:40]}, {str(after)[:40]}"

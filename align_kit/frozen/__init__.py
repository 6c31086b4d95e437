"""Frozen models: the reference and reward models alignment needs, resolved, loaded, frozen and watched.

A role has a source and a digest, resolved once, written to the run's manifest and reused on resume: it is never "the
policy as it is now". It is loaded from its source, never deep-copied. Where it lives is a choice with a reason:

- `adapter`: the policy's own base with the adapter off, or a frozen copy of the adapter the policy started from;
- `shared`: a reward model that is an adapter and a head on the policy's own base;
- `sharded`: a ZeRO-3 inference engine of its own; `offloaded`: the same with its shards in CPU memory;
- `quantised`: an int8 copy, whole on each rank, with its measured error;
- `cached`: a reference that computed every row once and was let go; its numbers come with the batch.
"""

from align_kit.frozen.choice import Room
from align_kit.frozen.hold import Frozen, RewardModel, StoredReference, freeze
from align_kit.frozen.identity import Identity, of_run, refuse_checkpoint_of, resolve_reference, resolve_reward
from align_kit.frozen.moving import Following, MovingReference
from align_kit.frozen.place import REFERENCE_ADAPTER, Site, load_reference, load_reward
from align_kit.frozen.roles import reference, rewards

__all__ = [
    "REFERENCE_ADAPTER",
    "Following",
    "Frozen",
    "Identity",
    "MovingReference",
    "RewardModel",
    "Room",
    "Site",
    "StoredReference",
    "freeze",
    "load_reference",
    "load_reward",
    "of_run",
    "reference",
    "refuse_checkpoint_of",
    "resolve_reference",
    "resolve_reward",
    "rewards",
]

"""What lies in memory from one step to the next: counted tensor by tensor, as the engine lays them out.

Source: DeepSpeed 0.19.8, `runtime/zero/{stage3,stage_1_and_2,partition_parameters,parameter_offload}.py`. Of W ranks,
each has a shard of ceil(n / W) elements of every parameter of n (ZeRO-3), or an equal share of all trained parameters
of an optimizer's group laid end to end (ZeRO-1 and 2).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from align_kit.plan.facts import Held, Run, Shape, Weight

FP32 = 4  # bytes of an element of masters and moments
STEP = 4  # bytes of the count of steps that Adam keeps beside each tensor
ADAM = 8  # bytes of two moments of an element
# Bytes of an optimizer's state for an element, where that is not two fp32 moments; names as transformers' `optim`.
MOMENTS = {
    "sgd": 0,
    **dict.fromkeys(("adagrad", "adafactor", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit"), 4),
    **dict.fromkeys(("lion", "lion_32bit", "paged_lion", "paged_lion_32bit"), 4),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), 2),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1),
}
STEPLESS = ("sgd", "lion", "lion_32bit", "paged_lion", "paged_lion_32bit")
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")  # transformers.Trainer
ALIGNMENT = 2  # elements each rank's share of a group begins at multiples of: `nccl_start_alignment_factor`
# Elements of DeepSpeed's host buffers for NVMe: `buffer_count` x `buffer_size` for parameters, 4 for the optimizer.
NVME_PARAMETERS, NVME_OPTIMIZER = 5 * 10**8, 4
SUB_GROUP = 10**9  # elements that are updated together: `sub_group_size`

State = dict[str, int]
PASSING = ("loading", "final save")  # of `host`: what is there before training, or after it


def persistent(run: Run) -> State:
    """Return the bytes on the fullest rank's device from one step to the next, by component.

    "parameters" are the weights that compute (a ZeRO-3 shard of each, and what stays gathered), "masters" and
    "moments" the optimizer's, "gradients" and "buckets" what the engine holds for gradients at all times; frozen
    models come under their role.
    """
    found = Counter(parameters=_weights(run.policy, run), buffers=run.policy.buffers)
    if run.engine.offload_optimizer == "none":
        found.update(_optimizer(run))
    found["buckets"] = _buckets(run)
    for held in run.frozen:
        found[held.role] += _held(held, run)
    if run.rollout and run.rollout.placement == "copied":
        found["rollout copy"] = round(_whole(_writing(run.policy), run))
    return _named(found)


def moved_out(run: Run) -> State:
    """Return the bytes of host memory that a rank takes from one step to the next for what is offloaded."""
    found = Counter[str]()
    if run.engine.offload_optimizer == "cpu":
        found.update(_optimizer(run))
        found.update(_host_gradients(run))
    if run.engine.offload_optimizer == "nvme":
        largest = min(SUB_GROUP, owned_elements(run))
        found["swap buffers"] += NVME_OPTIMIZER * FP32 * largest
        found["gradients"] = run.engine.element_bytes * owned_elements(run)
    if run.engine.offload_param == "cpu":
        found["parameters"] = _shards(run.policy, run)
    if run.engine.offload_param == "nvme":
        found["swap buffers"] += NVME_PARAMETERS * run.engine.element_bytes
    for held in run.frozen if run.engine.offload_param != "nvme" else ():
        found[held.role] += moved_shards(held, run)
    return _named(found)


def moved_shards(held: Held, run: Run) -> int:
    """Return the bytes of a rank's shards of a frozen model where these lie off its device, else 0."""
    moved = held.shape is not None and _is_sharded(held, run) and _moves(held, run)
    return _shards(held.shape, run) if moved and held.shape is not None else 0


def host(run: Run) -> State:
    """Return the bytes of host memory on the node with rank 0, by component, at the fullest moment.

    Beside what is offloaded: a copy of a checkpoint in the making, and the more of loading and the final save. Under
    ZeRO-3 rank 0 alone reads the weights, below it every rank does; the final model is gathered on rank 0, read back,
    and opened once more to be compared.
    """
    ranks = run.ranks_per_node
    found = Counter({name: ranks * count for name, count in moved_out(run).items()})
    if run.checkpoints_made:
        found["checkpoint copy"] = _snapshot(run)
    shapes = [run.policy, *(held.shape for held in run.frozen if held.shape is not None)]
    loading = max(round(_whole(shape.weights, run)) for shape in shapes) * (1 if run.engine.stage == 3 else ranks)
    stored = stored_weights(run) * run.engine.element_bytes
    saving = 2 * stored + round(_whole(_writing(run.policy), run))
    found[PASSING[loading <= saving]] = max(loading, saving)
    return _named(found)


def _named(found: Counter[str]) -> State:
    return {name: count for name, count in found.items() if count}


# --- weights ----------------------------------------------------------------------------------------------------------


def _weights(shape: Shape, run: Run) -> int:
    """Return the bytes of the trained model's weights on a rank's device."""
    if run.engine.stage < 3:
        padding = sum(_flat(group, run) - _elements(group) for group in groups(shape)) if run.engine.stage else 0
        return round(_whole(shape.weights, run)) + padding * run.engine.element_bytes
    moved = run.engine.offload_param != "none"
    return resident(shape, run, moved=moved) + (0 if moved else _shards(shape, run))


def _stored(weight: Weight, run: Run) -> float:
    """Return in how many elements of the run's precision a parameter is stored: fewer where it is quantised."""
    usual = run.engine.element_bytes
    return weight.size if weight.element_bytes is None else weight.size * weight.element_bytes / usual


def _whole(weights: Iterable[Weight], run: Run) -> float:
    """Return the bytes of whole weights."""
    return sum(_stored(weight, run) for weight in weights) * run.engine.element_bytes


def _shards(shape: Shape, run: Run) -> int:
    """Return the bytes of a rank's ZeRO-3 shards, padding included."""
    shards = (-(-_stored(weight, run) // run.world_size) for weight in shape.weights)
    return round(sum(shards)) * run.engine.element_bytes


def resident(shape: Shape, run: Run, *, moved: bool) -> int:
    """Return the bytes of what ZeRO-3 keeps gathered: parameters up to the persistence threshold.

    One rank's shards are whole, and nothing is copied to gather them unless they were moved off the device.
    """
    if run.world_size == 1 and not moved:
        return 0
    small = (weight for weight in shape.weights if _stored(weight, run) <= run.engine.persistence_threshold)
    return round(_whole(small, run))


def _held(held: Held, run: Run) -> int:
    """Return the bytes of a frozen model on a rank's device; none of what has no weights of its own."""
    if held.shape is None or held.placement in ("adapter", "shared", "cached"):
        return 0
    if not _is_sharded(held, run):
        return round(_whole(held.shape.weights, run)) + held.shape.buffers
    moved = _moves(held, run)
    shards = 0 if moved else _shards(held.shape, run)
    return shards + resident(held.shape, run, moved=moved) + held.shape.buffers


def _is_sharded(held: Held, run: Run) -> bool:
    return run.engine.stage == 3 and held.placement in ("sharded", "offloaded")


def _moves(held: Held, run: Run) -> bool:
    """Tell whether a frozen model's shards lie off the device: put there, or where the policy's are."""
    return held.placement == "offloaded" or run.engine.offload_param != "none"


def _writing(policy: Shape) -> list[Weight]:
    """Return the weights of the part of the policy that writes completions."""
    others = ("value.", "value_head.", "reward_heads.")
    mine = (weight for weight in policy.weights if not weight.name.startswith(others))
    return [weight for weight in mine if ".lora_" not in weight.name or ".default." in weight.name]


# --- the optimizer ----------------------------------------------------------------------------------------------------


def _optimizer(run: Run) -> State:
    """Return the bytes on a rank of what updates its share of the trained weights."""
    owned, stage = owned_elements(run), run.engine.stage
    own_masters = stage > 0 or run.engine.precision != "fp32"  # else the weights are updated in place
    gradients = run.engine.element_bytes * owned if stage == 3 else 0
    return {"masters": own_masters * FP32 * owned, "moments": moments_bytes(run), "gradients": gradients}


def moments_bytes(run: Run) -> int:
    """Return the bytes of the optimizer's state on a rank."""
    tensors = sum(bool(group) if run.engine.stage else len(group) for group in groups(run.policy))
    steps = 0 if run.optimizer in STEPLESS else STEP * tensors
    return owned_elements(run) * MOMENTS.get(run.optimizer, ADAM) + steps


def owned_elements(run: Run) -> int:
    """Return how many trained elements, padding included, a rank updates."""
    if run.engine.stage == 3:
        return sum(-(-weight.size // run.world_size) for weight in run.policy.weights if weight.trained)
    if run.engine.stage == 0:
        return run.policy.trained_size
    return sum(_flat(group, run) for group in groups(run.policy)) // run.world_size


def groups(shape: Shape) -> tuple[list[Weight], list[Weight]]:
    """Return the trained parameters as the optimizer groups them: with weight decay and without."""
    found: tuple[list[Weight], list[Weight]] = ([], [])
    for weight in shape.weights:
        if weight.trained:
            found[NO_DECAY.search(weight.name.lower()) is not None].append(weight)
    return found


def _elements(weights: Iterable[Weight]) -> int:
    return sum(weight.size for weight in weights)


def _flat(group: Sequence[Weight], run: Run) -> int:
    """Return the elements of a group laid end to end, with the padding that lets ranks share it (ZeRO-1 and 2)."""
    unit = ALIGNMENT * run.world_size
    return -(-_elements(group) // unit) * unit


def _buckets(run: Run) -> int:
    """Return the bytes of gradients' buffers that stay on a rank's device."""
    if run.engine.stage == 3:
        return run.engine.reduce_bucket * run.engine.element_bytes if run.engine.contiguous_gradients else 0
    moved = run.engine.stage > 0 and run.engine.offload_optimizer != "none"
    return _largest(run) * run.engine.element_bytes if moved else 0


def _largest(run: Run) -> int:
    return max((weight.size for weight in run.policy.weights if weight.trained), default=0)


def _host_gradients(run: Run) -> State:
    """Return what an optimizer on the host keeps there beside its states; for ZeRO-3 beside `_optimizer`'s.

    An fp32 gradient of each master; below ZeRO-3 also the updated weights on their way back, one gradient of the
    largest parameter, and with accumulation those of every parameter that lies in the rank's share.
    """
    usual, owned = run.engine.element_bytes, owned_elements(run)
    if run.engine.stage == 3:
        return {"gradients": FP32 * owned}
    passing = _largest(run) + (_fullest_share(run) if run.accumulation > 1 else 0)
    return {"gradients": FP32 * owned, "passing": usual * (owned + passing)}


def _fullest_share(run: Run) -> int:
    """Return the most elements that parameters have together which lie in one rank's share, wholly or in part."""
    shares = [0] * run.world_size
    for group in groups(run.policy):
        size, start = _flat(group, run) // run.world_size, 0
        for weight in group:
            first, last = start // size, (start + weight.size - 1) // size
            for rank in range(first, last + 1):
                shares[rank] += weight.size
            start += weight.size
    return max(shares)


# --- what is stored ---------------------------------------------------------------------------------------------------


def stored_weights(run: Run) -> int:
    """Return the elements of the model a run stores: the policy's, or of LoRA what is trained of it."""
    return sum(weight.size for weight in _writing(run.policy) if weight.trained or not run.use_peft)


def _snapshot(run: Run) -> int:
    """Return the bytes of host memory that the node with rank 0 takes for a checkpoint that is being written."""
    ranks, sharded = run.ranks_per_node, run.engine.stage == 3
    whole = stored_weights(run) * run.engine.element_bytes  # rank 0's, to be written
    optimizer = (FP32 * owned_elements(run) + moments_bytes(run)) * ranks
    again = whole * ranks // run.world_size if sharded else whole  # shards to join, or what DeepSpeed stores of them
    return whole + optimizer + (0 if sharded and run.use_peft else again)

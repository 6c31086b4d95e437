"""What lies on the fullest rank's device beside what stays there, at each moment of a run.

Read in `align_kit/forward` (the run's own forward), torch 2.13, transformers 5.23 and DeepSpeed 0.19.8
(`runtime/zero/{stage3,stage_1_and_2,partitioned_param_coordinator}.py`, `runtime/comm/coalesced_collectives.py`).
P predictions, V vocabulary, H hidden, N tokens of a row.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate

from align_kit.plan.activations import block_for
from align_kit.plan.facts import Block, Held, Micro, Rollout, Run, Shape, Weight

FP32, FP64 = 4, 8
CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}  # logits of the head that live together: `forward.head.CHUNK`
NEAR = 1 << 18  # of which those that are exponentiated together on a CPU: `forward.head.NEAR`
SUBGROUP = 1_000_000_000  # elements that ZeRO-3 updates at a time: DeepSpeed's sub_group_size
Parts = dict[str, float]


def moments(run: Run, device: str = "cpu") -> dict[str, dict[str, int]]:
    """Return the bytes above what is persistent, by moment and component, on ranks whose device is "cpu" or "cuda".

    "forward" is the begin of a micro-batch's forward, "head" where it turns into the backward, "backward" the begin of
    the latter in the layers, "reduce" its end; "reference" is a frozen model's forward before the head turns, "step"
    the optimizer's, "save" the storing of the final model.
    """
    found = {
        "forward": _begin(run, device),
        "head": _head(run, device),
        "backward": _backward(run, device),
        "reduce": _reduce(run, device),
        "step": _step(run, device),
        "save": _save(run, device),
    }
    if run.rollout:
        found |= {"rollout": _rollout(run, run.rollout), "score": _score(run, run.rollout, device)}
    elif computing := [held for held in run.frozen if held.placement != "cached"]:
        found["reference"] = _reference(run, computing, device)
    return {moment: {name: round(size) for name, size in parts.items() if size >= 1} for moment, parts in found.items()}


# --- a micro-batch ------------------------------------------------------------------------------------------------


def _begin(run: Run, device: str) -> Parts:
    """The first layers compute, while weights are fetched ahead."""
    return {
        "activations": _block(run, run.policy).forward * run.worst.tokens,
        "gathered": _ahead(run, run.policy),
        "gradients in flight": _gradients(run, device).before,
    }


def _head(run: Run, device: str) -> Parts:
    """A chunk of logits becomes their gradient; the head's own gradient is summed up in fp32."""
    weight = _head_weight(run.policy)
    # In fp32, beside each chunk's share, or the sum narrowed, in the run's own precision.
    wide = FP32 + (run.engine.element_bytes if run.engine.precision != "fp32" else 0)
    by_weight = wide * weight.size if weight and weight.trained and run.forward != "plain" else 0
    return {
        "activations": _kept(run),
        "head": _head_bytes(run, run.policy, run.worst, device, by_weight=by_weight),
        "gradients in flight": _gradients(run, device).before,
        "gathered": _gathered(run, run.policy),
    }


def _backward(run: Run, device: str) -> Parts:
    """The last layer is differentiated, computed once more before where activations are checkpointed.

    Or a later one, where gradients fill a bucket for the first time: it is reduced while the rest is still kept.
    """
    block, tokens, kept = _block(run, run.policy), run.worst.tokens, _kept(run)
    layer = tokens * (block.again - _unjoined(run) if run.checkpointing else block.backward)
    flight = _gradients(run, device)
    parts = {"activations": kept, "gradients in flight": flight.held}
    if flight.filled < 1:
        at_flush = {"activations": kept * (1 - flight.filled), "gradients in flight": flight.reduced}
        parts = max(parts, at_flush, key=lambda each: sum(each.values()))
    return {**parts, "layer": layer, "gathered": _at_hand(run, run.policy)}


def _reduce(run: Run, device: str) -> Parts:
    """The last gradients are reduced, when the activations are gone."""
    return {"gradients in flight": _gradients(run, device).last}


def _kept(run: Run) -> float:
    """Return what a forward keeps for its backward: of each layer what it saved, or its input where that is all."""
    block = _block(run, run.policy)
    if run.checkpointing:
        each = run.policy.layers * block.hidden + max(0, block.ends)
    else:
        each = run.policy.layers * (block.saved - _unjoined(run)) + block.ends
    return block.passes * run.worst.tokens * each


def _unjoined(run: Run) -> int:
    """Return the bytes a token and layer less where whole sequences attend: no segments are joined in a copy."""
    shape = run.policy
    return shape.heads * shape.head_dim * run.engine.element_bytes if run.forward == "plain" else 0


def _block(run: Run, shape: Shape) -> Block:
    return block_for(shape, run.engine.stage, run.engine.precision)


def _matrices(shape: Shape) -> list[Weight]:
    """Return the weights with a row for each word: the embedding, and the head where it has one of its own."""
    return [weight for weight in shape.weights if weight.shape == (shape.vocab, shape.hidden)]


def _head_weight(shape: Shape) -> Weight | None:
    matrices = _matrices(shape)
    return matrices[-1] if matrices and shape.head == "lm" else None


def _head_bytes(run: Run, shape: Shape, micro: Micro, device: str, *, by_weight: float | None = None) -> float:
    """Return what it takes to read tokens off hidden states: logits, and the states at P places.

    With a backward (`by_weight` bytes of the head's own gradient) the states meet theirs, and whole logits (plain)
    three like themselves in fp32: of gather's gradient, and of logsumexp's.
    """
    if shape.head != "lm":
        return 0
    element, narrow = run.engine.element_bytes, run.engine.precision != "fp32"
    if run.forward == "plain":
        return micro.tokens * shape.vocab * (2 if by_weight is None else 4) * FP32
    rows, states = min(micro.predicted, max(1, CHUNK[device] // shape.vocab)), micro.predicted * shape.hidden * element
    chunk, beside = rows * shape.vocab * FP32, rows * shape.vocab * (element if narrow else 0)
    # To be exponentiated: at once on CUDA, on a CPU by rows that its cache holds.
    read = chunk + max(beside, chunk if device == "cuda" else min(chunk, FP32 * NEAR))
    return states + (read if by_weight is None else max(read, chunk + beside + states + by_weight))


def _reference(run: Run, frozen: list[Held], device: str) -> Parts:
    """A frozen model computes, while all that the policy keeps for its backward is there, its last logits included.

    It takes most at its begin, where weights are fetched ahead, or at its head.
    """
    logits, tokens = run.worst.predicted * run.policy.vocab, run.worst.tokens
    ways: list[Parts] = []
    for shape in (held.shape or run.policy for held in frozen):
        block = _block(run, shape)
        head = block.hidden * tokens + _head_bytes(run, shape, run.worst, device)
        ways.append({"reference": block.forward * tokens, "gathered": _ahead(run, shape)})
        ways.append({"reference": head, "gathered": _gathered(run, shape)})
    most: Parts = max(ways, key=lambda parts: sum(parts.values()))
    kept_logits = FP32 * (logits if run.forward == "plain" else min(logits, CHUNK[device]))
    return {
        "activations": _kept(run),
        "head": kept_logits if run.policy.head == "lm" else 0,
        **most,
    }


def _forward(run: Run, shape: Shape, micro: Micro, device: str) -> float:
    """Return what a forward without gradient takes: a layer, or the head after the last of them."""
    block = _block(run, shape)
    return max(block.forward * micro.tokens, block.hidden * micro.tokens + _head_bytes(run, shape, micro, device))


# --- what the engine moves ----------------------------------------------------------------------------------------


def _gathered(run: Run, shape: Shape) -> float:
    """Return the weights that ZeRO-3 holds whole where the forward turns, those always whole left out.

    Where batches are walked plain it holds what is used again within `max_reuse` elements: half before the turn, half
    after it. Walked packed it lets go of each at once: the engine remembers what to keep from the trial forward that
    settles how to walk, which has no backward (its cache of `__params_to_release` outlives the trace).
    """
    sizes = _split(run, shape)
    reused = min(sum(sizes), run.engine.max_reuse // 2) if run.forward == "plain" else max(sizes, default=0)
    return run.engine.element_bytes * (reused + min(sum(sizes), run.engine.prefetch_bucket))


def _at_hand(run: Run, shape: Shape) -> float:
    """Return the weights that ZeRO-3 holds whole in the backward: as received and joined, and those fetched ahead.

    Where the forward has fetched all at once nothing is fetched ahead in the backward.
    """
    sizes = _split(run, shape)
    if run.forward == "plain":
        return _gathered(run, shape)
    ahead = 0 if _runs_ahead(run, shape) else run.engine.prefetch_bucket
    return run.engine.element_bytes * min(2 * sum(sizes), 2 * (max(sizes, default=0) + ahead))


def _ahead(run: Run, shape: Shape) -> float:
    """Return the weights that ZeRO-3 holds at the begin of a forward: as received, and those in use joined beside that.

    Every module with weights fetches another bucket: where this runs ahead of their use, all are there soon.
    """
    sizes, bucket = _split(run, shape), run.engine.prefetch_bucket
    fetched = run.engine.max_live if _runs_ahead(run, shape) else bucket
    at_hand = max(sizes, default=0) + bucket
    return run.engine.element_bytes * (min(sum(sizes), max(fetched, at_hand)) + min(sum(sizes), at_hand))


def _runs_ahead(run: Run, shape: Shape) -> bool:
    return run.engine.prefetch_bucket * len(shape.weights) >= sum(_split(run, shape))


def _split(run: Run, shape: Shape) -> list[int]:
    if run.engine.stage != 3:
        return []
    return [weight.size for weight in shape.weights if weight.size > run.engine.persistence_threshold]


@dataclass(frozen=True)
class Flight:
    """What holds gradients on their way to their owner, in bytes.

    `before` a micro-batch's backward, `held` as it begins, `reduced` while a bucket is, `last` at its end; `filled` is
    the share of the backward that is done when a bucket is reduced for the first time.
    """

    before: float
    held: float
    reduced: float
    filled: float
    last: float


def _gradients(run: Run, device: str) -> Flight:
    engine, element, trained = run.engine, run.engine.element_bytes, _trained(run)
    if engine.stage == 0:
        whole = element * trained
        return Flight(whole * (run.accumulation > 1), whole, whole, 1.0, 2 * whole)
    bucket, (first, others) = min(trained, engine.reduce_bucket), _oversized(run)
    filled = 0.0 if others else min(1.0, engine.reduce_bucket / max(1, trained))
    copies = 2 if engine.stage == 3 and device == "cpu" else 1  # joined to be reduced; gloo scatters a copy of that
    reduced, last = element * max(bucket * copies, 2 * others), element * max(bucket * copies, 2 * first)
    matrices = _matrices(run.policy)
    tied = element * matrices[0].size if len(matrices) == 1 and _head_weight(run.policy) in matrices else 0
    pending = tied if tied and matrices[0].trained else 0  # the head's share, until it joins the embedding's: the last
    if engine.stage == 3:
        return Flight(0, pending, pending + reduced, filled, last)
    buffers = element * engine.reduce_bucket * (2 if engine.overlap_comm else 1) if engine.contiguous_gradients else 0
    if engine.precision != "fp32":  # summed up in fp32
        reduced, last = reduced + FP32 * max(bucket, others), last + FP32 * max(bucket, first)
    owned, again = element * _spilling(run), run.accumulation > 1
    before = (owned if engine.stage == 2 else element * trained + buffers) * again
    held = max(before, buffers + owned * again) + pending
    # By then, earlier gradients are in the buffers (ZeRO-1) or in the share that is kept (ZeRO-2).
    ending = buffers + owned * (again and engine.stage == 2)
    return Flight(before, held, ending + pending + reduced + owned, filled, ending + last + owned)


def _oversized(run: Run) -> tuple[int, int]:
    """Return the elements of the greatest gradients that fit no bucket: the embedding's, which comes last, and others.

    Such a one is there as it was made, and once more while it is reduced.
    """
    embedding = next(iter(_matrices(run.policy)), None)
    large = [w for w in run.policy.weights if w.trained and w.size > run.engine.reduce_bucket]
    others = max((weight.size for weight in large if weight is not embedding), default=0)
    return embedding.size if embedding in large and embedding is not None else 0, others


def _trained(run: Run) -> int:
    return sum(weight.size for weight in run.policy.weights if weight.trained)


def _spilling(run: Run) -> int:
    """Return the elements of the gradients that the fullest rank keeps below ZeRO-3.

    All trained weights lie end to end, in shares as long as one another; a weight that is cut is kept whole.
    """
    ends = list(accumulate(weight.size for weight in run.policy.weights if weight.trained))
    share = -(-_trained(run) // run.world_size)
    most = 0
    for start in range(0, _trained(run), max(1, share)):
        first, last = bisect_right(ends, start), bisect_left(ends, min(start + share, ends[-1]))
        most = max(most, ends[last] - (ends[first - 1] if first else 0))
    return most


def _step(run: Run, device: str) -> Parts:
    """The optimizer reads this rank's gradients, joined and in fp32; below ZeRO-3 all then get the new weights."""
    if run.engine.offload_optimizer != "none":
        return {}
    trained, element = _trained(run), run.engine.element_bytes
    owned = trained / (run.world_size if run.engine.stage else 1)
    working = _working(run, device)
    if run.engine.stage == 3:
        return {"optimizer": FP32 * min(owned, SUBGROUP) * (1 + working)}
    if run.engine.stage == 0:
        return {"gradients in flight": element * trained, "optimizer": FP32 * owned * working}
    received = element * min(trained, run.engine.allgather_bucket) if device == "cpu" else 0  # gloo's own copy
    return {
        "optimizer": max(FP32 * owned * (1 + working), received),
        "gradients in flight": element * _spilling(run),
    }


def _working(run: Run, device: str) -> int:
    """Return how many tensors like a master the optimizer works in: Adam's denominator, twice where not in place."""
    if "adam" not in run.optimizer or "fused" in run.optimizer:
        return 0
    return 2 if device == "cpu" else 1


# --- between the steps --------------------------------------------------------------------------------------------


def _rollout(run: Run, rollout: Rollout) -> Parts:
    """The policy writes: its weights whole, keys and values of a batch, and the last step's probabilities.

    It takes most while it reads the prompts, or at the last token, when the keys and values are longest.
    """
    shape, element = run.policy, run.engine.element_bytes
    writers = min(rollout.batch_size, rollout.completions)
    token = writers * 2 * shape.kv_heads * shape.head_dim * element  # keys and values of a layer
    spread = writers * 2 * shape.heads * shape.head_dim * element if shape.heads != shape.kv_heads else 0
    written = [w.size for w in shape.weights if not w.name.startswith(("value.", "value_head.", "reward_heads."))]
    length, forward = rollout.longest_prompt + rollout.response_tokens, _block(run, shape).forward * writers
    reading: Parts = {
        "kv cache": token * rollout.longest_prompt * shape.layers,
        "activations": forward * rollout.longest_prompt,
    }
    writing: Parts = {
        "kv cache": length * (token * (shape.layers + 1) + spread),  # a layer's is copied to grow
        "head": writers * shape.vocab * (3 * FP32 + 3 * FP64),  # tempered and as log p; summed up in fp64
        "activations": forward,
    }
    gathered = element * sum(written) if run.engine.stage == 3 and rollout.placement == "gathered" else 0
    most: Parts = max(reading, writing, key=lambda parts: sum(parts.values()))
    return {"gathered": gathered, **most}


def _score(run: Run, rollout: Rollout, device: str) -> Parts:
    """Policy, value function, reference and rewards look at what was written, one after the other."""
    length = rollout.longest_prompt + rollout.response_tokens
    rows = min(rollout.score_batch_size, rollout.completions)
    micro = Micro(rows, rows * length, rows * rollout.response_tokens, rows * length * length / 2, length)
    shapes = [run.policy, *(held.shape for held in run.frozen if held.shape is not None)]
    # A change of role ends the engine's trace, and what was fetched for one role goes with it.
    ways: list[Parts] = [
        {"activations": _forward(run, shape, micro, device), "gathered": _ahead(run, shape)} for shape in shapes
    ]
    return max(ways, key=lambda parts: sum(parts.values()))


def _save(run: Run, device: str) -> Parts:
    """Rank 0 holds all that is stored, reads it back, and compares what both say of a row.

    In the host's memory, which a CPU's device is.
    """
    element, stage = run.engine.element_bytes, run.engine.stage
    stored = [weight.size for weight in run.policy.weights if weight.trained or not run.use_peft]
    if device != "cpu":
        return {"gathered": element * max(stored, default=0) if stage == 3 else 0}
    row = run.worst.longest * max(1, round(run.worst.sequences / run.per_device))
    both = 4 * row * run.policy.vocab * FP32 if run.policy.head == "lm" else 0  # logits, their difference, its size
    compared = max(both, row * _block(run, run.policy).forward)
    again = run.policy.size if run.use_peft else sum(stored)
    return {
        "gathered": element * sum(stored) if stage == 3 or not run.use_peft else 0,  # a copy below ZeRO-3
        "read back": element * again + max(compared, 1.25 * element * max(stored, default=0)),
    }

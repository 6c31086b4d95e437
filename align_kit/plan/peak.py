"""What lies on the fullest rank's device beside what stays there, at each moment of a run.

Read in `align_kit/forward` (the run's own forward), torch 2.13, transformers 5.23 and DeepSpeed 0.19.8
(`runtime/zero/{stage3,stage_1_and_2,partitioned_param_coordinator}.py`, `runtime/comm/coalesced_collectives.py`).
P predictions, V vocabulary, H hidden, N tokens of a row.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from align_kit.plan.activations import block_for
from align_kit.plan.engines import has_engine
from align_kit.plan.facts import Block, Held, Micro, Rollout, Run, Shape, Weight
from align_kit.plan.gathers import BACKWARD, EMBEDS, FORWARD, GLOO_THREADS, LEARNING
from align_kit.plan.state import resident
from align_kit.plan.whole import Whole

FP32, FP64 = 4, 8
BATCH = 3 * 8  # bytes of a batch at each place: ids, attention mask, loss mask
CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}  # logits of the head that live together: `forward.head.CHUNK`
NEAR = 1 << 18  # of which those that are exponentiated together on a CPU: `forward.head.NEAR`
REFRESHED = 1 << 26  # elements of a copied policy that are gathered together: `trainers.rollout.CHUNK`
SUBGROUP = 1_000_000_000  # elements that ZeRO-3 updates at a time: DeepSpeed's sub_group_size
Parts = dict[str, float]


def moments(run: Run, device: str = "cpu", begun: int | None = None) -> dict[str, dict[str, int]]:
    """Return the bytes above what is persistent, by moment and component, on ranks whose device is "cpu" or "cuda".

    "forward" is a micro-batch's forward in the layers, "head" where it turns into the backward, "backward" the latter
    in the layers, "reduce" its end; "reference" is a frozen model's forward before the head turns, "step" the
    optimizer's, "evaluation" what computes in one, "save" the storing of the final model. `begun`: after so many steps
    (of an online phase: iterations), while ZeRO-3 learns in which order modules run; else once it knows.
    """
    whole = Whole.of(run, device, begun)
    found = {
        "forward": _begin(run, device, whole),
        "head": _head(run, device, whole),
        "backward": _backward(run, device, whole),
        "reduce": _reduce(run, device, whole),
        "step": _step(run, device),
        "save": _save(run, device),
    }
    if run.rollout:
        found |= {"rollout": _rollout(run, run.rollout, device), "score": _score(run, run.rollout, device, whole)}
    elif computing := [held for held in run.frozen if held.placement != "cached"]:
        found["reference"] = _reference(run, computing, device, whole)
    if run.evaluated:
        batch = BATCH * run.evaluated.sequences * run.evaluated.longest * (2 if device == "cpu" else 1)  # and the next
        held = Whole.of(run, device, begun, evaluates=True)
        found["evaluation"] = {**_looking(run, run.evaluated, device, held), "batch": batch}
    return {moment: {name: round(size) for name, size in parts.items() if size >= 1} for moment, parts in found.items()}


# --- a micro-batch ------------------------------------------------------------------------------------------------


def _begin(run: Run, device: str, whole: Whole) -> Parts:
    """A layer computes, while weights are fetched ahead."""
    layer, last = _block(run, run.policy).forward * run.worst.tokens, _layers(run) - 1
    found = whole.by(LEARNING) or {last: 0}
    ways: list[Parts] = []
    for depth, held in found.items():
        before = min(depth, last)
        computes = {"activations": _kept(run, before) + layer, "head": _kept_logits(run, before, device)}
        embeds = {"activations": _block(run, run.policy).hidden * run.worst.tokens}
        ways.append({**(embeds if depth == EMBEDS else computes), "gathered": held})
    ways += ({"activations": _kept(run, max(0, depth)), "gathered": n} for depth, n in whole.come(LEARNING).items())
    return {**_most(ways), "gradients in flight": _gradients(run, device).before}


def _most(ways: Iterable[Parts]) -> Parts:
    return max(ways, key=lambda parts: sum(parts.values()))


def _head(run: Run, device: str, whole: Whole) -> Parts:
    """A chunk of logits becomes their gradient; the head's own gradient is summed up in fp32.

    Of a policy and its value function the former's, which computes before the latter does, and is differentiated after.
    """
    weight = _head_weight(run.policy)
    # In fp32, beside each chunk's share, or the sum narrowed, in the run's own precision; a CPU widens the former.
    wide = FP32 if run.engine.precision == "fp32" else FP32 * (1 + (device == "cpu")) + run.engine.element_bytes
    by_weight = wide * weight.size if weight and weight.trained and run.forward != "plain" else 0
    taken = _head_bytes(run, run.policy, run.worst, device, by_weight=by_weight)
    layers = run.policy.layers
    kept = _kept_logits(run, layers, device) + _states(run, run.policy, run.worst)
    ways = [
        (_head_bytes(run, run.policy, run.worst, device), whole.at_head(LEARNING)),
        (kept, whole.come(BACKWARD, head=True).get(layers, 0)),
        (taken, whole.at_head(BACKWARD)),
    ]
    most = _most({"head": size, "gathered": held} for size, held in ways)
    return {
        "activations": _kept(run, layers),
        "gradients in flight": _gradients(run, device).before,
        **most,
    }


def _backward(run: Run, device: str, whole: Whole) -> Parts:
    """The last layer is differentiated, computed once more before where activations are checkpointed.

    Or an earlier one, with more weights at hand; or gradients fill a bucket for the first time, which is reduced while
    the rest is still kept.
    """
    block, tokens, layers = _block(run, run.policy), run.worst.tokens, _layers(run)
    layer = tokens * (block.again - _unjoined(run) if run.checkpointing else block.backward)
    flight, found = _gradients(run, device), whole.by(BACKWARD) or {layers: 0}
    ways: list[Parts] = [
        {"activations": _kept(run, depth), "head": _kept_logits(run, depth - 1, device), "gathered": held,
         "gradients in flight": flight.held}
        for depth, held in found.items()
        if depth
    ]  # fmt: skip
    if flight.filled < 1:
        kept, left = _kept(run, layers) * (1 - flight.filled), math.ceil(layers * (1 - flight.filled))
        ways.append({"activations": kept, "gradients in flight": flight.reduced, "gathered": found.get(left, 0)})
    return {**_most(ways), "layer": layer}


def _reduce(run: Run, device: str, whole: Whole) -> Parts:
    """The last gradients are reduced, when the activations are gone."""
    return {"gradients in flight": _gradients(run, device).last, "gathered": whole.by(BACKWARD).get(0, 0)}


def _layers(run: Run) -> int:
    """Return the layers that a forward computes, of all trunks."""
    return run.policy.layers * _block(run, run.policy).passes


def _kept(run: Run, layers: int) -> float:
    """Return what a forward keeps for its backward after some `layers`: of each what it saved, or its input alone."""
    block, trunks = _block(run, run.policy), math.ceil(layers / max(1, run.policy.layers))
    each, ends = block.saved - _unjoined(run), block.ends
    if run.checkpointing:
        each, ends = block.hidden, max(0, ends)
    return run.worst.tokens * (layers * each + trunks * ends)


def _kept_logits(run: Run, layers: int, device: str) -> float:
    """Return the bytes of logits that stay for their backward, once the trunk of an LM head has run before others."""
    if run.policy.head != "lm" or layers < run.policy.layers:
        return 0
    logits = run.worst.predicted * run.policy.vocab
    return FP32 * (logits if run.forward == "plain" else min(logits, CHUNK[device]))


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
    element, narrow, states = run.engine.element_bytes, run.engine.precision != "fp32", _states(run, shape, micro)
    if run.forward == "plain":
        return micro.tokens * shape.vocab * ((2 if by_weight is None else 4) * FP32 + (element if narrow else 0))
    rows = min(micro.predicted, max(1, CHUNK[device] // shape.vocab))
    chunk, beside = rows * shape.vocab * FP32, rows * shape.vocab * (element if narrow else 0)
    # To be exponentiated: at once on CUDA, on a CPU by rows that its cache holds.
    read = chunk + max(beside, chunk if device == "cuda" else min(chunk, FP32 * NEAR))
    return states + (read if by_weight is None else max(read, chunk + beside + states + by_weight))


def _states(run: Run, shape: Shape, micro: Micro) -> float:
    """Return the bytes of the hidden states that an LM head reads; of whole rows nothing is picked out."""
    picked = shape.head == "lm" and run.forward != "plain"
    return micro.predicted * shape.hidden * run.engine.element_bytes if picked else 0


def _reference(run: Run, frozen: list[Held], device: str, whole: Whole) -> Parts:
    """A frozen model computes, while all that the policy keeps for its backward is there, its last logits included."""
    ways = (way for held in frozen for way in _forwards(run, held, run.worst, device, whole))
    return {
        "activations": _kept(run, _layers(run)),
        "head": _kept_logits(run, _layers(run), device),
        "gradients in flight": _gradients(run, device).before,
        **_most({"reference" if name == "layer" else name: size for name, size in way.items()} for way in ways),
    }


def _forwards(run: Run, held: Held | None, micro: Micro, device: str, whole: Whole) -> Iterator[Parts]:
    """Yield what a forward without gradient takes in a layer, and at the head; of the policy, or of a frozen model."""
    shape, role = (held.shape if held else None) or run.policy, held.role if held else None
    block, quantised = _block(run, shape), held is not None and held.placement == "quantised"
    own_engine = held is None or held.shape is None or has_engine(held)
    by_depth = whole.by(FORWARD, role=role) if own_engine else {}
    floated = _floated(run, shape) if quantised else 0
    yield {"layer": block.hidden * micro.tokens, "gathered": by_depth.pop(EMBEDS, 0)}
    layer = (block.forward + block.beside) * micro.tokens
    yield {"layer": layer + floated, "gathered": max(by_depth.values(), default=0)}
    head = block.hidden * micro.tokens + _head_bytes(run, shape, micro, device)
    yield {"layer": head, "gathered": whole.at_head(FORWARD, role=role) if own_engine else 0}


def _floated(run: Run, shape: Shape) -> float:
    """Return the bytes of the largest linear weight of an int8 copy, while it is a floating-point one again."""
    narrow = run.engine.precision != "fp32"
    linear = [w.size for w in shape.weights if len(w.shape) == 2 and w not in _matrices(shape)]
    return (FP32 + narrow * run.engine.element_bytes) * max(linear, default=0)


# --- what the engine moves ----------------------------------------------------------------------------------------


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
    if run.engine.stage == 3:  # what always is whole is let go, and gathered anew afterwards
        return {"optimizer": max(0, FP32 * min(owned, SUBGROUP) * (1 + working) - _always(run))}
    if run.engine.stage == 0:
        return {"gradients in flight": element * trained, "optimizer": FP32 * owned * working}
    received = element * min(trained, run.engine.allgather_bucket) if device == "cpu" else 0  # gloo's own copy
    return {
        "optimizer": max(FP32 * owned * (1 + working), received),
        "gradients in flight": element * _spilling(run),
    }


def _always(run: Run) -> float:
    """Return the bytes of the weights that ZeRO-3 holds whole but for the time of an update."""
    return resident(run.policy, run, moved=run.engine.offload_param != "none")


def _working(run: Run, device: str) -> int:
    """Return how many tensors like a master the optimizer works in: Adam's denominator, twice where not in place."""
    if "adam" not in run.optimizer or "fused" in run.optimizer:
        return 0
    return 2 if device == "cpu" else 1


# --- between the steps --------------------------------------------------------------------------------------------


def _rollout(run: Run, rollout: Rollout, device: str) -> Parts:
    """The policy writes: its weights whole, keys and values of a batch, and the last step's probabilities.

    It takes most while it gathers its weights or refreshes its copy of them, while it reads the prompts, or at the last
    token, when the keys and values are longest.
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
    if run.engine.stage != 3:
        return _most((reading, writing))
    together = max(_refreshed(written) if rollout.placement == "copied" else [written], key=sum, default=[])
    received = sum(sorted(together)[-GLOO_THREADS - 1 :]) if device == "cpu" else 0  # in copies, as one is handed in
    stays = element * sum(written) if rollout.placement == "gathered" else 0
    gathering: Parts = {"gathered": element * (sum(together) + received)}
    return _most((gathering, *({"gathered": stays, **parts} for parts in (reading, writing))))


def _refreshed(sizes: Iterable[int]) -> Iterator[list[int]]:
    """Yield the sizes of the weights that are gathered together to refresh a copy (`trainers.rollout.chunks`)."""
    some: list[int] = []
    for size in sizes:
        some.append(size)
        if sum(some) >= REFRESHED:
            yield some
            some = []
    yield some


def _score(run: Run, rollout: Rollout, device: str, whole: Whole) -> Parts:
    """Policy, value function, reference and rewards look at what was written, one after the other."""
    length = rollout.longest_prompt + rollout.response_tokens
    rows = min(rollout.score_batch_size, rollout.completions)
    written = rows * rollout.response_tokens
    return _looking(run, Micro(rows, rows * length, written, rows * length * length / 2, length), device, whole)


def _looking(run: Run, micro: Micro, device: str, whole: Whole) -> Parts:
    """The policy and the frozen models compute one after the other, and nothing is kept for a backward."""
    scorers = [None, *(held for held in run.frozen if held.shape is not None and held.placement != "cached")]
    most = _most(way for held in scorers for way in _forwards(run, held, micro, device, whole))
    return {"activations" if name == "layer" else name: size for name, size in most.items()}


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

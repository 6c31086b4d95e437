"""What a run computes: floating-point operations of an optimizer step on one rank, from first principles.

A matrix of n elements takes 2 n operations a token forward, and as many each for the gradient of its input and of
itself (Kaplan 2020, section 2.1; Narayanan 2021, section 5.1). Attention takes 4 x heads x head_dim a layer for each
query-key pair that it needs, forward, and twice that backward. Where the run does not ask for a token's
log-probability the LM head is left out. Norms, activations and softmax are left out, as is usual: they are bound by
memory and below 1 % of the operations. Model operations are those a step needs; what is recomputed comes on top
("hardware operations": PaLM, Chowdhery 2022, appendix B; MFU counts the first, HFU both).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from align_kit.plan.facts import Held, Micro, Run, Shape, Weight
from align_kit.plan.visits import HEADS

EMBEDDING = re.compile(r"(^|\.)(embed\w*|wte|wpe|word_embeddings|position_embeddings)\.(weight|base_layer)")
ADAPTER = re.compile(r"\.lora_\w+\.(\w+)")
HEAD = re.compile(rf"(^|\.)({'|'.join(HEADS)})\.")
RECOMPUTED = "recomputed"
CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}  # logits of the head that are held at a time (`forward.head.CHUNK`)


@dataclass(frozen=True)
class Work:
    """Operations of one optimizer step on one rank, by what they are for; `tokens` are those a trunk trains on."""

    by: dict[str, float]
    tokens: float

    @property
    def flops(self) -> float:
        """All operations, recomputed ones included."""
        return sum(self.by.values())

    @property
    def model_flops(self) -> float:
        """Operations without what is recomputed."""
        return self.flops - self.by.get(RECOMPUTED, 0.0)


def work(run: Run, device: str = "cuda") -> Work:
    """Return what one rank computes in an optimizer step; of an online phase a mean over an iteration's steps."""
    micros, mean = run.accumulation, run.mean
    by = {
        "forward": micros * _forward(run, mean),
        "backward": micros * _backward(run, mean),
        RECOMPUTED: micros * (_recomputed(run, mean) + _head_again(run, mean, device)),
    }
    if run.rollout is None:
        by["frozen"] = micros * sum(_frozen(run, held, mean) for held in run.frozen)
        if run.phase == "kto":  # its baseline: as many mismatched completions, through policy and reference
            by["baseline"] = by["forward"] + by["frozen"]
        return Work(_some(by), micros * mean.tokens)
    judged = run.rollout.completions / max(1, run.per_device)  # micro-batches that an iteration's completions make
    by["score"] = judged / run.rollout.steps * (_forward(run, mean) + sum(_frozen(run, h, mean) for h in run.frozen))
    by["rollout"] = _rollout(run) / run.rollout.steps
    return Work(_some(by), micros * mean.tokens)


def _some(by: dict[str, float]) -> dict[str, float]:
    return {name: count for name, count in by.items() if count}


# --- one micro-batch --------------------------------------------------------------------------------------------------


def _forward(run: Run, micro: Micro) -> float:
    """Return a training forward: every trunk that is trained, the adapters that are, and the heads."""
    shape, trunks = run.policy, _trunks(run)
    return (
        2 * micro.tokens * (trunks.base + _adapters(shape, trained=True))
        + trunks.passes * _attention(shape, micro)
        + 2 * micro.predicted * _head(shape)
    )


def _backward(run: Run, micro: Micro) -> float:
    """Return its backward: gradients of inputs everywhere, of weights where they are trained."""
    shape, trunks = run.policy, _trunks(run)
    return (
        2 * micro.tokens * (trunks.base + _trained(shape) + 2 * _adapters(shape, trained=True))
        + 2 * trunks.passes * _attention(shape, micro)
        + 2 * micro.predicted * _head(shape) * (1 if run.use_peft and shape.head == "lm" else 2)
    )


def _recomputed(run: Run, micro: Micro) -> float:
    """Return what activation checkpointing computes again: the layers, not the heads.

    A layer stops where its last saved tensor is there again: before its last matrix, or the adapter's small one on it.
    """
    if not run.checkpointing:
        return 0.0
    shape = run.policy
    last = 0 if run.use_peft or shape.experts else shape.layers * shape.hidden * shape.intermediate
    products = 2 * micro.tokens * _trunks(run).passes * last
    return _forward(run, micro) - 2 * micro.predicted * _head(shape) - products


def _head_again(run: Run, micro: Micro, device: str) -> float:
    """Return what the chunked LM head computes again in the backward: all chunks of logits but the last."""
    if run.policy.head != "lm" or run.forward == "plain":
        return 0.0
    rows = max(1, CHUNK[device] // run.policy.vocab)
    chunks = -(-micro.predicted // rows)
    return 2 * _head(run.policy) * max(0.0, min((chunks - 1) * rows, micro.predicted))


def _frozen(run: Run, held: Held, micro: Micro) -> float:
    """Return the forward of a frozen model; none where its answers are stored."""
    if held.placement == "cached":
        return 0.0
    own = held.shape is not None and held.placement not in ("adapter", "shared")
    shape = held.shape if own and held.shape is not None else run.policy
    matrices = _matrices(shape) if own else _trunks(run).base / _trunks(run).passes
    predicted = micro.predicted if shape.head == "lm" and not held.role.startswith("reward") else 0.0
    return 2 * micro.tokens * matrices + _attention(shape, micro) + 2 * predicted * _head(shape)


def _rollout(run: Run) -> float:
    """Return what writing an iteration's completions takes on a rank: prompts once, then token by token."""
    rollout = run.rollout
    assert rollout is not None
    written = rollout.response_tokens
    tokens = rollout.completions * (rollout.prompt_tokens + written)
    pairs = rollout.completions * (rollout.prompt_tokens + written) * (rollout.prompt_tokens + written + 1) / 2
    micro = Micro(rollout.completions, tokens, rollout.completions * written, pairs, 0)
    matrices = _trunks(run).base / _trunks(run).passes + _adapters(run.policy, trained=True) / _trunks(run).passes
    return 2 * tokens * matrices + _attention(run.policy, micro) + 2 * micro.predicted * _head(run.policy)


# --- shapes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trunks:
    """How often a training forward goes through a trunk, and the elements of matrices that it meets in all."""

    passes: int
    base: float


def _trunks(run: Run) -> _Trunks:
    """A policy with values goes through two: two models, or one base with two adapters."""
    base = _matrices(run.policy)
    if run.rollout is None:
        return _Trunks(1, base)
    return _Trunks(2, 2 * base if run.use_peft else base)


def _matrices(shape: Shape) -> float:
    """Return the elements of a model's own matrices that a token meets: no embedding, no head, no adapter."""
    return _sum(shape, lambda weight: ADAPTER.search(weight.name) is None)


def _trained(shape: Shape) -> float:
    return _sum(shape, lambda weight: weight.trained and ADAPTER.search(weight.name) is None)


def _adapters(shape: Shape, *, trained: bool) -> float:
    return _sum(shape, lambda weight: weight.trained == trained and ADAPTER.search(weight.name) is not None)


def _sum(shape: Shape, counts: Callable[[Weight], bool]) -> float:
    return sum(_met(weight, shape) for weight in shape.weights if _is_matrix(weight) and counts(weight))


def _is_matrix(weight: Weight) -> bool:
    return len(weight.shape) > 1 and not (EMBEDDING.search(weight.name) or HEAD.search(weight.name))


def _met(weight: Weight, shape: Shape) -> float:
    """Return the elements of a matrix that a token meets: of experts, those it is sent to."""
    among_experts = shape.experts and ".experts." in f"{weight.name}."
    return weight.size * (shape.experts_per_token / shape.experts if among_experts else 1.0)


def _head(shape: Shape) -> int:
    """Return the elements of the head that a prediction meets: the LM head's, or one score's."""
    return shape.hidden * (shape.vocab if shape.head == "lm" else 1)


def _attention(shape: Shape, micro: Micro) -> float:
    """Return the operations of attention proper: scores and their use, for each pair in each layer."""
    return 4.0 * micro.pairs * shape.heads * shape.head_dim * shape.layers

"""What the planner knows of a run: models by their tensors, the engine, the batches, and how many ranks there are.

Everything here is plain data without torch. `plan.describe` makes it from a configuration, without loading a weight.
Sizes are in elements or tokens where they are not said to be bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Device = Literal["none", "cpu", "nvme"]
Precision = Literal["fp32", "bf16", "fp16"]
Placement = Literal["adapter", "shared", "cached", "sharded", "offloaded", "quantised"]
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of an element, by the precision of a run


@dataclass(frozen=True)
class Weight:
    """One parameter: its name in the module that is trained, its whole shape, and whether it is trained.

    `element_bytes` is what an element takes where that is not the run's precision (a quantised base), else `None`.
    """

    name: str
    shape: tuple[int, ...]
    trained: bool = True
    element_bytes: float | None = None

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """What a layer of a trunk takes while it is computed, in bytes per token of a row: see `plan.activations`.

    `saved` is kept for the backward, `hidden` is what goes from layer to layer (all that a checkpointed layer keeps),
    `ends` is kept outside the layers; `forward` is what a forward without gradient takes at most, its input included,
    `backward` what a backward takes at most beside what was kept, and `again` that of a checkpointed layer, which is
    computed again in it. `passes` trunks are computed and kept together. `beside` is there while all layers compute:
    what they are told of positions.
    """

    saved: float
    hidden: float
    ends: float
    forward: float
    backward: float
    again: float
    passes: int = 1
    beside: float = 0.0


@dataclass(frozen=True)
class Shape:
    """A model: its parameters in the module's order (tied ones once) and the numbers its arithmetic follows from."""

    name: str
    weights: tuple[Weight, ...]
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0
    head: Literal["lm", "score"] = "lm"
    buffers: int = 0  # bytes of what is no parameter and lies whole on each rank
    tied: int = 0  # elements of parameters that go by another name too, once for each of those names
    block: Block | None = None  # weighed; `None`: by the numbers of a layer of Llama's kind
    sharded_block: Block | None = None  # the same under ZeRO-3

    @property
    def size(self) -> int:
        """Elements of all parameters."""
        return sum(weight.size for weight in self.weights)

    @property
    def trained_size(self) -> int:
        """Elements of the parameters that are trained."""
        return sum(weight.size for weight in self.weights if weight.trained)


@dataclass(frozen=True)
class Held:
    """A frozen model of the run: the role it has, where it lives, and its shape (`None` where it has no weights)."""

    role: str
    placement: Placement
    shape: Shape | None = None


@dataclass(frozen=True)
class EngineFacts:
    """What of a DeepSpeed configuration decides on bytes and traffic; sizes in elements, "auto" filled in."""

    stage: int
    precision: Precision
    offload_optimizer: Device = "none"
    offload_param: Device = "none"
    reduce_bucket: int = 500_000_000
    allgather_bucket: int = 500_000_000  # stages 1 and 2
    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000  # a weight that is used again within so many is not let go
    contiguous_gradients: bool = True
    overlap_comm: bool = True

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the weights that compute."""
        return BYTES[self.precision]


@dataclass(frozen=True)
class Micro:
    """One micro-batch on one rank, as the run's way of computing (`Run.forward`) sees it.

    `tokens` are the positions the trunk computes (padding included where it is computed), `predicted` those the LM
    head does, `pairs` the query-key pairs that attention needs (summed over sequences, causal ones counted once),
    `longest` the longest sequence or packed row, `sequences` how many there are; `given` are the tokens of the batch,
    no padding and every copy of a shared prefix counted. Means need not be whole.
    """

    sequences: float
    tokens: float
    predicted: float
    pairs: float
    longest: float
    given: float = 0.0


@dataclass(frozen=True)
class Rollout:
    """What an online phase writes and judges in one iteration on one rank, and how many optimizer steps follow."""

    completions: float  # on this rank
    batch_size: int  # written at a time
    prompt_tokens: float  # mean length of a prompt
    response_tokens: float  # written to a prompt at most
    longest_prompt: int
    placement: Literal["gathered", "copied"]
    score_batch_size: int
    steps: int  # optimizer steps an iteration trains for


@dataclass(frozen=True)
class Run:
    """A run as the planner sees it. `policy` is all that one engine holds: a value model and adapters are in it."""

    phase: str
    unit: str
    policy: Shape
    engine: EngineFacts
    optimizer: str  # transformers' name: adamw_torch, sgd, …
    mean: Micro
    worst: Micro
    per_device: int
    accumulation: int
    world_size: int
    steps: int
    forward: Literal["shared", "packed", "plain"] = "packed"
    checkpointing: bool = False
    frozen: tuple[Held, ...] = ()
    evaluated: Micro | None = None  # the heaviest micro-batch of an evaluation, where the run has any
    per_device_eval: int = 0  # its rows
    rollout: Rollout | None = None
    nodes: int = 1
    checkpoints_kept: int | None = 1  # None: all; 0: none are made
    checkpoints_made: int = 0
    checkpoints_lasting: int = 0  # of those made, how many stay beside `checkpoints_kept`: milestones, the best
    checkpoints_limit: int | None = None  # bytes they may take together
    use_peft: bool = False
    resumed: bool = False  # a run that goes on checks nothing before its first step
    gated: bool = True  # else it is checked that policy and reference are alike, or that a fresh head scores 0
    notes: tuple[str, ...] = field(default=())  # what was assumed, in words

    @property
    def ranks_per_node(self) -> int:
        """Ranks on the fullest node."""
        return -(-self.world_size // self.nodes)

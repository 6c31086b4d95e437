"""The machine, the engine and the ranks of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from align_kit import log, machine, zero
from align_kit.config import BatchPlan, Config, derive
from align_kit.errors import UserError
from align_kit.registry import Recipe
from align_kit.stages.other_world import kept_batch


@dataclass
class Engine:
    """The DeepSpeed configuration of a run, where it came from, and the precision to train in."""

    config: dict[str, Any]
    label: str
    precision: str

    @property
    def stage(self) -> int:
        return int(self.config.get("zero_optimization", {}).get("stage", 0))


def start(config: Config) -> Engine:
    """Choose precision and engine configuration, agree with the launch file, look for what would block the start."""
    machine.choose_accelerator(os.environ)
    launch = zero.read_launch(os.environ)
    precision = precision_of(config)
    zero.check_precision(precision, launch)
    if precision == "fp16" and machine.device_name() == "CPU":
        raise UserError("fp16 does not train on a CPU; use --bf16 true, or leave both out for what the hardware does")
    engine, label = zero.choose(config.training.get("deepspeed"), launch)
    zero.check_buildable(engine, label)
    for line in machine.check_locks(zero.needs_build(engine), os.environ):
        log.warn(line)
    return Engine(engine, label, precision)


def shown(config: Config, engine: Engine, plan: BatchPlan) -> dict[str, Any]:
    """Return the engine configuration as `--dry-run` shows it: what does not wait for the model is filled in."""
    values = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.per_device,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.value("max_grad_norm"),
        "bf16.enabled": engine.precision == "bf16",
        "fp16.enabled": engine.precision == "fp16",
    }
    return zero.filled(engine.config, values)


PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def precision_of(config: Config, native: str | None = None) -> str:
    """Return what to train in: `bf16` and `fp16` where given, else a `dtype` that was given, else the hardware's.

    `native` is what other hardware than this machine's computes best in.
    """
    bf16, fp16, dtype = config.training.get("bf16"), config.training.get("fp16"), config.model.dtype
    if fp16:
        return "fp16"
    if bf16 is not None:
        return "bf16" if bf16 else "fp32"
    if config.given("dtype") and dtype in PRECISIONS:
        return PRECISIONS[dtype]
    return native or machine.hardware_precision()


def batch(config: Config, rows: int | None = None) -> BatchPlan:
    """Return the batch arithmetic of one optimizer step; a run that may go on on other ranks keeps its global batch."""
    if kept := kept_batch(config):
        return replace(kept, rows=rows)
    accumulation = config.value("gradient_accumulation_steps")
    return derive(
        config.value("per_device_train_batch_size"),
        machine.world_size(),
        None if config.run.global_batch_size else accumulation,
        config.run.global_batch_size,
        rows,
    )


def repeats(recipe: Recipe, config: Config) -> int:
    """Return how often an epoch trains on a row of the data."""
    return math.prod(config.value(name) for name in recipe.repeats)


@contextmanager
def process_group(config: Config, engine: Engine, plan: BatchPlan) -> Iterator[Any]:
    """Join the ranks and yield the phase's training arguments; leave the group at the end."""
    import torch.distributed as dist

    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes"):
        config.training.setdefault("use_cpu", True)
    zero.forget_launch(os.environ)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # the arguments say it
    with open(os.devnull, "w") as nowhere, log.native_output_to(nowhere.fileno()):
        zero.join_ranks(config.value("ddp_timeout"))
        args = config.training_arguments(
            deepspeed=engine.config,
            bf16=engine.precision == "bf16",
            fp16=engine.precision == "fp16",
            gradient_accumulation_steps=plan.accumulation,
        )
        dist.barrier()  # gloo connects, and prints about it, at the first collective
    yield args
    if dist.is_initialized():
        dist.destroy_process_group()

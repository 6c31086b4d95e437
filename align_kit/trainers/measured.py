"""What a run really took: bytes by kind on the fullest rank, the peak of memory, and what DeepSpeed sent per step.

Collectives are counted where every one of DeepSpeed's passes, at its backend (DeepSpeed 0.19.8: comm/comm.py, `cdb`),
by the rule of its comms logger: the bytes of the tensor a rank hands in. The logger itself would synchronise the
device at each of them and keep every latency. What does not pass there is not counted: sums of metrics and counts
(a few hundred bytes a step) and what PPO's ranks tell each other of an iteration.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from align_kit.frozen.hold import bare
from align_kit.plan.wire import on_wire
from align_kit.trainers.holdings import masters_of, moments_of

# The argument that holds what a rank hands in: its name and place, by the backend's method.
HANDED_IN = {
    "all_gather": ("tensor", 1),
    "all_gather_coalesced": ("input_tensors", 1),
    "all_gather_into_tensor": ("input_tensor", 1),
    "all_reduce": ("tensor", 0),
    "all_reduce_coalesced": ("tensors", 0),
    "all_to_all_single": ("input", 1),
    "broadcast": ("tensor", 0),
    "reduce": ("tensor", 0),
    "reduce_scatter": ("input_list", 1),
    "reduce_scatter_tensor": ("input_tensor", 1),
}
WARM_UP = 3
DEVICE, RESIDENT = "device allocator", "resident size"
Counts = dict[str, list[float]]  # by collective: calls, bytes handed in, bytes on the wire


class Measure(TrainerCallback):
    """Counts what training sends, step by step, and remembers the peak of memory.

    Evaluations and saves are left out, and so are the first `WARM_UP` steps (iterations of an online phase) where more
    follow: gates are passed, and ZeRO-3 learns in which order layers come, gathering twice meanwhile.
    """

    def __init__(self, args: Any) -> None:
        self.steps = 0
        self.peak = 0
        self.period = getattr(args, "num_ppo_epochs", 1) * getattr(args, "num_mini_batches", 1)
        self._counts: Counts = {}  # since the last mark
        self._current: Counts = {}  # of the iteration at hand
        self._kept: Counts = {}  # of the iterations that count
        self._iterations = 0  # that are in it
        self._undo: list[Callable[[], None]] = []

    @property
    def traffic(self) -> dict[str, dict[str, float]]:
        """Calls, bytes handed in and bytes on the wire, by collective, a step: a mean over the steps counted."""
        whole = self._iterations * self.period
        counts, steps = (self._kept, whole) if whole else (self._current, self.steps)
        names = ("calls", "bytes", "link_bytes")
        return {
            op: {name: each / max(1, steps) for name, each in zip(names, numbers, strict=True)}
            for op, numbers in sorted(counts.items())
        }

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._watch()
        self._mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1
        _add(self._current, self._counts)
        self._mark()
        self.peak = max(self.peak, _peak())
        if self.steps % self.period:
            return
        if self.steps <= (WARM_UP + 1) * self.period:
            self._kept, self._iterations = {}, 0  # nothing before counts where something follows
        _add(self._kept, self._current)
        self._iterations += 1
        self._current = {}

    def on_train_end(self, *_: Any, **__: Any) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.peak = max(self.peak, _peak())

    def _mark(self, *_: Any, **__: Any) -> None:
        """Forget what was counted since the last step."""
        self._counts = {}

    on_log = on_evaluate = on_save = _mark

    def _watch(self) -> None:
        """Count every collective of DeepSpeed's backend from now on."""
        from deepspeed.comm import comm

        for name, argument in HANDED_IN.items():
            if hasattr(comm.cdb, name):
                setattr(comm.cdb, name, self._counting(getattr(comm.cdb, name), name, *argument))
                self._undo.append(functools.partial(delattr, comm.cdb, name))

    def _counting(self, call: Any, name: str, argument: str, place: int) -> Any:
        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            given = kwargs[argument] if argument in kwargs else args[place]
            tensors = given if isinstance(given, list | tuple) else [given]
            sent = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            ranks = dist.get_world_size(kwargs.get("group"))
            _add(self._counts, {name: [1, sent, on_wire(name, sent, ranks)]})
            return call(*args, **kwargs)

        return counted


def _add(total: Counts, more: Mapping[str, Iterable[float]]) -> None:
    for name, numbers in more.items():
        total[name] = [a + b for a, b in zip(total.get(name, [0, 0, 0]), numbers, strict=True)]


def measured(trainer: Any) -> dict[str, Any]:
    """Return what the training that has just ended took; all ranks call it, and all get the same.

    "trained_parameters" is how many numbers the optimizer moves, those of a value model among them;
    "state_bytes" are those of the rank with most of them; "peak_bytes" the most on any rank, on a CPU above what the
    process had before its model loaded; "traffic" is a step's, of the first rank (all send the same).
    """
    measure = trainer.measure
    mine = state_bytes(trainer)
    everyone: list[Any] = [None] * trainer.args.world_size
    if trainer.args.world_size > 1:
        dist.all_gather_object(everyone, (mine, measure.peak - _before(trainer.args)))
    else:
        everyone = [(mine, measure.peak - _before(trainer.args))]
    traffic = measure.traffic
    return {
        "steps": measure.steps,
        "trained_parameters": trained_parameters(bare(trainer.model_wrapped)),
        "state_bytes": max((state for state, _ in everyone), key=lambda state: sum(state.values())),
        "peak_bytes": max(peak for _, peak in everyone),
        "peak_how": DEVICE if torch.cuda.is_available() else RESIDENT,
        "traffic": traffic,
        "link_bytes": sum(each["link_bytes"] for each in traffic.values()),
    }


def trained_parameters(module: nn.Module) -> int:
    """Return how many numbers are trained over all ranks, tied tensors once."""
    return sum(int(getattr(one, "ds_numel", one.numel())) for one in module.parameters() if one.requires_grad)


# --- the peak ---------------------------------------------------------------------------------------------


def begin(args: Any) -> None:
    """Remember what the process takes now, before it loads a model, and let peaks count from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # not Linux, or a sandbox: the peak is then that of the process's whole life
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident
    args.resident_before = _status("VmRSS")


def _before(args: Any) -> int:
    return getattr(args, "resident_before", 0)


def _peak() -> int:
    """Return the most bytes this process had: of the device's allocator, or resident."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    """Return an entry of Linux's `/proc/self/status` in bytes, 0 on another system."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


# --- the state --------------------------------------------------------------------------------------------


def state_bytes(trainer: Any) -> dict[str, int]:
    """Return the bytes this rank holds between two steps, by kind; memory that tensors share counts once.

    Kinds are "parameters" (shards, and what stays gathered), "masters", "moments", "gradients", "engine" (what else
    the engine keeps), "buffers", and each frozen role that has weights of its own.
    """
    seen: set[int] = set()
    kinds = _kinds(trainer)
    found = {kind: sum(_new_bytes(tensor, seen, trainer.args.device) for tensor in tensors) for kind, tensors in kinds}
    return {kind: size for kind, size in found.items() if size}


def _kinds(trainer: Any) -> Iterator[tuple[str, Iterator[Tensor]]]:
    engine = trainer.model_wrapped
    module, optimizer = bare(engine), getattr(engine, "optimizer", None) or trainer.optimizer
    yield "parameters", _weights(module)
    yield "masters", masters_of(optimizer)
    yield "moments", moments_of(optimizer)
    yield "gradients", _gradients(module, optimizer)
    yield "engine", _tensors(vars(optimizer), set())
    yield "buffers", _buffers(module)
    for role, held in trainer.frozen.items():
        if held.model is not None:
            yield role, _everything(bare(held.model))


def _weights(module: nn.Module) -> Iterator[Tensor]:
    for parameter in module.parameters():
        yield parameter.data
        if isinstance(shard := getattr(parameter, "ds_tensor", None), Tensor):
            yield shard


def _buffers(module: nn.Module) -> Iterator[Tensor]:
    """Yield the buffers, and what weights in 4 bits are scaled by, which stays whole on each rank."""
    yield from module.buffers()
    for parameter in module.parameters():
        scales = getattr(parameter, "quant_state", None)
        while scales is not None:  # scales may be in 8 bits themselves, with scales of their own
            yield from _tensors(vars(scales), set())
            scales = scales.state2


def _everything(module: nn.Module) -> Iterator[Tensor]:
    yield from _weights(module)
    yield from _buffers(module)


def _gradients(module: nn.Module, optimizer: Any) -> Iterator[Tensor]:
    for parameter in module.parameters():
        if parameter.grad is not None:
            yield parameter.grad
    yield from _tensors({name: value for name, value in vars(optimizer).items() if _holds_gradients(name)}, set())


def _holds_gradients(name: str) -> bool:
    return "grad" in name or "ipg" in name


def _tensors(value: Any, walked: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, and in what DeepSpeed's ZeRO keeps its own in."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        inner: Iterable[Any] = list(value.values())
    elif isinstance(value, list | tuple | set | deque):
        inner = list(value)
    elif type(value).__module__.startswith("deepspeed.runtime.zero") and hasattr(value, "__dict__"):
        inner = list(vars(value).values())
    else:
        return
    if id(value) in walked:
        return
    walked.add(id(value))
    for each in inner:
        yield from _tensors(each, walked)


def _new_bytes(tensor: Tensor, seen: set[int], device: torch.device) -> int:
    """Return the bytes of the memory a tensor lies in, unless another that lies there was counted."""
    if tensor.device.type != device.type:
        return 0
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()

"""How a run ends badly: one line on one rank and exit code 2 for a user's mistake, the error itself for a bug."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from align_kit import log, supervised
from align_kit.errors import EXIT_CODE, Fault, UserError

# What gloo and NCCL say on the ranks that are left when a peer ends: not the failure, only its echo.
PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Socket Timeout", "remote process exited")
# What they say where another rank has not come within the limit.
TOO_LATE = (re.compile(r"Timed out waiting (\d+)ms"), re.compile(r"Application timeout caused pair closure()"))
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "DefaultCPUAllocator")
SPOKEN = "align_kit/user_error_spoken"


@dataclass
class Outcome:
    """The exit code of a run."""

    code: int = 0


@contextmanager
def in_one_line() -> Iterator[Outcome]:
    """Turn a `UserError` into one line on one rank and exit code 2; let ranks that only echo it end in silence.

    In a group of ranks the process ends here, at once: destructors would wait for the others.
    """
    outcome = Outcome()
    try:
        yield outcome
    except UserError as error:
        first, kind = _speaks_first(), "fault" if isinstance(error, Fault) else "user"
        if not supervised.report(kind, str(error), getattr(error, "skip_steps", ())) and first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        outcome.code = error.code
        _leave(outcome.code)
    except KeyboardInterrupt:
        log.warn("interrupted; go on with --resume from the last checkpoint")
        outcome.code = 130
        _leave(outcome.code)
    except Exception as error:
        kind, line = _kind(error)
        told = supervised.report(kind, line, trace=traceback.format_exc() if kind == "error" else "")
        if kind == "error" and not told:
            raise
        outcome.code = EXIT_CODE if kind == "peer" and _has_spoken() else 1
        if outcome.code == 1 and not told:
            print(f"rank {log.rank()} stopped: {line}", file=sys.stderr, flush=True)
        _leave(outcome.code)


def _kind(error: Exception) -> tuple[str, str]:
    """Return what an exception that is no `UserError` is to this rank (see `supervised.Failure`), and a line for it."""
    said, line = str(error), f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    if not (isinstance(error, RuntimeError) and _among_ranks()):  # a hub's or a store's connection breaks alike
        return "error", line
    for words in TOO_LATE:
        if found := words.search(said):
            limit = f"{int(found[1]) / 1000:g} s" if found[1] else "as long as it may take"
            return "late", f"it waited {limit} for another rank, which did not come (the limit is ddp_timeout)"
    if any(echo in said for echo in PEER_ENDED):
        return "peer", f"another rank ended first ({' '.join(said.split())[:200]})"
    return "error", line


def _among_ranks() -> bool:
    """Tell whether other ranks run beside this one, or are about to join it."""
    return _store() is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1


def _speaks_first() -> bool:
    """Tell whether this rank is the first to report: rank 0 before the ranks are joined, then whoever comes first."""
    return log.rank() == 0 if _store() is None else _spoken(1) == 1


def _has_spoken() -> bool:
    """Tell whether another rank has reported a user's mistake."""
    return _store() is not None and _spoken(0) > 0


def _spoken(more: int) -> int:
    """Count `more` reports of a user's mistake and return how many there are; 2 where the count's host has ended."""
    try:
        return int(_store().add(SPOKEN, more))
    except Exception:  # a host that ends by itself has spoken; a launcher that hosts the count outlives its ranks
        return 2


def _store() -> Any:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()


def _leave(code: int) -> None:
    """End this process now where other ranks run beside it."""
    if _store() is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(0.2)  # let the peers see who spoke before the connections close
    os._exit(code)


class Plan(Protocol):
    """The batch arithmetic that an out-of-memory message speaks of."""

    def sentence(self, unit: str = "pairs") -> str: ...

    def smaller(self) -> Any: ...


def is_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, a device's or the machine's."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def naming_memory(plan: Plan) -> Iterator[None]:
    """Turn running out of memory into one line with the next smaller micro-batch that keeps the global batch."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_of_memory(error):
            raise
        if os.environ.get("ALIGN_KIT_TRACEBACK"):
            traceback.print_exc()
        raise UserError(f"out of memory at {plan.sentence('rows')}; {_way_out(plan)}") from None


@contextmanager
def naming_packages() -> Iterator[None]:
    """Turn a package that is not installed, asked for by some option, into one line."""
    try:
        yield
    except ImportError as error:
        if os.environ.get("ALIGN_KIT_TRACEBACK"):
            traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"an option needs a package that is not installed: {reason}") from None


def _way_out(plan: Plan) -> str:
    fewer = plan.smaller()
    if fewer is None:
        return (
            "the micro-batch is 1 already: use --gradient_checkpointing true, a shorter --max_length, or "
            "--deepspeed zero3_offload"
        )
    return (
        f"try --per_device_train_batch_size {fewer.per_device} --gradient_accumulation_steps {fewer.accumulation} "
        f"(the same {fewer.global_batch} per step)"
    )

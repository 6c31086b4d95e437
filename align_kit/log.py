"""What a run says: rank 0 speaks, third-party floods are filtered at their named source."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Flood(NamedTuple):
    """A third-party warning that says nothing to a user: its category, the module that raises it, and why."""

    category: type[Warning]
    module: str
    message: str
    why: str


# Filters name a source and a category, so that warnings of the user's own making still show.
FLOODS = (
    Flood(FutureWarning, r"torch\.distributed\.c10d_logger", "", "one per collective, hundreds a run"),
    Flood(FutureWarning, r"torch\.distributed\.distributed_c10d", "", "deprecated helper names used by the engine"),
    Flood(FutureWarning, r"(transformers|deepspeed|accelerate|peft)\.", "", "between libraries"),
    Flood(DeprecationWarning, r"(transformers|deepspeed|accelerate|peft|torch)\.", "", "between libraries"),
    Flood(UserWarning, r"torch\.distributed\.", "", "barrier() without a device, on every start"),
    Flood(UserWarning, r"deepspeed\.", "", "capabilities of the machine that were not asked for"),
    Flood(UserWarning, r"torch\.utils\.data\.dataloader", "'pin_memory' argument", "no accelerator: nothing to pin"),
    Flood(RuntimeWarning, r"peft\.tuners\.", "The following rank_pattern keys", "stacked experts: they do match"),
    Flood(RuntimeWarning, r"peft\.tuners\.", "The following alpha_pattern keys", "stacked experts: they do match"),
    Flood(UserWarning, r"peft\.utils\.save_and_load", "Could not find a config file", "offline base models"),
)

# Loggers whose INFO and WARNING lines are for their own developers.
QUIET_LOGGERS = {
    "DeepSpeed": logging.ERROR,
    "accelerate": logging.ERROR,
    "torch.distributed": logging.ERROR,
    "datasets": logging.ERROR,
    "transformers": logging.ERROR,
    "peft": logging.ERROR,
    "bitsandbytes": logging.ERROR,
    "filelock": logging.ERROR,
}

# ACCELERATE_LOG_LEVEL is not among them: accelerate sets the root logger to it, and the user's own lines with it.
ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def quiet() -> None:
    """Filter third-party floods; call before the heavy imports. A variable the user has set is left alone."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for flood in FLOODS:
        warnings.filterwarnings("ignore", message=flood.message, category=flood.category, module=flood.module)
    for name, level in QUIET_LOGGERS.items():
        logging.getLogger(name).setLevel(level)


def rank() -> int:
    """Return this process's global rank as its launcher set it, 0 where there is none."""
    return int(os.environ.get("RANK", "0"))


def say(text: str = "") -> None:
    """Print one line on rank 0 (standard output, flushed)."""
    if rank() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    """Print one `warning:` line on rank 0 (standard error)."""
    if rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


@contextmanager
def native_output_to(descriptor: int) -> Iterator[None]:
    """Send what native code writes to file descriptor 1 to `descriptor` meanwhile.

    gloo prints `[Gloo] Rank 0 is connected to …` with `std::cout`, which no Python filter sees.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(descriptor, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)

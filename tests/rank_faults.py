"""What a forked rank does before it runs the command line: real faults, and modules of the user's own."""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_in_little_memory(words: Sequence[str], spare_mib: int) -> int:
    """Run the command line with `spare_mib` of address space above what this process has now."""
    from align_kit.cli import main

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + spare_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return main(words)


def run_with_changed_reference(words: Sequence[str]) -> int:
    """Run the command line with a frozen copy of the adapter that is not what the policy starts from."""
    import torch

    from align_kit.cli import main
    from align_kit.models import lora

    load_adapter = lora.load_adapter

    def load_and_change(*given: Any, **named: Any) -> Any:
        model = load_adapter(*given, **named)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if f".{named['frozen_copy']}." in name and "lora_B" in name:
                    parameter.add_(0.05)
        return model

    lora.load_adapter = load_and_change
    return main(words)


def run_with_a_bug(words: Sequence[str]) -> int:
    """Run the command line where loading the policy fails in a way nobody foresaw."""
    from align_kit import stages
    from align_kit.cli import main

    def broken(*_: Any) -> None:
        raise RuntimeError("nobody foresaw this")

    stages.policy = broken
    return main(words)


def run_where_rank_1_dies(words: Sequence[str]) -> int:
    """Run the command line; rank 1 is killed when the policy would be loaded."""
    from align_kit import stages
    from align_kit.cli import main

    load_policy = stages.policy

    def die_or_load(*given: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return load_policy(*given)

    stages.policy = die_or_load
    return main(words)


def run_with_a_users_module(words: Sequence[str], module: str) -> int:
    """Run the command line; `module`, from the working folder, is imported when the policy would be loaded."""
    from align_kit import stages
    from align_kit.cli import main

    load_policy = stages.policy

    def import_and_load(*given: Any) -> Any:
        sys.path.insert(0, os.getcwd())
        importlib.import_module(module)
        return load_policy(*given)

    stages.policy = import_and_load
    return main(words)

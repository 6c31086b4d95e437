"""`align-kit launch`: several ranks of one recipe on this machine (or one of several), by torchrun's elastic agent."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from align_kit import log, machine, registry
from align_kit.errors import EXIT_CODE, UserError

OPTIONS = {
    "nproc_per_node": "ranks on this machine; default: every GPU, on a CPU 2",
    "nnodes": "machines",
    "node_rank": "which of them this is",
    "master_addr": "address of machine 0",
    "master_port": "port there",
}


def launch(argv: Sequence[str]) -> int:
    """Start the ranks of a recipe and return 0, 2 after a user's mistake, 128 + n after signal n, or 1.

    `argv` is `[--nproc_per_node N …] <recipe> [the recipe's own words]`. Raises `UserError` for an option it
    does not know.
    """
    options, recipe, rest = _split(list(argv))
    _check_nodes(options)
    registry.get(recipe)
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(options)))
    log.quiet()
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for agent in ("multiprocessing.api", "agent.server.api"):  # what they say of a rank that failed, we say
        logging.getLogger(f"torch.distributed.elastic.{agent}").setLevel(logging.CRITICAL)
    command = ["-m", "align_kit", recipe, *rest]
    try:
        elastic_launch(config=_elastic_config(options), entrypoint=sys.executable)(*command)
    except ChildFailedError as error:
        return _exit_code(error.failures)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _exit_code(failures: Mapping[int, Any]) -> int:
    """Return 2 where a rank has reported a user's mistake; else name the rank that ended first and return 1."""
    if EXIT_CODE in {failure.exitcode for failure in failures.values()}:
        return EXIT_CODE
    rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    how = f"exit code {first.exitcode}" if first.exitcode > 0 else f"signal {-first.exitcode} ({first.signal_name()})"
    print(f"rank {rank} ended with {how}, and the others with it", file=sys.stderr, flush=True)
    return 1


def _split(argv: list[str]) -> tuple[dict[str, str], str, list[str]]:
    """Take our options off the front; what follows the recipe's name is the recipe's."""
    options: dict[str, str] = {}
    while argv and argv[0].startswith("--"):
        name, _, value = argv.pop(0)[2:].partition("=")
        name = name.replace("-", "_")
        if name not in OPTIONS:
            listed = ", ".join(f"--{option}" for option in OPTIONS)
            raise UserError(f"align-kit launch: unknown option --{name}; known: {listed}, then the recipe and its keys")
        if not value and not argv:
            raise UserError(f"align-kit launch: --{name} needs a value ({OPTIONS[name]})")
        options[name] = value or argv.pop(0)
    if not argv:
        raise UserError(f"align-kit launch: which recipe? known: {', '.join(registry.names())}")
    return options, argv[0], argv[1:]


def _ranks(options: dict[str, str]) -> int:
    if "nproc_per_node" not in options:
        import torch

        return torch.cuda.device_count() or 2
    given = options["nproc_per_node"]
    if not given.isdigit() or int(given) < 1:
        raise UserError(f"--nproc_per_node {given}: give a number of ranks, 1 or more")
    return int(given)


def _check_nodes(options: Mapping[str, str]) -> None:
    """Raise `UserError` where the numbers of several machines do not fit each other."""
    for name in ("nnodes", "node_rank", "master_port"):
        if not options.get(name, "1").isdigit():
            raise UserError(f"--{name} {options[name]}: give a number ({OPTIONS[name]})")
    nodes, rank = int(options.get("nnodes", "1")), int(options.get("node_rank", "0"))
    if nodes < 1 or rank >= nodes:
        allowed = " or ".join(map(str, range(nodes))) if nodes < 3 else f"0 to {nodes - 1}"
        raise UserError(f"--node_rank {rank}: of --nnodes {nodes} this is one of {allowed or 'none'}")
    if nodes > 1 and "master_addr" not in options:
        raise UserError(f"--nnodes {nodes} needs --master_addr, the address of machine 0")


def _threads(options: dict[str, str]) -> int:
    return max(1, machine.cores() // _ranks(options))


def _elastic_config(options: dict[str, str]):  # type: ignore[no-untyped-def]
    """Return the agent's configuration: one group, no restarts, a port of its own where one machine is meant."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    nodes = int(options.get("nnodes", "1"))
    address = options.get("master_addr", "127.0.0.1")
    port = options.get("master_port", str(machine.free_port()) if nodes == 1 else "29500")
    return LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=_ranks(options),
        run_id="align_kit",
        rdzv_backend="static",
        rdzv_endpoint=f"{address}:{port}",
        rdzv_configs={"rank": int(options.get("node_rank", "0"))},
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(),
    )

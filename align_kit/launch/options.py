"""The words of `align-kit launch` before the recipe's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align_kit import machine, registry
from align_kit.errors import UserError

OPTIONS = {
    "nproc_per_node": "ranks on this machine; default: every GPU, on a CPU 2",
    "nnodes": "machines",
    "node_rank": "which of them this is",
    "master_addr": "address of machine 0",
    "master_port": "port there, by default 29500; each restart takes the next one",
    "max_restarts": "restarts in a row without a newer checkpoint, of a run that died or hung; default 3",
    "hang_seconds": "a rank hangs after so long without progress, or 20 median steps if longer; 30 times so long in an "
    "evaluation, rollout, save or the first step, 120 times before and after training; 0: never; default 60",
    "grace_seconds": "how long ranks may take to save and stop after SIGTERM, only to stop after SIGINT; default 120",
    "skip_poisoned": "after two failures at the same step leave out its batch; default false",
}
NUMBERS = ("nnodes", "node_rank", "master_port", "max_restarts")
SECONDS = ("hang_seconds", "grace_seconds")
FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
PORT = 29500


@dataclass(frozen=True)
class Options:
    """What `align-kit launch` was asked for; times in seconds."""

    ranks: int
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int | None = None
    max_restarts: int = 3
    hang_seconds: float = 60.0
    grace_seconds: float = 120.0
    skip_poisoned: bool = False

    def port_of(self, attempt: int) -> int:
        """Return the port of an attempt: on one machine any free one, on several the one that all will count to.

        A port of its own keeps an attempt's ranks apart from what is left of the one before.
        """
        if self.port is None and self.nodes == 1:
            return machine.free_port()
        return (self.port or PORT) + attempt


def split(argv: Sequence[str]) -> tuple[dict[str, str], str, list[str]]:
    """Take our options off the front; what follows the recipe's name is the recipe's.

    Raises `UserError` for an option that does not exist or has no value, and where no recipe is named.
    """
    options, rest = {}, list(argv)
    while rest and rest[0].startswith("--"):
        name, equals, value = rest.pop(0)[2:].partition("=")
        name = name.replace("-", "_")
        if name not in OPTIONS:
            listed = ", ".join(f"--{option}" for option in OPTIONS)
            raise UserError(f"align-kit launch: unknown option --{name}; known: {listed}, then the recipe and its keys")
        if name == "skip_poisoned" and not equals and (not rest or rest[0].lower() not in FLAGS):
            value = "true"
        if not value and not rest:
            raise UserError(f"align-kit launch: --{name} needs a value ({OPTIONS[name]})")
        options[name] = value or rest.pop(0)
    if not rest:
        raise UserError(f"align-kit launch: which recipe? known: {', '.join(registry.names())}")
    return options, rest[0], rest[1:]


def parse(given: Mapping[str, str]) -> Options:
    """Return the options by their types; raises `UserError` for a value that is none of its kind."""
    numbers = {name: _number(name, given[name]) for name in NUMBERS if name in given}
    seconds = {name: _seconds(name, given[name]) for name in SECONDS if name in given}
    _check_nodes(given, numbers)
    poisoned = given.get("skip_poisoned", "false").lower()
    if poisoned not in FLAGS:
        raise UserError(f"--skip_poisoned {given['skip_poisoned']}: give true or false")
    return Options(
        _ranks(given),
        numbers.get("nnodes", 1),
        numbers.get("node_rank", 0),
        given.get("master_addr", "127.0.0.1"),
        numbers.get("master_port"),
        numbers.get("max_restarts", 3),
        seconds.get("hang_seconds", 60.0),
        seconds.get("grace_seconds", 120.0),
        FLAGS[poisoned],
    )


def _number(name: str, given: str) -> int:
    if not given.isdigit():
        raise UserError(f"--{name} {given}: give a number ({OPTIONS[name]})")
    return int(given)


def _seconds(name: str, given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(f"--{name} {given}: give seconds, 0 or more ({OPTIONS[name]})")
    return value


def _ranks(given: Mapping[str, str]) -> int:
    if "nproc_per_node" not in given:
        import torch

        return torch.cuda.device_count() or 2
    asked = given["nproc_per_node"]
    if not asked.isdigit() or int(asked) < 1:
        raise UserError(f"--nproc_per_node {asked}: give a number of ranks, 1 or more")
    return int(asked)


def _check_nodes(given: Mapping[str, str], numbers: Mapping[str, int]) -> None:
    """Raise `UserError` where the numbers of several machines do not fit each other."""
    nodes, rank = numbers.get("nnodes", 1), numbers.get("node_rank", 0)
    if nodes < 1 or rank >= nodes:
        allowed = " or ".join(map(str, range(nodes))) if nodes < 3 else f"0 to {nodes - 1}"
        raise UserError(f"--node_rank {rank}: of --nnodes {nodes} this is one of {allowed or 'none'}")
    if nodes > 1 and "master_addr" not in given:
        raise UserError(f"--nnodes {nodes} needs --master_addr, the address of machine 0")

"""Which numbers of a run belong into one plot, and what they are called there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from align_kit.run_folder import MACHINE

EVAL = "eval_"


@dataclass(frozen=True)
class Curve:
    """One plot: its title, what its values are, and the numbers in it; those of evaluations join by themselves."""

    title: str
    unit: str
    names: tuple[str, ...]
    caption: str = ""
    log: bool = False


FIRST = (
    Curve("Loss", "loss", ("loss",)),
    Curve("Reward", "reward", ("reward", "mean_reward")),
    Curve("Rewards", "reward", ("rewards/chosen", "rewards/rejected")),
    Curve("Margin", "reward", ("rewards/margins", "margin"), "Of the chosen reward over the rejected one."),
    Curve("Accuracy", "share", ("rewards/accuracies", "accuracy"), "Share of pairs whose chosen completion wins."),
    Curve("KL divergence from the reference", "nats", ("kl",)),
    Curve("Learning rate", "learning rate", ("learning_rate",)),
    Curve("Gradient norm", "norm", ("grad_norm",), "Before clipping; logarithmic.", log=True),
)
MACHINE_CURVES = (
    Curve("Speed", "tokens/s", (f"{MACHINE}tokens_per_second",), "Trained tokens on all ranks, padding not counted."),
    Curve("Time of a step", "seconds", (f"{MACHINE}seconds",), "Evaluations and saves are not in it."),
    Curve("Memory", "GiB", (f"{MACHINE}peak_gib",), "The most that rank 0 has taken so far."),
    Curve("Model FLOPs utilisation", "share of peak", (f"{MACHINE}mfu",), "Recomputed activations are not counted."),
)
KNOWN = {name for curve in (*FIRST, *MACHINE_CURVES) for name in curve.names}
# Clocks and counters: they stand elsewhere, or say nothing as a curve.
LEFT_OUT = {"epoch", "tokens", "iteration", "runtime", "samples_per_second", "steps_per_second", "total_flos"}


def base(name: str) -> str:
    """Return what a number is called in training."""
    return name.removeprefix(EVAL)


def beside(names: Sequence[str]) -> Iterator[Curve]:
    """Yield a plot for each number that no other plot shows, in the order of `names`."""
    for name in dict.fromkeys(map(base, names)):
        if name not in KNOWN and name not in LEFT_OUT:
            yield Curve(name, "", (name,))


def labels(curve: Curve, logged: Sequence[str]) -> dict[str, str]:
    """Return the numbers of `logged` that a plot shows, each with its name in the legend."""
    shown = [name for name in curve.names if name in logged]
    held_out = [EVAL + name for name in curve.names if EVAL + name in logged]
    if len(curve.names) == 1 or len({base(name) for name in shown + held_out}) == 1:
        return {**dict.fromkeys(shown, "training"), **dict.fromkeys(held_out, "evaluation")}
    short = {name: name.rpartition("/")[2] for name in curve.names}
    return {name: short[name] for name in shown} | {name: f"{short[base(name)]}, evaluation" for name in held_out}

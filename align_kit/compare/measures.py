"""The rows of the report: how each is read off a run, how it is written, and which way is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align_kit import registry
from align_kit.compare import fair
from align_kit.compare.interval import Interval, over, paired
from align_kit.compare.reading import Ran, checkpoint_bytes, tokens_to

MB = 1e6
OPTIMIZER = ("masters", "moments")
# Titles of rows that a table may lack.
EXACT, SPEED, CHECKPOINT, RANK = "exact answers, %", "tokens/s", "checkpoint, MB", "effective rank of the update"


@dataclass(frozen=True)
class Measure:
    """One row: its title with the unit, how it is read off a run, its format, and whether more or less is better."""

    title: str
    read: Callable[[Ran], float | None]
    form: str = ",.4g"
    better: str = ""  # "more", "less", or neither
    group: str = "quality"


def measures(runs: Sequence[Ran], texts: Sequence[str], quality: float | None) -> list[Measure]:
    """Return the rows that these runs have values for."""
    listed = [*_quality(runs), *(_forgetting(name) for name in texts), *COST, *_time(quality), *UPDATE]
    return [one for one in listed if any(one.read(ran) is not None for ran in runs)]


def unmeasured(rows: Sequence[Measure], runs: Sequence[Ran], texts: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return a sentence on rows that the table could have and lacks, each with why; nothing where none is missing.

    `texts` are those on which loss was to be taken; of `wanted` are "answers" where there were problems to answer, and
    "text" where a text to take the loss on was looked for.
    """
    manifest, titles = runs[0].manifest, {row.title for row in rows}
    scores = registry.get(manifest["phase"]).head == "score"
    why = {CHECKPOINT: f"none was kept, save_strategy is {manifest['config'].get('save_strategy')}"}
    why[SPEED] = "the runs are too short to tell"
    if not all(ran.curve for ran in runs):
        why["time to a loss"] = "the runs logged no held-out loss"
    if manifest["policy"].get("random"):
        why[RANK] = "the runs start from random weights"
    if scores:
        why |= {_forgetting(name).title: "a model that scores predicts no text" for name in texts}
    elif "text" in wanted and not texts:
        why["loss on text from before"] = "none is known that the start was trained on; --forgetting names some"
    if scores and "answers" in wanted:
        why[EXACT] = "a model that scores writes none"
    lacking = {title.rpartition(", ")[0] or title: why[title] for title in why if title not in titles}
    missing = [f"{title} ({reason})" for title, reason in lacking.items()]
    return [f"Not measured: {'; '.join(missing)}."] if missing else []


def _quality(runs: Sequence[Ran]) -> list[Measure]:
    return [
        Measure("held-out loss", lambda ran: ran.evaluated.get("eval_loss"), ".4f", "less"),
        Measure(EXACT, _exact, ".1f", "more"),
        Measure("preference accuracy, %", _accuracy, ".1f", "more"),
        Measure("reward", lambda ran: ran.evaluated.get("eval_reward"), ".4f", "more"),
    ]


def _exact(ran: Ran) -> float | None:
    exact = ran.found.get("exact")
    return 100 * sum(exact) / len(exact) if exact else None


ACCURACIES = ("eval_rewards/accuracies", "eval_accuracy")


def _accuracy(ran: Ran) -> float | None:
    return next((100 * ran.evaluated[name] for name in ACCURACIES if name in ran.evaluated), None)


def _forgetting(name: str) -> Measure:
    return Measure(f"loss on {name}, nats", lambda ran: ran.found.get("texts", {}).get(name), ".3f", "less", "before")


def _state(ran: Ran, kinds: Sequence[str]) -> float | None:
    state = ran.measured.get("state_bytes")
    return sum(state.get(kind, 0) for kind in kinds) / MB if state else None


def _measured(name: str, scale: float) -> Callable[[Ran], float | None]:
    def read(ran: Ran) -> float | None:
        value = ran.measured.get(name)
        return None if value is None else value / scale

    return read


def _all_state(ran: Ran) -> float | None:
    return _state(ran, tuple(ran.measured.get("state_bytes", ())))


def _checkpoint(ran: Ran) -> float | None:
    size = checkpoint_bytes(ran.home)
    return None if size is None else size / MB


COST = [
    Measure("trained parameters, k", _measured("trained_parameters", 1e3), ",.1f", "less", "cost"),
    Measure("optimizer state, MB a rank", lambda ran: _state(ran, OPTIMIZER), ",.2f", "less", "cost"),
    Measure("all state, MB a rank", _all_state, ",.2f", "less", "cost"),
    Measure("peak memory, MB a rank", _measured("peak_bytes", MB), ",.1f", "less", "cost"),
    Measure("on the wire, MB a rank and step", _measured("link_bytes", MB), ",.3f", "less", "cost"),
    Measure(SPEED, lambda ran: ran.speed, ",.0f", "more", "cost"),
    Measure(CHECKPOINT, _checkpoint, ",.2f", "less", "cost"),
    Measure("stored model, MB", lambda ran: ran.manifest["result"]["bytes"] / MB, ",.2f", "less", "cost"),
]


def _time(quality: float | None) -> list[Measure]:
    if quality is None:
        return []

    def tokens(ran: Ran) -> float | None:
        return tokens_to(ran.curve, quality)

    def seconds(ran: Ran) -> float | None:
        needed = tokens(ran)
        return needed / ran.speed if needed is not None and ran.speed else None

    return [
        Measure(f"tokens to a loss of {quality:.3g}, k", _thousand(tokens), ",.1f", "less", "time"),
        Measure(f"seconds to a loss of {quality:.3g}", seconds, ",.1f", "less", "time"),
    ]


def _thousand(read: Callable[[Ran], float | None]) -> Callable[[Ran], float | None]:
    def scaled(ran: Ran) -> float | None:
        value = read(ran)
        return None if value is None else value / 1e3

    return scaled


def _found(part: str, name: str, scale: float = 1.0) -> Callable[[Ran], float | None]:
    def read(ran: Ran) -> float | None:
        value = ran.found.get(part, {}).get(name)
        return None if value is None else value * scale

    return read


UPDATE = [
    Measure("update, % of the weights' norm", _found("update", "relative", 100), ".2f", "", "update"),
    Measure(RANK, _found("update", "effective_rank"), ".1f", "", "update"),
    Measure("stable rank of the update", _found("update", "stable_rank"), ".2f", "", "update"),
    Measure("merged in fp32: largest logit gap", _found("merge_gap", "largest"), ".1e", "less", "update"),
]


# Keys that say what the loss is: with another beta, a pair that is told apart as well has another loss.
OF_THE_LOSS = {
    "loss_type", "beta", "loss_weights", "label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef",
    "use_weighting", "discopop_tau", "desirable_weight", "undesirable_weight", "center_rewards_coefficient",
    "router_aux_loss_coef",
}  # fmt: skip


def one_loss(factor: Sequence[str], runs: Sequence[Ran]) -> bool:
    """Tell whether all runs' held-out loss is the same function of the same rows, so that it can be compared."""
    return not OF_THE_LOSS & {*factor} and {"held-out data", "frozen models"} <= {*fair.equal(runs)}


def reachable(runs: Sequence[Ran]) -> float | None:
    """Return the held-out loss that every run reaches at its best: the time to it can be told of all."""
    lowest = [min(point.loss for point in ran.curve) for ran in runs if ran.curve]
    return max(lowest) if len(lowest) == len(runs) and runs else None


# --- over seeds -------------------------------------------------------------------------------------------------------

Values = Mapping[str, Sequence[float | None]]  # by arm, in the order of seeds


def values(measure: Measure, runs: Mapping[str, Sequence[Ran]]) -> dict[str, list[float | None]]:
    """Return a row's value of every run, by arm in the order of seeds."""
    return {arm: [measure.read(ran) for ran in some] for arm, some in runs.items()}


def mean(found: Sequence[float | None]) -> Interval | None:
    """Return the mean over seeds, `None` where a run has no value."""
    numbers = [value for value in found if value is not None]
    return over(numbers) if numbers and len(numbers) == len(found) else None


def difference(base: Sequence[float | None], other: Sequence[float | None]) -> Interval | None:
    """Return the mean of other - base on the same seeds, `None` where a run has no value."""
    if None in base or None in other:
        return None
    return paired([value for value in base if value is not None], [value for value in other if value is not None])


def problem_difference(base: Sequence[Ran], other: Sequence[Ran]) -> Interval | None:
    """Return the difference in exact answers, percentage points, over the same problems.

    Each problem counts once, with its mean over seeds: the interval tells what other problems might have said of
    these very runs, where that over seeds tells what other runs might have said of these problems.
    """
    columns = [_by_problem(runs) for runs in (base, other)]
    if any(column is None for column in columns):
        return None
    before, after = columns
    return paired(before or [], after or [])


def _by_problem(runs: Sequence[Ran]) -> list[float] | None:
    answered: list[Any] = [ran.found.get("exact") for ran in runs]
    if not answered or not all(answered):
        return None
    return [100 * sum(column) / len(answered) for column in zip(*answered, strict=True)]

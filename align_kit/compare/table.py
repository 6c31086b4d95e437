"""What was found, as Markdown that also reads well in a terminal, and as plain values for `compare.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from align_kit.compare import fair, measures
from align_kit.compare.interval import LEVEL, Interval
from align_kit.compare.measures import Measure
from align_kit.compare.reading import Ran
from align_kit.compare.sweep import REWARD, Found


@dataclass(frozen=True)
class Results:
    """All that a report is made of; `runs` are the reported ones by arm, in the order of their seeds."""

    recipe: str
    factor: Sequence[str]
    runs: Mapping[str, Sequence[Ran]]
    sweeps: Mapping[str, Found]
    rows: Sequence[Measure]
    start: str
    before: Mapping[str, Any]  # what was measured on the start
    problems: str  # the card of the problems, "" without any
    notes: Sequence[str] = field(default_factory=tuple)
    same_rows: bool = False  # the rates were chosen by the rows that the runs are judged by

    @property
    def arms(self) -> list[str]:
        return list(self.runs)

    @property
    def seeds(self) -> list[int]:
        return [ran.seed for ran in self.runs[self.arms[0]]]

    def title(self) -> str:
        """Return what was compared: `sft: full against lora`."""
        return f"{self.recipe}: {' against '.join(self.arms)}"


# --- rows -------------------------------------------------------------------------------------------------------------


def head(results: Results) -> list[str]:
    """Return the head of the main table."""
    first, *others = results.arms
    return ["", "start", *results.arms, *(f"{arm} - {first}" for arm in others)]


def main_rows(results: Results) -> list[list[str]]:
    """Return a row for each measure: the start, each arm's mean and interval, each arm's difference from the first."""
    return [_row(results, one) for one in results.rows]


def _row(results: Results, measure: Measure) -> list[str]:
    by_arm = measures.values(measure, results.runs)
    first, *others = by_arm.values()
    cells = [written(measures.mean(found), measure.form) for found in by_arm.values()]
    apart = [difference(measures.difference(first, other), measure.form) for other in others]
    return [measure.title, started(results, measure), *cells, *apart]


def started(results: Results, measure: Measure) -> str:
    """Return what a measure was before training, where it was taken."""
    first = results.runs[results.arms[0]][0]
    if measure.title.startswith("held-out loss"):
        # Of every seed: where each holds out other rows, the start has another loss on them.
        starts = [ran.curve[0] for ran in results.runs[results.arms[0]] if ran.curve and ran.curve[0].step == 0]
        whole = len(starts) == len(results.seeds)
        return f"{fmean(point.loss for point in starts):{measure.form}}" if whole else ""
    before = Ran("start", 0.0, 0, first.home, {"measured": {}}, [], results.before)
    value = measure.read(before) if measure.group in ("quality", "before") else None
    return "" if value is None else f"{value:{measure.form}}"


def written(found: Interval | None, form: str) -> str:
    """Return a mean with half its interval: `0.4312 ± 0.0045`; the number alone where all runs gave the same."""
    if found is None:
        return ""
    return f"{found.mean:{form}}" + (f" ± {found.half:{form}}" if _shows(found, form) else "")


def _shows(found: Interval, form: str) -> bool:
    """Tell whether there is an interval, and one that the digits shown tell from nothing."""
    return found.count > 1 and f"{found.half:{form}}" != f"{0.0:{form}}"


def difference(found: Interval | None, form: str) -> str:
    """Return a difference with its interval: `+0.0210 [+0.0180, +0.0240]`."""
    if found is None:
        return ""
    sign = f"+{form}"
    if not _shows(found, form):
        return f"{found.mean:{sign}}"
    return f"{found.mean:{sign}} [{found.low:{sign}}, {found.high:{sign}}]"


def sweep_rows(results: Results) -> list[list[str]]:
    """Return a row for each learning rate that was tried: what each arm got by it, the best marked."""
    rates = sorted({rate for found in results.sweeps.values() for rate in found.losses})
    return [
        [f"{rate:.2g}", *(_tried(results.sweeps[arm], rate) for arm in results.arms if arm in results.sweeps)]
        for rate in rates
    ]


def _tried(found: Found, rate: float) -> str:
    if rate not in found.losses:
        return ""
    value = found.values[rate]
    return (f"{value:.4f}" if math.isfinite(value) else "diverged") + (" *" if rate == found.rate else "")


# --- sentences --------------------------------------------------------------------------------------------------------


def how(results: Results) -> str:
    """Return how the numbers came about and how they are to be read."""
    count = len(results.seeds)
    seeds = f"seeds {', '.join(map(str, results.seeds))}" if count > 1 else f"seed {results.seeds[0]}"
    level = f"{100 * LEVEL:.0f} %"
    spread = (
        f"± and [ ] are {level} intervals of Student's t over {count} seeds, one measure at a time; differences are "
        f"between runs with the same seed. A seed draws {_drawn(results)} and what an arm draws (a fresh adapter, "
        "dropout); all start from one model."
        if count > 1
        else "One seed: there are no intervals."
    )
    return f"Means of {seeds}. {spread}"


ROWS = {"data": "which rows are trained on", "held-out data": "which rows are held out"}


def _drawn(results: Results) -> str:
    """Return what a seed draws of the data, by the digests in the runs' own accounts."""
    rows = [ROWS[name] for name in fair.drawn_by_seeds([ran for some in results.runs.values() for ran in some])]
    return ", ".join(["the order of the data", *rows])


def fairness(results: Results) -> str:
    """Return what was the same in all runs with one seed, by the runs' own accounts."""
    ran = results.runs[results.arms[0]][0]
    tokens = ran.tokens(ran.manifest["steps"])
    factor = ", ".join(results.factor[:8]) + (", …" if len(results.factor) > 8 else "")
    same = ", ".join(fair.equal([ran for some in results.runs.values() for ran in some]))
    return (
        f"The arms differ in {factor} and, where it was swept, the learning rate. Equal by the runs' own accounts, "
        f"seed by seed: {same}. A run of {results.arms[0]} starts from {results.start} and takes "
        f"{ran.manifest['steps']} steps, {tokens / 1e3:,.1f} k tokens, on {ran.manifest['world_size']} ranks."
    )


def quantity(results: Results) -> str:
    """Return what the learning rates were chosen by: all arms of one phase are judged by the same."""
    return next(found.quantity for found in results.sweeps.values())


def chosen_by(results: Results) -> str:
    """Return a sentence on the rows that the learning rates were chosen by."""
    if results.same_rows:
        return "The learning rates were chosen by the same held-out rows; --test_datasets names others."
    return "The learning rates were chosen by other held-out rows."


def swept(results: Results) -> list[str]:
    """Return a sentence for each arm's learning rate, and one for the ratio of two."""
    said = []
    for arm, found in results.sweeps.items():
        if len(found.losses) == 1:
            said.append(f"{arm}: only {found.rate:.2g} was tried.")
            continue
        guess = f", by a parabola {found.estimate:.2g}" if found.estimate else ""
        edge = f"; it is the {found.edge} that was tried, and a better one may lie beyond" if found.edge else ""
        said.append(f"{arm}: best at {found.rate:.2g} of {len(found.losses)} rates{guess}{edge}.")
    both = [results.sweeps[arm] for arm in results.arms if arm in results.sweeps]
    if len(both) == 2 and len(results.arms) == 2 and all(len(found.losses) > 1 for found in both):
        one, other = both
        finer = f" ({other.estimate / one.estimate:.2g} by the parabolas)" if one.estimate and other.estimate else ""
        first, second = results.arms
        said.append(f"The best of {second} is {other.rate / one.rate:.2g} times that of {first}{finer}.")
    return said


def over_problems(results: Results) -> list[str]:
    """Return the differences in exact answers over the same problems, one sentence for each arm but the first."""
    first, *others = results.arms
    said = []
    for arm in others:
        found = measures.problem_difference(results.runs[first], results.runs[arm])
        if found is not None:
            said.append(
                f"Exact answers, {arm} - {first}, over the same {found.count} problems of {results.problems}: "
                f"{difference(found, '.1f')} percentage points."
            )
    return said


# --- the whole --------------------------------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """Return the whole report."""
    parts = [f"# {results.title()}", fairness(results), grid(head(results), main_rows(results)), how(results)]
    parts += over_problems(results)
    if results.sweeps:
        names = [arm for arm in results.arms if arm in results.sweeps]
        parts.append(
            f"{quantity(results).capitalize()} by learning rate, one seed that is not among those above (* the best). "
            + chosen_by(results)
        )
        parts += [grid(["learning rate", *names], sweep_rows(results)), " ".join(swept(results))]
    return "\n\n".join([*parts, *results.notes])


def grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns."""
    table = [list(titles), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(titles))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def plain(results: Results) -> dict[str, Any]:
    """Return all numbers, for `compare.json`."""
    first, *others = results.arms
    rows = {}
    for measure in results.rows:
        by_arm = measures.values(measure, results.runs)
        apart = {arm: measures.difference(by_arm[first], by_arm[arm]) for arm in others}
        rows[measure.title] = {
            "by_seed": by_arm,
            "mean": {arm: _plain(measures.mean(found)) for arm, found in by_arm.items()},
            "difference": {arm: _plain(found) for arm, found in apart.items()},
        }
    return {
        "recipe": results.recipe,
        "factor": list(results.factor),
        "seeds": results.seeds,
        "start": results.start,
        "before": results.before.get("texts", {}),
        "rows": rows,
        "sweeps": {arm: _plain_sweep(found) for arm, found in results.sweeps.items()},
    }


def _plain_sweep(found: Found) -> dict[str, Any]:
    """Return a sweep with what was measured by rate: "losses", or "rewards" where these chose."""
    name = "rewards" if found.quantity == REWARD else "losses"
    values = {f"{rate:.2g}": _finite(value) for rate, value in found.values.items()}
    rest = {key: value for key, value in asdict(found).items() if key != "losses"}
    return {**rest, name: values}


def _plain(found: Interval | None) -> dict[str, float | None] | None:
    return {name: _finite(value) for name, value in asdict(found).items()} if found else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

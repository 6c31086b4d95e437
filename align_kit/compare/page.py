"""The report as one self-contained page with plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from align_kit.compare import measures, table
from align_kit.compare.interval import LEVEL
from align_kit.compare.reading import Ran
from align_kit.compare.sweep import REWARD
from align_kit.compare.table import Results
from align_kit.report import plots
from align_kit.report.page import Page
from align_kit.telemetry.clock import clock

MB = 1e6


def write(results: Results, place: Path) -> Path:
    """Write the page to `place` and return it."""
    page = Page(results.title(), f"{len(results.seeds)} seed{'s' * (len(results.seeds) > 1)} each")
    page.section("Result")
    page.text(table.fairness(results))
    page.table(table.head(results), table.main_rows(results))
    page.text("\n\n".join([table.how(results), *table.over_problems(results), *results.notes]))
    _quality(page, results)
    page.section("Learning")
    _curves(page, results)
    if results.sweeps:
        page.section("Learning rates")
        _sweeps(page, results)
    page.section("Memory and traffic")
    _costs(page, results)
    page.section("Runs")
    page.table(*_runs(results))
    return page.write(place)


def _quality(page: Page, results: Results) -> None:
    """Draw each arm's mean with its interval in what the arms are judged by."""
    if len(results.seeds) < 2:
        return
    over = f"mean and {100 * LEVEL:.0f} % interval over {len(results.seeds)} seeds"
    for measure in results.rows:
        if measure.group not in ("quality", "before"):
            continue
        means = {arm: measures.mean(found) for arm, found in measures.values(measure, results.runs).items()}
        shown = {arm: (one.mean, one.low, one.high) for arm, one in means.items() if one is not None}
        if len(shown) == len(means):
            figure = plots.intervals(shown, x=measure.title)
            page.figure(figure, f"{over}; {measure.better} is better; differences in the table are paired")


def _curves(page: Page, results: Results) -> None:
    if any(not ran.curve for some in results.runs.values() for ran in some):
        page.text("The runs logged no held-out loss on the way.")
        return
    by_tokens = {arm: _mean_curve(some, by_time=False) for arm, some in results.runs.items()}
    page.figure(
        plots.lines(by_tokens, x="tokens trained on, k", y="held-out loss, nats", title="Held-out loss by tokens"),
        "mean over seeds",
        "loss",
    )
    if all(ran.speed for some in results.runs.values() for ran in some):
        by_time = {arm: _mean_curve(some, by_time=True) for arm, some in results.runs.items()}
        page.figure(
            plots.lines(by_time, x="seconds of training", y="held-out loss, nats", title="Held-out loss by time"),
            "mean over seeds; seconds are tokens over the run's median tokens/s",
        )


def _mean_curve(runs: Sequence[Ran], *, by_time: bool) -> list[tuple[float, float]]:
    """Return the mean over seeds of each evaluation; runs of one arm evaluate at the same steps."""
    points = zip(*(ran.curve for ran in runs), strict=True)
    scale = fmean(ran.speed or math.nan for ran in runs) if by_time else 1e3
    return [(fmean(p.tokens for p in some) / scale, fmean(p.loss for p in some)) for some in points]


def _sweeps(page: Page, results: Results) -> None:
    names = [arm for arm in results.arms if arm in results.sweeps]
    quantity = table.quantity(results)
    page.table(["learning rate", *names], table.sweep_rows(results), f"{quantity} on one seed; * the best")
    page.text(" ".join([*table.swept(results), table.chosen_by(results)]))
    unit = quantity if quantity == REWARD else f"{quantity}, nats"
    curves = {
        arm: [(math.log10(rate), value) for rate, value in sorted(found.values.items()) if math.isfinite(value)]
        for arm, found in results.sweeps.items()
    }
    page.figure(
        plots.lines(curves, x="log10 of the learning rate", y=unit, title="Learning rates tried"),
        "each point is one run",
    )


def _costs(page: Page, results: Results) -> None:
    firsts = {arm: some[0] for arm, some in results.runs.items()}
    if not all(ran.measured for ran in firsts.values()):
        page.text("The runs kept no measurements of memory and traffic.")
        return
    state = {arm: _in_mb(ran.measured["state_bytes"]) for arm, ran in firsts.items()}
    page.figure(plots.bars(state, unit="MB on the fullest rank", title="State between steps"), "by tensor", "state")
    wire = {arm: _in_mb(_link_bytes(ran)) for arm, ran in firsts.items()}
    if any(wire.values()):
        page.figure(plots.bars(wire, unit="MB a rank and step", title="On the wire"), "by collective", "wire")


def _link_bytes(ran: Ran) -> dict[str, float]:
    return {name: each["link_bytes"] for name, each in (ran.measured.get("traffic") or {}).items()}


def _in_mb(sizes: Mapping[str, float]) -> dict[str, float]:
    return {name: size / MB for name, size in sizes.items() if size}


def _runs(results: Results) -> tuple[list[str], list[list[str]]]:
    every = [ran for some in results.runs.values() for ran in some]
    rows = [
        [ran.arm, f"{ran.rate:.2g}", str(ran.seed), str(ran.manifest["steps"]), clock(ran.manifest["seconds"]),
         ran.manifest["forward"]["mode"], ran.manifest["result"]["digest"][:12], str(ran.home)]
        for ran in every
    ]  # fmt: skip
    return ["arm", "learning rate", "seed", "steps", "time", "forward", "digest", "folder"], rows

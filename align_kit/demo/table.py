"""The tables of the demo: scores by phase, gains with intervals, answers side by side, where the files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from align_kit.demo.score import CARD, Score, gain
from align_kit.telemetry.clock import clock

TITLES = {"pretrain": "base", "sft": "SFT", "dpo": "DPO", "control": "DPO, shuffled pairs"}
COLUMNS = ("model", "perplexity", "exact, greedy", "exact, sampled", "shows work", "format", "distinct")


def report(results: Mapping[int, Mapping[str, Score]], output: Path, seconds: float, split: str) -> str:
    """Return the whole report as Markdown that also reads well in a terminal."""
    first = next(iter(results.values()))
    problems = len(first["sft"].greedy)
    over = f"seed {next(iter(results))}" if len(results) == 1 else f"mean over seeds {', '.join(map(str, results))}"
    parts = [
        f"{problems} held-out problems ({split}), {over}:",
        scores(list(results.values())),
        "Gain in exact answers, percentage points with 95 % intervals over the same problems:",
        gains(results),
        "The same problems, answered by each:",
        answers(first, split),
        f"{clock(seconds)} in all; models, pairs, manifests and metrics: {output}/seed*/",
    ]
    return "\n\n".join(parts)


def scores(results: Sequence[Mapping[str, Score]]) -> str:
    """Return a row for each model, averaged over seeds."""
    return grid(COLUMNS, [_score_row(arm, [one[arm] for one in results]) for arm in results[0]])


def _score_row(arm: str, found: Sequence[Score]) -> list[str]:
    shares = (
        [fmean(one.greedy) for one in found],
        [fmean(one.sampled) for one in found],
        [one.work for one in found],
        [one.form for one in found],
        [one.distinct for one in found],
    )
    return [TITLES[arm], f"{fmean(one.perplexity for one in found):.2f}", *(f"{100 * fmean(s):.1f} %" for s in shares)]


def gains(results: Mapping[int, Mapping[str, Score]]) -> str:
    """Return a row for each seed and comparison."""
    rows = []
    for seed, found in results.items():
        for before, after in (("pretrain", "sft"), ("sft", "dpo"), ("sft", "control")):
            if after in found:
                pair = (found[before], found[after])
                greedy, sampled = gain(pair[0].greedy, pair[1].greedy), gain(pair[0].sampled, pair[1].sampled)
                rows.append([str(seed), f"{TITLES[before]} -> {TITLES[after]}", str(greedy), str(sampled)])
    return grid(("seed", "step", "greedy", "sampled"), rows)


def answers(found: Mapping[str, Score], split: str) -> str:
    """Return three problems with each model's greedy answer on one line."""
    from align_kit.data import embedded

    problems = embedded.rows(CARD, split)
    width = max(len(TITLES[arm]) for arm in found)
    lines = []
    for number in range(3):
        lines.append(problems[number]["prompt"].strip())
        for arm, one in found.items():
            shown = " / ".join(one.shown[number].split("\n")) or "(nothing)"
            lines.append(f"    {TITLES[arm]:<{width}}  {shown[:100]}")
    return "\n".join(lines)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns."""
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])

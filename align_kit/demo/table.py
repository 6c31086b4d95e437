"""The tables of the demo: scores by phase, gains with intervals, the reward model, answers, where the files are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from align_kit.demo.score import CARD, Score, gain
from align_kit.telemetry.clock import clock

TITLES = {
    "pretrain": "base",
    "sft": "SFT",
    "dpo": "DPO",
    "dpo_again": "DPO, second round",
    "orpo": "ORPO, from base",
    "kto": "KTO",
    "ppo": "PPO",
    "ppo_model": "PPO, reward model",
    "dpo_control": "DPO, shuffled pairs",
    "kto_control": "KTO, shuffled labels",
    "ppo_control": "PPO, shuffled rewards",
}
BEFORE = {"sft": "pretrain", "dpo_again": "dpo"}  # what an arm's gain is over, where not over SFT
COLUMNS = (
    "model", "tokens", "perplexity", "exact, greedy", "exact, sampled", "shows work", "format", "distinct", "KL",
)  # fmt: skip
Results = Mapping[int, Mapping[str, Score]]


def report(results: Results, output: Path, seconds: float, split: str) -> str:
    """Return the whole report as Markdown that also reads well in a terminal."""
    first = next(iter(results.values()))
    problems = len(first["sft"].greedy)
    over = f"seed {next(iter(results))}" if len(results) == 1 else f"mean over seeds {', '.join(map(str, results))}"
    parts = [
        f"{problems} held-out problems ({split}), {over}; tokens are those its updates computed, KL is to its "
        "start, in nats per sampled answer:",
        scores(results, output),
        "Gain in exact answers, percentage points with 95 % intervals over the same problems:",
        gains(results),
        *reward_models(results, output),
        "The same problems, answered by each:",
        answers(first, split),
        f"{clock(seconds)} in all; models, pairs, manifests and metrics: {output}/seed*/",
    ]
    return "\n\n".join(parts)


def scores(results: Results, output: Path) -> str:
    """Return a row for each model, averaged over seeds."""
    arms = next(iter(results.values()))
    rows = []
    for arm in arms:
        tokens = fmean(trained_tokens(output / f"seed{seed}" / arm) for seed in results)
        rows.append(_score_row(arm, tokens, [one[arm] for one in results.values()]))
    return grid(COLUMNS, rows)


def _score_row(arm: str, tokens: float, found: Sequence[Score]) -> list[str]:
    shares = (
        [fmean(one.greedy) for one in found],
        [fmean(one.sampled) for one in found],
        [one.work for one in found],
        [one.form for one in found],
        [one.distinct for one in found],
    )
    divergence = fmean(one.kl for one in found)
    return [
        TITLES[arm],
        f"{tokens / 1e6:.2f} M",
        f"{fmean(one.perplexity for one in found):.2f}",
        *(f"{100 * fmean(share):.1f} %" for share in shares),
        f"{divergence:.2f}" if arm != "pretrain" else "",
    ]


def trained_tokens(folder: Path) -> float:
    """Return the tokens a run computed in training, by its metrics."""
    return sum(line.get("tokens", 0.0) for line in metrics(folder))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def gains(results: Results) -> str:
    """Return a row for each seed and arm: SFT over the base model, a second round over the first, others over SFT."""
    rows = []
    for seed, found in results.items():
        for after in found:
            before = BEFORE.get(after, "sft")
            if after != "pretrain":
                pair = (found[before], found[after])
                greedy, sampled = gain(pair[0].greedy, pair[1].greedy), gain(pair[0].sampled, pair[1].sampled)
                rows.append([str(seed), f"{TITLES[before]} -> {TITLES[after]}", str(greedy), str(sampled)])
    return grid(("seed", "comparison", "greedy", "sampled"), rows)


REWARD_COLUMNS = ("seed", "pair accuracy", "margin", "calibration error", "Brier score")
REWARD_METRICS = ("eval_accuracy", "eval_margin", "eval_calibration_error", "eval_brier_score")


def reward_models(results: Results, output: Path) -> list[str]:
    """Return a title and a row for each seed's reward model on held-out pairs; nothing where there is none."""
    rows = []
    for seed in results:
        folder = output / f"seed{seed}" / "reward"
        lines = [line for line in metrics(folder) if REWARD_METRICS[0] in line] if folder.is_dir() else []
        if lines:
            rows.append([str(seed), *(f"{lines[-1][name]:.3f}" for name in REWARD_METRICS)])
    title = "The reward model on held-out pairs of the SFT model's answers:"
    return [title, grid(REWARD_COLUMNS, rows)] if rows else []


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

"""The page of one run: how it went, what it answers now, where its time and memory went, and what it depends on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align_kit import run_folder
from align_kit.report import plots
from align_kit.report.curves import FIRST, MACHINE_CURVES, Curve, beside, labels
from align_kit.report.page import Page
from align_kit.report.reading import Record, read

GIB = 2**30
# Parts of the ledger of time in the order of a run; others follow as they come.
PARTS = ("start", "data", "policy", "frozen models", "training/engine", "training/rollout", "training/score",
         "training/update", "training/evaluation", "training/saves", "final save", "samples", "rest")  # fmt: skip
HEADLINE = ("loss", "eval_loss", "reward", "eval_reward", "rewards/accuracies", "accuracy", "kl")
DIGEST = 16  # digits of a digest that are shown


def write(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a run, from what lies there, and return where it is."""
    record = read(folder)
    return page(record).write(record.folder / run_folder.REPORT)


def page(record: Record) -> Page:
    """Return the page of a run."""
    made = Page(f"{record.phase}: {record.folder.resolve().name}", _subtitle(record.manifest))
    _ending(made, record.manifest)
    made.facts(_facts(record))
    _curves(made, record, "How it went", FIRST)
    _answers(made, record)
    _rollouts(made, record)
    _curves(made, record, "Speed and memory", MACHINE_CURVES)
    _time(made, record.manifest.get("spent") or {})
    _memory(made, record)
    _curves(made, record, "Other numbers", tuple(beside(record.names())))
    _checks(made, record.manifest)
    _identities(made, record.manifest)
    _configuration(made, record.manifest)
    return made


# --- how it ended -----------------------------------------------------------------------------------------------------


def _subtitle(manifest: Mapping[str, Any]) -> str:
    policy, engine = manifest.get("policy", {}), manifest.get("engine", {})
    stage = engine.get("zero_optimization", {}).get("stage", 0)
    ranks = manifest.get("world_size", 1)
    words = [str(policy.get("name", "")), f"{ranks} rank{'s' * (ranks != 1)}", f"ZeRO-{stage}"]
    words += [str(manifest.get("precision", "")), str(manifest.get("started", ""))]
    return ", ".join(word for word in words if word)


def _ending(made: Page, manifest: Mapping[str, Any]) -> None:
    status = manifest.get("status")
    if status == run_folder.FAILED:
        made.text(f"The run failed: {manifest.get('failure', 'it is not known how')}")
    if status == run_folder.STOPPED and (why := manifest.get("stopped")):
        made.text(f"The run was stopped at step {why.get('step')}: {why.get('why')}. It goes on with --resume.")


def _facts(record: Record) -> dict[str, Any]:
    manifest, measured = record.manifest, record.manifest.get("measured") or {}
    steps = max((line["step"] for line in record.lines), default=0)
    facts: dict[str, Any] = {"status": manifest.get("status"), "steps": manifest.get("steps", steps)}
    if spent := manifest.get("spent"):
        facts["time"] = duration(sum(spent.values()))
    facts |= {name: _from_to(record.series(name)) for name in HEADLINE if record.series(name)}
    if speed := mean(value for _, value in record.series(f"{run_folder.MACHINE}tokens_per_second")):
        facts["tokens/s"] = f"{speed:,.0f}"
    peak = measured.get("peak_bytes", 0) / GIB or record.last(f"{run_folder.MACHINE}peak_gib")
    if peak:
        facts["peak memory a rank"] = f"{peak:.3g} GiB"
    if share := mean(value for _, value in record.series(f"{run_folder.MACHINE}mfu")):
        facts["MFU"] = f"{share:.2%}"
    return facts


def _from_to(points: Sequence[tuple[float, float]]) -> str:
    first, last = points[0][1], points[-1][1]
    return f"{last:.4g}" if len(points) == 1 else f"{first:.4g} → {last:.4g}"


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, `None` of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else None


def duration(seconds: float) -> str:
    """Return seconds as a reader says them: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# --- curves and answers -----------------------------------------------------------------------------------------------


def _curves(made: Page, record: Record, title: str, curves: Sequence[Curve]) -> None:
    logged = record.names()
    named = [(curve, labels(curve, logged)) for curve in curves]
    if any(names for _, names in named):
        made.section(title)
    for curve, names in named:
        if names:
            series = {label: record.series(name) for name, label in names.items()}
            drawn = plots.lines(series, x="step", y=curve.unit, title=curve.title, log_y=curve.log)
            made.figure(drawn, curve.caption)


def _answers(made: Page, record: Record) -> None:
    why = (record.manifest.get("samples") or {}).get("why")
    if not record.answers and not why:
        return
    made.section("Answers before and after")
    if why:
        made.text(f"There are none: {why}.")
        return
    made.text("Greedy answers of the model the run started from and of the one it left, both opened from disk.")
    for line in record.answers:
        before = line.get("before")
        shown = {"before": "(random weights)" if before is None else before, "after": line.get("after", "")}
        made.blocks({"prompt": line.get("prompt", ""), **shown})


def _rollouts(made: Page, record: Record) -> None:
    if not record.rollouts:
        return
    made.section("Written while it trained")
    last = record.rollouts[-1].get("iteration")
    some = [line for line in record.rollouts if line.get("iteration") in (record.rollouts[0].get("iteration"), last)]
    head = ("iteration", "prompt", "completion", "reward", "KL")
    rows = [[line.get(name) for name in ("iteration", "prompt", "completion", "reward", "kl")] for line in some]
    made.table(head, rows, "Of the first iteration and of the last.")


# --- time and memory --------------------------------------------------------------------------------------------------


def _time(made: Page, spent: Mapping[str, float]) -> None:
    if not spent:
        return
    made.section("Where the time went")
    parts = parts_of(spent)
    whole = sum(parts.values()) or 1.0
    seen = {part: seconds for part, seconds in parts.items() if seconds >= 0.002 * whole}
    made.figure(
        plots.bars({part: {"": seconds} for part, seconds in seen.items()}, unit="seconds"),
        f"{duration(whole)} of rank 0 in this process, before this page was written; each second counts once, and "
        "parts under 0.2 % are left out.",
    )


def parts_of(spent: Mapping[str, float]) -> dict[str, float]:
    """Return the parts of a ledger in the order of a run."""
    return {part: spent[part] for part in (*PARTS, *spent) if part in spent}


def _memory(made: Page, record: Record) -> None:
    """Show what was planned beside what was measured, as far as either is known."""
    measured, plan = record.manifest.get("measured") or {}, record.manifest.get("plan") or {}
    if not measured and not plan:
        return
    made.section("Plan and measurement")
    planned, held = plan.get("state_bytes") or {}, measured.get("state_bytes") or {}
    moment = (plan.get("moment_bytes") or {}).get(plan.get("peak_at"), {})
    stacks = {"planned, at the peak": {**planned, **_beside(planned, moment)}} if moment else {}
    stacks |= {"planned, between steps": planned} if planned else {}
    stacks |= {"measured, between steps": held} if held else {}
    if stacks:
        sizes, unit = _scaled(stacks)
        made.figure(plots.bars(sizes, unit=unit, title="Memory of the fullest rank"), "")
    step = mean(value for _, value in record.series(f"{run_folder.MACHINE}seconds"))
    rows = [
        ["between two steps", *_compared(plan.get("persistent_bytes"), sum(held.values()), _bytes)],
        ["at the peak", *_compared(plan.get("peak_bytes"), measured.get("peak_bytes"), _bytes)],
        ["on the wire, a rank and step", *_compared(plan.get("link_bytes"), measured.get("link_bytes"), _bytes)],
        ["time of a step", *_compared(plan.get("seconds"), step, duration)],
    ]
    how = measured.get("peak_how")
    said = f"Of the fullest rank. The measured peak is that of the {how}, above what was there before." if how else ""
    made.table(("", "planned", "measured", "planned / measured"), rows, said)


def _beside(state: Mapping[str, float], moment: Mapping[str, float]) -> dict[str, float]:
    """Return what a moment adds to the state, under names of its own."""
    return {f"{name}, in flight" if name in state else name: size for name, size in moment.items()}


def _scaled(stacks: Mapping[str, Mapping[str, float]]) -> tuple[dict[str, dict[str, float]], str]:
    """Return stacks of bytes in the unit their largest is a handful of, and that unit."""
    largest = max(sum(stack.values()) for stack in stacks.values())
    unit, scale = ("GiB", GIB) if largest >= GIB / 10 else ("MiB", 2**20)
    return {name: {part: size / scale for part, size in stack.items()} for name, stack in stacks.items()}, unit


def _bytes(size: float) -> str:
    return f"{size / GIB:.4g} GiB" if size >= GIB / 10 else f"{size / 2**20:.4g} MiB"


def _compared(planned: float | None, measured: float | None, say: Callable[[float], str]) -> list[str | None]:
    shown = [say(size) if size else None for size in (planned, measured)]
    return [*shown, f"{planned / measured:.3f}" if planned and measured else None]


# --- what it depends on -----------------------------------------------------------------------------------------------


def _checks(made: Page, manifest: Mapping[str, Any]) -> None:
    held = list(manifest.get("gates") or [])
    if checks := manifest.get("frozen_checks"):
        times = f"{checks} comparison{'s' * (checks != 1)}"
        held.append(f"frozen models had not changed in {times} with their first fingerprint")
    if (result := manifest.get("result")) is not None:
        held.append(
            f"the final model ({result['bytes'] / 1e6:,.1f} MB, digest {result['digest'][:DIGEST]}) was opened from "
            f"disk and gave the trained model's logits within {result['logit_gap']:.1g}"
        )
    if held:
        made.section("What was checked, and held")
        made.points(held)
    changed = [f"from step {one.get('step')} on: {one.get('line')}" for one in manifest.get("changes") or []]
    changed += [f"step {step} was passed over" for step in manifest.get("skip_steps") or []]
    changed += [f"world size {one['from_world_size']} → {one['world_size']}" for one in manifest.get("recuts") or []]
    if changed:
        made.section("What changed as it went on")
        made.points(changed)


def _identities(made: Page, manifest: Mapping[str, Any]) -> None:
    made.section("What it was made from")
    policy, rows = manifest.get("policy", {}), []
    rows.append(["policy", policy.get("name"), str(policy.get("digest"))[:DIGEST], policy.get("why")])
    for role, held in (manifest.get("frozen") or {}).items():
        rows.append([role, held["name"], held["digest"][:DIGEST], f"{held['placement']}: {held['reason']}"])
    for split, account in (manifest.get("data") or {}).items():
        names = ", ".join(f"{one['path']} {one['split']}" for one in account["sources"])
        tokens = account["tokenised"]
        said = f"{tokens['rows_out']:,} rows, {tokens['tokens']:,} tokens, {tokens['trained_tokens']:,} trained"
        rows.append([f"data, {split}", names, account["digest"][:DIGEST], said])
    made.table(("", "name", "digest", ""), rows)
    versions = ", ".join(f"{name} {number}" for name, number in (manifest.get("versions") or {}).items())
    git = manifest.get("git") or {}
    revision = f"; git {git['revision'][:12]}{' with changes' if git.get('changed') else ''}" if git else ""
    made.text(f"{versions}{revision}")


def _configuration(made: Page, manifest: Mapping[str, Any]) -> None:
    config, origin = manifest.get("config") or {}, manifest.get("origin") or {}
    made.section("Configuration")
    given = [[name, plain(config[name]), origin[name]] for name in sorted(origin) if name in config]
    derived = [
        [name, plain(value), f"derived: {why}"] for name, (value, why) in (manifest.get("derived") or {}).items()
    ]
    made.table(("option", "value", "from"), [*given, *derived], "What was given or derived; all else is a default.")
    made.code(_json(config), summary="Every option")
    made.code(_json(manifest.get("engine") or {}), summary="DeepSpeed's configuration")


def plain(value: Any) -> str:
    """Return a value of a configuration as one writes it."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)

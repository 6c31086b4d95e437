"""The planner's answer in words, tables and text bars. Bytes are shown in GiB, times in the unit that suits them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from align_kit.config import BatchPlan
from align_kit.plan.choose import SPARE, Choice, Limits, Way, global_batch, words
from align_kit.plan.plan import Plan
from align_kit.plan.time import HOUR

if TYPE_CHECKING:
    from align_kit.plan.hardware import Hardware

GIB = 2**30
WIDTH = 120
BAR = 60  # characters of the longest bar
FAR = 6  # times as long as any bar: the limit is not drawn then
SHADES = "█▓▒░▚◆●▲■▬◇○△□"
GLUE = "\xa0"  # a space that no line is broken at
SHOWN = 4  # components named in a line
RUNNERS_UP = 2
# The moments of `plan.peak` in words.
MOMENTS = {
    "forward": "in the forward", "head": "at the LM head", "backward": "in the backward",
    "reduce": "reducing gradients", "step": "in the update", "reference": "while the reference computes",
    "rollout": "writing", "score": "scoring", "save": "saving", "evaluation": "in an evaluation",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What the planner found: the ways to carry out a run of `model`, on what, within which limits."""

    phase: str
    unit: str
    model: str
    hardware: Hardware
    limits: Limits
    batch: BatchPlan
    choice: Choice

    def refusal(self) -> str | None:
        """Return the line about a run that cannot fit as configured, None where it can."""
        return refusal(self.choice, self.limits, self.model)

    @property
    def ranks(self) -> str:
        """The ranks in words: `16 x h200 on 2 nodes`."""
        run = self.choice.configured.plan.run
        return f"{run.world_size} x {self.hardware.name}" + (f" on {run.nodes} nodes" if run.nodes > 1 else "")

    def why(self) -> list[str]:
        """Return why the best way is, and what the others cost beside it, a line each."""
        return list(_reasons(self))

    @property
    def ways(self) -> dict[str, Way]:
        """The run as configured, the best way, and the runners-up, by name; each way once."""
        found = {"as configured": self.choice.configured}
        others = [way for way in self.choice.fitting if way is not self.choice.configured]
        best = self.choice.best is not self.choice.configured
        names = [*(["best"] if best else []), *[f"runner-up {number + 1}" for number in range(RUNNERS_UP)]]
        return found | dict(zip(names, others, strict=False))

    def as_dict(self) -> dict[str, Any]:
        """Return the answer as plain values."""
        return {
            "phase": self.phase,
            "model": self.model,
            "hardware": self.hardware.name,
            "ranks": self.batch.world_size,
            "batch": self.batch.sentence(self.unit),
            "limits": {"device_bytes": self.limits.device, "host_bytes": self.limits.host},
            "ways": [
                {"name": name, "changes": dict(way.changes), "fits": way.fits, "step_seconds": way.seconds,
                 **way.plan.as_dict()}
                for name, way in self.ways.items()
            ],
            "refused": self.refusal(),
        }


# --- numbers ----------------------------------------------------------------------------------------------------------


def gib(count: float) -> str:
    """Return bytes in GiB, in MiB below a tenth of one."""
    if 0 < count < GIB / 10:
        return f"{count / 2**20:.3g} MiB"
    return f"{count / GIB:.2f} GiB" if count < 100 * GIB else f"{count / GIB:,.0f} GiB"


def short(count: float, unit: str) -> str:
    """Return a large number with three figures and a decimal prefix: 1.23 TFLOP, 340 MB."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}"


def seconds(value: float) -> str:
    """Return a time in the unit that suits it."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min")):
        if value < limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value / 3600:,.1f} h"


def largest(parts: Mapping[str, float]) -> str:
    """Return the largest components in GiB, in words."""
    first = sorted(parts.items(), key=lambda item: -item[1])[:SHOWN]
    return ", ".join(f"{name} {gib(count)}" for name, count in first)


def components(plan: Plan) -> dict[str, int]:
    """Return the bytes of each component at the moment of the peak, largest first."""
    found = dict(plan.memory.state)
    for name, count in plan.memory.moments[plan.memory.at].items():
        found[name] = found.get(name, 0) + count
    return dict(sorted(found.items(), key=lambda item: -item[1]))


# --- one line ---------------------------------------------------------------------------------------------------------


def line(plan: Plan, limits: Limits) -> str:
    """Return the line of a run's header: memory, the network, and the work of a step."""
    need, _ = limits.needed(plan.run, plan.memory)
    sent = f"{short(plan.traffic.link_bytes, 'B')} sent and " if plan.traffic.link_bytes else ""
    return (
        f"at most {gib(need)} of {gib(limits.device)} a rank, {MOMENTS.get(plan.memory.at, plan.memory.at)} "
        f"({largest(components(plan))}); "
        f"{sent}{short(plan.work.flops, 'FLOP')} a step on each"
    )


def refusal(choice: Choice, limits: Limits, model: str) -> str | None:
    """Return the line about a run that cannot fit as configured, with the smallest change that helps."""
    if choice.configured.fits:
        return None
    return f"{_too_much(choice.configured, limits, model)}; {_way_out(choice, limits)}, or go on as it is with --force"


def _too_much(way: Way, limits: Limits, model: str) -> str:
    run, memory = way.plan.run, way.plan.memory
    device, host = limits.needed(run, memory)
    if device > limits.device:
        return (
            f"{run.phase} of {model} needs {gib(device)} on each of {run.world_size} ranks "
            f"{MOMENTS.get(memory.at, memory.at)} ({largest(components(way.plan))}), and {gib(limits.device)} are there"
        )
    return (
        f"{run.phase} of {model} needs {gib(host)} of a node's memory ({largest(memory.host)}), and "
        f"{gib(limits.host)} are there"
    )


def _way_out(choice: Choice, limits: Limits) -> str:
    run = choice.configured.plan.run
    if choice.smallest is not None:
        device, _ = limits.needed(choice.smallest.plan.run, choice.smallest.plan.memory)
        return f"it fits with {choice.smallest.words()} ({gib(device)})"
    if choice.wider is not None:
        how = f" with {words(choice.wider.changes)}" if choice.wider.changes else ""
        batch, before = choice.wider.batch, global_batch(run)
        instead = "as now" if batch == before else f"for {before}"
        return f"it fits on {choice.wider.ranks} such ranks{how} ({batch} {run.unit} a step {instead})"
    in_few_bits = any(weight.element_bytes is not None for weight in run.policy.weights)
    other = "an adapter (use_peft), or " if not run.use_peft else "on a base in 4 bits (load_in_4bit), or "
    return f"nothing that keeps its results makes it fit: train {'' if in_few_bits else other}a smaller model"


# --- the whole answer -------------------------------------------------------------------------------------------------


def text(answer: Answer) -> str:
    """Return the answer as it is printed."""
    parts = [
        _head(answer),
        table(*memory_table(answer)),
        bars({name: components(way.plan) for name, way in answer.ways.items()}, answer.limits.device),
        table(*cost_table(answer)),
        "\n".join(answer.why()),
    ]
    return "\n\n".join(parts)


def _head(answer: Answer) -> str:
    run = answer.choice.configured.plan.run
    trained = f"{short(run.policy.trained_size, '')} of " if run.policy.trained_size < run.policy.size else ""
    said = [
        f"{answer.phase} of {answer.model}: {trained}{short(run.policy.size, '').strip()} parameters, "
        f"{run.engine.precision}, {answer.ranks}",
        f"batch      {answer.batch.sentence(answer.unit)}; {run.steps:,} steps",
        f"rows       {run.mean.tokens:,.0f} tokens in a micro-batch ({run.worst.tokens:,.0f} in the largest), computed "
        f"{run.forward}; longest {run.worst.longest:,.0f}",
        f"memory     {gib(answer.limits.device)} usable on each rank, {gib(answer.limits.host)} on each node",
        *(f"note       {note}" for note in run.notes),
    ]
    return "\n".join(said)


def memory_table(answer: Answer) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of what each way takes of a rank's memory by component, of the host's and of the disk."""
    ways = list(answer.ways.values())
    plans = [way.plan for way in ways]
    unit = unit_of([plan.memory.peak for plan in plans])
    shown = partial(cell, unit=unit)
    states = list(dict.fromkeys(name for plan in plans for name in plan.memory.state))
    passing = list(dict.fromkeys(name for plan in plans for name in plan.memory.moments[plan.memory.at]))
    moments = list(dict.fromkeys(name for plan in plans for name in plan.memory.moments))
    rows = [[name, *(shown(plan.memory.state.get(name, 0)) for plan in plans)] for name in states]
    rows.append(["= from step to step", *(shown(plan.memory.persistent) for plan in plans)])
    rows += [[f"+ {name}", *(shown(_passing(plan).get(name, 0)) for plan in plans)] for name in passing]
    rows.append(["= at most", *(shown(plan.memory.peak) for plan in plans)])
    rows.append(["", *(MOMENTS.get(plan.memory.at, plan.memory.at) for plan in plans)])
    rows.append(["  fits", *("barely" if way.barely else "yes" if way.fits else "NO" for way in ways)])
    rows += [[f"at most {MOMENTS.get(name, name)}", *(shown(_at(plan, name)) for plan in plans)] for name in moments]
    kept = partial(_activations, device=answer.hardware.kind)
    rows += [[f"activations {word}", *(shown(kept(plan, on)) for plan in plans)] for word, on in KEPT.items()]
    rows.append(["host memory of a node", *(shown(sum(plan.memory.host.values())) for plan in plans)])
    rows.append(["a checkpoint", *(shown(plan.memory.checkpoint_bytes) for plan in plans)])
    rows.append(["on the disk at most", *(shown(plan.memory.disk_bytes) for plan in plans)])
    return [f"{unit} on each rank", *answer.ways], rows


def _passing(plan: Plan) -> Mapping[str, int]:
    return plan.memory.moments[plan.memory.at]


def _at(plan: Plan, moment: str) -> int:
    return plan.memory.persistent + sum(plan.memory.moments.get(moment, {}).values())


def _activations(plan: Plan, recomputed: bool, device: str) -> int:
    """Return what a micro-batch's forward keeps for its backward, with activation checkpointing or without."""
    from align_kit.plan import peak

    return peak.moments(replace(plan.run, checkpointing=recomputed), device)["head"].get("activations", 0)


KEPT = {"kept, all of them": False, "with checkpointing": True}


def unit_of(counts: Sequence[float]) -> str:
    """Return the unit that the largest of `counts` is readable in."""
    return "GiB" if max(counts) >= GIB else "MiB"


def cell(count: float, unit: str) -> str:
    """Return bytes as a number in `unit`."""
    return f"{count / (GIB if unit == 'GiB' else GIB / 1024):,.2f}" if count else "-"


def cost_table(answer: Answer) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of what each way sends and computes in a step, how long it takes, and what it costs."""
    plans = [way.plan for way in answer.ways.values()]
    names = list(dict.fromkeys(name for plan in plans for name in plan.traffic.by))
    rows = [[f"{name}, handed in", *(_sent(plan, name) for plan in plans)] for name in names]
    rows.append(["sent by a rank", *(short(plan.traffic.link_bytes, "B") for plan in plans)])
    kinds = list(dict.fromkeys(name for plan in plans for name in plan.work.by))
    rows += [[f"{name} work", *(short(plan.work.by.get(name, 0), "FLOP") for plan in plans)] for name in kinds]
    rows += _time_rows(list(answer.ways.values()))
    return ["a step", *answer.ways], rows


def _sent(plan: Plan, name: str) -> str:
    sent = plan.traffic.by.get(name)
    return f"{short(sent.bytes, 'B')} in {sent.calls:,.0f}" if sent else "-"


def _time_rows(ways: Sequence[Way]) -> list[list[str]]:
    times = [way.plan.time for way in ways]
    parts = ("compute", "exposed", "offload", "generation")
    names = {"exposed": "waiting for the network", "offload": "waiting for the host", "generation": "writing"}
    rows = [
        [names.get(part, part), *(seconds(getattr(time, part)) for time in times)]
        for part in parts
        if any(getattr(time, part) for time in times)
    ]
    rows.append(["= time of a step", *(seconds(time.seconds) for time in times)])
    if any(time.once for time in times):
        rows.append(["  and its share of what is done once", *(seconds(way.seconds) for way in ways)])
    rows.append(["  bound by", *(BOUND[time.bound] for time in times)])
    rows.append([f"all {times[0].steps:,} steps", *(seconds(time.hours * HOUR) for time in times)])
    if costs := [time.dollars for time in times if time.dollars is not None]:
        rows.append(["cost", *(f"${cost:,.2f}" for cost in costs)])
    return rows


BOUND = {"compute": "arithmetic", "link": "network", "offload": "host memory", "generation": "writing"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in text: the first column to the left, numbers to the right."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]

    def shown(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([shown(head), "  ".join("-" * width for width in widths), *(shown(row) for row in rows)])


def bars(stacks: Mapping[str, Mapping[str, float]], limit: float) -> str:
    """Return stacked bars in text, one for each way, with a mark where the memory ends, and what each shade means.

    Where the memory ends far beyond the longest bar, there is no mark.
    """
    names = list(dict.fromkeys(name for parts in stacks.values() for name in parts))
    shades = dict(zip(names, SHADES, strict=False))
    longest = max(sum(parts.values()) for parts in stacks.values())
    far = limit > FAR * longest
    scale, width = BAR / (longest if far else max(limit, longest)), max(map(len, stacks))
    lines = [f"{name:<{width}}  {_bar(parts, shades, scale, None if far else limit)}" for name, parts in stacks.items()]
    meanings = [f"{shade} {name}" for name, shade in shades.items()] + ([] if far else ["| all there is"])
    legend, indent = "   ".join(meaning.replace(" ", GLUE) for meaning in meanings), " " * (width + 2)
    wrapped = textwrap.wrap(legend, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return "\n".join([*lines, *(line.replace(GLUE, " ") for line in wrapped)])


def _bar(parts: Mapping[str, float], shades: Mapping[str, str], scale: float, limit: float | None) -> str:
    drawn, total = "", 0.0
    for name, count in parts.items():
        total += count
        drawn += shades.get(name, "·") * (round(total * scale) - len(drawn))
    if limit is None:
        return f"{drawn} {gib(total)}"
    end = min(round(limit * scale), BAR)
    padded = drawn.ljust(BAR + 1)
    return f"{padded[:end]}|{padded[end:].rstrip()}" + f" {gib(total)}"


# --- why --------------------------------------------------------------------------------------------------------------


def _reasons(answer: Answer) -> Iterator[str]:
    """Yield why the best way is, and what the others cost beside it."""
    choice = answer.choice
    if refused := answer.refusal():
        yield f"as configured: {refused}"
    best = choice.best
    if best is None:
        return
    if best is choice.configured:
        free = f" barely, with less than {SPARE:.0%} of a rank's memory to spare" if best.barely else ""
        yield f"as configured is best: it fits{free}, and no way that fits is quicker; {_bound(best)}"
    else:
        yield f"best: {best.words()}: {_beside(best, choice.configured)}; {_bound(best)}"
    for name, way in answer.ways.items():
        if name.startswith("runner-up"):
            yield f"{name}: {way.words() or 'as configured'}: {_beside(way, best)}"
    yield f"speed: {answer.hardware.calibration.mfu:.0%} of the peak rate ({answer.hardware.calibration.how})"


def _beside(way: Way, other: Way) -> str:
    """Return how a way compares with another in time and memory."""
    share = way.seconds / other.seconds - 1 if other.seconds else 0.0
    speed = "as quick" if abs(share) < 0.01 else f"{abs(share):.0%} {'quicker' if share < 0 else 'slower'}"
    return f"{speed}, {gib(way.plan.memory.peak)} for {gib(other.plan.memory.peak)}"


def _bound(way: Way) -> str:
    return f"a step is bound by {BOUND[way.plan.time.bound]}"


# --- the page ---------------------------------------------------------------------------------------------------------


def write_page(answer: Answer, path: str) -> None:
    """Write the answer as one HTML file, with a picture of each way's memory."""
    from align_kit.report import plots
    from align_kit.report.page import Page

    page = Page(f"Plan of {answer.phase}: {answer.model}", answer.ranks)
    bytes_of = {name: components(way.plan) for name, way in answer.ways.items()}
    unit = unit_of([sum(parts.values()) for parts in bytes_of.values()])
    size = GIB if unit == "GiB" else GIB / 1024
    stacks = {name: {part: count / size for part, count in parts.items()} for name, parts in bytes_of.items()}
    far = answer.limits.device > FAR * max(sum(parts.values()) for parts in bytes_of.values())
    page.section("Memory")
    limit = None if far else answer.limits.device / size
    page.figure(plots.bars(stacks, unit=unit, limit=limit), f"{unit} on each rank at the peak")
    page.table(*memory_table(answer))
    page.section("Work, network and time")
    page.table(*cost_table(answer))
    page.section("Why")
    for reason in answer.why():
        page.text(reason)
    page.section("What was assumed")
    page.code(_head(answer))
    page.write(path)

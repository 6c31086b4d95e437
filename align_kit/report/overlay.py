"""`align-kit report <dir…>`: the page of one run again, or one page with the curves of several over each other."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align_kit import log, run_folder
from align_kit.errors import UserError, first_line
from align_kit.report import plots, run_page
from align_kit.report.curves import EVAL, FIRST, MACHINE_CURVES, Curve, base, beside
from align_kit.report.page import Page
from align_kit.report.reading import Record, read

# Options that differ between any two runs, and say nothing about what was trained.
OWN = {"output_dir", "logging_dir", "run_name", "resume", "overwrite"}
COLUMNS = ("loss", "eval_loss", "reward", "eval_reward", "rewards/accuracies", "eval_rewards/accuracies", "kl")


def report(argv: Sequence[str]) -> int:
    """Carry out `align-kit report …` and return its exit code; raises `UserError` where no folder holds a run."""
    parser = argparse.ArgumentParser("align-kit report", description=(__doc__ or "").splitlines()[0])
    what = "output_dir of a run or of a comparison, or a folder of runs"
    parser.add_argument("folders", nargs="+", type=Path, metavar="dir", help=what)
    where = f"page to write; default {run_folder.REPORT}, in the run's folder, of several runs in this one"
    parser.add_argument("--output", type=Path, help=where)
    given = parser.parse_args(list(argv))
    places = [place for folder in given.folders for place in _places_in(folder)]
    without = [place for place in places if not _holds_run(place)]
    if len(without) == len(places):
        read(places[0])  # says what is missing there
    if without:
        log.say(f"left out, for they hold no run: {', '.join(map(str, without))}")
    return _told([read(place) for place in places if place not in without], given.output)


def _told(records: Sequence[Record], output: Path | None) -> int:
    alone = len(records) == 1
    output = output or (records[0].folder if alone else Path()) / run_folder.REPORT
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it, or name another page")
    try:
        made = run_page.page(records[0]) if alone else overlay(_named(records))
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # files that no run wrote, or not all of them
        places = ", ".join(str(record.folder) for record in records)
        raise UserError(
            f"{places}: {run_folder.MANIFEST} or {run_folder.METRICS} is not as a run writes it "
            f"({type(error).__name__}: {first_line(error)}); leave that folder out"
        ) from None
    log.say(f"report: {made.write(output)} ({len(records)} run{'s' * (not alone)})")
    return 0


def _places_in(folder: Path) -> list[Path]:
    """Return where runs are: `folder`, or folders in it and, as a comparison has them, in these; itself for none."""
    home = folder.expanduser()
    if _has_manifest(home):
        return [folder]
    found = []
    for place in sorted(home.glob("*")):
        found += [place] if _has_manifest(place) else sorted(filter(_has_manifest, place.glob("*")))
    return found or [folder]


def _has_manifest(folder: Path) -> bool:
    return (folder / run_folder.MANIFEST).is_file()


def _holds_run(folder: Path) -> bool:
    return "phase" in (run_folder.read_manifest(folder.expanduser()) or {})


def _named(records: Sequence[Record]) -> dict[str, Record]:
    """Return runs by the shortest ends of their paths that tell them apart."""
    places = [record.folder.resolve() for record in records]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise UserError(f"{twice} was named twice; give each run once")
    parts = 1
    while len({place.parts[-parts:] for place in places}) < len(places):
        parts += 1
    return {os.sep.join(place.parts[-parts:]): record for place, record in zip(places, records, strict=True)}


def overlay(records: Mapping[str, Record]) -> Page:
    """Return one page of several runs."""
    made = Page(f"{len(records)} runs", ", ".join(records))
    _summary(made, records)
    _differences(made, records)
    _curves(made, records, "How they went", _apart(FIRST))
    _curves(made, records, "Speed and memory", MACHINE_CURVES)
    _time(made, records)
    logged = list(dict.fromkeys(name for record in records.values() for name in record.names()))
    _curves(made, records, "Other numbers", _apart(tuple(beside(logged))))
    return made


def _summary(made: Page, records: Mapping[str, Record]) -> None:
    shown = [name for name in COLUMNS if any(record.series(name) for record in records.values())]
    head = ("run", "phase", "status", "steps", "time", *shown, "tokens/s", "peak GiB")
    made.table(head, [_line(name, record, shown) for name, record in records.items()], "Last values; means of speed.")


def _line(name: str, record: Record, shown: Sequence[str]) -> list[Any]:
    manifest, spent = record.manifest, record.manifest.get("spent") or {}
    speed = run_page.mean(value for _, value in record.series(f"{run_folder.MACHINE}tokens_per_second"))
    return [
        name,
        record.phase,
        manifest.get("status"),
        manifest.get("steps", max((line["step"] for line in record.lines), default=0)),
        run_page.duration(sum(spent.values())) if spent else None,
        *(record.last(column) for column in shown),
        None if speed is None else round(speed),
        record.last(f"{run_folder.MACHINE}peak_gib"),
    ]


def _differences(made: Page, records: Mapping[str, Record]) -> None:
    """Show which options differ, and what else the runs were made from that is not the same."""
    told = {name: _what_it_is(record.manifest) for name, record in records.items()}
    # What only some phases know follows from the phase, which is among the options.
    common = set.intersection(*(set(facts) for facts in told.values())) - OWN
    rows = [[name, *(facts[name] for facts in told.values())] for name in sorted(common)]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    made.section("What differs")
    if rows:
        made.table(("", *records), rows)
    else:
        made.text("Nothing: options, start, data, engine and versions are the same.")


def _what_it_is(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run's result depends on, by name: its options, and what they stand for."""
    facts = {name: run_page.plain(value) for name, value in (manifest.get("config") or {}).items()}
    facts["digest of the policy's start"] = str((manifest.get("policy") or {}).get("digest"))[: run_page.DIGEST]
    for split, account in (manifest.get("data") or {}).items():
        facts[f"digest of the data, {split}"] = account["digest"][: run_page.DIGEST]
    for role, held in (manifest.get("frozen") or {}).items():
        facts[f"digest of the {role}"] = held["digest"][: run_page.DIGEST]
    facts["ranks"], facts["precision"] = str(manifest.get("world_size")), str(manifest.get("precision"))
    facts["versions"] = run_page.plain(manifest.get("versions"))
    return facts | dict(_flat(manifest.get("engine") or {}, "DeepSpeed: "))


def _flat(value: Mapping[str, Any], before: str) -> Iterator[tuple[str, str]]:
    """Yield the options of nested mappings by dotted names."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{before}{name}.")
        else:
            yield before + name, run_page.plain(inner)


def _apart(curves: Sequence[Curve]) -> list[Curve]:
    """Return a plot for each number of `curves` and for each of an evaluation: colours tell runs apart here."""
    found = []
    for curve in curves:
        for name in (each for number in curve.names for each in (number, EVAL + number)):
            title = curve.title if len(curve.names) == 1 else base(name)
            said = f"{title}, evaluation" if name.startswith(EVAL) else title
            found.append(Curve(said, curve.unit, (name,), curve.caption, curve.log))
    return found


def _curves(made: Page, records: Mapping[str, Record], title: str, curves: Sequence[Curve]) -> None:
    drawn = []
    for curve in curves:
        series = {name: record.series(curve.names[0]) for name, record in records.items()}
        if any(series.values()):
            figure = plots.lines(series, x="step", y=curve.unit, title=curve.title, log_y=curve.log)
            drawn.append((figure, curve.caption))
    if drawn:
        made.section(title)
    for figure, caption in drawn:
        made.figure(figure, caption)


def _time(made: Page, records: Mapping[str, Record]) -> None:
    stacks = {name: run_page.parts_of(record.manifest.get("spent") or {}) for name, record in records.items()}
    if any(stacks.values()):
        made.section("Where the time went")
        made.figure(plots.bars(stacks, unit="seconds"), "Of rank 0 in the last process of each run.")

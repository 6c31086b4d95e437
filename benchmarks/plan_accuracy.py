"""How right the planner is: what it said before real small runs, against what they took.

    OMP_NUM_THREADS=1 python -m benchmarks.plan_accuracy [--count 30] [--seed 7] [--json FILE]

Configurations are drawn at random from the seed (phases, families, sizes, stages, LoRA, checkpointing, lengths,
placements, precision, evaluations; see `_planned`) and run on two CPU ranks each. Compared are, on the fullest rank:

- the state between two steps, component by component, counted from the engine's own tensors (goal: within 1 %);
- the peak of training, as torch's allocator saw it (goal: within 10 % for 90 % of the runs), against the planner's for
  the micro-batches and prompts that each rank really had, and for the first of them without what is not there yet (the
  optimizer's moments, weights fetched ahead): a run of a few steps need not draw the heaviest, for which a run is told
  before it begins; how far that is off stands apart, and so does the final save, which reads the model back through
  mapped files and threads that the allocator's profile does not see;
- what a step sends, collective by collective, as its backend was handed it (goal: within 2 %).

An error by component is the sum of what each is off by, over the sum of all: what is too much here does not pay for
too little there. Ends with 1 where a run failed or a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._planned import Case, drawn, written
from benchmarks._ranks import ranks_in_a_folder
from tests.harness import Ranks
from tests.small import words

GOALS = {"state": (0.01, 1.0), "peak": (0.10, 0.9), "traffic": (0.02, 1.0)}  # error, share of runs within it
TRAINING, SAVE = ("backward", "evaluation", "step", "rollout", "score"), ("save",)  # moments that are watched


def error_by_part(planned: Mapping[str, float], found: Mapping[str, float]) -> float:
    """Return by how much parts are off, all together, over what was found: 0.01 is 1 %."""
    off = sum(abs(planned.get(name, 0) - found.get(name, 0)) for name in planned.keys() | found.keys())
    return off / max(1, sum(found.values()))


def judged(case: Case, ranks: Ranks, home: Path) -> dict[str, Any]:
    """Run a case and return what was planned and found, and the errors; "failed" has its output where it failed."""
    options = written(case, home)
    report = str(home / "report")
    argv = [case.phase, *words({name: value for name, value in options.items() if value is not None})]
    done = ranks.run(function="benchmarks._planned:watched", argv=argv, report=report, cwd=home, timeout=240)
    if set(done.codes) != {0}:
        return {"failed": done.text}
    manifest = json.loads((home / "out" / "manifest.json").read_text())
    reports = [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(len(done.codes))]
    return compared(manifest["plan"], manifest["measured"], reports)


def compared(plan: Mapping[str, Any], measured: Mapping[str, Any], reports: Sequence[Any]) -> dict[str, Any]:
    """Return planned and found bytes, and the errors of state, peak and traffic."""
    fullest = max(reports, key=lambda report: sum(report["state"].values()))
    state_bytes, names = plan["persistent_bytes"], plan["moment_bytes"]
    moments = {name: state_bytes + max(report["drawn"][name] for report in reports) for name in names}
    bound = state_bytes + max(sum(by.values()) for name, by in plan["moment_bytes"].items() if name not in SAVE)
    at = max(moments.keys() - SAVE, key=lambda name: moments[name])
    peak, saving = (max(_peak(report, names) for report in reports) for names in (TRAINING, SAVE))
    beside = peak - sum(fullest["state"].values())
    state = joined(plan["state_bytes"])
    sent = {name: one["bytes"] for name, one in plan["traffic"].items()}
    found = {name: one["bytes"] for name, one in measured["traffic"].items()}
    return {
        "state": error_by_part(state, joined(fullest["state"])),
        "peak": abs(moments[at] - peak) / peak,
        "beside": abs(moments[at] - plan["persistent_bytes"] - beside) / beside,
        "save": abs(moments["save"] - saving) / saving,
        "bound": bound / peak - 1,
        "traffic": error_by_part(sent, found),
        "planned": {"state": state, "peak": moments[at], "at": at, "traffic": plan["traffic"]},
        "found": {"state": fullest["state"], "peak": peak, "traffic": measured["traffic"]},
        "other": max(report["other"] for report in reports),
    }


def _peak(report: Mapping[str, Any], moments: Sequence[str]) -> int:
    """Return the most bytes of tensors in some moments."""
    return int(max(report["peaks"].get(name, 0) for name in moments))


def joined(state: Mapping[str, int]) -> dict[str, int]:
    """Return the state with what holds gradients as one component: the engine mixes them."""
    mixed = ("gradients", "buckets", "engine")
    kept = {name: size for name, size in state.items() if name not in mixed}
    return {**kept, "gradients": sum(state.get(name, 0) for name in mixed)}


# --- told -------------------------------------------------------------------------------------------------------------


def row(number: int, case: Case, result: Mapping[str, Any]) -> str:
    """Return a line of the table."""
    if "failed" in result:
        return f"{number:3} failed: {case.words}"
    planned, found = result["planned"], result["found"]
    signed = planned["peak"] / found["peak"] - 1
    return (
        f"{number:3} {result['state']:8.4%} of {sum(found['state'].values()) / 1e6:7.2f} MB   {signed:+7.1%} of "
        f"{found['peak'] / 1e6:7.2f} MB ({planned['at']})   {result['traffic']:7.2%}   {case.words}"
    )


def summary(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], bool]:
    """Return worst, median and share within the goal of each error as lines, and whether all goals are met."""
    lines, met = [], True
    for name, (goal, share) in GOALS.items():
        errors = [result[name] for result in results]
        within = sum(error <= goal for error in errors) / len(errors)
        met = met and within >= share
        lines.append(
            f"{name:8} worst {max(errors):8.3%}  median {statistics.median(errors):8.3%}  "
            f"within {goal:.0%}: {within:.0%} of {len(errors)} (goal {share:.0%})"
        )
    for name, label in (("beside", "the peak beside the state"), ("save", "the final save, as far as it is seen")):
        errors = [result[name] for result in results]
        lines.append(f"{label}: worst {max(errors):.1%}  median {statistics.median(errors):.1%}")
    bounds = [result["bound"] for result in results]
    lines.append(
        f"what a run is told before it begins, of the heaviest that it may draw: {min(bounds):+.1%} to "
        f"{max(bounds):+.1%} off the peak, median {statistics.median(bounds):+.1%}"
    )
    lines.append(f"held in tensors of no component (batches, orders): {max(r['other'] for r in results)} bytes at most")
    return lines, met


def main() -> int:
    """Judge the planner and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", type=int, nargs="+", help="run these of them")
    parser.add_argument("--json", type=Path, help="write all that was planned and found here")
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    cases = [drawn(draw) for _ in range(asked.count)]
    chosen = asked.only or range(len(cases))
    print("  #    state              peak (planned at)              traffic   run", flush=True)
    results = []
    with ranks_in_a_folder() as (ranks, home):
        for number in chosen:
            results.append(judged(cases[number], ranks, home / f"case{number}"))
            print(row(number, cases[number], results[-1]), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1))
    ran = [result for result in results if "failed" not in result]
    for result in results:
        print(result.get("failed", "")[-2000:], end="")
    lines, met = summary(ran) if ran else ([], False)
    print(*lines, sep="\n")
    return 0 if met and len(ran) == len(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())

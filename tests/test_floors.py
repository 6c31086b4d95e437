"""The house stands: a module imports only from lower floors, never in a circle, and the doors open at once."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import ROOT

# What lies on each floor, the ground first. A folder is one room: inside it modules import each other.
FLOORS = (
    {"control_groups", "errors", "imports", "log", "occupied", "resources", "scrub", "supervised", "__version__"},
    {"cards", "config", "failures", "losses", "machine", "run_folder", "zero"},
    {"data", "forward", "models", "report", "telemetry"},
    {"frozen", "checkpoint", "plan", "clean", "preferences"},
    {"trainers"},
    {"registry", "run", "narrate", "stages", "sampling"},
    {"launch", "demo", "compare", "planner", "data_commands", "card_commands", "inspect", "doctor"},
    {"cli", "__main__", "check"},
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
# The one orchestration: `run` tells it, `stages` does it, `narrate` says it, `registry` is what it is told about.
ONE_ROOM = {"registry": "run", "stages": "run", "narrate": "run", "__main__": "cli"}
# Libraries that only some rooms may know.
KEPT_IN = {"deepspeed": {"zero", "frozen", "checkpoint", "trainers"}, "trl": {"trainers"}}
HEAVY = {"torch", "transformers", "trl", "deepspeed", "datasets", "peft", "accelerate", "numpy", "pydantic"}
HEAVY |= {"matplotlib"}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "align_kit").rglob("*.py"))
}


def imports(path: Path) -> Iterator[str]:
    """Yield every dotted name a module imports, at its top or later: `align_kit.models.load`, `torch`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if node.module == "align_kit" or full in MODULES else str(node.module)


def room(module: str) -> str:
    """Return the top folder or file below align_kit that a module lies in."""
    return module.split(".")[1] if "." in module else "__version__"


def ours(path: Path) -> Iterator[str]:
    return (name for name in imports(path) if name.split(".")[0] == "align_kit")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    here = room(module)
    for name in ours(MODULES[module]):
        there = room(name)
        same_room = here == there or ONE_ROOM.get(here, here) == ONE_ROOM.get(there, there)
        assert same_room or LEVEL[there] < LEVEL[here], f"{module} (floor {LEVEL[here]}) imports {name}"


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES} <= set(LEVEL)


def test_libraries_stay_in_their_rooms() -> None:
    for module, path in MODULES.items():
        foreign = {name.split(".")[0] for name in imports(path)}
        for library, rooms in KEPT_IN.items():
            assert library not in foreign or room(module) in rooms, f"{module} imports {library}"


def test_recipes_know_only_run() -> None:
    for path in (ROOT / "recipes").glob("*.py"):
        assert set(imports(path)) == {"align_kit.run"}, path


def test_no_circles() -> None:
    edges = {module: {name for name in ours(path) if name in MODULES} for module, path in MODULES.items()}
    left = dict(edges)
    while leaves := [module for module, needs in left.items() if not needs & set(left)]:
        for module in leaves:
            del left[module]
    assert not left, f"these import each other: {sorted(left)}"


def loaded_after(statement: str, cwd: Path) -> set[str]:
    """Return the top-level modules a fresh interpreter holds after `statement`, whose own output is thrown away."""
    code = f"""
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()):
    {statement}
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "statement",
    [
        "import align_kit",
        "import align_kit.run",
        "from align_kit.cli import main; main(['--help'])",
        "from align_kit.cli import main; main(['dp0'])",
    ],
)
def test_doors_open_without_heavy_imports(statement: str, tmp_path: Path) -> None:
    assert not loaded_after(statement, tmp_path) & HEAVY


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield every function of the package with its place."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{module}:{node.name}", node


def test_functions_are_annotated() -> None:
    bare = [place for place, node in functions() if node.returns is None]
    assert len(bare) <= 0.05 * len(list(functions())), bare


def test_functions_are_small_on_the_whole() -> None:
    """Sizes are smells, not limits: `pytest -k small -s` shows the longest files and functions."""
    files = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    spans = {place: (node.end_lineno or 0) - node.lineno + 1 for place, node in functions()}
    for title, sizes in (("files", files), ("functions", spans)):
        longest = sorted(sizes.items(), key=lambda item: -item[1])
        print(f"{title}: {len(sizes)}, median {statistics.median(sizes.values())}, longest {longest[:5]}")
    assert statistics.median(spans.values()) <= 15

"""What is shipped: the wheel and what it does outside the checkout, the targets, the recipe scripts."""

from __future__ import annotations

import ast
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from align_kit import registry
from tests.harness import ROOT

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")


def call(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command and return its standard output; fail with all it printed where it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=env, timeout=300)
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# --- the wheel --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout, so that nothing is left in the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, work / "source", ignore=LEFT_OUT)
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", work / "dist", ".")
    call(sys.executable, *build, cwd=work / "source")
    (made,) = (work / "dist").glob("align_kit-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed by pip into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    call(sys.executable, *pip, "--target", target, wheel, cwd=target)
    return target


@pytest.mark.slow
def test_wheel_holds_every_data_file(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    tiny, sample = "align_kit/data/embedded/tiny", "align_kit/data/embedded"
    wanted = {f"align_kit/{path.relative_to(ROOT)}" for name in ("ds_configs", "data_cards", "recipes")
              for path in (ROOT / name).iterdir() if path.is_file()}  # fmt: skip
    wanted |= {f"{tiny}/{path.name}" for path in (ROOT / tiny).iterdir() if path.is_file()}
    wanted |= {f"{sample}/{path.name}" for path in (ROOT / sample).glob("*.xz")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "align_kit").rglob("*.py")}
    assert len(wanted) > 80 and wanted <= held, sorted(wanted - held)
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    where = "import align_kit.resources as r; print(r.PACKAGE, r.folder('recipes'))"
    assert call(sys.executable, "-c", where, cwd=tmp_path, env=env).count(str(installed)) == 2
    assert "recipes:" in call(installed / "bin" / "align-kit", "--help", cwd=tmp_path, env=env)
    assert "--learning_rate" in call(sys.executable, "-m", "align_kit", "dpo", "--help", cwd=tmp_path, env=env)
    dry = call(sys.executable, "-m", "align_kit", "dpo", "--dry-run", cwd=tmp_path, env=env)
    assert "batch: 16 pairs" in dry and '"stage": 3' in dry and str(ROOT) not in dry
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


def test_every_package_folder_is_listed() -> None:
    """setup.cfg names packages one by one: a folder that is not listed is missing from the wheel."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "align_kit").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} <= listed


def test_pins_cover_what_is_required() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    asked = setup["options"]["install_requires"] + setup["options.extras_require"]["test"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    names = {line.split()[0].lower() for line in asked.splitlines() if line.strip()}
    assert names <= pinned, names - pinned


# --- the targets ------------------------------------------------------------------------------------------


def make(*words: str) -> str:
    """Return what make prints for `words`, as if no other make ran around it."""
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return call("make", "--no-print-directory", *words, cwd=ROOT, env=env)


def test_make_help_lists_every_target() -> None:
    shown = make("help")
    targets = {line.split()[0] for line in shown.splitlines()[1:]}
    ours = {"help", "setup", "demo", "compare", "doctor", "test", "check", "lint", "bench", "soak", "wheel", "clean"}
    assert targets == {*ours, *registry.names()}
    assert all(len(line.split()) > 2 for line in shown.splitlines()[1:]), "each with what it does"


@pytest.mark.parametrize("phase", registry.names())
def test_a_phase_target_passes_arguments_on(phase: str) -> None:
    shown = make("-n", phase, "ARGS=--max_steps 7", "RANKS=3")
    assert shown.strip().endswith(f"align-kit launch --nproc_per_node 3 {phase} --max_steps 7")


# --- the recipe scripts -----------------------------------------------------------------------------------


def test_one_script_and_one_yaml_per_recipe() -> None:
    assert sorted(path.stem for path in (ROOT / "recipes").glob("*.py")) == sorted(registry.names())
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == {*registry.names(), "lora"}


@pytest.mark.parametrize("phase", registry.names())
def test_a_recipe_script_is_a_sentence(phase: str) -> None:
    text = (ROOT / "recipes" / f"{phase}.py").read_text()
    tree = ast.parse(text)
    assert f"recipes/{phase}.py" in (ast.get_docstring(tree) or ""), "the docstring holds the launch line"
    assert f'main("{phase}")' in text and len(text.splitlines()) <= 20
    kinds = [type(node).__name__ for node in tree.body]
    assert kinds == ["Expr", "ImportFrom", "If"], "a docstring, one import, the start"
    assert not any(isinstance(node, ast.ClassDef | ast.FunctionDef) for node in ast.walk(tree))

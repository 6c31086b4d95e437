"""The README's commands, run as they are written, in a copy of the checkout whose recipes take two steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT, Ranks
from tests.little import strangers

BIN = Path(sys.executable).parent
PROGRAMS = ("accelerate", "torchrun", "deepspeed", "python", "align-kit", "make")
README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for line in re.findall(r"^    (\S.*)$", README, re.M) if line.split()[0] in PROGRAMS]

# Not run here, and why.
LEFT_OUT = {
    "make demo": "takes minutes; tests/test_demo.py runs a smaller one",
    "make test": "is what runs this",
    "align-kit sample runs/sft card:gsm8k --output runs/pairs": "needs a model that answers; tests/test_sampling.py",
    "make compare": "takes ten minutes; tests/test_compare_runs.py runs a smaller one",
    "align-kit compare dpo --config my_dpo.yaml --vary lora_r=8,32,128": "many runs, as that",
    "align-kit compare sft --config my_sft.yaml --arms full lora=recipes/lora.yaml --seeds 5": "many runs, as that",
    "accelerate launch --config_file ds_configs/launch_multinode.yaml --machine_rank 0 --main_process_ip 10.0.0.1 "
    "recipes/dpo.py": "needs a second machine",
    "align-kit launch --nnodes 2 --node_rank 0 --master_addr 10.0.0.1 --nproc_per_node 8 dpo": "needs a second machine",
}
# Ways to start the same recipe -> ranks it makes on a machine without a GPU.
STARTS = {
    "accelerate launch recipes/dpo.py": 1,
    "accelerate launch --config_file ds_configs/launch_cpu2.yaml recipes/dpo.py": 2,
    "torchrun --nproc_per_node 2 recipes/dpo.py": 2,
    "deepspeed recipes/dpo.py": 1,
    "python recipes/dpo.py": 1,
    "align-kit dpo": 1,
    "align-kit launch dpo": 2,
}
OTHERS = [line for line in COMMANDS if line not in STARTS and line not in LEFT_OUT]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """A copy of the checkout with recipes of two steps, and the model and data the README calls the user's own."""
    place = tmp_path_factory.mktemp("readme") / "align_kit"
    listed = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    for name in filter(None, subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    for recipe in (place / "recipes").glob("*.yaml"):
        recipe.write_text(re.sub(r"^max_steps: \d+", "max_steps: 2", recipe.read_text(), flags=re.M))
    text = place / "my_text.txt"
    text.write_text("One two three four five six seven eight nine ten. " * 200)
    words = ["--datasets", json.dumps([{"path": str(text)}]), "--max_length", "64", "--max_steps", "1"]
    ranks.run("pretrain", *words, "--output_dir", place / "my-model", world_size=1).ok()
    shutil.copytree(place / "my-model", place / "runs" / "sft")  # the phase before dpo has run
    rows = [{"prompt": f"{i} and {i}?\n", "completion": f"{2 * i}"} for i in range(64)]
    pairs = [{"prompt": f"{i} and {i}?\n", "chosen": f"{2 * i}", "rejected": f"{i}"} for i in range(64)]
    (place / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "my_pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    answered(place / "answered")
    assert run("align-kit sample --from answered --output runs/pairs", place).returncode == 0
    for name, text in re.findall(r"```yaml\n# (my_\w+\.yaml)\n(.*?)```", README, re.S):
        (place / name).write_text(text)
    return place


def answered(folder: Path) -> None:
    """Write what `align-kit sample` leaves of a model that is right half of the time."""
    told = [{"text": text, "tokens": 9, "ended": True, "control": False} for text in ("1+1=2\n#### 2", "#### 3")]
    rows = [{"prompt": f"1 and 1, {number}?\n", "answer": "#### 2", "completions": told} for number in range(64)]
    drawn_as = {"model": "sft", "model_digest": "0" * 32, "samples": 2, "seed": 0, "licences": ["mit"],
                "checker": "align_kit.data.checkers:check", "from": [{"card": "gsm8k", "rows": 64}]}  # fmt: skip
    folder.mkdir()
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "drawn.json").write_text(json.dumps(drawn_as))


def run(line: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run one line as a user would: no launcher's variables, caches of its own, no network."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    env |= {
        "PATH": f"{BIN}{os.pathsep}{env['PATH']}",
        "PYTHONPATH": str(place),
        "ALIGN_KIT_CACHE": str(place / "cache"),
        "TORCH_EXTENSIONS_DIR": str(place / "extensions"),
        "HF_HOME": str(place / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=place, env=env, timeout=240)


def test_every_command_is_known() -> None:
    assert set(STARTS) <= set(COMMANDS) and set(LEFT_OUT) <= set(COMMANDS)
    assert len(OTHERS) >= 4


@pytest.mark.slow
@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="counts ranks on a CPU")
@pytest.mark.parametrize("line", STARTS)
def test_a_way_to_start(line: str, checkout: Path) -> None:
    shutil.rmtree(checkout / "runs" / "dpo", ignore_errors=True)
    done = run(line, checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((checkout / "runs/dpo/manifest.json").read_text())
    assert (manifest["status"], manifest["world_size"], manifest["steps"]) == ("finished", STARTS[line], 2)
    assert manifest["engine"]["zero_optimization"]["stage"] == 3
    assert done.stdout.count("saved and verified: runs/dpo") == 1, done.stdout
    if line.split()[0] in ("python", "align-kit"):  # the other launchers speak for themselves
        assert not strangers(done.stdout + done.stderr)
    assert not (checkout / "extensions").exists(), "nothing is compiled in the way of a start"


@pytest.mark.slow
@pytest.mark.parametrize("line", OTHERS)
def test_a_command(line: str, checkout: Path, ranks: Ranks) -> None:
    """Runs are given to warm ranks: how `align-kit launch` starts its own is shown above, once."""
    program, *words = shlex.split(line)
    if (program, words[0]) == ("align-kit", "launch"):
        done = ranks.run(*words[1:], "--max_steps", "2", cwd=checkout).ok()
        assert done.text.count("saved and verified: ") == 1
        return
    started = run(line, checkout)
    assert started.returncode == 0, started.stdout + started.stderr
    assert started.stdout.strip()

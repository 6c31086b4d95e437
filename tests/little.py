"""Little inputs for real runs: a handful of rows, and the words that make a run last two steps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS = {
    "pretrain": {"text": "Ann had 12 pens and bought 30 more. How many pens has she now? " * 8},
    "sft": {"prompt": "Ann had 12 pens and bought 30 more. How many pens are there?\n", "completion": "#### 42"},
    "reward": {"prompt": "Ann had 12 pens and bought 30 more.\n", "chosen": "2 + 0 = 2\n#### 42", "rejected": "#### 7"},
    "dpo": {"prompt": "Ann had 12 pens and bought 30 more.\n", "chosen": "2 + 0 = 2\n#### 42", "rejected": "#### 7"},
    "orpo": {"prompt": "Ann had 12 pens and bought 30 more.\n", "chosen": "2 + 0 = 2\n#### 42", "rejected": "#### 7"},
    "kto": {"prompt": "Ann had 12 pens and bought 30 more.\n", "chosen": "2 + 0 = 2\n#### 42", "rejected": "#### 7"},
    "ppo": {"prompt": "Ann had 12 pens and bought 30 more. How many pens are there?\n", "answer": "#### 42"},
}
# Random weights of the built-in model, two steps of two rows a rank, nothing stored but the final model.
TWO_STEPS = (
    *("--config_name", "builtin:tiny", "--max_length", "64", "--max_steps", "2"),
    *("--per_device_train_batch_size", "2", "--output_dir", "out"),
    *("--report", "false", "--sample_prompts", "0"),
)
MORE = {
    "ppo": ("--reward_funcs", "tests.rank_work:odd_tokens", "--response_length", "16", "--num_generations", "2"),
}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `rows` as JSON lines and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def little_run(phase: str, folder: Path, *more: str | Path, rows: int = 8) -> list[str | Path]:
    """Return the command line of a two-step run of `phase` on `rows` rows of its own in `folder`."""
    data = write_rows(folder / f"{phase}.jsonl", [ROWS[phase]] * rows)
    return [phase, *TWO_STEPS, *MORE.get(phase, ()), "--datasets", json.dumps([{"path": str(data)}]), *more]


# Every line a run may print where nothing is wrong: its header, its progress, its footer.
OURS = re.compile(
    r"align_kit \w+: \d+ ranks? on .*, ZeRO-\d \(.*\)"
    r"|  (policy|reference|reward|reward_\d|data|eval|labels|mixture) +\S.*"
    r"|  (forward|batch|derived|gate|note|output|changed) +\S.*"
    r"|warning: \S+: \d+ of \d+ rows \(\d+\.\d%\) stand in the data before \(the first is row \d+\); .*"
    r"|  plan +at most \S.*"
    r"|  step \d+/\d+  loss -?\d+\.\d{4}  [\d,]+ tokens/s  [\d:]+ left"
    r"|  step \d+: eval (loss|reward) -?\d+\.\d{4}"
    r"|done in [\d:]+, \d+ steps: .* tokens/s( \(\d+% of them computed\))?"
    r"|an iteration: rollout [\d.]+ s, score [\d.]+ s, update [\d.]+ s; some of what was written: \S+"
    r"|report: \S+"
    r"|saved and verified: \S+ \(.* MB, digest \w{12}, re-opened logits within \S+\)"
)


def strangers(text: str) -> list[str]:
    """Return the lines of a run's output that are not its own."""
    return [line for line in text.splitlines() if not OURS.fullmatch(line)]

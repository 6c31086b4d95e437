"""The words of `align-kit compare`: its own, and those every run is given."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from align_kit import registry
from align_kit.config import command_line
from align_kit.errors import UserError

OPTIONS = {
    "vary": "key=a,b,c: one arm for each value of a key; default: full against LoRA",
    "arms": "name=overlay.yaml …: one arm for each overlay, a name alone is the recipe as it is",
    "seeds": "runs of each arm at its best learning rate; default 3",
    "learning_rates": "a,b,c: rates to try for each arm on one seed; default: a walk from the recipe's own, until the "
    "best has a worse one on either side; a --learning_rate of the runs is taken as it is",
    "output_dir": "folder of all runs and the report; default runs/compare/<recipe>-<arms>",
    "ranks": "ranks of each run; default 2, or every GPU",
    "test_datasets": "held-out data of the runs that are reported, where eval_datasets are for choosing the rate",
    "problems": "card whose checker judges answers to its problems; default: the training data's; none: no problems",
    "forgetting": "text (cards or files, a,b) on which loss is taken before and after; default: the pretraining data's "
    "held-out rows; none: none",
    "quality": "held-out loss for the time to it; default: the one that every run reaches",
    "overwrite": "replace finished runs in output_dir that were configured otherwise",
}
FLAGS = ("overwrite",)
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
OURS_ALONE = ("seed", "data_seed", "resume", "dry_run")  # of the runs' keys
HELP = """usage: align-kit compare [<recipe>] [--option value ...] [--config a.yaml ...] [the recipe's keys]

Runs the recipe (default: a short sft on the embedded data) once for each arm, learning rate and seed, all else equal.
What is done is not run again.

{options}"""


@dataclass(frozen=True)
class Options:
    """What `align-kit compare` was asked for; `words` and `configs` are every run's."""

    recipe: str
    default: bool  # the embedded experiment: nothing was named
    configs: tuple[str, ...]
    words: tuple[str, ...]
    vary: str
    arms: tuple[str, ...]
    seeds: int
    rates: tuple[float, ...]
    output: Path | None
    ranks: int
    test_datasets: str
    problems: str
    forgetting: tuple[str, ...] | None
    quality: float | None
    overwrite: bool


def help_text() -> str:
    """Return what `align-kit compare --help` prints."""
    return HELP.format(options="\n".join(f"  --{name:<16} {what}" for name, what in OPTIONS.items()))


def parse(argv: list[str]) -> Options:
    """Return the options of a command line; raises `UserError` for a word that cannot be used."""
    named = bool(argv) and not argv[0].startswith("-")
    recipe = registry.get(argv[0]).name if named else "sft"
    line = command_line.split(argv[1:] if named else argv)
    given = {name: _one(name, words) for name, words in line.words.items() if name in OPTIONS and name != "arms"}
    _refuse(line.words, given)
    forgetting = given.get("forgetting")
    return Options(
        recipe=recipe,
        default=not named and not line.configs,
        configs=tuple(line.configs),
        words=_passed_on(line.words),
        vary=given.get("vary", ""),
        arms=tuple(line.words.get("arms", ())),
        seeds=_whole("seeds", given.get("seeds", "3")),
        rates=_rates(given.get("learning_rates", "")),
        output=Path(given["output_dir"]).expanduser() if "output_dir" in given else None,
        ranks=_whole("ranks", given["ranks"]) if "ranks" in given else _ranks(),
        test_datasets=given.get("test_datasets", ""),
        problems=given.get("problems", ""),
        forgetting=None if forgetting is None else tuple(filter(None, forgetting.split(","))),
        quality=_number("quality", given["quality"]) if "quality" in given else None,
        overwrite=_truth("overwrite", given.get("overwrite", "false")),
    )


def _one(name: str, words: list[str]) -> str:
    if not words and name in FLAGS:
        return "true"
    if len(words) != 1:
        raise UserError(f"--{name} takes one value, not {len(words)} ({OPTIONS[name]})")
    return words[0]


def _refuse(words: Mapping[str, list[str]], given: Mapping[str, str]) -> None:
    for name in OURS_ALONE:
        if name in words:
            raise UserError(f"--{name} is not for compare, which gives each run its own; drop it")
    if "vary" in given and "arms" in words:
        raise UserError("--vary and --arms both say what differs; drop one")
    if "learning_rates" in given and given.get("vary", "").partition("=")[0].strip() == "learning_rate":
        raise UserError("--learning_rates are tried for each arm, and --vary learning_rate makes each an arm; drop one")
    if "learning_rate" in words and "learning_rates" in given:
        raise UserError("--learning_rate and --learning_rates were both given: one rate for all arms, or those to try")


def _passed_on(words: Mapping[str, list[str]]) -> tuple[str, ...]:
    return tuple(word for name, rest in words.items() if name not in OPTIONS for word in (f"--{name}", *rest))


def _truth(name: str, text: str) -> bool:
    if text.lower() not in TRUTHS:
        raise UserError(f"--{name} {text}: give true or false, or the option alone")
    return TRUTHS[text.lower()]


def _whole(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--{name} {text}: give a whole number, 1 or more")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--{name} {text}: give a number ({OPTIONS[name]})") from None


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(dict.fromkeys(_number("learning_rates", word) for word in text.split(",") if word))
    if any(not 0 < rate < 1 for rate in rates):
        raise UserError(f"--learning_rates {text}: give rates between 0 and 1, separated by commas")
    return rates


def _ranks() -> int:
    import torch

    return torch.cuda.device_count() or 2


def output_of(options: Options, names: tuple[str, ...]) -> Path:
    """Return the folder of the experiment: the one named, else one after the recipe and its arms."""
    what = options.vary.partition("=")[0] or "-".join(names)
    return options.output or Path(os.environ.get("ALIGN_KIT_RUNS") or "runs") / "compare" / f"{options.recipe}-{what}"

"""The arms of an experiment: what is compared, and that nothing else differs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from align_kit import registry
from align_kit.compare.options import Options
from align_kit.config.fields import ModelFields
from align_kit.errors import UserError

# Keys of the one factor "how much of the model is trained, and in which form".
ADAPTER = {
    field.name
    for field in dataclasses.fields(ModelFields)
    if field.name.startswith(("lora_", "use_peft", "use_rslora", "use_dora", "load_in_", "bnb_", "use_bnb_"))
}
# Keys that differ between the runs of one arm, or say nothing of a method.
OF_A_RUN = {"output_dir", "seed", "learning_rate", "run_name", "logging_dir", "project"}
NOT_VARIED = (
    "output_dir", "seed", "data_seed", "resume", "overwrite", "dry_run", "eval_datasets", "test_split_size",
    "test_split_seed",
)  # fmt: skip
LORA = "recipes/lora.yaml"
TAKEN = {*registry.names(), "logs", "measures", ".", ".."}  # folders of an experiment that are no arm's


@dataclass(frozen=True)
class Arm:
    """One side of the comparison: overlays that lie below and above the recipe's files, and words of its own."""

    name: str
    below: tuple[str, ...] = ()
    above: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def arms_of(options: Options) -> list[Arm]:
    """Return the arms that were asked for; by default all weights against an adapter, as `recipes/lora.yaml` has it.

    The overlay lies below the user's own files there: what they say of an adapter wins.
    """
    if options.vary:
        return _varied(options.vary)
    if options.arms:
        return _overlaid(options.arms)
    return [Arm("full", words=("--use_peft", "false")), Arm("lora", below=(LORA,), words=("--use_peft", "true"))]


def _varied(text: str) -> list[Arm]:
    key, equals, values = text.partition("=")
    key = key.strip().replace("-", "_")
    if key in NOT_VARIED:
        raise UserError(f"--vary {key}: each run has its own, or is judged by it; vary a key of the method")
    parts = [part.strip() for part in split(values)]
    if not equals or len(set(parts)) < 2 or len(set(parts)) < len(parts) or "" in parts:
        raise UserError(f"--vary {text}: give a key and two or more different values: --vary lora_r=8,32,128")
    adapter = key in ADAPTER - {"use_peft"}  # without an adapter such a key says nothing
    below, peft = ((LORA,), ("--use_peft", "true")) if adapter else ((), ())
    names = [_named(key, part) for part in parts]
    if len(set(names)) < len(names):  # long values that begin alike: two paths, for instance
        names = [f"{name}-{place}" for place, name in enumerate(names, 1)]
    return [Arm(name, below, words=(*peft, f"--{key}", part)) for name, part in zip(names, parts, strict=True)]


def split(values: str) -> list[str]:
    """Split at the commas that stand outside brackets, braces and quotes."""
    return re.findall(r'((?:"[^"]*"|\[[^\]]*\]|\{[^}]*\}|[^,])*)(?:,|$)', values)[:-1]


def _named(key: str, value: str) -> str:
    """Return a name that can be a folder's: `lora_r=8`."""
    return f"{key}={re.sub(r'[^A-Za-z0-9_.+-]+', '-', value).strip('-')[:40]}"


def _overlaid(given: Sequence[str]) -> list[Arm]:
    arms = []
    for word in given:
        name, equals, overlay = word.partition("=")
        if name in TAKEN:
            raise UserError(f"--arms {word}: a folder of that name holds something else; name the arm otherwise")
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or (equals and not overlay):
            raise UserError(f"--arms {word}: write name=overlay.yaml, or a name alone for the recipe as it is")
        arms.append(Arm(name, above=tuple(filter(None, overlay.split(",")))))
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names) or len(names) < 2:
        raise UserError(f"--arms {' '.join(given)}: give two or more arms, each with a name of its own")
    return arms


def factor(configs: Mapping[str, Mapping[str, Any]], varied: str = "") -> list[str]:
    """Return the keys in which the arms' resolved configurations differ: one key, or keys of the adapter.

    `varied` is the key that `--vary` names. Raises `UserError` where two arms are the same, or differ in more than one
    thing.
    """
    left_out = OF_A_RUN - {varied}
    for one, other in combinations(configs, 2):
        if not _apart(configs[one], configs[other], left_out):
            raise UserError(f"the arms {one} and {other} are the same configuration; let them differ in a factor")
    first, *rest = configs
    differing = {key: name for name in rest for key in _apart(configs[first], configs[name], left_out)}
    if len(differing) > 1 and not set(differing) <= ADAPTER:
        shown = ", ".join(sorted(set(differing) - ADAPTER)[:4])
        raise UserError(
            f"the arms {first} and {next(iter(differing.values()))} differ in {len(differing)} keys ({shown}); "
            "compare one at a time: the adapter, or one key"
        )
    return sorted(differing)


def _apart(one: Mapping[str, Any], other: Mapping[str, Any], left_out: set[str]) -> list[str]:
    """Return the keys in which two configurations differ."""
    return sorted(key for key in {*one, *other} - left_out if one.get(key) != other.get(key))
